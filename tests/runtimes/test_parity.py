"""The lab model with a patch: every runtime against Transformers fed ``inputs_embeds``, and greedy text at F16.

Then the rows and the negative controls of `edgepatch bench parity` for the architectures that are converted here, and the table itself.
"""

import json
import shutil

import numpy as np
import pytest
import torch

from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.parity import floors
from edgepatch.bench.parity import models as parity_models
from edgepatch.bench.parity import rows as parity_rows
from edgepatch.bench.parity import run as parity
from edgepatch.bench.parity.controls import control_rows
from edgepatch.bench.parity.report import render
from edgepatch.converters import architectures, rope
from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.decoding.sampling import Sampling
from edgepatch.patch.file import Patch
from edgepatch.progress import silent
from edgepatch.prompts.sets import load_prompts
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import SoftPrompt
from kit.amounts import examples

BASE = LAB_FOLDER / "base"
COUNT = examples(6, 12)
PROMPTS = load_prompts("benign", "eval")[:COUNT] + load_prompts("toxic", "eval")[:COUNT]
BOUNDS = {"torch": 5e-5, "F32.gguf": 5e-5, "onnx": 1e-4}
"""Largest difference of a logit, full-precision weights and cache."""

TIE = 0.02
"""Two logits this close are a tie at float16."""


@pytest.fixture(scope="module")
def model():
    return folders.load_model(BASE)


@pytest.fixture(scope="module")
def patch(model) -> Patch:
    """P 50, made of token embeddings with noise: in the scale of a trained one, with a float32 seed."""
    rng = np.random.default_rng(2)
    rows = model.get_input_embeddings().weight[rng.integers(20, 4096, 50)].numpy()
    noise = rng.standard_normal(rows.shape) * rows.std()
    soft_prompt = SoftPrompt((rows + noise).astype(np.float32))
    return Patch("parity", "1.0.0", folders.read_spec(BASE), soft_prompt, seeds.compute_kv_seed(model, soft_prompt))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for kind in ("F32", "F16"):
        writer.convert_folder(BASE, folder / f"{kind}.gguf", kind)
    onnx.export(BASE, folder / "onnx", "fp32")
    return {"torch": BASE, **{name: folder / name for name in ("F32.gguf", "F16.gguf", "onnx")}}


@pytest.mark.parametrize("form", BOUNDS)
@pytest.mark.parametrize("patched", [False, True])
def test_logits_equal_inputs_embeds(form, patched, forms, model, patch):
    options = {"kv_type": "f32", "flash_attention": False} if form == "F32.gguf" else {}
    worst = 0.0
    with load_runtime(forms[form], patch if patched else None, **options) as runtime:
        for prompt in PROMPTS:
            tokens = runtime.tokens(prompt)
            embeddings = model.get_input_embeddings()(torch.tensor([tokens]))
            if patched:
                embeddings = torch.cat([torch.from_numpy(patch.soft_prompt.embeddings)[None], embeddings], dim=1)
            with torch.inference_mode():
                expected = model(inputs_embeds=embeddings).logits[0, -len(tokens) :].numpy()
            worst = max(worst, float(np.abs(runtime.logits(tokens) - expected).max()))
    print(f"{form} patched={patched}: max |dlogit| {worst:.1e}")
    assert worst <= BOUNDS[form]


def test_greedy_text_is_the_same_at_f16(forms, patch):
    """llama.cpp rounds activations to float16, so it may take the other token of a tie; nothing else may differ."""
    greedy = Sampling(max_new_tokens=24, temperature=0)
    equal = 0
    with load_runtime(BASE, patch) as reference, load_runtime(forms["F16.gguf"], patch) as runtime:
        for prompt in PROMPTS:
            expected, actual = ([p.token_id for p in r.stream(prompt, greedy)] for r in (reference, runtime))
            equal += actual == expected
            if actual == expected:
                continue
            first = next(i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b)
            logits = reference.logits([*reference.tokens(prompt), *expected[:first]])[-1]
            assert logits[expected[first]] - logits[actual[first]] < TIE, prompt
    print(f"greedy text equal at F16: {equal} of {len(PROMPTS)}")
    assert equal >= len(PROMPTS) - 2


def test_greedy_text_is_the_same_in_onnx(forms, patch):
    greedy = Sampling(max_new_tokens=24, temperature=0)
    with load_runtime(BASE, patch) as reference, load_runtime(forms["onnx"], patch) as exported:
        for prompt in PROMPTS:
            assert exported.generate(prompt, greedy) == reference.generate(prompt, greedy)


# The rows of `edgepatch bench parity`.


def write_gemma(folder, target):
    """Gemma's GGUF: llama.cpp's graph multiplies all embeddings by sqrt(D), also those that are fed; norms are stored plus one."""
    import safetensors.torch

    shifted = folder.parent / "shifted"
    shutil.copytree(folder, shifted)
    weights = safetensors.torch.load_file(shifted / "model.safetensors")
    shift = {name: architectures.norm_shift("gemma", name) if "norm" in name else 0.0 for name in weights}
    safetensors.torch.save_file({name: w + shift[name] for name, w in weights.items()}, shifted / "model.safetensors")
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(rope.ROTATES_NEIGHBOURS, "gemma", False)
        writer._write_model(target, shifted, folders.read_config(folder), folders.read_spec(folder), "F32", silent)


@pytest.fixture(scope="module", params=examples(["qwen2", "gemma"], ["mistral", "qwen2", "qwen3", "gemma"]))
def tiny(request, tmp_path_factory):
    """(architecture, folder with its F32 and Q8_0 GGUF, oracle); `edgepatch bench parity` has all of them."""
    architecture, folder = parity_models.architecture(request.param), tmp_path_factory.mktemp(request.param)
    parity_models.build_folder(architecture, folder / "hf")
    if request.param == "gemma":
        write_gemma(folder / "hf", folder / "F32.gguf")
    else:
        parity_models.convert(architecture, folder / "hf", folder / "F32.gguf", "F32", folder)
    writer.quantize(folder / "F32.gguf", folder / "Q8_0.gguf", "Q8_0", num_threads=1)
    return architecture, folder, parity_rows.make_oracle(architecture, folder / "hf")


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_every_setting_reaches_its_floors(tiny, quantization):
    architecture, folder, oracle = tiny
    rows = [*parity_rows.llamacpp_rows(architecture, quantization, folder / f"{quantization}.gguf", oracle)]
    judged = [floors.judge(row) for row in rows]
    assert not [floors.complaint(row) for row in judged if row["passed"] is False]
    for seed in parity_rows.SEEDS:
        passed = [row for row in judged if row["passed"] is True and row["seed"] == seed]
        assert len(passed) == 12, "f32 and f16 with and without flash attention, q8_0, q4_0; b and c"
    assert {row["refused"] for row in judged if row["passed"] is None} == {
        f"KV type {t} needs flash attention" for t in ("q8_0", "q4_0")
    }


def test_the_stored_seed_is_taken_unasked(tiny):
    architecture, folder, oracle = tiny
    for kv_type in ("f16", "q4_0"):
        with load_runtime(folder / "Q8_0.gguf", oracle.patch, kv_type=kv_type, num_threads=1) as runtime:
            assert runtime.seed_route == "stored", architecture.name


def test_every_wrong_seed_is_caught(tiny):
    architecture, folder, oracle = tiny
    rows = [*control_rows(architecture, folder, oracle, ("F32", "Q8_0"))]
    names = {row["control"] for row in rows}
    assert len(names) == (6 if architecture.name == "gemma" else 5) and "seed of another rope theta" in names
    assert not [floors.control_complaint(row) for row in rows if not row["caught_by"]]


ROW = {
    "architecture": "qwen2",
    "runtime": "llamacpp",
    "quantization": "Q4_0",
    "kv_type": "f16",
    "flash_attention": True,
    "route": "b",
    "max_abs_dlogit": 1.0,
    "kl": 0.1,
    "top1": 0.5,
    "kl_bare": 0.1,
    "kl_no_patch": 0.8,
    "canary": 0.1,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kl": 0.12}, "kl 1.2e-01 > 1.1e-01 (stored seed, quantized weights)"),
        ({"kl": 0.12, "route": "c"}, ""),
        ({"kl": 0.18, "route": "c"}, "requantized virtual tokens"),
        ({"kl": 0.12, "kv_type": "q8_0"}, ""),
        ({"kl": 0.3, "kl_bare": 0.3}, "(active)"),
        ({"kl": float("nan")}, "kl nan"),
        ({"quantization": "F16", "kl": 4e-6}, ""),
        ({"quantization": "F16", "kl": 6e-6}, "float16 somewhere"),
        (
            {"quantization": "F32", "kv_type": "f32", "flash_attention": False, "kl": 0.0, "max_abs_dlogit": 6e-5},
            "float32 throughout",
        ),
        ({"quantization": "F32", "kv_type": "f32", "flash_attention": False, "kl": 0.0, "max_abs_dlogit": 4e-5}, ""),
        (
            {"runtime": "onnx", "quantization": "fp32", "kl": 0.0, "max_abs_dlogit": 2e-4, "flash_attention": None},
            "ONNX fp32",
        ),
        ({"runtime": "onnx", "quantization": "int8", "kl": 0.12, "flash_attention": None}, "stored seed"),
        ({"refused": "no layout fits"}, "refused: no layout fits"),
        ({"architecture": "lfm2"}, "should have been refused"),
        ({"architecture": "lfm2", "route": "c", "seed": "moved", "kl_pinned": 0.5}, "should have been refused"),
        ({"seed": "moved", "kl_pinned": 0.3}, ""),
        (
            {"seed": "moved", "kl_pinned": 0.3, "quantization": "F32", "kv_type": "q4_0"},
            "route b, moved: kl 1.0e-01 > 9.0e-02 (moved)",
        ),
    ],
)
def test_a_missed_floor_is_named(change, words):
    judged = floors.judge(ROW | change)
    assert judged["passed"] is not bool(words)
    if words:
        assert words in floors.complaint(judged) and judged["architecture"] in floors.complaint(judged)


@pytest.fixture(scope="module")
def results():
    return json.loads(parity.RESULTS.read_text(encoding="utf-8"))


def test_the_document_is_made_of_the_committed_results(results):
    assert parity.DOCUMENT.read_text(encoding="utf-8") == render(results)
    assert len({row["architecture"] for row in results["rows"]}) >= 10
    for row in results["rows"]:
        assert {
            "architecture",
            "runtime",
            "quantization",
            "kv_type",
            "flash_attention",
            "route",
            "max_abs_dlogit",
            "kl",
            "top1",
        } <= row.keys()
        assert floors.judge({k: v for k, v in row.items() if k not in ("floors", "passed")}) == row


def test_the_committed_results_reach_every_floor(results):
    missed = [floors.complaint(row) for row in results["rows"] if row["passed"] is False]
    page = (parity.ROOT / "docs" / "results" / "parity.md").read_text("utf-8")
    assert len(missed) == 6 and "six do not" in page and all("moved" in words for words in missed), missed
    assert not [
        floors.control_complaint(row) for row in results["controls"] if row["required"] and not row["caught_by"]
    ]

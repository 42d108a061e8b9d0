"""The lab model with a patch: every runtime against Transformers fed ``inputs_embeds``, and greedy text at F16."""

import numpy as np
import pytest
import torch

from edgepatch.bench.demo import LAB_FOLDER
from edgepatch.bench.prompt_sets import load_prompts
from edgepatch.converters import gguf, hf, onnx
from edgepatch.patches import Patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.reference import TorchRuntime
from edgepatch.sampling import Sampling
from edgepatch.tensors import SoftPrompt

BASE = LAB_FOLDER / "base"
PROMPTS = load_prompts("benign", "eval")[:12] + load_prompts("toxic", "eval")[:12]
BOUNDS = {"torch": 5e-5, "F32.gguf": 5e-5, "onnx": 1e-4}
"""Largest difference of a logit, full-precision weights and cache."""

TIE = 0.02
"""Two logits this close are a tie at float16."""


@pytest.fixture(scope="module")
def model():
    return hf.load_model(BASE)


@pytest.fixture(scope="module")
def patch(model) -> Patch:
    """P 50, made of token embeddings with noise: in the scale of a trained one, with a float32 seed."""
    rng = np.random.default_rng(2)
    rows = model.get_input_embeddings().weight[rng.integers(20, 4096, 50)].numpy()
    noise = rng.standard_normal(rows.shape) * rows.std()
    soft_prompt = SoftPrompt((rows + noise).astype(np.float32))
    return Patch("parity", "1.0.0", hf.read_spec(BASE), soft_prompt, hf.compute_kv_seed(model, soft_prompt))


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    for kind in ("F32", "F16"):
        gguf.convert_folder(BASE, folder / f"{kind}.gguf", kind)
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
    with TorchRuntime(BASE, patch) as reference, load_runtime(forms["F16.gguf"], patch) as runtime:
        for prompt in PROMPTS:
            expected, found = ([p.token_id for p in r.stream(prompt, greedy)] for r in (reference, runtime))
            equal += found == expected
            if found == expected:
                continue
            first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
            logits = reference.logits([*reference.tokens(prompt), *expected[:first]])[-1]
            assert logits[expected[first]] - logits[found[first]] < TIE, prompt
    print(f"greedy text equal at F16: {equal} of {len(PROMPTS)}")
    assert equal >= len(PROMPTS) - 2


def test_greedy_text_is_the_same_in_onnx(forms, patch):
    greedy = Sampling(max_new_tokens=24, temperature=0)
    with TorchRuntime(BASE, patch) as reference, load_runtime(forms["onnx"], patch) as exported:
        for prompt in PROMPTS:
            assert exported.generate(prompt, greedy) == reference.generate(prompt, greedy)

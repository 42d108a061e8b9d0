"""PEFT adapter folders in and out, and the GGUF file for registries: against PEFT, llama.cpp and the gguf package themselves."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgepatch.converters.gguf import adapters as adapters_gguf
from edgepatch.converters.gguf import library
from edgepatch.converters.hf import folders
from edgepatch.converters.peft import adapters as peft
from edgepatch.errors import InputError, MismatchError, PatchFormatError
from edgepatch.patch.file import PAYLOAD_TYPE, patch_bytes, read_patch, signed, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.trust.signatures import sign
from kit.amounts import examples

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks for it

P = 6
KINDS = ("prompt", "prefix", "projected", "cartridge")
TOKENS = [1, 17, 230, 5, 99, 404, 41, 8, 300, 12]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="session")
def adapters(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """Kind -> folder, each saved by PEFT itself with random values."""
    import torch
    from peft import CartridgeConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

    shared = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    configs = {
        "prompt": PromptTuningConfig(**shared),
        "prefix": PrefixTuningConfig(**shared),
        "projected": PrefixTuningConfig(**shared, prefix_projection=True, encoder_hidden_size=32),
        "cartridge": CartridgeConfig(**shared),
    }
    root = tmp_path_factory.mktemp("adapters")
    for seed, (kind, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        get_peft_model(folders.load_model(tiny_folder), config).save_pretrained(root / kind)
    return {kind: root / kind for kind in configs}


@pytest.fixture(scope="session")
def spec(tiny_folder):
    return folders.read_spec(tiny_folder)


@pytest.fixture(scope="session")
def gguf_model(tiny_ggufs) -> Path:
    return tiny_ggufs["F16"]


@pytest.fixture
def copy_of(adapters, tmp_path):
    """(kind, settings to change) -> a copy of an adapter folder."""

    def copy(kind: str = "prefix", **settings: Any) -> Path:
        folder = tmp_path / "adapter"
        shutil.copytree(adapters[kind], folder)
        values = json.loads((folder / CONFIG).read_text("utf-8"))
        (folder / CONFIG).write_text(json.dumps(values | settings), "utf-8")
        return folder

    return copy


def peft_logits(model_folder: Path, adapter: Path) -> np.ndarray:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(folders.load_model(model_folder), str(adapter)).eval()
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0, -len(TOKENS) :].numpy()


def our_logits(model_folder: Path, patch) -> np.ndarray:
    with load_runtime(model_folder, patch) as runtime:
        return runtime.logits(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_adapter_gives_pefts_logits(kind, adapters, spec, tiny_folder):
    patch = peft.read_adapter(adapters[kind], spec, "imported", "1.0.0")
    assert (patch.soft_prompt is None, patch.kv_seed is None) == (kind != "prompt", kind == "prompt")
    assert patch.num_virtual_tokens == P
    expected = peft_logits(tiny_folder, adapters[kind])
    assert np.abs(our_logits(tiny_folder, patch) - expected).max() <= 1e-5
    assert np.abs(our_logits(tiny_folder, None) - expected).max() > 1e-2  # the adapter does something


def test_heads_of_their_own_size(tiny_folder, tmp_path):
    """Qwen3: the query heads together are wider than the hidden size, and PEFT counts key/value heads."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    for file in tiny_folder.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P)).save_pretrained(
        tmp_path / "adapter"
    )
    patch = peft.read_adapter(tmp_path / "adapter", folders.read_spec(tmp_path / "model"))
    assert patch.kv_seed.keys[0].shape == (2, P, 32)
    expected = peft_logits(tmp_path / "model", tmp_path / "adapter")
    assert np.abs(our_logits(tmp_path / "model", patch) - expected).max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_out_again_bit_for_bit(kind, adapters, spec, tiny_folder, tmp_path):
    patch = peft.read_adapter(adapters[kind], spec)
    peft.write_adapter(patch, tmp_path / "out")
    assert (tmp_path / "out" / TENSORS).read_bytes() == (adapters[kind] / TENSORS).read_bytes()
    written, original = (
        json.loads((folder / CONFIG).read_text("utf-8")) for folder in (tmp_path / "out", adapters[kind])
    )
    if kind == "projected":  # it was saved with the projection applied, so it is none now
        original |= {"prefix_projection": False}
    assert written == original | ({"encoder_hidden_size": None} if "encoder_hidden_size" in original else {})
    assert (peft_logits(tiny_folder, tmp_path / "out") == peft_logits(tiny_folder, adapters[kind])).all()
    again = peft.read_adapter(tmp_path / "out", spec, patch.name)
    assert replace(again, training={}).digest == replace(patch, training={}).digest


@pytest.mark.parametrize("peft_type", peft.PEFT_TYPES)
def test_our_own_patch_goes_out_to_peft(peft_type, tiny_patch, tiny_folder, tmp_path):
    folder = tmp_path / "deep" / "out"
    assert peft.write_adapter(tiny_patch, folder, "org/model", peft_type) == peft_type
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, TENSORS] and not list(folder.parent.glob(".*"))
    assert json.loads((folder / CONFIG).read_text("utf-8"))["base_model_name_or_path"] == "org/model"
    peft.write_adapter(tiny_patch, tmp_path / "again", "org/model", peft_type)
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in (CONFIG, TENSORS))
    assert np.abs(peft_logits(tiny_folder, folder) - our_logits(tiny_folder, tiny_patch)).max() <= 1e-5


def test_types_chosen_when_none_is_named(tiny_patch, tmp_path):
    assert peft.write_adapter(tiny_patch, tmp_path / "a") == "PROMPT_TUNING"
    assert peft.write_adapter(replace(tiny_patch, soft_prompt=None), tmp_path / "b") == "PREFIX_TUNING"
    with pytest.raises(InputError, match="no soft prompt"):
        peft.write_adapter(replace(tiny_patch, soft_prompt=None), tmp_path / "c", peft_type="PROMPT_TUNING")
    with pytest.raises(InputError, match="no KV seed"):
        peft.write_adapter(replace(tiny_patch, kv_seed=None), tmp_path / "c", peft_type="CARTRIDGE")
    with pytest.raises(InputError, match="LORA"):
        peft.write_adapter(tiny_patch, tmp_path / "c", peft_type="LORA")
    with pytest.raises(InputError, match="not an empty folder"):
        peft.write_adapter(tiny_patch, tmp_path / "a")
    assert not (tmp_path / "c").exists()


def test_a_prefix_is_split_by_hand(adapters, spec):
    """One value of each kind, counted through the flat tensor by hand."""
    flat = safetensors.numpy.load_file(adapters["prefix"] / TENSORS)["prompt_embeddings"]
    seed = peft.split_prefix(flat, spec)
    width, head, dim, token = 2 * 64, 1, 3, 4  # K * H; a head, a dimension and a virtual token
    assert seed.keys[1][head, token, dim] == flat[token, 2 * width + head * 64 + dim]
    assert seed.values[1][head, token, dim] == flat[token, 3 * width + head * 64 + dim]
    assert (peft.flatten_prefix(seed) == flat).all()


def test_half_precision_adapters(copy_of, spec, tmp_path):
    import torch
    from safetensors.torch import save_file

    folder = copy_of("cartridge")
    values = torch.randn(P, 2 * 2 * 2 * 64)
    save_file({"prompt_embeddings": values.to(torch.bfloat16)}, folder / TENSORS)
    seed = peft.read_adapter(folder, spec).kv_seed
    assert (peft.flatten_prefix(seed) == values.to(torch.bfloat16).float().numpy()).all() and seed.keys[
        0
    ].dtype == np.float32
    save_file({"prompt_embeddings": values.half()}, folder / TENSORS, metadata={"format": "pt"})
    patch = peft.read_adapter(folder, spec)
    assert patch.kv_seed.keys[0].dtype == np.float16
    peft.write_adapter(patch, tmp_path / "out")
    assert (tmp_path / "out" / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()


def test_a_gguf_model_is_enough_and_needs_no_torch(adapters, spec, gguf_model):
    code = (
        "import sys; from pathlib import Path; from edgepatch.converters.hf import folders; from edgepatch.converters.peft import adapters\n"
        f"patch = adapters.read_adapter(Path({str(adapters['prefix'])!r}), folders.read_spec(Path({str(gguf_model)!r})))\n"
        "print(patch.digest, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent.parent.parent,
    )
    assert done.stdout.split() == [peft.read_adapter(adapters["prefix"], spec).digest, "[]"]


def test_the_training_record_names_the_source(adapters, spec, tiny_folder):
    source = peft.read_adapter(adapters["cartridge"], spec).training["source"]
    assert (source["format"], source["peft_type"], source["base_model_name_or_path"]) == (
        "peft",
        "CARTRIDGE",
        str(tiny_folder),
    )
    assert len(source["adapter_sha256"]) == 64


def test_a_saved_p_tuning_adapter_is_a_soft_prompt(tiny_patch, spec, tmp_path):
    peft.write_adapter(tiny_patch, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    encoder = {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0}
    config |= {"peft_type": "P_TUNING", "encoder_hidden_size": 128, **encoder}
    config.pop("prompt_tuning_init", None)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    patch = peft.read_adapter(tmp_path / "a", spec)
    assert patch.soft_prompt and (patch.soft_prompt.embeddings == tiny_patch.soft_prompt.embeddings).all()
    assert peft.write_adapter(patch, tmp_path / "b") == "PROMPT_TUNING"


# What must be refused.


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "weights.pkl"])
def test_pickles_are_refused_by_name(name, copy_of, spec):
    folder = copy_of()
    (folder / TENSORS).rename(folder / name)
    with pytest.raises(InputError, match=re.escape(name)) as caught:
        peft.read_adapter(folder, spec)
    assert "safetensors" in caught.value.hint
    with pytest.raises(InputError, match="found a file") as caught:
        peft.read_adapter(folder / name, spec)
    assert "pickles are never read" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type: expected PROMPT_TUNING, PREFIX_TUNING, CARTRIDGE, P_TUNING, found 'LORA'"),
        ({"peft_type": None}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type: expected 'CAUSAL_LM', found SEQ_CLS"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules: expected 1, found 2"),
        ({"num_transformer_submodules": True}, "num_transformer_submodules"),
        ({"trust_remote_code": True}, "'trust_remote_code'"),
        ({"target_modules": ["q_proj"]}, "'target_modules'"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is missing"),
        ({"num_virtual_tokens": 2**40}, "num_virtual_tokens: expected an integer from 1 to 65536, found 1099511627776"),
        ({"num_virtual_tokens": -1}, "found -1"),
        ({"num_virtual_tokens": 6.0}, "found 6.0"),
        ({"num_layers": "2"}, "num_layers"),
        ({"token_dim": True}, "token_dim"),
        ({"num_virtual_tokens": P + 1}, r"prompt_embeddings: expected \(7, 512\), found \(6, 512\)"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "a" * 5000}, "at most 4096"),
    ],
)
def test_settings_that_are_refused(settings, message, copy_of, spec):
    with pytest.raises(InputError, match=message):
        peft.read_adapter(copy_of(**settings), spec)


def test_settings_that_do_not_matter_are_not_looked_at(copy_of, spec, adapters):
    folder = copy_of(
        tokenizer_kwargs={"trust_remote_code": True}, revision=7, auto_mapping=[1], option_of_tomorrow=None
    )
    patch = peft.read_adapter(folder, spec, "prefix")
    assert patch.digest == peft.read_adapter(adapters["prefix"], spec, "prefix").digest
    assert "trust_remote_code" not in json.dumps(patch.training)


@pytest.mark.parametrize(
    ("kind", "settings", "field", "actual"),
    [
        ("prefix", {"num_layers": 3}, "num_layers", "patch expects 3, model has 2"),
        ("prefix", {"num_attention_heads": 4}, "num_attention_heads", "patch expects 4, model has 2"),
        ("cartridge", {"token_dim": 256}, "token_dim", "patch expects 256, model has 128"),
        ("prompt", {"token_dim": 128}, "token_dim", "patch expects 128, model has 256"),
        ("prompt", {"num_layers": 1}, "num_layers", "patch expects 1, model has 2"),
    ],
)
def test_an_adapter_for_another_model_is_refused(kind, settings, field, actual, copy_of, spec):
    with pytest.raises(MismatchError, match=f"{field}: {actual}"):
        peft.read_adapter(copy_of(kind, **settings), spec)


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"\xff\xfe", b'{"peft_type": "X", "peft_type": "X"}', b"[" * 100_000, b" " * 2**21]
)
def test_damaged_settings(text, copy_of, spec):
    folder = copy_of()
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(InputError, match=re.escape(CONFIG)):
        peft.read_adapter(folder, spec)


def test_half_characters_in_texts_do_not_reach_the_manifest(copy_of, spec, tmp_path):
    patch = peft.read_adapter(copy_of(base_model_name_or_path="a\ud800b"), spec)
    write_patch(patch, tmp_path / "a.safetensors")
    assert read_patch(tmp_path / "a.safetensors").training["source"]["base_model_name_or_path"] == "a?b"


def _header(shape: list[int], size: int, name: str = "prompt_embeddings", dtype: str = "F32") -> bytes:
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header


FLAT = 2 * 2 * 2 * 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_header([2**20, 2**20], 2**42) + bytes(1400), "damaged or truncated"),
        (_header([2**40, 2**40], 0), "damaged or truncated"),
        (_header([P, FLAT], P * FLAT * 4) + bytes(P * FLAT * 4 - 1), "damaged or truncated"),
        (_header([P, FLAT], P * FLAT * 4) + bytes(P * FLAT * 4 + 1), "damaged or truncated"),
        (_header([FLAT, P], P * FLAT * 4) + bytes(P * FLAT * 4), r"expected \(6, 512\), found \(512, 6\)"),
        (_header([P, FLAT], P * FLAT * 8, dtype="F64") + bytes(P * FLAT * 8), "found F64"),
        (_header([P, FLAT], P * FLAT, dtype="I8") + bytes(P * FLAT), "found I8"),
        (
            _header([P, FLAT], P * FLAT * 4, "base_model.lora_A") + bytes(P * FLAT * 4),
            "prompt_embeddings alone, found base_model.lora_A",
        ),
        (_header([P, FLAT], P * FLAT * 4) + b"\0\0\xc0\x7f" * (P * FLAT), "prompt_embeddings holds NaN or infinity"),
        (
            _header([P, FLAT], P * FLAT * 2, dtype="BF16") + b"\x80\x7f" * (P * FLAT),
            "prompt_embeddings holds NaN or infinity",
        ),
        (
            _header([P, FLAT], P * FLAT * 2, dtype="F16") + b"\x00\x7c" * (P * FLAT),
            "prompt_embeddings holds NaN or infinity",
        ),
        ((2**62).to_bytes(8, "little") + bytes(100), "damaged or truncated"),
        (b"", "damaged or truncated"),
        (b"\x80\x04.", "damaged or truncated"),
    ],
)
def test_damaged_tensor_files(data, message, copy_of, spec):
    folder = copy_of()
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(InputError, match=message):
        peft.read_adapter(folder, spec)


def test_two_tensors_a_huge_file_and_no_file(copy_of, spec):
    folder = copy_of()
    tensors = safetensors.numpy.load_file(folder / TENSORS)
    safetensors.numpy.save_file(tensors | {"extra": np.zeros(1, np.float32)}, folder / TENSORS)
    with pytest.raises(InputError, match="found extra, prompt_embeddings"):
        peft.read_adapter(folder, spec)
    with (folder / TENSORS).open("wb") as file:
        file.truncate(10 * 2**30)  # sparse
    with pytest.raises(InputError, match="at most 268435456 bytes, found 10737418240"):
        peft.read_adapter(folder, spec)
    (folder / TENSORS).unlink()
    with pytest.raises(InputError, match="cannot read"):
        peft.read_adapter(folder, spec)
    with pytest.raises(InputError, match="cannot read"):
        peft.read_adapter(folder / "nothing", spec)


def test_every_truncation_is_refused(copy_of, spec):
    folder = copy_of("prompt")
    data = (folder / TENSORS).read_bytes()
    for length in [*range(300), *range(300, len(data), 97)]:
        (folder / TENSORS).write_bytes(data[:length])
        with pytest.raises(InputError, match="damaged or truncated"):
            peft.read_adapter(folder, spec)


# The GGUF file.


@pytest.fixture(scope="module")
def registry_file(tiny_patch, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("registry") / "tiny-patch.gguf"
    adapters_gguf.write_gguf(tiny_patch, path, "org/model")
    return path


def test_gguf_gives_the_same_patch_back(registry_file, tiny_patch, adapters, spec, tmp_path):
    assert adapters_gguf.read_gguf(registry_file).digest == tiny_patch.digest
    imported = peft.read_adapter(adapters["cartridge"], spec)
    adapters_gguf.write_gguf(imported, tmp_path / "a.gguf")
    assert adapters_gguf.read_gguf(tmp_path / "a.gguf").digest == imported.digest
    adapters_gguf.write_gguf(imported, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_signatures_travel_in_gguf(tiny_patch, tmp_path):
    keys = [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2)]
    patch = tiny_patch
    for key in keys:
        patch = signed(patch, sign(patch.manifest, PAYLOAD_TYPE, key))
    adapters_gguf.write_gguf(patch, tmp_path / "signed.gguf")
    back = adapters_gguf.read_gguf(tmp_path / "signed.gguf")
    assert back.digest == patch.digest and len(back.signatures) == 2
    assert patch_bytes(back) == patch_bytes(patch)
    data = (tmp_path / "signed.gguf").read_bytes()
    first, second = (signature.key_id.encode() for signature in back.signatures)
    for old, new in {b'"key_id"': b'"key-id"', second: first, first: b"g" * 64, b'[{"': b'{ "'}.items():
        (tmp_path / "other.gguf").write_bytes(data.replace(old, new))
        with pytest.raises(PatchFormatError, match="signatures"):
            adapters_gguf.read_gguf(tmp_path / "other.gguf")


def test_the_gguf_package_reads_it(registry_file, tiny_patch):
    from gguf import GGUFReader

    reader = GGUFReader(registry_file)
    values = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.version": "1.0.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "org/model",
        "adapter.type": "edgepatch.soft_prompt",
        "edgepatch.patch_digest": tiny_patch.digest,
        "edgepatch.num_virtual_tokens": 10,
    }
    assert {name: values[name] for name in expected} == expected
    assert json.loads(values["edgepatch.base"]) == tiny_patch.base.as_dict()
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert (tensors.pop("prompt_embeddings") == tiny_patch.soft_prompt.embeddings).all()
    for layer in range(2):
        assert (tensors.pop(f"past_key_values.{layer}.key") == tiny_patch.kv_seed.keys[layer]).all()
        assert (tensors.pop(f"past_key_values.{layer}.value") == tiny_patch.kv_seed.values[layer]).all()
    assert not tensors


def test_llamacpp_refuses_it_as_a_lora(registry_file, gguf_model):
    llama_cpp = library.load_library()
    model = llama_cpp.llama_model_load_from_file(bytes(gguf_model), llama_cpp.llama_model_default_params())
    try:
        assert not llama_cpp.llama_adapter_lora_init(model, bytes(registry_file))
        assert "expect adapter.type to be 'lora', but got: edgepatch.soft_prompt" in library.library_errors()
    finally:
        llama_cpp.llama_model_free(model)


def test_every_truncation_of_a_gguf_file_is_refused(registry_file, tmp_path):
    data, path = registry_file.read_bytes(), tmp_path / "cut.gguf"
    for length in [*range(200), *range(200, len(data), 1009), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(PatchFormatError, match=re.escape(str(path))):
            adapters_gguf.read_gguf(path)


def test_flipped_bits_of_a_gguf_file_are_refused(registry_file, tmp_path, tiny_patch):
    data, path = bytearray(registry_file.read_bytes()), tmp_path / "flipped.gguf"
    name = data.index(b"org/model")
    start = data.index(b"prompt_embeddings\x02") + 64
    for position in [*range(0, start, examples(29, 7)), *range(start, len(data), 997)]:
        if name <= position < name + len(b"org/model"):
            continue  # the one value that the patch does not know
        data[position] ^= 1 << position % 8
        path.write_bytes(data)
        with pytest.raises(PatchFormatError):
            adapters_gguf.read_gguf(path)
        data[position] ^= 1 << position % 8


def test_other_gguf_files_are_refused(gguf_model, tmp_path):
    with pytest.raises(PatchFormatError, match="no GGUF adapter file"):
        adapters_gguf.read_gguf(gguf_model)
    with pytest.raises(InputError, match="cannot read"):
        adapters_gguf.read_gguf(tmp_path / "nothing.gguf")


# The command line.


@pytest.fixture
def run(monkeypatch, capfd):
    from edgepatch import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


def test_verbs_in_and_out(run, adapters, gguf_model, tmp_path):
    patch, folder, file = tmp_path / "a.safetensors", tmp_path / "peft", tmp_path / "a.gguf"
    code, out, _ = run(
        "convert", "adapter", adapters["prefix"], "--model", gguf_model, "-o", patch, "--name", "detox", "--json"
    )
    assert code == 0 and json.loads(out)["digest"] == read_patch(patch).digest
    assert (read_patch(patch).name, json.loads(out)["kv_seed"], json.loads(out)["soft_prompt"]) == (
        "detox",
        True,
        False,
    )
    assert json.loads(run("show", patch, "--json")[1])["canary"] is None
    code, out, _ = run("convert", "patch", patch, folder, "--to", "peft", "--base-model-name", "org/model")
    assert code == 0 and "PREFIX_TUNING of 6 virtual tokens" in out
    assert (folder / TENSORS).read_bytes() == (adapters["prefix"] / TENSORS).read_bytes()
    code, out, _ = run("convert", "patch", patch, file, "--to", "gguf", "--json")
    assert code == 0 and json.loads(out)["patch_digest"] == read_patch(patch).digest
    code, out, _ = run("convert", "adapter", file, "-o", tmp_path / "b.safetensors", "--model", gguf_model)
    assert code == 0 and (tmp_path / "b.safetensors").read_bytes() == patch.read_bytes()


def test_verbs_refuse_with_their_exit_codes(run, copy_of, adapters, gguf_model, registry_file, tmp_path):
    out = tmp_path / "out.safetensors"
    assert run("convert", "adapter", adapters["prefix"], "-o", out)[0] == 2
    code, _, err = run("convert", "adapter", copy_of(num_layers=3), "-o", out, "--model", gguf_model)
    assert code == 4 and "num_layers: patch expects 3, model has 2" in err
    assert run("convert", "adapter", gguf_model, "-o", out)[0] == 3
    assert run("convert", "patch", tmp_path / "nothing", out, "--to", "peft")[0] == 2
    patch = tmp_path / "a.safetensors"
    write_patch(adapters_gguf.read_gguf(registry_file), patch)
    code, _, err = run("convert", "patch", patch, out, "--to", "gguf", "--peft-type", "CARTRIDGE")
    assert code == 2 and "--peft-type" in err and "Traceback" not in err
    assert not out.exists()

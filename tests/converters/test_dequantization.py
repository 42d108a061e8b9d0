"""A GGUF file of any quantization becomes a Transformers folder, exactly; whatever goes wrong leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from edgepatch import cli
from edgepatch.converters import checkpoints, dequantization, rope, weight_sketches
from edgepatch.converters import dequantization as converters_dequantization
from edgepatch.converters.dequantization import dequantize
from edgepatch.converters.gguf import header as gguf_header
from edgepatch.converters.gguf import specs
from edgepatch.converters.gguf import writer as gguf_writer
from edgepatch.converters.hf import folders
from edgepatch.converters.origins import naming_origin
from edgepatch.errors import InputError, MismatchError
from edgepatch.patch.sketches import compare
from kit import tiny_gguf
from kit.forks import Fork
from kit.llamacpp_oracle import logits_of
from kit.real_model import smollm2_file
from kit.tiny_folders import make_folder

TOKENS = list(range(20, 60))
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A llama whose rows are wide enough for every quantization, in F32."""
    root = tmp_path_factory.mktemp("wide")
    gguf_writer.convert_folder(make_folder(root / "hf", "llama", **WIDE), root / "F32.gguf", "F32")
    return root / "F32.gguf"


def quantized(full: Path, kind: str) -> Path:
    path = full.with_name(f"{kind}.gguf")
    if not path.exists():
        gguf_writer.quantize(full, path, kind, num_threads=1)
    return path


def values_of(path: Path) -> dict[str, np.ndarray]:
    """Tensors as gguf-py itself reads and dequantizes them."""
    return {
        t.name: gguf_py.quants.dequantize(t.data, t.tensor_type).reshape([int(n) for n in t.shape[::-1]])
        for t in gguf_py.GGUFReader(path).tensors
    }


def folder_logits(folder: Path) -> np.ndarray:
    with torch.inference_mode():
        return folders.load_model(folder)(torch.tensor([TOKENS])).logits[0].numpy()


KINDS = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_1",
    "Q4_K_M",
    "Q4_0",
    "Q4_1",
    "Q3_K_S",
    "Q2_K",
    "IQ4_NL",
    "TQ2_0",
)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_gguf_pys_bit_for_bit(full, kind, tmp_path):
    path = quantized(full, kind) if kind != "F32" else full
    origin = dequantize(path, tmp_path / "hf")
    assert (origin.file, origin.quantization) == (path.name, kind)
    weights, expected = load_file(tmp_path / "hf" / "model.safetensors"), values_of(path)
    for name, heads in (("q", 4), ("k", 2)):
        key = f"blk.1.attn_{name}.weight"
        expected[key] = rope.projection_from_llamacpp(expected[key], heads)
    names = {"token_embd": "embed_tokens", "output_norm": "norm", "blk.1.attn_q": "layers.1.self_attn.q_proj"}
    names |= {"blk.1.attn_k": "layers.1.self_attn.k_proj", "blk.0.ffn_down": "layers.0.mlp.down_proj"}
    for source, target in names.items():
        actual = weights[f"model.{target}.weight"].numpy()
        assert actual.dtype == np.float32 and np.array_equal(actual, expected[f"{source}.weight"]), source
    assert sum(w.numel() for w in weights.values()) == sum(w.size for w in expected.values())
    assert folders.read_spec(tmp_path / "hf") == specs.read_spec(path)


def test_the_folder_is_an_ordinary_one(full, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dequantize(quantized(full, "Q4_1"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert config["edgepatch_origin"]["quantization"] == "Q4_1"
    assert "Q4_1" in (tmp_path / "hf" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    model.save_pretrained(tmp_path / "again")  # Transformers refuses this of what it read from a GGUF file itself
    assert tokenizer.chat_template and model.generation_config.eos_token_id


@pytest.mark.parametrize("kind", ["Q5_1", "Q2_K", "F16"])
def test_the_folder_computes_what_the_file_computes(full, kind, tmp_path):
    """Against the file widened, so that llama.cpp does not round activations too."""
    path = quantized(full, kind)
    dequantize(path, tmp_path / "hf")
    gguf_writer.convert_folder(tmp_path / "hf", tmp_path / "F32.gguf", "F32")
    logits = folder_logits(tmp_path / "hf")
    assert np.abs(logits - logits_of(tmp_path / "F32.gguf", TOKENS)).max() <= 5e-5
    converters_dequantization.requantize(path, tmp_path / "widened.gguf", "F32")
    assert np.abs(logits - logits_of(tmp_path / "widened.gguf", TOKENS)).max() <= 5e-5
    assert np.array_equal(logits, folder_logits(path)), "training on the file is training on other weights"


def test_sketches_of_file_and_folder_fit(full, tmp_path):
    path = quantized(full, "Q4_0")
    dequantize(path, tmp_path / "hf")
    sketch = weight_sketches.sketch_of(tmp_path / "hf")
    for file, kind in ((path, "Q4_0"), (quantized(full, "F16"), "F16")):
        if kind == "Q4_0":
            compare(sketch, weight_sketches.sketch_of(file, sketch), kind)
    converters_dequantization.requantize(path, tmp_path / "Q8_0.gguf", "Q8_0")
    compare(sketch, weight_sketches.sketch_of(tmp_path / "Q8_0.gguf", sketch), "Q8_0")


@pytest.mark.parametrize("write", [tiny_gguf.write_gemma3, tiny_gguf.write_lfm2, tiny_gguf.write_llama])
def test_windows_and_convolutions_too(write, tmp_path):
    write(tmp_path / "model.gguf")
    dequantize(tmp_path / "model.gguf", tmp_path / "hf")
    assert folders.read_spec(tmp_path / "hf") == specs.read_spec(tmp_path / "model.gguf")
    assert np.array_equal(folder_logits(tmp_path / "hf"), folder_logits(tmp_path / "model.gguf"))


def test_bfloat16_and_shards(full, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "MAX_SHARD_BYTES", 600_000)
    monkeypatch.setattr("edgepatch.converters.gguf.weights.PIECE_VALUES", 40_000)
    calls: list[tuple[str, int, int]] = []
    dequantize(full, tmp_path / "half", "bfloat16", progress=lambda *event: calls.append(event))
    dequantize(full, tmp_path / "whole")
    shards = sorted((tmp_path / "half").glob("*.safetensors"))
    assert len(shards) > 2 and calls[-1][1] == calls[-1][2]
    half, whole = (
        folders.load_model(tmp_path / "half").state_dict(),
        folders.load_model(tmp_path / "whole").state_dict(),
    )
    assert all(torch.equal(half[n], whole[n].to(torch.bfloat16).float()) for n in whole)
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    with safe_open(shards[0], framework="pt") as tensors:
        assert tensors.get_tensor(next(iter(tensors.keys()))).dtype == torch.bfloat16


# From one quantization to another.


def test_another_quantization_says_what_it_was_made_from(full, tmp_path):
    path = quantized(full, "Q4_1")
    origin = converters_dequantization.requantize(path, tmp_path / "Q8_0.gguf", "Q8_0")
    assert "Q4_1" in origin.note()
    header, source = gguf_header.read_header(tmp_path / "Q8_0.gguf"), gguf_header.read_header(path)
    assert specs.quantization(header) == "Q8_0"
    assert header.metadata["edgepatch.origin.quantization"] == "Q4_1"
    for key in ("tokenizer.ggml.pre", "tokenizer.chat_template", "general.name", "tokenizer.ggml.tokens"):
        assert header.metadata[key] == source.metadata[key]
    converters_dequantization.requantize(tmp_path / "Q8_0.gguf", tmp_path / "Q5_0.gguf", "Q5_0")
    assert (
        gguf_header.read_header(tmp_path / "Q5_0.gguf").metadata["edgepatch.origin.quantization"] == "Q4_1, then Q8_0"
    )
    assert specs.read_spec(tmp_path / "Q5_0.gguf") == specs.read_spec(path)
    dequantize(path, tmp_path / "hf")
    gguf_writer.convert_folder(tmp_path / "hf", tmp_path / "F16.gguf", "F16")
    assert gguf_header.read_header(tmp_path / "F16.gguf").metadata["edgepatch.origin.quantization"] == "Q4_1"
    with pytest.raises(MismatchError) as refused, naming_origin(header):
        raise MismatchError({"weights": ("those of its base", "others")})
    assert f"was made from Q4_1 weights of {path.name}" in refused.value.hint
    old, new = values_of(path), values_of(tmp_path / "Q8_0.gguf")
    assert max(np.abs(old[n] - new[n]).max() / np.abs(old[n]).max() for n in old) < 0.01


def run(monkeypatch, capfd, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    output = capfd.readouterr()
    return caught.value.code or 0, output.out, output.err


def test_the_command_line_goes_from_the_file_to_everything(full, tmp_path, monkeypatch, capfd):
    path = quantized(full, "Q4_1")
    for name, options in (
        ("hf", ["--to", "transformers"]),
        ("Q8_0.gguf", ["--type", "Q8_0"]),
        ("onnx", ["--to", "onnx", "--type", "int8"]),
    ):
        code, out, err = run(monkeypatch, capfd, "convert", "base", path, tmp_path / name, *options, "--json")
        assert code == 0, err
        assert json.loads(out)["made_from"] == {"file": "Q4_1.gguf", "quantization": "Q4_1"}
        assert "made from Q4_1 weights" in err
    assert json.loads((tmp_path / "onnx" / "config.json").read_text())["edgepatch_origin"]["quantization"] == "Q4_1"
    code, out, err = run(monkeypatch, capfd, "convert", "base", tmp_path / "hf", tmp_path / "F16.gguf", "--json")
    assert code == 0 and json.loads(out)["made_from"]["quantization"] == "Q4_1"
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".log") == ["F16.gguf", "Q8_0.gguf", "hf", "onnx"]


# What goes wrong.


def require_refused(source: Path, target: Path, message: str, **options) -> None:
    before = sorted(target.parent.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        dequantize(source, target, **options)
    assert caught.value.hint
    assert sorted(target.parent.iterdir()) == before


def test_damaged_files_are_refused(full, tmp_path):
    data = quantized(full, "Q4_1").read_bytes()
    (tmp_path / "out").mkdir()
    for length in (0, 10, 1000, len(data) // 2, len(data) - 1):
        (tmp_path / "cut.gguf").write_bytes(data[:length])
        require_refused(tmp_path / "cut.gguf", tmp_path / "out" / "hf", "cut.gguf")
    require_refused(tmp_path / "absent.gguf", tmp_path / "out" / "hf", "cannot read")


def rewrite(path: Path, **metadata) -> Path:
    """A GGUF file of a few keys and no tensors but those that are asked for."""
    tensors = metadata.pop("tensors", {})
    writer = gguf_py.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        key = key.replace("__", ".")
        (writer.add_uint16 if isinstance(value, int) else writer.add_string)(key, value)
    writer.add_token_list(["a", "b"])
    for name, shape in tensors.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_files_that_are_no_whole_model_are_refused_by_name(tmp_path):
    (tmp_path / "out").mkdir()
    split = rewrite(tmp_path / "a.gguf", split__count=3, tensors={"blk.0.x": (2, 2)})
    require_refused(split, tmp_path / "out" / "hf", "3 parts")
    lora = rewrite(tmp_path / "b.gguf", general__type="adapter", tensors={"blk.0.attn_q.weight.lora_a": (2, 2)})
    require_refused(lora, tmp_path / "out" / "hf", "adapter")
    require_refused(rewrite(tmp_path / "c.gguf"), tmp_path / "out" / "hf", "vocabulary and no weights")


def test_types_that_nobody_can_dequantize_are_named(full, tmp_path):
    """Q8_K exists inside llama.cpp alone."""
    header = gguf_header.read_header(full)
    data = bytearray(full.read_bytes())
    at = data.index(b"blk.1.ffn_up.weight") + len("blk.1.ffn_up.weight") + 4 + 16
    assert data[at : at + 4] == bytes(4)
    for number, word in ((15, "Q8_K"), (77, "77")):
        data[at] = number
        (tmp_path / "new.gguf").write_bytes(data)
        (tmp_path / f"out{number}").mkdir()
        require_refused(tmp_path / "new.gguf", tmp_path / f"out{number}" / "hf", word)
    assert header.tensors["blk.1.ffn_up.weight"].ggml_type == 0


def test_existing_targets_are_kept(full, tmp_path):
    target = tmp_path / "out" / "hf"
    target.mkdir(parents=True)
    dequantize(full, target)  # an empty folder may be filled
    written = (target / "config.json").read_bytes()
    require_refused(full, target, "exists")
    (target / "extra.txt").write_text("kept till the end")
    dequantize(quantized(full, "Q4_1"), target, force=True)
    assert (target / "config.json").read_bytes() != written and not (target / "extra.txt").exists()
    other = tmp_path / "out" / "notes"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    require_refused(full, other, "not a Transformers folder", force=True)
    require_refused(full, other / "mine.txt", "not a Transformers folder", force=True)
    assert (other / "mine.txt").read_text() == "mine"
    require_refused(full, tmp_path / "out" / "new", "float16", dtype="float16")


def test_folders_are_no_source(tmp_path, tiny_folder, monkeypatch, capfd):
    code, _, err = run(monkeypatch, capfd, "convert", "base", tiny_folder, tmp_path / "hf", "--to", "transformers")
    assert code == 2 and "expected a GGUF file" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--to", "transformers"], ["--to", "onnx"], ["--type", "Q8_0"]])
def test_space_is_counted_before_anything_is_written(full, options, tmp_path, monkeypatch, capfd):
    path = quantized(full, "Q4_1")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 10**5, 10**5))
    code, _, err = run(monkeypatch, capfd, "convert", "base", path, tmp_path / "out", *options)
    assert code == 2 and "it needs" in err and "0 MB are free" in err
    assert not list(tmp_path.iterdir())


def test_the_needed_space_is_told_rightly(full, tmp_path, monkeypatch):
    counted: list[int] = []
    monkeypatch.setattr(dequantization, "require_space", lambda target, count: counted.append(count))
    dequantize(full, tmp_path / "hf")
    written = sum(file.stat().st_size for file in (tmp_path / "hf").iterdir())
    assert written <= counted[0] <= 1.5 * written


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"


@pytest.mark.parametrize("options", [["--to", "transformers"], ["--to", "onnx"], ["--type", "Q8_0"]])
def test_a_disk_that_fills_up_leaves_nothing(full, options, tmp_path):
    """Files may not grow past a megabyte, so writing fails in the middle of the weights."""
    command = ["convert", "base", quantized(full, "Q4_1"), tmp_path / "out" / "new", *options]
    (tmp_path / "out").mkdir()
    with Fork(*command, before=LIMITED) as process:
        _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "cannot write" in errors and "Traceback" not in errors
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["new.log"]


STAGES = {
    "the tokenizer": "edgepatch.converters.gguf.vocabularies._build",
    "the weights": "edgepatch.converters.checkpoints._in_dtype",
    "the check": "edgepatch.converters.hf.folders.read_spec",
    "the quantization": "edgepatch.converters.dequantization.quantize",
    "the full file": "edgepatch.converters.gguf.weights.pieces",
    "the graph": "edgepatch.converters.onnx.exporters._run",
}
SLOW = """
import os, sys, time
from importlib import import_module
module, _, name = os.environ["STAGE"].rpartition(".")
module = import_module(module)
whole = getattr(module, name)

def slow(*arguments, **options):
    open(os.environ["REACHED"], "w").close()  # what is printed during the work is put aside
    time.sleep(60)
    return whole(*arguments, **options)

import edgepatch.converters.onnx.conversion
for loaded in list(sys.modules.values()):
    if getattr(loaded, name, None) is whole:
        setattr(loaded, name, slow)
"""


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("the tokenizer", ["--to", "transformers"]),
        ("the weights", ["--to", "transformers"]),
        ("the check", ["--to", "transformers"]),
        ("the weights", ["--to", "onnx"]),
        ("the graph", ["--to", "onnx"]),
        ("the full file", ["--type", "Q8_0"]),
        ("the quantization", ["--type", "Q8_0"]),
    ],
)
def test_ctrl_c_at_any_stage_leaves_nothing(full, stage, options, tmp_path):
    command = ["convert", "base", quantized(full, "Q4_1"), tmp_path / "out" / "new", *options]
    (tmp_path / "out").mkdir()
    (tmp_path / "tmp").mkdir()
    environment = {"TMPDIR": str(tmp_path / "tmp"), "STAGE": STAGES[stage], "REACHED": str(tmp_path / "reached")}
    with Fork(*command, before=SLOW, env={**os.environ, **environment}) as child:
        while not (tmp_path / "reached").exists():
            assert child.poll() is None, child.communicate()
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert {file.name for file in (tmp_path / "out").iterdir()} <= {"new.log"}  # which says what became of it
    assert not list((tmp_path / "tmp").iterdir())


def test_smollm2(tmp_path):
    """The real file: every weight is gguf-py's, and the folder has the file's fingerprint and sketch."""
    file = smollm2_file()
    dequantize(file, tmp_path / "hf")
    spec = specs.read_spec(file)
    assert folders.read_spec(tmp_path / "hf") == spec
    expected = values_of(file)
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as tensors:
        for name, source, heads in (
            ("model.embed_tokens", "token_embd", 0),
            ("model.layers.7.self_attn.q_proj", "blk.7.attn_q", 9),
            ("model.layers.29.self_attn.k_proj", "blk.29.attn_k", 3),
            ("model.layers.15.mlp.down_proj", "blk.15.ffn_down", 0),
        ):
            values = expected[f"{source}.weight"]
            values = rope.projection_from_llamacpp(values, heads) if heads else values
            assert np.array_equal(tensors.get_tensor(f"{name}.weight").numpy(), values), name
    sketch = weight_sketches.sketch_of(tmp_path / "hf")
    compare(sketch, weight_sketches.sketch_of(file, sketch), "Q4_1")

"""The weight sketch: every quantization of a base has it, and no other model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.identity import fine_tunes
from edgepatch.converters import weight_sketches
from edgepatch.converters.gguf import header as gguf_header
from edgepatch.converters.gguf import specs, writer
from edgepatch.converters.hf import folders
from edgepatch.converters.onnx.weights import sketch_of_onnx
from edgepatch.errors import InputError, MismatchError, PatchFormatError
from edgepatch.patch import sketches
from edgepatch.patch.sketches import Sketch
from kit.artefacts import Lazy
from kit.tiny_folders import make_folder

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q4_1", "Q5_0", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_S", "TQ1_0")


@pytest.fixture(scope="module")
def sketch(tiny_folder: Path) -> Sketch:
    return weight_sketches.sketch_of_folder(tiny_folder)


@pytest.fixture(scope="module")
def half(tiny_ggufs: Lazy) -> Path:
    return tiny_ggufs["F16"]


@pytest.fixture(scope="module")
def four_bits(tiny_ggufs: Lazy) -> Path:
    return tiny_ggufs["Q4_K_M"]


def quantized(folder: Path, target: Path, kind: str) -> Path:
    writer.convert_folder(folder, target / "F16.gguf")
    writer.quantize(target / "F16.gguf", target / f"{kind}.gguf", kind, 1)
    return target / f"{kind}.gguf"


def changed(tiny_folder: Path, tmp_path: Path, change) -> Path:
    model = folders.load_model(tiny_folder)
    change(model, tiny_folder)
    return fine_tunes.save(model, tiny_folder, tmp_path / "changed")


def test_a_sketch_is_small_and_survives_json(sketch: Sketch):
    text = json.dumps(sketch.as_dict())
    again = Sketch.from_dict(json.loads(text))
    assert len(text) < 2048 and again.as_dict() == sketch.as_dict()
    assert again.positions == sketch.positions and sketches.compare(sketch, again, "F32").distance == 0


def test_every_tensor_is_sampled_and_embeddings_get_their_share(sketch: Sketch):
    counts = {name: sum(p.tensor == name for p in sketch.positions) for name in sketch.tensors}
    assert min(counts.values()) > 20 and counts["token_embd"] + counts["output"] == sketches.NUM_WEIGHTS // 8


def test_rows_of_queries_and_keys_are_those_that_no_converter_moves(sketch: Sketch):
    rows = {p.row % sketch.head_dim for p in sketch.positions if p.tensor.endswith(("attn_q", "attn_k"))}
    assert rows == {0, sketch.head_dim - 1}


def test_full_precision_files_have_the_same_sketch(sketch: Sketch, half: Path):
    assert weight_sketches.sketch_of_gguf(half).as_dict() == sketch.as_dict()


@pytest.mark.parametrize("kind", TYPES)
def test_every_quantization_is_the_base(kind: str, sketch: Sketch, half: Path, tmp_path: Path):
    writer.quantize(half, tmp_path / "q.gguf", kind, 1)
    assert sketches.compare(sketch, weight_sketches.sketch_of_gguf(tmp_path / "q.gguf", sketch), kind).distance == 0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_every_architecture(architecture: str, tmp_path: Path):
    sizes = {"hidden_size": 256, "intermediate_size": 256} | (
        {"sliding_window": None} if architecture == "mistral" else {}
    )
    folder = make_folder(tmp_path / "hf", architecture, **sizes)
    path, expected = quantized(folder, tmp_path, "Q4_0"), weight_sketches.sketch_of_folder(folder)
    assert sketches.compare(expected, weight_sketches.sketch_of_gguf(path, expected), "Q4_0").distance == 0
    other = make_folder(tmp_path / "other", architecture, **sizes, initializer_range=0.11)
    with pytest.raises(MismatchError):
        sketches.compare(
            weight_sketches.sketch_of_folder(other), weight_sketches.sketch_of_gguf(path, expected), "Q4_0"
        )


def test_onnx_folders_are_the_base(sketch: Sketch, onnx_folders: dict[str, Path]):
    for precision, folder in onnx_folders.items():
        assert sketches.compare(sketch, sketch_of_onnx(folder, sketch), precision).distance == 0


@pytest.fixture(
    scope="module",
    params=[
        (fine_tunes.other_layer(1), {"blk.1"}),
        (fine_tunes.shuffled, {"blk.0", "blk.1", "token_embd", "output"}),
        (fine_tunes.noisy(0.05), {"blk.0", "blk.1", "token_embd", "output"}),
    ],
    ids=["one layer replaced", "another seed", "noise of 5 %"],
)
def fine_tune(request, tiny_folder: Path, tmp_path_factory) -> tuple[Path, set[str]]:
    """(F16 file of a changed model, where it was changed)."""
    change, where = request.param
    folder = tmp_path_factory.mktemp("fine_tune")
    writer.convert_folder(changed(tiny_folder, folder, change), folder / "F16.gguf")
    return folder / "F16.gguf", where


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "Q4_0", "Q2_K"])
def test_another_model_under_the_same_norms_is_refused(kind, fine_tune, sketch, tiny_folder, tmp_path):
    (half, where), path = fine_tune, tmp_path / f"{kind}.gguf"
    writer.quantize(half, path, kind, 1)
    assert specs.read_spec(path) == folders.read_spec(tiny_folder), "the norm vectors cannot tell"
    actual = weight_sketches.sketch_of_gguf(path, sketch)
    with pytest.raises(MismatchError, match=f"rounded to {kind}.* of 576 sampled weights"):
        sketches.compare(sketch, actual, kind)
    tensors = sketches.measure(sketch, actual).outside
    assert {name.rsplit(".", 1)[0] for name in tensors} <= where, "what was not changed is not accused"


def merged_lora(model, _base):
    """Rank 4 on queries and values, 5 % of their size."""
    import torch

    generator = torch.Generator().manual_seed(2)
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            weight = projection.weight.data
            update = torch.randn(len(weight), 4, generator=generator) @ torch.randn(
                4, weight.shape[1], generator=generator
            )
            weight += update * 0.05 * weight.square().mean().sqrt() / update.square().mean().sqrt()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_merged_lora_is_refused_by_name(kind, sketch, tiny_folder, tmp_path):
    path = quantized(changed(tiny_folder, tmp_path, merged_lora), tmp_path, kind)
    with pytest.raises(MismatchError, match=r"\(attn_q of layers 0-1; attn_v of layers 0-1\)"):
        sketches.compare(sketch, weight_sketches.sketch_of_gguf(path, sketch), kind)


def test_an_onnx_folder_of_another_model_is_refused(sketch, onnx_folders):
    other = replace(sketch, low=-sketch.low, high=-sketch.high)
    for precision, folder in onnx_folders.items():
        with pytest.raises(MismatchError):
            sketches.compare(other, sketch_of_onnx(folder, sketch), precision)


def test_a_quantized_base_has_a_sketch_too(half, four_bits, tiny_folder, tmp_path):
    expected = Sketch.from_dict(json.loads(json.dumps(weight_sketches.sketch_of_gguf(four_bits).as_dict())))
    assert not expected.is_exact and len(expected.low) == sketches.NUM_CELLS
    assert len(json.dumps(expected.as_dict())) < 2048
    for path in (four_bits, half):
        assert sketches.compare(expected, weight_sketches.sketch_of_gguf(path, expected), "F16").distance == 0
    path = quantized(changed(tiny_folder, tmp_path, fine_tunes.shuffled), tmp_path, "Q4_0")
    with pytest.raises(MismatchError):
        sketches.compare(expected, weight_sketches.sketch_of_gguf(path, expected), "Q4_0")


def test_sketches_of_other_positions_are_not_compared(sketch, four_bits):
    with pytest.raises(InputError, match="same positions"):
        sketches.measure(sketch, weight_sketches.sketch_of_gguf(four_bits))


def test_missing_and_reshaped_tensors_are_named(sketch, four_bits):
    tensors = {**sketch.tensors, "blk.1.attn_v": (64, 256), "blk.7.ffn_up": (512, 256)}
    with pytest.raises(MismatchError) as caught:
        weight_sketches.sketch_of_gguf(four_bits, replace(sketch, tensors=tensors))
    assert caught.value.differences == {"blk.1.attn_v": ((64, 256), (128, 256)), "blk.7.ffn_up": ((512, 256), "none")}


def test_truncated_and_exotic_files_are_refused(four_bits, tiny_folder, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(four_bits.read_bytes()[:-1000])
    with pytest.raises(InputError, match="truncated"):
        weight_sketches.sketch_of_gguf(cut)
    header = gguf_header.read_header(four_bits)
    odd = {name: replace(info, ggml_type=99) for name, info in header.tensors.items()}
    with pytest.raises(InputError, match="unknown type 99"):
        weight_sketches.sketch_of_gguf(replace(header, tensors=odd))
    with pytest.raises(InputError, match="name that is known"):
        weight_sketches.sketch_of_gguf(replace(header, tensors={"strange.weight": header.tensors["token_embd.weight"]}))
    folder = tmp_path / "folder"
    fine_tunes.save(folders.load_model(tiny_folder), tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="damaged or truncated"):
        weight_sketches.sketch_of_folder(folder)


def test_onnx_graphs_that_do_not_name_their_weights_are_refused(sketch, onnx_folders):
    shapes = {name.replace("blk.0", "blk.5"): shape for name, shape in sketch.tensors.items()}
    with pytest.raises(InputError, match=r"none of its weights is called model\.layers\.5"):
        sketch_of_onnx(onnx_folders["fp32"], replace(sketch, tensors=shapes))
    wide = {name: (shape[0], 2 * shape[1]) for name, shape in sketch.tensors.items()}
    with pytest.raises(MismatchError):
        sketch_of_onnx(onnx_folders["int4"], replace(sketch, tensors=wide))


@pytest.mark.parametrize(
    "damage",
    [
        {"head_dim": 0},
        {"head_dim": True},
        {"low": "?"},
        {"low": ""},
        {"low": 3},
        {"low": "AH4="},
        {"high": "AAA="},
        {"extra": 1},
        {"tensors": []},
        {"tensors": {}},
        {"tensors": {"attn_x": [[1, 1, "0"]]}},
        {"tensors": {"attn_v": [[1, 1, "0-9999"]]}},
        {"tensors": {"attn_v": [[1, 1, "3-1"]]}},
        {"tensors": {"attn_v": [[1, 1, ""]]}},
        {"tensors": {"attn_v": [[1, 1]]}},
        {"tensors": {"attn_v": [[0, 1, "0"]]}},
        {"tensors": {"output": [[1, 1, "0"]]}},
        {"tensors": {"attn_v": [[1, 1, "0"]] * 65}},
        {"tensors": {"attn_v": "0"}},
        {"tensors": {"attn_v": [[1, 1, 0]]}},
    ],
    ids=str,
)
def test_damaged_sketches_are_refused(damage, sketch):
    with pytest.raises(PatchFormatError):
        Sketch.from_dict({**sketch.as_dict(), **damage})


def test_layers_are_written_as_runs(sketch):
    tensors = {f"blk.{n}.attn_v": (64, 256) for n in (0, 1, 2, 5, 9, 10)} | {"token_embd": (512, 256)}
    stored = replace(sketch, tensors=tensors).as_dict()
    assert stored["tensors"] == {"attn_v": [[64, 256, "0-2,5,9-10"]], "token_embd": [[512, 256, ""]]}
    assert dict(Sketch.from_dict(stored).tensors) == tensors


def test_cells_hold_what_rounds_to_them():
    """By hand: a block of steps of 2, one weight at each."""
    block = np.array([-6, -2, 0, 2, 8] + [0] * 27, dtype=np.float32)
    low, high = weight_sketches.cells(np.stack([block] * 3), np.array([3, 0, 4]), "Q4_0")
    slack = weight_sketches.STEP_SLACK * 2
    assert low[0] == pytest.approx(1 - slack, abs=0.01) and high[0] == pytest.approx(3 + slack, abs=0.01)
    assert low[1] == -np.inf and high[1] == pytest.approx(-5 + slack, abs=0.02)
    assert high[2] == np.inf and low[2] == pytest.approx(7 - slack, abs=0.02)

"""Arms in place of a patch: LoRA adapters and control vectors in every runtime, against what PEFT computes."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench import arms, columns
from edgepatch.converters import rope
from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.converters.peft import lora
from edgepatch.errors import InputError
from edgepatch.runtimes import load_runtime
from kit.tiny_folders import make_folder

TOKENS = list(range(5, 45))
EXACT = {"num_threads": 1, "kv_type": "f32", "flash_attention": False}
ADAPTERS = {"llama": {"r": 16, "lora_alpha": 32}, "qwen2": {"r": 4, "lora_alpha": 3, "use_rslora": True}}


@dataclass(frozen=True)
class Adapted:
    """A tiny model with a strong random adapter, and the (T, V) logits of PEFT with and without it."""

    base: Path
    adapter: Path
    full: Path  # GGUF in float32
    expected: np.ndarray
    bare: np.ndarray


def make_adapted(root: Path, architecture: str, **settings) -> Adapted:
    import torch
    from peft import LoraConfig, get_peft_model

    base = make_folder(root / "base", architecture, intermediate_size=128, head_dim=16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings)
        model = get_peft_model(folders.load_model(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(root / "adapter")
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
        with model.disable_adapter():
            bare = model(torch.tensor([TOKENS])).logits[0].numpy()
    writer.convert_folder(base, root / "F32.gguf", "F32")
    return Adapted(base, root / "adapter", root / "F32.gguf", expected, bare)


@pytest.fixture(scope="module", params=ADAPTERS)
def adapted(request, tmp_path_factory) -> Adapted:
    return make_adapted(tmp_path_factory.mktemp(request.param), request.param, **ADAPTERS[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Adapted:
    return make_adapted(tmp_path_factory.mktemp("llama"), "llama", **ADAPTERS["llama"])


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max())


def llamacpp_logits(model: Path, adapter: Path | None = None, vector: Path | None = None) -> np.ndarray:
    with arms.load_llamacpp(model, adapter, vector, **EXACT) as runtime:
        return runtime.logits(TOKENS)


def test_llamacpp_with_an_unmerged_adapter_gives_the_logits_of_peft(adapted, tmp_path):
    lora.write_lora(adapted.adapter, adapted.base, tmp_path / "lora.gguf")
    assert distance(adapted.expected, adapted.bare) > 1, "the adapter matters"
    assert distance(llamacpp_logits(adapted.full), adapted.bare) < 1e-4
    assert distance(llamacpp_logits(adapted.full, tmp_path / "lora.gguf"), adapted.expected) < 1e-4


def test_a_merged_folder_gives_the_logits_of_peft(adapted, tmp_path):
    lora.merge_lora(adapted.base, adapted.adapter, tmp_path / "merged")
    with load_runtime(tmp_path / "merged", None) as runtime:
        assert distance(runtime.logits(TOKENS), adapted.expected) < 1e-4
    with pytest.raises(InputError, match="cannot write"):
        lora.merge_lora(adapted.base, adapted.adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_without_the_order_of_heads_the_adapter_is_another_one(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(rope, "projection_to_llamacpp", lambda weight, *_: weight)
    lora.write_lora(llama.adapter, llama.base, tmp_path / "lora.gguf")
    assert distance(llamacpp_logits(llama.full, tmp_path / "lora.gguf"), llama.expected) > 0.1


def test_an_adapter_in_half_precision_stands_beside_quantized_weights(llama, tmp_path):
    lora.write_lora(llama.adapter, llama.base, tmp_path / "lora.gguf", "F16")
    writer.quantize(llama.full, tmp_path / "Q4_0.gguf", "Q4_0", num_threads=1)
    adapted, bare = (
        llamacpp_logits(tmp_path / "Q4_0.gguf", tmp_path / "lora.gguf"),
        llamacpp_logits(tmp_path / "Q4_0.gguf"),
    )
    closeness = (
        np.corrcoef(adapted.ravel(), llama.expected.ravel())[0, 1],
        np.corrcoef(bare.ravel(), llama.expected.ravel())[0, 1],
    )
    assert closeness[0] > 0.85 > 0.7 > closeness[1]


def test_every_runtime_loads_an_adapter_by_its_column(llama, tmp_path):
    shutil.copytree(llama.base, columns.TORCH.path(tmp_path / "forms"))
    writer.quantize(llama.full, tmp_path / "forms" / "Q8_0.gguf", "Q8_0", num_threads=1)
    for name in ("torch F32", "llamacpp Q8_0", "onnx int4"):
        column = next(column for column in columns.columns() if column.name == name)
        with arms.load_lora(column, column.path(tmp_path / "forms"), llama.adapter, tmp_path / "made") as runtime:
            closeness = np.corrcoef(runtime.logits(TOKENS).ravel(), llama.expected.ravel())[0, 1]
            assert (runtime.name, runtime.quantization) == (column.runtime, column.quantization)
            assert closeness > 0.9, name
    (outputs,) = (tmp_path / "made").iterdir()
    assert sorted(path.name for path in outputs.iterdir()) == ["lora.gguf", "onnx-int4", "transformers"]
    assert_unmerged(outputs / "onnx-int4" / "model.onnx")


def assert_unmerged(graph: Path) -> None:
    """Both factors of each of 7 matrices in 2 layers are plain products beside the quantized one."""
    import onnx as library

    kinds = {
        node.name: node.op_type
        for node in library.load(graph, load_external_data=False).graph.node
        if "MatMul" in node.op_type
    }
    factors = [kind for name, kind in kinds.items() if "/lora_" in name]
    weights = {name: kind for name, kind in kinds.items() if "/lora_" not in name}
    assert factors == ["MatMul"] * 2 * 7 * 2
    assert set(weights.values()) == {"MatMulNBits"} and len(weights) == 7 * 2 + 1
    assert "/model/layers.0/attn/q_proj/MatMul_Q8" in weights, "as fine as in the packed matrix of the bare graph"


def edited(llama, target: Path, **settings) -> Path:
    shutil.copytree(llama.adapter, target)
    config = json.loads((target / "adapter_config.json").read_text()) | settings
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"r": 0},
        {"peft_type": "IA3"},
        {"modules_to_save": ["lm_head"]},
        {"new_trick": 1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_more_than_a_plain_lora_is_refused(llama, tmp_path, settings):
    with pytest.raises(InputError, match="expected"):
        lora.read_lora(edited(llama, tmp_path / "edited", **settings), llama.base)


def test_an_adapter_of_another_base_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match=r"\(8, 128\)"):
        lora.read_lora(edited(llama, tmp_path / "rank", r=8), llama.base)
    other = make_folder(tmp_path / "other", "llama", hidden_size=32)
    with pytest.raises(InputError, match=r"\(32, 16\)"):
        lora.write_lora(llama.adapter, other, tmp_path / "lora.gguf")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        broken = edited(llama, tmp_path / "broken")
        (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
        lora.merge_lora(llama.base, broken, tmp_path / "merged")
    assert not (tmp_path / "lora.gguf").exists() and not (tmp_path / "merged").exists()


def test_llamacpp_refuses_a_file_that_is_no_adapter(llama):
    with pytest.raises(InputError, match=r"general\.type"):
        arms.load_llamacpp(llama.full, llama.full, **EXACT)


def test_only_the_builder_takes_adapters(llama, tmp_path):
    with pytest.raises(InputError, match="transformers and fp32"):
        onnx.export(llama.base, tmp_path / "x", "fp32", "transformers", adapter=llama.adapter)


def test_a_control_vector_moves_the_logits_by_its_norm(llama, tmp_path):
    spec, moved = folders.read_spec(llama.base), []
    for norm in (0.0, 0.5, 5.0):
        arms.write_control_vector(spec, arms.random_directions(spec, norm), tmp_path / "vector.gguf")
        moved.append(distance(llamacpp_logits(llama.full, vector=tmp_path / "vector.gguf"), llama.bare))
    assert moved[0] < 1e-4 < 0.05 < moved[1] < moved[2]
    other = folders.read_spec(make_folder(tmp_path / "other", "llama", num_hidden_layers=3))
    arms.write_control_vector(other, arms.random_directions(other, 1.0), tmp_path / "vector.gguf")
    with pytest.raises(InputError, match="expected 1 directions of 64 values, found 2"):
        llamacpp_logits(llama.full, vector=tmp_path / "vector.gguf")


def test_forms_are_made_once_and_belong_to_one_model(llama, tmp_path, monkeypatch):
    few = [
        column
        for column in columns.columns()
        if column.name in ("torch F32", "llamacpp F16", "llamacpp Q8_0", "llamacpp F16 kv q8_0")
    ]
    monkeypatch.setattr(columns, "columns", lambda: few)
    events: list[tuple[str, int, int]] = []
    first = columns.convert_model(llama.base, tmp_path / "forms", lambda *step: events.append(step))
    assert [step for step in events if step[0] == "convert"] == [("convert", done, 4) for done in range(5)]
    times = {name: path.stat().st_mtime_ns for name, path in first.items()}
    (tmp_path / "forms" / "Q8_0.gguf").unlink()
    again = columns.convert_model(llama.base, tmp_path / "forms")
    kept = {name for name, path in again.items() if path.stat().st_mtime_ns == times[name]}
    assert kept == {column.name for column in few} - {"llamacpp Q8_0"}
    with pytest.raises(InputError, match="another model"):
        columns.convert_model(make_folder(tmp_path / "other", "llama"), tmp_path / "forms")


def test_columns_have_names_and_files_of_their_own():
    every = columns.columns()
    assert len({column.name for column in every}) == len(every) == 12
    assert len({(column.file, column.kv_type) for column in every}) == 12

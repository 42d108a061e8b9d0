"""Transformers folders to ONNX folders, with onnxruntime-genai's model builder.

The folder says of itself what a patch must know: the ``ModelSpec`` and the quantization are metadata of ``model.onnx``, so that
a device needs onnxruntime alone to check them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from edgepatch.converters import hf
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.tensors import ModelSpec
from edgepatch.tokenizers import FolderTokenizer

Precision = Literal["fp32", "int8", "int4"]

SPEC_KEY = "edgepatch.model_spec"
QUANTIZATION_KEY = "edgepatch.quantization"
QUANTIZATIONS: dict[str, str] = {"fp32": "F32", "int8": "int8", "int4": "int4"}
MODEL_FILE = "model.onnx"
CONFIG_FILE = "genai_config.json"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
PACKAGES = {  # import name -> (distribution, extra)
    "torch": ("torch", "convert"),
    "transformers": ("transformers", "convert"),
    "onnxruntime_genai": ("onnxruntime-genai", "convert"),
    "onnx": ("onnx", "convert"),
    "onnx_ir": ("onnx-ir", "convert"),
}
BUILDER_OPTIONS = {
    # A cache of a window's size would drop the seed as soon as the text has outgrown it.
    "fp32": ["windowed_kv_cache=false"],
    "int8": ["windowed_kv_cache=false"],
    # One MB more than plain 4 bit on a 64 M model, a tenth of its divergence from full precision.
    "int4": [
        "windowed_kv_cache=false",
        "algo_config=k_quant",
        "matmul_mixed_precision=last_matmul:int8,mixed_layers:int8",
    ],
}
BUILDER = """
import sys
from onnxruntime_genai.models import builder
from builders.base import Model

# The builder takes every linear layer with V outputs for the LM head: an MLP as wide as the vocabulary gives a wrong graph.
Model.has_lm_head = lambda self, module: module is self.weights.get_output_embeddings()

folder, target, precision, cache, *extra = sys.argv[1:]
options = builder.parse_extra_options("", folder, target, precision, "cpu", cache, extra)
builder.create_model("", folder, target, precision, "cpu", cache, **options)
"""


def export(folder: Path, target: Path, precision: Precision) -> None:
    """Writes an ONNX folder of a Transformers folder: graph, weights, tokenizer, settings and ``ModelSpec``.

    Weights saved in half precision are widened first, so that they give the same graph as the same values in float32.
    A model with sliding-window attention gets a context no longer than its window.

    Args:
        folder: holds config, safetensors weights and tokenizer.
        target: the ONNX folder; an older one is replaced once the new one is complete, anything else is left alone.
        precision: "fp32", or weights in blocks of 32 with "int8" or "int4" (k-quant, sensitive layers in int8).

    Raises:
        InputError: the folder or its architecture cannot be exported, or the target cannot be written.
        MissingExtraError: a package of the extra "convert" is missing.
    """
    if precision not in QUANTIZATIONS:
        raise InputError(f"precision: expected one of {', '.join(QUANTIZATIONS)}, found {precision!r}")
    _require_packages()
    spec = hf.read_spec(folder)
    try:
        with _replacement(target) as unfinished:
            _build(folder, unfinished, precision)
            _stamp(unfinished / MODEL_FILE, spec, QUANTIZATIONS[precision])
            _keep_within_window(unfinished / CONFIG_FILE, hf.read_config(folder))
            _copy_tokenizer(folder, unfinished)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror or error}", hint="free space or name another folder"
        ) from error


def _require_packages() -> None:
    for module, (distribution, extra) in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(distribution, extra)


@contextmanager
def _replacement(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place at the end, or vanishes on any error."""
    if target.is_symlink() or (target.exists() and not _may_replace(target)):
        raise InputError(f"{target} exists and is not an ONNX model folder", hint="name a new folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    unfinished, old = beside / "new", beside / "old"
    try:
        unfinished.mkdir()
        yield unfinished
        try:
            if target.exists():
                target.rename(old)
            unfinished.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _may_replace(target: Path) -> bool:
    return target.is_dir() and ((target / MODEL_FILE).is_file() or not any(target.iterdir()))


def _build(folder: Path, target: Path, precision: Precision) -> None:
    """Runs the builder in a process of its own: it prints, changes ``sys.path`` and holds the whole model in memory."""
    with tempfile.TemporaryDirectory() as cache:
        arguments = [str(folder.resolve()), str(target.resolve()), precision, cache, *BUILDER_OPTIONS[precision]]
        done = subprocess.run(
            [sys.executable, "-c", BUILDER, *arguments],
            cwd=cache,  # "-c" imports from the working folder first
            env=os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
    if done.returncode == 0 and (target / MODEL_FILE).is_file():
        return
    architecture = hf.read_config(folder).get("architectures")
    if "NotImplementedError" in done.stderr or not architecture:
        raise InputError(
            f"the ONNX model builder does not know the architecture {architecture}",
            hint="convert the model to GGUF instead, or take a Llama, Mistral, Qwen or Phi model",
        )
    reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit code {done.returncode}")
    raise InputError(
        f"the ONNX model builder failed on {architecture}: {reason}",
        hint="check memory and disk, or convert to GGUF instead",
    )


def _stamp(model_file: Path, spec: ModelSpec, quantization: str) -> None:
    """Writes the spec into the graph's metadata; the weights, kept in their own file, are not touched."""
    import onnx

    model: Any = onnx.load(str(model_file), load_external_data=False)
    _require_sound(model.graph, spec)
    described = json.dumps(spec.as_dict(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    onnx.helper.set_model_props(model, {SPEC_KEY: described, QUANTIZATION_KEY: quantization})
    onnx.save(model, str(model_file))


def _require_sound(graph: Any, spec: ModelSpec) -> None:
    """Checks that every layer can be seeded and that the logits come from behind the last one.

    Raises:
        InputError: the builder has misread the model.
    """
    attentions = sum(node.op_type == "GroupQueryAttention" for node in graph.node)
    if attentions != spec.num_hidden_layers:
        raise InputError(
            f"{spec.model_type}: {attentions} of {spec.num_hidden_layers} layers can take a seed in the builder's graph",
            hint="convert the model to GGUF instead",
        )
    producers = {output: node for node in graph.node for output in node.output}
    node = producers["logits"]
    while not node.op_type.endswith("LayerNormalization"):
        node = producers[node.input[0]]
    if not any(f".layers.{spec.num_hidden_layers}." in name for name in node.input):
        raise InputError(f"{spec.model_type}: the builder's graph takes its logits from {node.name}, not from the final norm",
                         hint="convert the model to GGUF instead")  # fmt: skip


def _keep_within_window(config_file: Path, config: dict[str, Any]) -> None:
    """Ends the context where sliding-window attention would start to forget: the seed is the first that it forgets."""
    window = config.get("sliding_window")
    slides = config["model_type"] == "mistral" or "sliding_attention" in (config.get("layer_types") or [])
    if not window or not slides:
        return
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    settings["model"]["context_length"] = min(settings["model"]["context_length"], window)
    settings["search"]["max_length"] = settings["model"]["context_length"]
    config_file.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _copy_tokenizer(folder: Path, target: Path) -> None:
    """Takes the tokenizer as it is: the builder loads and saves it again, which can add tokens and change its digest."""
    for name in TOKENIZER_FILES:
        (target / name).unlink(missing_ok=True)
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    ends = {"eos_token_id": sorted(FolderTokenizer(folder).end_token_ids)}
    (target / "generation_config.json").write_text(json.dumps(ends) + "\n", encoding="utf-8")

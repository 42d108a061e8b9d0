"""Transformers folders to ONNX folders, and the identity of graphs that others have exported.

The folder says of itself what a patch must know: the ``ModelSpec`` and the quantization are metadata of ``model.onnx``, so that
a device needs onnxruntime alone to check them. How each exporter is run is known to ``onnx.exporters``.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from edgepatch.converters.hf import folders
from edgepatch.converters.onnx.check import Agreement, compare
from edgepatch.converters.onnx.exporters import (
    EXPORTERS,
    build,
    export_with_optimum,
    export_with_transformers,
    require_packages,
)
from edgepatch.converters.onnx.files import MODEL_FILE, ONNX_FOLDER, GraphFile, find_model_file, open_folder
from edgepatch.converters.onnx.graphs import quantization, recognise
from edgepatch.converters.onnx.identity import QUANTIZATIONS, identity, stamp
from edgepatch.converters.onnx.precision import reduce
from edgepatch.converters.onnx.sessions import open_session, prove_session
from edgepatch.converters.peft.lora import merge_lora
from edgepatch.decoding import defaults
from edgepatch.errors import InputError
from edgepatch.files import strict_json
from edgepatch.files.writing import replacing_folder, require_new_folder
from edgepatch.progress import Progress, silent, stage
from edgepatch.tensors import ModelSpec
from edgepatch.text.tokenizers import FolderTokenizer

Precision = Literal["fp32", "fp16", "int8", "int4"]
Exporter = Literal["builder", "transformers", "optimum"]

CONFIG_FILE = "genai_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
NORM, LAYER = re.compile(r"norm\w*\.weight$"), re.compile(r"\.layers\.(\d+)\.")
COPIED_FILES = (*TOKENIZER_FILES, "config.json")


def export(
    folder: Path,
    target: Path,
    precision: Precision,
    exporter: Exporter = "builder",
    optimum_env: Path | None = None,
    adapter: Path | None = None,
    progress: Progress = silent,
) -> Agreement:
    """Writes an ONNX folder of a Transformers folder: graph, weights, tokenizer, settings and ``ModelSpec``.

    Weights saved in half precision are widened first, so that they give the same graph as the same values in float32.
    A builder's graph of a model with sliding-window attention gets a context no longer than its window. The graph takes its
    place only after it has continued a random seed as the model itself does.

    Args:
        folder: holds config, safetensors weights and tokenizer.
        target: the ONNX folder; an older one is replaced once the new one is complete, anything else is left alone.
        precision: "fp32"; "fp16", cache included; or weights in blocks of 32 with "int8" or "int4" (k-quant, sensitive layers
            in int8).
        exporter: "builder", "transformers" or "optimum".
        optimum_env: virtual environment for optimum; made, with optimum in it, if it does not exist.
        adapter: PEFT LoRA folder that the graph applies beside the weights, unmerged and in full precision; builder only.
        progress: told of the export and of the comparison with the model.

    Raises:
        InputError: the folder or its architecture cannot be exported, the graph does not agree with the model, or the target
            cannot be written.
        MissingExtraError: a package of the extra "convert" is missing.
    """
    require_choices(precision, exporter)
    if adapter is not None and (exporter != "builder" or precision == "fp16"):
        raise InputError(
            f"adapters go into graphs of the builder in fp32, int8 or int4, found {exporter} and {precision}",
            hint="merge the adapter into its base",
        )
    spec = folders.read_spec(folder)
    with replacement(target) as unfinished, _adapted(folder, adapter) as oracle:
        with stage(progress, f"export {precision}"):
            _write_graph(folder, unfinished, precision, exporter, optimum_env, adapter)
        if exporter == "builder":
            _require_sound(unfinished / MODEL_FILE, spec)
            _keep_within_window(unfinished / CONFIG_FILE, folders.read_config(folder))
        stamp(unfinished / MODEL_FILE, identity(spec, QUANTIZATIONS[precision]))
        _copy_tokenizer(folder, unfinished)
        with stage(progress, "compare with model"):
            return compare(unfinished, spec, oracle)


def require_choices(precision: str, exporter: str) -> None:
    """Raises for what no export can be, before any work."""
    if precision not in QUANTIZATIONS:
        raise InputError(f"precision: expected one of {', '.join(QUANTIZATIONS)}, found {precision!r}")
    if exporter not in EXPORTERS:
        raise InputError(f"exporter: expected one of {', '.join(EXPORTERS)}, found {exporter!r}")
    require_packages(exporter)


@contextmanager
def _adapted(folder: Path, adapter: Path | None) -> Iterator[Path]:
    """What the graph must compute: the folder itself, or a temporary one with the adapter merged."""
    if adapter is None:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        merge_lora(folder, adapter, Path(temporary) / "merged")
        yield Path(temporary) / "merged"


def _write_graph(
    folder: Path, target: Path, precision: Precision, exporter: Exporter, optimum_env: Path | None, adapter: Path | None
) -> None:
    if exporter == "builder":
        # The builder's own fp16 graph for the CPU is broken; converting its float32 graph works.
        build(folder, target, "fp32" if precision == "fp16" else precision, adapter)
        if precision != "fp16":
            return
    elif exporter == "transformers":
        export_with_transformers(folder, target)
    elif optimum_env is None:
        raise InputError("optimum needs an environment of its own", hint="name a folder for it: --optimum-env DIR")
    else:
        export_with_optimum(folder, target, optimum_env)
    reduce(target / MODEL_FILE, precision)


def stamp_folder(folder: Path, base: Path | None = None, model_file: str | None = None) -> Agreement | None:
    """Says in a graph that others have exported which model it is.

    With the base model at hand the graph must first prove to be that model; tokenizer and settings of the base take the place
    of the folder's own, which an exporter may have changed. Without it, the folder's own tokenizer and settings are believed,
    and the graph must hold the norm vectors by their names.

    Args:
        folder: ONNX folder, for example of optimum.
        base: Transformers folder of the model.
        model_file: of several graphs in the folder the one to take.

    Returns:
        How close the graph is to the base model; ``None`` without one.

    Raises:
        InputError: the graph cannot be seeded, does not compute what the model computes, or does not tell its norm vectors.
        MissingExtraError: a package of the extra "convert" is missing.
    """
    require_packages("optimum")
    path = find_model_file(folder, model_file)
    if base is not None:
        spec = folders.read_spec(base)
        agreement = compare(folder, spec, base, model_file)
        _copy_tokenizer(base, folder)
        stamp(path, identity(spec, agreement.quantization))
        return agreement
    file = open_folder(folder, model_file)
    spec = folders.read_spec(folder, _norms(file, folder))
    graph = recognise(open_session(prove_session(file, spec=spec)), file, spec)
    stamp(path, identity(spec, quantization(file, graph)))
    return None


def _norms(file: GraphFile, folder: Path) -> dict[str, NDArray[Any]]:
    """Norm vectors that a graph holds by their names in the checkpoint.

    Raises:
        InputError: some are missing: exporters rename what they compute with, such as the 1 + weight of Gemma.
    """
    vectors = {t.name: file.values(t) for t in file.tensors if NORM.search(t.name) and len(t.shape) == 1}
    norms = {name: values for name, values in vectors.items() if values is not None}
    layers = Counter(int(match[1]) for name in norms if (match := LAYER.search(name)))
    num_layers = int(folders.read_config(folder).get("num_hidden_layers", 0))
    if "model.norm.weight" not in norms or set(layers) != set(range(num_layers)) or len(set(layers.values())) != 1:
        raise InputError(
            f"{file.path}: expected the norm vectors of {num_layers} layers and model.norm.weight, found {len(norms)} vectors",
            hint=f"name the model that it was made of: edgepatch convert stamp {folder} --base HF_FOLDER",
        )
    return norms


@contextmanager
def replacement(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that takes its place at the end, or vanishes on any error."""
    require_new_folder(target, ONNX_FOLDER, force=True)
    with replacing_folder(target) as unfinished:
        yield unfinished


def _require_sound(model_file: Path, spec: ModelSpec) -> None:
    """Checks that every layer of a builder's graph can be seeded and that the logits come from behind the last one.

    Raises:
        InputError: the builder has misread the model.
    """
    import onnx

    graph: Any = onnx.load(str(model_file), load_external_data=False).graph
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
        raise InputError(
            f"{spec.model_type}: the builder's graph takes its logits from {node.name}, not from the final norm",
            hint="convert the model to GGUF instead",
        )


def _keep_within_window(config_file: Path, config: dict[str, Any]) -> None:
    """Ends the context where sliding-window attention would start to forget: the seed is the first that it forgets."""
    window = config.get("sliding_window")
    slides = config["model_type"] == "mistral" or "sliding_attention" in (config.get("layer_types") or [])
    if not window or not slides:
        return
    settings = strict_json.read_json(config_file)
    settings["model"]["context_length"] = min(settings["model"]["context_length"], window)
    settings["search"]["max_length"] = settings["model"]["context_length"]
    config_file.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def _copy_tokenizer(folder: Path, target: Path) -> None:
    """Takes the tokenizer as it is: an exporter loads and saves it again, which can add tokens and change its digest."""
    for name in COPIED_FILES:
        (target / name).unlink(missing_ok=True)
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    tokenizer = FolderTokenizer(folder)
    if not (target / "tokenizer.json").is_file():
        (target / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
    settings = {"eos_token_id": sorted(tokenizer.end_token_ids), **defaults.of_folder(folder).generation_config}
    (target / "generation_config.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")

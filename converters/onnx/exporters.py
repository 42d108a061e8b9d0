"""Three ways to an ONNX graph of a Transformers folder, each in a process of its own: they print, and change the libraries that they use.

- ``builder``: onnxruntime-genai's model builder. Few architectures, the fastest graphs, quantized as it goes.
- ``transformers``: Transformers' own ``OnnxExporter``. Many architectures.
- ``optimum``: Hugging Face optimum, which needs transformers < 4.58 and therefore a virtual environment of its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgepatch.converters.hf import folders
from edgepatch.converters.onnx.files import MODEL_FILE
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.files.writing import hint_behind
from edgepatch.processes.programs import Ended, run_program

EXPORTERS = ("builder", "transformers", "optimum")
PACKAGES: dict[str, dict[str, tuple[str, str]]] = {  # exporter -> import name -> (distribution, extra)
    "all": {
        "torch": ("torch", "convert"),
        "transformers": ("transformers", "convert"),
        "onnx": ("onnx", "convert"),
        "onnxruntime": ("onnxruntime", "onnx"),
    },
    "builder": {"onnxruntime_genai": ("onnxruntime-genai", "convert"), "onnx_ir": ("onnx-ir", "convert")},
    "transformers": {"onnxscript": ("onnxscript", "convert"), "onnx_ir": ("onnx-ir", "convert")},
    "optimum": {},
}
OPTIMUM_PACKAGES = ("optimum-onnx==0.1.0", "onnxruntime")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

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

make_matmul = Model.make_matmul


def keep_precisions(self, matmul, basename):
    path, node = basename.rsplit("/", 1)
    block, projection = path.rsplit("/", 1)
    if hasattr(matmul, "base_layer"):  # the quantizer would round the adapter too, or fail on rows shorter than a block
        for factor in ("lora_A", "lora_B"):
            self.exclude_node_from_quantization(f"{path}/{factor}/{node}")
    # Without adapter q, k and v are one matrix, which is as fine everywhere as v must be.
    precisions = getattr(self, "int4_customized_weight_config", {})
    packed = precisions.get(f"{block}/qkv_proj/{node}")
    if packed and projection in ("q_proj", "k_proj") and not self.attention_attrs["q_norm"]:
        precisions[basename] = packed


def make_matmul_beside_lora(self, matmul, basename, *inputs, **kwargs):
    if self.matmul_attrs["use_lora"]:
        keep_precisions(self, matmul, basename)
    return make_matmul(self, matmul, basename, *inputs, **kwargs)


Model.make_matmul = make_matmul_beside_lora

folder, target, precision, cache, *extra = sys.argv[1:]
options = builder.parse_extra_options("", folder, target, precision, "cpu", cache, extra)
builder.create_model("", folder, target, precision, "cpu", cache, **options)
"""
TRANSFORMERS = """
import sys
from pathlib import Path
import torch
from edgepatch.files.pretrained import load_pretrained_model
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.exporters import OnnxConfig, OnnxExporter

folder, target = sys.argv[1:]
model = load_pretrained_model(AutoModelForCausalLM, Path(folder), dtype=torch.float32).eval()
cache = DynamicCache(config=model.config)
with torch.no_grad():
    model(input_ids=torch.ones(2, 7, dtype=torch.long), past_key_values=cache)
inputs = {
    "input_ids": torch.ones(2, 3, dtype=torch.long),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
    "position_ids": torch.arange(7, 10)[None].repeat(2, 1),
    "past_key_values": cache,
}
exporter = OnnxExporter()
exporter.save_program(exporter.export(model, inputs, OnnxConfig(dynamic=True)).program, target + "/model.onnx")
"""
OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export

folder, target = sys.argv[1:]
main_export(folder, output=target, task="text-generation-with-past", device="cpu", dtype="fp32", do_validation=False, trust_remote_code=False)
"""


def require_packages(exporter: str) -> None:
    """Checks that this environment has what an exporter needs.

    Raises:
        MissingExtraError: a package is missing.
    """
    for module, (distribution, extra) in (PACKAGES["all"] | PACKAGES[exporter]).items():
        if importlib.util.find_spec(module) is None:
            raise MissingExtraError(distribution, extra)


def build(folder: Path, target: Path, precision: str, adapter: Path | None = None) -> None:
    """The graph of onnxruntime-genai's model builder, with its settings file.

    Args:
        folder: Transformers folder.
        target: gets the graph.
        precision: "fp32", "int8" or "int4".
        adapter: PEFT LoRA folder; its products stand beside those of the weights, unmerged and in float32.

    Raises:
        InputError: the builder does not know the architecture, or fails.
    """
    arguments = [precision, "cache", "hf_remote=false", *BUILDER_OPTIONS[precision]]
    if adapter is not None:
        arguments.append(f"adapter_path={adapter.resolve()}")
    done = _run(sys.executable, BUILDER, [str(folder.resolve()), str(target.resolve()), *arguments])
    if not done.failure and (target / MODEL_FILE).is_file():
        return
    architecture = folders.read_config(folder).get("architectures")
    if "NotImplementedError" in done.complaints or not architecture:
        raise InputError(
            f"the ONNX model builder does not know the architecture {architecture}",
            hint="use Transformers' own exporter (--exporter transformers), or convert the model to GGUF",
        )
    raise InputError(
        f"the ONNX model builder failed on {architecture}: it {done.failure or 'wrote no graph'}",
        hint=hint_behind(
            done.complaints, "use Transformers' own exporter (--exporter transformers), or convert the model to GGUF"
        ),
    )


def export_with_transformers(folder: Path, target: Path) -> None:
    """The float32 graph of Transformers' ``OnnxExporter``.

    Raises:
        InputError: it fails.
    """
    done = _run(sys.executable, TRANSFORMERS, [str(folder.resolve()), str(target.resolve())])
    if done.failure or not (target / MODEL_FILE).is_file():
        raise InputError(
            f"Transformers cannot export {folders.read_config(folder).get('architectures')}: it {done.failure or 'wrote no graph'}",
            hint=hint_behind(done.complaints, "check memory and disk, or convert the model to GGUF"),
        )


def export_with_optimum(folder: Path, target: Path, environment: Path) -> None:
    """The float32 graph of optimum, run in its own virtual environment.

    Raises:
        InputError: the environment has no optimum and cannot be made, or the export fails.
    """
    python = optimum_python(environment)
    with tempfile.TemporaryDirectory() as copy, tempfile.TemporaryDirectory() as exported:
        _write_for_transformers_4(folder, Path(copy))
        done = _run(str(python), OPTIMUM, [copy, exported])
        if done.failure or not (Path(exported) / MODEL_FILE).is_file():
            raise InputError(
                f"optimum cannot export {folders.read_config(folder).get('architectures')}: it {done.failure or 'wrote no graph'}",
                hint=hint_behind(done.complaints, "use Transformers' own exporter (--exporter transformers)"),
            )
        for file in Path(exported).glob(f"{MODEL_FILE}*"):  # the rest is settings and tokenizer as version 4 sees them
            shutil.move(str(file), target / file.name)


def _write_for_transformers_4(folder: Path, copy: Path) -> None:
    """A model folder as Transformers 4 wants it: it knows no ``rope_parameters`` and would silently take its own rope theta.

    The tokenizer stays out: version 4 does not know the class that version 5 names, and the graph does not need it.
    """
    for weights in folder.glob("*.safetensors*"):
        (copy / weights.name).symlink_to(weights.resolve())
    config = rope_of_transformers_4(folders.read_config(folder))
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")


def rope_of_transformers_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its rotary settings where Transformers 4 looks for them."""
    parameters = config.get("rope_parameters")
    if not parameters:
        return dict(config)
    full = dict(parameters.get("full_attention", parameters))
    local = parameters.get("sliding_attention")
    rewritten = {key: value for key, value in config.items() if key != "rope_parameters"}
    if "rope_theta" in full:
        rewritten["rope_theta"] = full.pop("rope_theta")
    if "partial_rotary_factor" in full:
        rewritten["partial_rotary_factor"] = full.pop("partial_rotary_factor")
    rewritten["rope_scaling"] = full if full.get("rope_type", "default") != "default" else None
    if local:
        rewritten["rope_local_base_freq"] = local["rope_theta"]
    return rewritten


def optimum_python(environment: Path) -> Path:
    """Python of a virtual environment that has optimum's ONNX exporter; an environment that does not exist is made.

    Raises:
        InputError: the folder is something else, or optimum cannot be installed.
    """
    python = environment.absolute() / "bin" / "python"
    if not python.exists():
        if environment.exists() and (not environment.is_dir() or any(environment.iterdir())):
            raise InputError(
                f"--optimum-env {environment}: expected a virtual environment or a new folder, found something else",
                hint="name a folder that does not exist",
            )
        _make_environment(environment, python)
    done = _run(str(python), "import optimum.exporters.onnx", [])
    if done.failure:
        raise InputError(
            f"--optimum-env {environment}: optimum's ONNX exporter cannot be used there: it {done.failure}",
            hint=f"install it there: pip install {' '.join(OPTIMUM_PACKAGES)}, or name a folder that does not exist",
        )
    return python


def _make_environment(environment: Path, python: Path) -> None:
    # Torch goes first and alone, in the version at hand: pip then takes the same build of it.
    torch = "torch==" + importlib.metadata.version("torch").split("+")[0]
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    commands = [[sys.executable, "-m", "venv", str(environment)], [*pip, torch], [*pip, *OPTIMUM_PACKAGES]]
    try:
        for command in commands:
            done = run_program(command)
            if done.failure:
                raise InputError(
                    f"cannot make an environment for optimum: {command[0]} {done.failure}",
                    hint="check the network and the venv module, or make it yourself and name it with --optimum-env",
                )
    except BaseException:
        shutil.rmtree(environment, ignore_errors=True)
        raise


def _run(python: str, program: str, arguments: Sequence[str]) -> Ended:
    with tempfile.TemporaryDirectory() as empty:  # "-c" imports from the working folder first
        command = [python, "-c", program, *arguments]
        return run_program(command, environment={**OFFLINE, "PYTHONPATH": ""}, folder=empty)

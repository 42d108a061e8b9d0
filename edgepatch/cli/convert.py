"""``convert``: base models and patches to and from each runtime's format."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepatch.cli.application import Application, app
from edgepatch.cli.console import (
    ForceFlag,
    JsonFlag,
    LogOption,
    counted,
    log_beside,
    model_path,
    new_file,
    note,
    print_json,
    progress_bars,
)
from edgepatch.errors import InputError
from edgepatch.files.writing import require_new_file, require_new_folder
from edgepatch.progress import stage

if TYPE_CHECKING:
    from edgepatch.converters.origins import Origin
    from edgepatch.patch.file import Patch

convert_app = Application(
    help="Convert base models and patches.\n\nExample: `edgepatch convert base models/llama llama.gguf --type Q4_K_M`",
    no_args_is_help=True,
)
app.add_typer(convert_app, name="convert")


class Target(str, Enum):
    """File formats that a base model is converted to."""

    gguf = "gguf"
    onnx = "onnx"
    transformers = "transformers"


ONNX_TYPES = ("fp32", "fp16", "int8", "int4")
USUAL_TYPES = {Target.gguf: "F16", Target.onnx: "fp32", Target.transformers: "float32"}


@convert_app.command("base")
def convert_base(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", parser=model_path, help="Transformers folder, or GGUF file of any quantization."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="GGUF file, ONNX folder or Transformers folder to write.")
    ],
    to: Annotated[Target, typer.Option("--to", help="Format to write.")] = Target.gguf,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="gguf: F16 (default), Q8_0, Q4_K_M, Q4_0 or another type of llama.cpp. onnx: fp32 (default), fp16, int8, int4. "
            "transformers: float32 (default, exact), bfloat16 (half as large).",
        ),
    ] = None,
    exporter: Annotated[
        str,
        typer.Option(
            "--exporter", help="onnx: builder (fastest graphs), transformers (more architectures) or optimum."
        ),
    ] = "builder",
    optimum_env: Annotated[
        Path | None,
        typer.Option("--optimum-env", help="onnx: virtual environment for optimum; made if it does not exist."),
    ] = None,
    force: ForceFlag = False,
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a Transformers model or a GGUF file to GGUF or ONNX, quantized; or a GGUF file to a Transformers folder.

    GGUF takes every type that llama.cpp quantizes to; a wrong --type lists them. What is made from a quantized GGUF file is no
    more exact than that file, and says so.

    Examples: `edgepatch convert base models/llama llama.gguf --type Q4_K_M`,
    `edgepatch convert base models/llama llama-onnx --to onnx --type int4`,
    `edgepatch convert base models/gemma gemma-onnx --to onnx --exporter transformers`,
    `edgepatch convert base llama-Q4_1.gguf models/llama --to transformers`
    """
    kind = _type_of(kind, to)
    if to is not Target.onnx and (exporter != "builder" or optimum_env is not None):
        raise InputError(
            f"--exporter and --optimum-env: expected with --to onnx, found with --to {to.value}", hint="leave them out"
        )
    if to is Target.gguf:
        require_new_file(target, force)
    elif to is Target.onnx:
        from edgepatch.converters.onnx.files import ONNX_FOLDER

        require_new_folder(target, ONNX_FOLDER, force)
    from edgepatch.converters import base_models

    origin = _origin(source)  # before it may be replaced
    with progress_bars(log or log_beside(target)) as progress:
        if to is Target.onnx:
            base_models.to_onnx(source, target, kind, exporter, optimum_env, progress)
        elif to is Target.transformers:
            base_models.to_transformers(source, target, kind, force, progress)
        else:
            base_models.to_gguf(source, target, kind, progress)
    _tell(origin, target, to, kind, as_json)


def _type_of(kind: str | None, to: Target) -> str:
    """The type that is asked for, as its format spells it: llama.cpp has capitals."""
    if kind is None:
        return USUAL_TYPES[to]
    if to is not Target.gguf:
        return kind.lower()
    if kind.lower() in ONNX_TYPES:
        raise InputError(f"--type {kind}: a type of ONNX, found with --to gguf", hint="add --to onnx")
    return kind.upper()


def _tell(origin: Origin | None, target: Path, to: Target, kind: str, as_json: bool) -> None:
    """Says what was made, how large it is, and what it was made from."""
    files = target.rglob("*") if target.is_dir() else [target]
    size_bytes = sum(file.stat().st_size for file in files if file.is_file())
    if origin:
        note(f"{target}: {origin.note()}")
    if as_json:
        made_from = {"file": origin.file, "quantization": origin.quantization} if origin else None
        print_json(
            {"path": str(target), "format": to.value, "type": kind, "size_bytes": size_bytes, "made_from": made_from}
        )
    else:
        print(f"{target}: {kind}, {size_bytes / 1e6:.1f} MB")


def _origin(source: Path) -> Origin | None:
    """What the source's weights come from, where that is a GGUF file that is quantized."""
    from edgepatch.converters.gguf import header as gguf_header
    from edgepatch.converters.hf import folders
    from edgepatch.converters.origins import Origin, is_quantized

    if source.is_dir():
        return Origin.of_config(folders.read_config(source))
    header = gguf_header.read_header(source)
    return Origin.of_header(header) if is_quantized(header) else None


@convert_app.command("stamp")
def convert_stamp(
    folder: Annotated[
        Path, typer.Argument(metavar="ONNX_FOLDER", help="A graph that was exported elsewhere, with its tokenizer.")
    ],
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Transformers folder that it was made of: the graph must prove to be that model."),
    ] = None,
    model_file: Annotated[
        str | None, typer.Option("--file", help="The graph within the folder; default: model.onnx or onnx/model.onnx.")
    ] = None,
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Write into an ONNX graph of optimum, onnxruntime-genai or Transformers which model it is, so that it takes patches.

    Example: `edgepatch convert stamp downloads/llama-onnx --base models/llama`
    """
    from edgepatch.converters.onnx import conversion as onnx

    with progress_bars(log or log_beside(folder)) as progress, stage(progress, "compare" if base else "stamp"):
        agreement = onnx.stamp_folder(folder, base, model_file)
    if as_json:
        difference = agreement.max_difference if agreement else None
        print_json({"path": str(folder), "compared": agreement is not None, "max_abs_dlogit": difference})
    elif agreement:
        print(f"{folder}: computes what {base} computes; largest difference of a logit {agreement.max_difference:.1e}")
    else:
        print(f"{folder}: stamped by its own settings and norm vectors; not compared with a model")


@convert_app.command("baked")
def convert_baked(
    folder: Annotated[Path, typer.Argument(metavar="ONNX_FOLDER", help="Graph of onnxruntime-genai's builder.")],
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch with a KV seed.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    force: ForceFlag = False,
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Bake a patch into a graph for programs that run onnxruntime-genai, which takes no seeds.

    Such a program appends P tokens of any kind first, by themselves, and then its prompt.

    Example: `edgepatch convert baked llama-onnx detox-1.0.0.safetensors llama-detox-genai`
    """
    from edgepatch.converters.onnx import baked
    from edgepatch.converters.onnx.files import ONNX_FOLDER
    from edgepatch.patch.file import read_patch

    require_new_folder(target, ONNX_FOLDER, force)
    patch = read_patch(patch_file)
    with progress_bars(log or log_beside(target)) as progress, stage(progress, "bake"):
        baked.bake_seed(folder, patch, target)
    count = patch.num_virtual_tokens
    _note_place(patch)
    if as_json:
        print_json({"path": str(target), "patch_digest": patch.digest, "num_virtual_tokens": count})
    else:
        print(
            f"{target}: patch {patch.digest[:12]}; append {counted(count, 'token')} of any kind, by themselves, before the prompt"
        )


def _note_place(patch: Patch) -> None:
    """What is written has no anchoring: programs that read it move nothing."""
    from edgepatch.seeds.anchoring import FADES

    if patch.anchoring is not None:
        note(
            f"{patch.name} {patch.version} moves {patch.anchoring}; there it stays at the start of the text, and {FADES}"
        )


@convert_app.command("seed")
def convert_seed(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")],
    model: Annotated[
        Path,
        typer.Option(
            "--model", metavar="MODEL", parser=model_path, help="Transformers folder or GGUF file of the base model."
        ),
    ],
    out: Annotated[Path, new_file("Patch file to write.")],
    force: ForceFlag = False,
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compute a patch's KV seed and canary with the full-precision model and store them in a new patch file.

    The seed of a soft prompt is stored in float16; a trained K/V prefix stays as it is. How keys of the model turn with their place is
    stored too, so that the seed can be moved and put beside others; where they do not turn, a line says why. The new file is unsigned.

    Example: `edgepatch convert seed detox.safetensors --model models/llama -o detox-1.0.0.safetensors`
    """
    from edgepatch.converters import weight_sketches
    from edgepatch.converters.hf import seeds
    from edgepatch.patch.file import read_patch, write_patch

    patch = read_patch(patch_file)
    with progress_bars(log or log_beside(out)) as progress:
        with stage(progress, "seed and canary"):
            patch = seeds.with_kv_seed(patch, model, note)
        with stage(progress, "sketch"):
            patch = replace(patch, weight_sketch=weight_sketches.sketch_of(model))
        digest = write_patch(patch, out)
    if as_json:
        facts = {"num_virtual_tokens": patch.num_virtual_tokens, "can_move": patch.rotation is not None}
        print_json({"path": str(out), "digest": digest, **facts})
    else:
        print(f"{out}: KV seed of {patch.num_virtual_tokens} virtual tokens, SHA-256 {digest}")


class PatchTarget(str, Enum):
    """Foreign formats that a patch is written to."""

    peft = "peft"
    gguf = "gguf"


@convert_app.command("adapter")
def convert_adapter(
    source: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="PEFT folder, or a GGUF file of `convert patch --to gguf`.")
    ],
    out: Annotated[Path, new_file("Patch file to write.")],
    force: ForceFlag = False,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            parser=model_path,
            help="Its base model: Transformers folder or GGUF file. A PEFT folder needs it.",
        ),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the patch; default: the folder's.")] = "",
    version: Annotated[str, typer.Option("--version", help="Its version (SemVer).")] = "0.1.0",
    as_json: JsonFlag = False,
) -> None:
    """Make a patch of a PEFT adapter: prompt tuning, prefix tuning or cartridge, in safetensors.

    The base model only tells its shape and digests; its weights are not loaded.

    Example: `edgepatch convert adapter adapters/detox --model llama.gguf -o detox.safetensors --name detox`
    """
    from edgepatch.converters.gguf import adapters as adapters_gguf
    from edgepatch.converters.hf import folders
    from edgepatch.converters.peft import adapters as peft
    from edgepatch.patch.file import write_patch

    spec = folders.read_spec(model) if model else None
    if source.is_file() and source.suffix == ".gguf":
        patch = adapters_gguf.read_gguf(source)
        if spec is not None:
            patch.base.require_same(spec)
    elif spec is None:
        raise InputError(f"{source} does not say which model it is for", hint="name the model with --model")
    else:
        patch = peft.read_adapter(source, spec, name, version)
    digest = write_patch(patch, out)
    if as_json:
        holds = {"soft_prompt": patch.soft_prompt is not None, "kv_seed": patch.kv_seed is not None}
        print_json({"path": str(out), "digest": digest, "num_virtual_tokens": patch.num_virtual_tokens, **holds})
    else:
        what = "soft prompt" if patch.soft_prompt else "KV seed"
        print(f"{out}: {what} of {patch.num_virtual_tokens} virtual tokens, SHA-256 {digest}")


@convert_app.command("patch")
def convert_patch(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="PEFT folder or GGUF file to write.")],
    to: Annotated[PatchTarget, typer.Option("--to", help="Format to write.")],
    base_model_name: Annotated[
        str | None,
        typer.Option("--base-model-name", help="What the target calls the base model, e.g. its name on a hub."),
    ] = None,
    peft_type: Annotated[
        str | None,
        typer.Option(
            "--peft-type", help="PROMPT_TUNING, PREFIX_TUNING or CARTRIDGE; default: what the patch was trained as."
        ),
    ] = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a patch as a PEFT adapter folder, or as a GGUF file for registries.

    Examples: `edgepatch convert patch detox.safetensors adapters/detox --to peft --base-model-name org/model`,
    `edgepatch convert patch detox.safetensors detox.gguf --to gguf`
    """
    from edgepatch.converters.gguf import adapters as adapters_gguf
    from edgepatch.converters.peft import adapters as peft
    from edgepatch.patch.file import read_patch

    patch = read_patch(patch_file)
    if to is PatchTarget.peft:
        kind = peft.write_adapter(patch, target, base_model_name, peft_type)
        _note_place(patch)
    elif peft_type is not None:
        raise InputError("--peft-type: expected with --to peft, found with --to gguf", hint="leave it out")
    else:
        require_new_file(target, force)
        adapters_gguf.write_gguf(patch, target, base_model_name)
        kind = "GGUF adapter"
    if as_json:
        print_json({"path": str(target), "format": to.value, "type": kind, "patch_digest": patch.digest})
    else:
        print(f"{target}: {kind} of {patch.num_virtual_tokens} virtual tokens")

"""``convert``: base models and patches to and from each runtime's format."""

from __future__ import annotations

import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgepatch.cli.console import JsonFlag, print_json
from edgepatch.cli.root import app
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.converters import onnx

convert_app = typer.Typer(
    help="Convert base models and patches.\n\nExample: `edgepatch convert base models/llama llama.gguf --type Q4_K_M`",
    no_args_is_help=True,
)
app.add_typer(convert_app, name="convert")


class Target(str, Enum):
    """File formats that a base model is converted to."""

    gguf = "gguf"
    onnx = "onnx"


UNQUANTIZED = ("F32", "F16")


@convert_app.command("base")
def convert_base(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="Transformers folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file or ONNX folder to write.")],
    to: Annotated[Target, typer.Option("--to", help="Format to write.")] = Target.gguf,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="gguf: F16 (default), Q8_0, Q4_K_M, Q4_0, ... onnx: fp32 (default), int8, int4."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a Transformers model to GGUF or ONNX, quantized.

    Examples: `edgepatch convert base models/llama llama.gguf --type Q4_K_M`,
    `edgepatch convert base models/llama llama-onnx --to onnx --type int4`
    """
    kind = kind or ("F16" if to is Target.gguf else "fp32")
    (_convert_gguf if to is Target.gguf else _convert_onnx)(source, target, kind)
    files = target.rglob("*") if target.is_dir() else [target]
    size_bytes = sum(file.stat().st_size for file in files if file.is_file())
    if as_json:
        print_json({"path": str(target), "format": to.value, "type": kind, "size_bytes": size_bytes})
    else:
        print(f"{target}: {kind}, {size_bytes / 1e6:.1f} MB")


def _convert_gguf(source: Path, target: Path, kind: str) -> None:
    from edgepatch.converters import gguf

    if kind in UNQUANTIZED:
        gguf.convert_folder(source, target, kind)
        return
    if kind not in gguf.quantization_types():
        raise InputError(f"--type: llama.cpp has no type {kind}", hint="common ones are F16, Q8_0, Q4_K_M and Q4_0")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        full = Path(folder) / "F16.gguf"
        gguf.convert_folder(source, full, "F16")
        gguf.quantize(full, target, kind)


def _convert_onnx(source: Path, target: Path, kind: str) -> None:
    from edgepatch.converters import onnx

    onnx.export(source, target, cast("onnx.Precision", kind))


@convert_app.command("seed")
def convert_seed(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch with a soft prompt.")],
    model: Annotated[Path, typer.Option("--model", help="Transformers folder of the base model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.")],
    as_json: JsonFlag = False,
) -> None:
    """Compute a patch's KV seed with the full-precision model and store it, in float16, in a new patch file.

    Example: `edgepatch convert seed detox.safetensors --model models/llama -o detox-1.0.0.safetensors`
    """
    from edgepatch.converters import hf
    from edgepatch.patches import read_patch, write_patch

    patch = hf.with_kv_seed(read_patch(patch_file), model)
    digest = write_patch(patch, out)
    if as_json:
        print_json({"path": str(out), "digest": digest, "num_virtual_tokens": patch.num_virtual_tokens})
    else:
        print(f"{out}: KV seed of {patch.num_virtual_tokens} virtual tokens, SHA-256 {digest}")

"""``compose`` and ``card``: a patch of several, and the page that a hub shows of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.console import JsonFlag, print_json
from edgepatch.cli.root import app


@app.command()
def compose(
    patch_files: Annotated[list[Path], typer.Argument(metavar="PATCH PATCH...", help="Patch files of soft prompts, in order.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.")],
    model: Annotated[Path, typer.Option("--model", help="Full-precision base: Transformers folder, or GGUF file of 16 or 32 bits.")],
    name: Annotated[str, typer.Option("--name", help="Name of the new patch.")],
    version: Annotated[str, typer.Option("--version", help="Its version (SemVer).")] = "0.1.0",
    channel: Annotated[str, typer.Option("--channel", help="Default: that of the parts, if they agree.")] = "",
    sequence: Annotated[int, typer.Option("--sequence", help="Number of the release within its channel.")] = 1,
    created: Annotated[str, typer.Option("--created", help="Time like 2026-11-21T10:00:00Z; left out by default, for equal bytes.")] = "",
    expires: Annotated[str, typer.Option("--expires", help="The same; default: with the first of its parts.")] = "",
    license_: Annotated[str, typer.Option("--license", help="SPDX expression; default: those of all parts.")] = "",
    summary: Annotated[str, typer.Option("--summary", help="A sentence for people.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Make one patch of several for the same base: their soft prompts in order, the seed and the canary computed anew.

    The new patch is unsigned and not evaluated: sign it, and measure it, as one of its own.

    Example: `edgepatch compose detox.safetensors polite.safetensors -o both.safetensors --model models/llama --name both`
    """
    from edgepatch.converters.composition import compose as composed
    from edgepatch.patches import read_patch, write_patch

    parts = [read_patch(file) for file in patch_files]
    told = {"channel": channel, "created": created, "expires": expires, "license": license_, "summary": summary}
    patch = composed(parts, model, name, version, sequence=sequence, **{key: value for key, value in told.items() if value})
    digest = write_patch(patch, out)
    if as_json:
        print_json({"path": str(out), "digest": digest, "num_virtual_tokens": patch.num_virtual_tokens, "parts": list(patch.parts)})
    else:
        print(f"{out}: {len(parts)} patches, {patch.num_virtual_tokens} virtual tokens, SHA-256 {digest}; unsigned, not evaluated")


@app.command()
def card(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Markdown file to write.")],
    base_model: Annotated[str, typer.Option("--base-model", help="What the hub calls the base: org/model.")] = "",
    as_json: JsonFlag = False,
) -> None:
    """Write the model card of a patch, by the conventions of the Hugging Face hub.

    Example: `edgepatch card detox-1.1.0.safetensors --base-model org/model -o README.md`
    """
    from edgepatch.model_cards import model_card
    from edgepatch.patches import read_patch, write_atomically

    patch = read_patch(patch_file)
    text = model_card(patch, base_model)
    write_atomically(out, text.encode())
    if as_json:
        print_json({"path": str(out), "digest": patch.digest, "evaluated": "model-index:" in text})
    else:
        print(f"{out}: model card of {patch.name} {patch.version} ({patch.digest[:12]})")

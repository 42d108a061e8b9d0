"""``compose``, ``card`` and ``release``: a patch of several, the page that a hub shows of one, and what a release says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import ForceFlag, JsonFlag, counted, model_path, new_file, note, print_json, shown, warn
from edgepatch.errors import InputError


@app.command()
def compose(
    patch_files: Annotated[
        list[Path], typer.Argument(metavar="PATCH PATCH...", help="Patch files; their order changes nothing.")
    ],
    out: Annotated[Path, new_file("Patch file to write.")],
    model: Annotated[
        Path,
        typer.Option(
            "--model",
            metavar="MODEL",
            parser=model_path,
            help="Full-precision base: Transformers folder, or GGUF file of 16 or 32 bits.",
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="Name of the new patch.")],
    version: Annotated[str, typer.Option("--version", help="Its version (SemVer).")] = "0.1.0",
    channel: Annotated[str, typer.Option("--channel", help="Default: that of the parts, if they agree.")] = "",
    sequence: Annotated[int, typer.Option("--sequence", help="Number of the release within its channel.")] = 1,
    created: Annotated[
        str, typer.Option("--created", help="Time like 2026-11-21T10:00:00Z; left out by default, for equal bytes.")
    ] = "",
    expires: Annotated[str, typer.Option("--expires", help="The same; default: with the first of its parts.")] = "",
    license_: Annotated[str, typer.Option("--license", help="SPDX expression; default: those of all parts.")] = "",
    summary: Annotated[str, typer.Option("--summary", help="A sentence for people.")] = "",
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Make one patch of several for the same base: their seeds side by side, in no order, and a canary that proves each of them.

    The new patch is unsigned and not evaluated: sign it, and measure it, as one of its own.

    Example: `edgepatch compose detox.safetensors polite.safetensors -o both.safetensors --model models/llama --name both`
    """
    from edgepatch.patch.composition import trained_alone, trained_alone_in_words
    from edgepatch.patch.file import read_patch, write_patch
    from edgepatch.seeds.anchoring import place_in_words
    from edgepatch.training.composition import compose as composed

    _require_options(name=name, version=version, sequence=sequence)
    parts = [read_patch(file) for file in patch_files]
    fields = {"channel": channel, "created": created, "expires": expires, "license": license_, "summary": summary}
    _require_options(**{key: value for key, value in fields.items() if value})
    with shown("compose"):
        patch = composed(
            parts, model, name, version, sequence=sequence, **{key: value for key, value in fields.items() if value}
        )
    digest = write_patch(patch, out)
    place = place_in_words(patch.anchoring)
    for part in parts:
        if part.anchoring != patch.anchoring:
            note(
                f"{part.name} {part.version} alone {place_in_words(part.anchoring)}; beside the others it {place}: "
                "measure what that costs, or train them alike"
            )
    alone = trained_alone(parts)
    if alone:
        warn(trained_alone_in_words(alone))
    if as_json:
        print_json(
            {
                "path": str(out),
                "digest": digest,
                "num_virtual_tokens": patch.num_virtual_tokens,
                "anchoring": patch.anchoring.as_dict() if patch.anchoring else None,
                "parts": list(patch.parts),
            }
        )
    else:
        print(
            f"{out}: {counted(len(parts), 'patch', 'patches')}, {counted(patch.num_virtual_tokens, 'virtual token')}, {place}; SHA-256 {digest}; "
            "unsigned, not evaluated"
        )


def _require_options(**values: object) -> None:
    """Raises for what no manifest may hold, before any work."""
    from edgepatch.patch.manifest import require_option

    for key, value in values.items():
        require_option(key, value)


@app.command()
def card(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")],
    out: Annotated[Path, new_file("Markdown file to write.")],
    base_model: Annotated[str, typer.Option("--base-model", help="What the hub calls the base: org/model.")] = "",
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write the model card of a patch, by the conventions of the Hugging Face hub.

    Example: `edgepatch card detox-1.1.0.safetensors --base-model org/model -o README.md`
    """
    from edgepatch.files.writing import write_atomically
    from edgepatch.patch.card import model_card
    from edgepatch.patch.file import read_patch

    patch = read_patch(patch_file)
    text = model_card(patch, base_model)
    write_atomically(out, text.encode())
    if as_json:
        print_json({"path": str(out), "digest": patch.digest, "evaluated": "model-index:" in text})
    else:
        print(f"{out}: model card of {patch.name} {patch.version} ({patch.digest[:12]})")


@app.command()
def release(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file as trained or composed.")],
    out: Annotated[Path, new_file("Patch file to write.")],
    version: Annotated[str, typer.Option("--version", help="SemVer; default: as it is.")] = "",
    sequence: Annotated[
        int, typer.Option("--sequence", help="Number of the release within its channel; 0 leaves it.")
    ] = 0,
    channel: Annotated[str, typer.Option("--channel", help="stable, beta, ...")] = "",
    expires: Annotated[str, typer.Option("--expires", help="Time like 2027-11-21T10:00:00Z.")] = "",
    license_: Annotated[str, typer.Option("--license", help="SPDX expression.")] = "",
    summary: Annotated[str, typer.Option("--summary", help="A sentence for people.")] = "",
    results: Annotated[
        Path | None, typer.Option("--results", help="results.json of the bench, measured with this very patch.")
    ] = None,
    supersedes: Annotated[
        list[Path] | None, typer.Option("--supersedes", help="Patch file that this one replaces; repeatable.")
    ] = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Set what a release says of itself, and take in what was measured. The new file is unsigned: sign it last.

    Example: `edgepatch release detox.safetensors --version 1.1.0 --sequence 2 --results out/demo/results.json -o detox-1.1.0.safetensors`
    """
    from edgepatch.patch.file import read_patch, write_patch

    patch = read_patch(patch_file)
    fields: dict[str, Any] = {
        "version": version,
        "sequence": sequence,
        "channel": channel,
        "expires": expires,
        "license": license_,
        "summary": summary,
    }
    changes = {key: value for key, value in fields.items() if value}
    _require_options(**changes)
    if results is not None:
        changes["evaluation"] = measured(results, patch.digest)
    if supersedes:
        changes["supersedes"] = tuple(read_patch(file).digest for file in supersedes)
    released = replace(patch, signatures=(), **changes)
    digest = write_patch(released, out)
    if as_json:
        print_json(
            {
                "path": str(out),
                "digest": digest,
                "version": released.version,
                "channel": released.channel,
                "sequence": released.sequence,
            }
        )
    else:
        print(
            f"{out}: {released.name} {released.version}, {released.channel} {released.sequence}, SHA-256 {digest}; unsigned"
        )


def measured(results: Path, digest: str) -> dict[str, Any]:
    """What the bench found, for the manifest: figures without texts.

    Raises:
        InputError: the file is no results document, or was measured with another patch.
    """
    from edgepatch.files.strict_json import read_json

    hint = "name a results.json that the bench wrote"
    document = read_json(results, what="results", hint=hint)
    try:
        measured_digest = document["patch"]["digest"]
        kept = {
            "created": document["created"],
            "measured_digest": measured_digest,
            "cells": document["cells"],
            "retention": document["retention"],
            **({"source": source} if (source := _source(document)) else {}),
        }
    except (KeyError, TypeError) as error:
        raise InputError(f"cannot read results from {results}: {error}", hint) from None
    if measured_digest != digest:
        raise InputError(
            f"{results}: measured with the patch {measured_digest}, this one is {digest}", hint="measure this patch"
        )
    return kept


def _source(document: Mapping[str, Any]) -> str:
    """On how much of what a results document rests; "" where it does not say."""
    counts = [str(row["num_items"]) for row in document["cells"] if row.get("num_items")]
    data = document.get("settings", {}).get("data")
    return f"{'/'.join(dict.fromkeys(counts))} items, {data}" if counts and data else ""

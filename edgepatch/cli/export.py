"""``export``, ``check-export`` and ``check-server``: a patch for clients and servers that are not ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import (
    ForceFlag,
    JsonFlag,
    TemplateOption,
    cell,
    model_path,
    print_json,
    read_template,
    shown,
    stdout,
    tell,
)
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.exports.targets import TARGETS

if TYPE_CHECKING:
    from edgepatch.llama_server.client import LlamaServer

PatchArgument = Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")]
GGUFOption = Annotated[
    Path,
    typer.Option("--model", "-m", metavar="MODEL", parser=model_path, help="The GGUF file that the server loads."),
]
KVTypeOption = Annotated[str, typer.Option("--kv-type", help="Type of the server's KV cache: f16, f32, q8_0, ...")]
FlashOption = Annotated[
    bool, typer.Option("--flash-attn/--no-flash-attn", help="Whether the server uses flash attention.")
]
KeyOption = Annotated[
    Path | None, typer.Option("--api-key-file", help="Holds the server's key, if it has one. Else LLAMA_API_KEY.")
]


ClientOption = Annotated[
    Path | None,
    typer.Option(
        "--client",
        metavar="PATH",
        help="Where the client is installed: a folder with node_modules, or a Python interpreter. Default: here.",
    ),
]


def _target(name: str) -> str:
    """A name of the table of targets."""
    if name not in TARGETS:
        raise typer.BadParameter(f"expected {', '.join(TARGETS)}, found {name!r}")
    return name


def _server(url: str, key_file: Path | None) -> LlamaServer:
    """Its key comes from a file or the environment: everyone on a machine sees the command lines of its processes."""
    from edgepatch.llama_server.client import LlamaServer
    from edgepatch.server.settings import read_key_file

    return LlamaServer(url, read_key_file(key_file) if key_file else os.environ.get("LLAMA_API_KEY", ""))


@app.command("export")
def export_patch(
    patch_file: PatchArgument,
    model: Annotated[
        Path,
        typer.Option("--model", "-m", metavar="MODEL", parser=model_path, help="The model that the client loads."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")],
    to: Annotated[
        str,
        typer.Option("--to", metavar="TARGET", callback=_target, help=f"What to export for: {', '.join(TARGETS)}."),
    ] = "llama-server",
    client: ClientOption = None,
    server: Annotated[
        str | None,
        typer.Option("--server", metavar="URL", help="llama-server: take settings from this running one."),
    ] = None,
    slot_dir: Annotated[
        Path | None, typer.Option("--slot-dir", help="llama-server: that server's --slot-save-path.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="llama.cpp: positions of a conversation.")
    ] = None,
    slots: Annotated[int, typer.Option("--slots", min=1, help="llama-server: conversations at a time.")] = 1,
    kv_type: KVTypeOption = "f16",
    flash_attention: FlashOption = True,
    chat_template: TemplateOption = None,
    api_key_file: KeyOption = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a folder with which a client that is not ours runs a patch: the file it reads, an example, what is lost there.

    Whoever owns the client can take the patch off again; `edgepatch serve` does not let its clients do that.

    Example: `edgepatch export detox.safetensors --to transformers.js --model llama-int4 -o for-the-browser`
    """
    from edgepatch.llama_server import export
    from edgepatch.patch.file import read_patch

    if (server is None) != (slot_dir is None):
        raise InputError("--server and --slot-dir belong together", hint="the folder is the server's --slot-save-path")
    if server is not None and to != "llama-server":
        raise InputError(f"--server asks a llama-server, and the export is for {to}", hint="leave it out")
    export.require_replaceable(out, force)
    patch = read_patch(patch_file)
    template = read_template(chat_template) or ""
    options = export.ExportOptions(context, kv_type, flash_attention, slots, template, client)
    with shown("export"):
        if server and slot_dir:
            probe = export.probe(_server(server, api_key_file), slot_dir, model, options)
            manifest = export.export(patch, model, out, options, probe)
        else:
            manifest = TARGETS[to].write(patch, model, out, options)
    if as_json:
        print_json(manifest)
        return
    label = f", under the label {manifest['label']['text']!r}" if "label" in manifest else ""
    print(f"{out}: {patch.name} {patch.version} for {to} with {manifest['model']['file']}{label}")
    tell(f"note: the seed {manifest['place']}")
    if to == "llama-server":
        print(f"start the server with {out / 'start.sh'}, then run {out / 'restore.sh'}, then `edgepatch check-server`")
    else:
        print(f"read {out / 'README.md'}, then run `edgepatch check-export {out}`")


@app.command("check-export")
def check_export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="That `edgepatch export` wrote.")],
    patch_file: Annotated[Path, typer.Option("--patch", "-p", help="The patch that it was made of.")],
    model: Annotated[
        Path,
        typer.Option("--model", "-m", metavar="MODEL", parser=model_path, help="The model that the client loads."),
    ],
    client: ClientOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Run the real client of an export, and compare its tokens and logits with those of our own runtime, patched and bare.

    Exit codes: 0 each client answers with the patch, 1 one does not, 2 it is not installed.

    Example: `edgepatch check-export for-the-browser --patch detox.safetensors --model llama-int4 --client .`
    """
    from edgepatch.exports import checking
    from edgepatch.patch.file import read_patch

    patch = read_patch(patch_file)
    with shown("check"):
        rows = checking.check_export(folder, patch, model, client)
    if as_json:
        print_json([row.as_dict() for row in rows])
    else:
        for row in rows:
            print(
                f"{row.client} {row.version}: {row.verdict}; {row.tokens_equal} of {row.tokens_compared} tokens are ours, "
                f"the bare model differs at {row.bare_differs_at}; loaded in {row.load_ms:.1f} ms"
                + ("" if row.first_token_ratio is None else f"; first token {row.first_token_ratio:.2f} of bare")
            )
    checking.require_proven(rows, folder)


@app.command("check-server")
def check_server(
    url: Annotated[str, typer.Argument(metavar="URL", help="http://127.0.0.1:8080")],
    patch_file: Annotated[Path, typer.Option("--patch", "-p", help="The patch that it should serve.")],
    model: GGUFOption,
    seed_file: Annotated[
        str, typer.Option("--seed-file", help="Name of the slot file in the server's --slot-save-path.")
    ] = "seed.bin",
    fill_context: Annotated[
        bool, typer.Option("--fill-context", help="Also generate beyond a slot's context.")
    ] = False,
    client_restores: Annotated[
        bool, typer.Option("--client-restores", help="The client restores the slot before each conversation.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail also where a prompt that begins otherwise evicts the seed.")
    ] = False,
    kv_type: KVTypeOption = "f16",
    flash_attention: FlashOption = True,
    chat_template: TemplateOption = None,
    api_key_file: KeyOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Prove that a running server gives the patch's answers, or say why not. It compares log-probabilities with our own runtime.

    A llama-server is asked as it is found. If that holds, its slots are restored, also at the end.

    Exit codes: 0 proven, 1 not proven (the message names the cause and the flag that mends it), 2 not reachable.

    Example: `edgepatch check-server http://127.0.0.1:8080 --patch detox.safetensors --model llama-Q4_K_M.gguf`
    """
    from edgepatch.llama_server import check
    from edgepatch.llama_server.export import ExportOptions
    from edgepatch.patch.file import read_patch

    options = ExportOptions(
        kv_type=kv_type, flash_attention=flash_attention, chat_template=read_template(chat_template) or ""
    )
    patch, server = read_patch(patch_file), _server(url, api_key_file)
    report = check.check_server(
        server,
        patch,
        model,
        options,
        seed_file=seed_file,
        client_restores=client_restores,
        fill_context=fill_context,
        strict=strict,
    )
    if as_json:
        print_json(report.as_dict())
    else:
        for finding in report.findings:
            mark = (
                "[green]ok[/green]   "
                if finding.holds
                else "[red]FAIL[/red] "
                if finding.required
                else "[yellow]limit[/yellow]"
            )
            stdout().print(f"{mark} {cell(finding.subject)}: {cell(finding.evidence)}", soft_wrap=True)
            if finding.remedy and not finding.required:
                stdout().print(f"      {cell(finding.remedy)}", soft_wrap=True)
    failed = report.failed
    if failed:
        raise InactivePatchError(f"not proven: {failed.subject}: {failed.evidence}", hint=failed.remedy)
    if not as_json:
        print(f"{url} serves {patch.name} {patch.version}")

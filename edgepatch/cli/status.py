"""``status``, ``list`` and ``history``: what a device runs, has, and was told to do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import (
    ForceFlag,
    JsonFlag,
    StoreOption,
    cell,
    counted,
    model_path,
    note,
    print_json,
    print_table,
    require_new,
    stderr,
    stdout,
    table,
    tell,
)
from edgepatch.errors import InputError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgepatch.inspection.facts import ModelFacts
    from edgepatch.store.audit import Finding
    from edgepatch.store.reading import StoreReader
    from edgepatch.store.records import BaseRecord


@app.command()
def status(
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL", parser=model_path, help="Say instead what this model would run."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            callback=require_new,
            help="Also write it, with the history, as a page to print.",
        ),
    ] = None,
    force: ForceFlag = False,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the active patches, who vouches for them, and what needs attention; the exit code is 3 if one cannot be trusted.

    With --model: which of them this model would run. The exit code is 0 only if `chat` and `serve` would take it.

    Examples: `edgepatch status`, `edgepatch status --html status.html`, `edgepatch status --model llama-Q4_K_M.gguf`
    """
    if model is not None:
        if html is not None:
            raise InputError("--html shows the store, --model what one model would run", hint="leave one out")
        _print_run(model, store, as_json)
        return
    from edgepatch.converters.first_contact import remembered_notes
    from edgepatch.store import audit
    from edgepatch.store.reading import StoreReader

    reader = StoreReader(store)
    report, findings = audit.status(reader)
    report["limited_models"] = remembered_notes()
    limited = [audit.Finding("warning", entry["file"], entry["note"]) for entry in report["limited_models"]]
    if html is not None:
        _write_page(report, [*findings, *limited], reader, html)
    if as_json:
        print_json({**report, "findings": [asdict(finding) for finding in findings]})
    else:
        _print_status(report)
        print_findings([*findings, *limited])
    audit.require_no_error(findings)


def _write_page(report: dict[str, Any], findings: list[Finding], reader: StoreReader, path: Path) -> None:
    from edgepatch.store.page import write_status_page
    from edgepatch.trust.roots import time_text

    time = time_text(reader.time(reader.read()[1]))
    write_status_page(report, findings, reader.history(), time, path)
    note(f"wrote {path}")


def _print_status(report: dict[str, Any]) -> None:
    root = report["trust_root"]
    rows: list[tuple[str, object]] = [("store", report["store"])]
    rows.append(
        (
            "trust root",
            f"version {root['version']}, {root['threshold']} of {', '.join(root['keys'])}" if root else "none",
        )
    )
    for base in report["bases"]:
        rows += _base_rows(base)
    tell(_answer(report))
    stdout().print(table(rows))


def _answer(report: dict[str, Any]) -> str:
    """What this device runs, in a sentence."""
    bases = report["bases"]
    num_patches, num_bare = sum(len(base["patches"]) for base in bases), sum(not base["patches"] for base in bases)
    if not bases:
        return "nothing is active: this device has no patch yet"
    bare = f"; {counted(num_bare, 'model')} without a patch, by word" if num_bare else ""
    verb = "is" if num_patches == 1 else "are"
    return (
        f"{counted(num_patches, 'patch', 'patches')} {verb} active, for {counted(len(bases) - num_bare, 'model')}{bare}"
    )


def _base_rows(base: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("", "")]
    name = base["name"] or base["shape"]
    rows.append(("base", f"{name} ({base['base'][:12]}, weights {base['weight_fingerprint'][:12]})"))
    if base["held"]:
        rows.append(("held", base["hold_reason"] or "yes"))
    for patch in base["patches"]:
        rows.append(("active", f"{patch['name']} {patch['version']} ({patch['digest'][:12]})"))
        rows.append(("release", f"{patch['channel']} {patch['sequence']}, expires {patch['expires'] or 'never'}"))
        rows.append(("signatures", patch["signatures"]))
        if patch["held"]:
            rows.append(("held", patch["hold_reason"] or "yes"))
    if base["composition"]:
        composed = base["composition"]
        rows.append(
            ("together", f"{composed['digest'][:12]}, {composed['num_virtual_tokens']} virtual tokens side by side")
        )
    if not base["patches"]:
        rows.append(("active", "nothing: this model runs without a patch, by word"))
    for slot in base["off"]:
        held = f"; held: {slot['hold_reason'] or 'yes'}" if slot["held"] else ""
        rows.append(("off", f"{slot['name']}: {slot['reason'] or 'replaced'}{held}"))
    return rows


def print_findings(findings: list[Finding]) -> None:
    """Errors and warnings, on stderr."""
    console = stderr()
    for finding in findings:
        colour = "red" if finding.level == "error" else "yellow"
        console.print(
            f"[bold {colour}]{finding.level}:[/] {cell(finding.subject)}: {cell(finding.message)}", soft_wrap=True
        )


def _print_run(model: Path, store: Path | None, as_json: bool) -> None:
    """What a model would run, checked as loading does, but without loading it.

    Raises:
        InputError: it is no model, or nothing is active and nobody asked for the bare model.
        MismatchError: what is active is for other models.
        UntrustedError: what is active cannot be trusted.
    """
    from edgepatch.inspection.models import kind_of_model, read_facts
    from edgepatch.runtimes.patching import together
    from edgepatch.store.reading import StoreReader

    facts, reader = read_facts(model, kind_of_model(model), True), StoreReader(store)
    if facts.spec is None:
        raise InputError(f"{model}: no patch can be for this model: {facts.no_spec}", hint="--bare runs it as it is")
    composed, why = together(reader.require_active(facts.spec)), reader.why_bare(facts.spec)
    runs = _active_entries(facts, reader)
    if as_json:
        print_json(
            {
                "model": str(model),
                "name": facts.origin.name,
                "quantization": facts.quantization,
                "base": facts.base,
                "store": str(reader.folder),
                "patches": runs,
                "bare_by_word": why,
            }
        )
        return
    rows: list[tuple[str, object]] = [("model", f"{model}, {facts.quantization}")]
    rows.append(("base", f"{facts.origin.name or facts.architecture} ({facts.base[:12]})"))
    for patch in runs:
        rows.append(("runs", f"{patch['name']} {patch['version']} ({patch['digest'][:12]}), {patch['trust']}"))
    if len(runs) > 1 and composed is not None:
        rows.append(("together", f"{composed.digest[:12]}, {composed.num_virtual_tokens} virtual tokens side by side"))
    if not runs:
        rows.append(("runs", f"without a patch, by word: {why}"))
    stdout().print(table([*rows, ("store", reader.folder)]))
    if runs:
        note("nothing was loaded; `edgepatch verify --deep --model` also asks the canaries")


def _active_entries(facts: ModelFacts, reader: StoreReader) -> list[dict[str, Any]]:
    """The active patches of a model, each compared with its weights."""
    from edgepatch.inspection.fitting import fitting_patches

    active = [patch for patch in fitting_patches(facts, reader).patches if patch.is_active]
    for patch in active:
        if patch.problem:
            raise MismatchError({f"{patch.name} {patch.version}": ("the model that it was made with", patch.problem)})
    return [
        {"name": patch.name, "version": patch.version, "digest": patch.digest, "trust": patch.trust} for patch in active
    ]


@app.command("list")
def list_patches(store: StoreOption = None, as_json: JsonFlag = False) -> None:
    """List the patches of the store; a star marks the active ones.

    Example: `edgepatch list`
    """
    from edgepatch.store.audit import summary
    from edgepatch.store.reading import StoreReader

    state, _ = StoreReader(store).read()
    active = {digest for record in state.bases.values() for digest in record.active}
    patches = sorted(
        state.patches.items(), key=lambda item: (item[1].base, item[1].name, item[1].channel, item[1].sequence)
    )
    if as_json:
        print_json(
            [
                {
                    **summary(digest, patch),
                    "base": patch.base,
                    "base_name": state.bases[patch.base].name,
                    "active": digest in active,
                }
                for digest, patch in patches
            ]
        )
        return
    rows = [
        (
            "*" if digest in active else "",
            digest[:12],
            f"{patch.name} {patch.version}",
            patch.channel,
            patch.sequence,
            patch.expires or "never",
            f"{patch.base[:12]} {state.bases[patch.base].title}",
        )
        for digest, patch in patches
    ]
    answer = f"{counted(len(patches), 'patch', 'patches')}, {len(active)} active"
    print_table(("", "digest", "patch", "channel", "sequence", "expires", "base"), rows, answer)


@app.command()
def history(store: StoreOption = None, as_json: JsonFlag = False) -> None:
    """Show what was done to the store, oldest first; the exit code is 3 if somebody changed the record.

    Example: `edgepatch history`
    """
    from edgepatch.store.reading import StoreReader

    reader = StoreReader(store)
    entries = reader.history()
    if as_json:
        print_json(entries)
        return
    bases = reader.read()[0].bases
    rows = [(entry["number"], entry["time"], entry["action"], _what(entry, bases), _why(entry)) for entry in entries]
    print_table(("", "time", "action", "what", "why"), rows, f"{counted(len(rows), 'entry', 'entries')}, unchanged")


def _what(entry: dict[str, Any], bases: Mapping[str, BaseRecord]) -> str:
    title = bases[entry["base"]].title if entry.get("base") in bases else ""
    if "patch" in entry:
        beside = f", beside {', '.join(digest[:12] for digest in entry['beside'])}" if "beside" in entry else ""
        release = f"{entry['channel']} {entry['sequence']}"
        base = f", for {title}" if len(bases) > 1 and title else ""
        return f"{entry['name']} {entry['version']} ({entry['patch'][:12]}), {release}{beside}{base}"
    if "version" in entry:
        return f"trust root version {entry['version']} ({entry['fingerprint'][:12]}), sequences {entry['sequences']}"
    of = f"{entry['name']} of " if "name" in entry else ""
    return f"{of}base {title} ({entry['base'][:12]})" if "base" in entry else ""


def _why(entry: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {entry[name]}" for name in ("unsigned", "downgrade", "expired", "reason") if name in entry
    )

"""``apply`` and what belongs to it: the patches of a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edgepatch.cli.application import app
from edgepatch.cli.console import (
    JsonFlag,
    PinnedFlag,
    StoreOption,
    TemplateFlag,
    cell,
    model_path,
    note,
    print_json,
    stderr,
    stdout,
    table,
)
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.store.audit import Finding
    from edgepatch.store.changes import Change
    from edgepatch.tensors import ModelSpec

TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[PATCH|BASE]", help="Name of the patch, or start of the base's id, where the device has several."
    ),
]
NameOption = Annotated[
    str | None, typer.Option("--patch", metavar="NAME", help="Name of the patch, where several are active.")
]
ReasonOption = Annotated[str, typer.Option("--reason", help="The history keeps it.")]
FileArgument = Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")]
ModelOption = Annotated[
    Path | None,
    typer.Option("--model", metavar="MODEL", parser=model_path, help="GGUF file, ONNX folder or Transformers folder."),
]


@app.command()
def apply(
    patch_file: FileArgument,
    model: ModelOption = None,
    store: StoreOption = None,
    channel: Annotated[str, typer.Option("--channel", help="Change over to this channel.")] = "",
    allow_downgrade: Annotated[
        bool, typer.Option("--allow-downgrade", help="Take an older patch; needs --reason.")
    ] = False,
    reason: ReasonOption = "",
    allow_expired: Annotated[
        str, typer.Option("--allow-expired", metavar="REASON", help="Take a patch that has expired.")
    ] = "",
    unsigned: Annotated[
        str,
        typer.Option(
            "--unsigned",
            metavar="REASON",
            help="Take a patch that nobody vouches for, on a device without a trust root.",
        ),
    ] = "",
    as_json: JsonFlag = False,
) -> None:
    """Check a patch and make it the active one of its name; until that is done the old one stays.

    Active patches of other names for the same model stay beside it: they act side by side.

    Example: `edgepatch apply detox-1.1.0.safetensors --model llama-Q4_K_M.gguf`
    """
    from edgepatch.store.device import Store
    from edgepatch.store.policy import Allowances

    if allow_downgrade != bool(reason):
        raise InputError("expected --allow-downgrade together with --reason, found one of them")
    allowances = Allowances(unsigned, reason, allow_expired)
    change = Store(store).apply(patch_file, allowances, model=_spec(model), channel=channel)
    _print_change(change, "active" if change.is_new else "already active", as_json)


def _spec(model: Path | None) -> ModelSpec | None:
    from edgepatch.runtimes import read_spec

    return read_spec(model) if model else None


def _print_change(change: Change, word: str, as_json: bool) -> None:
    from edgepatch.store.audit import summary, title

    if as_json:
        facts = summary(change.digest, change.patch)
        print_json(
            {
                **facts,
                "base": change.patch.base,
                "before": change.before,
                "beside": sorted(change.beside),
                "changed": change.is_new,
                "signed_by": sorted(change.signed_by),
            }
        )
        return
    patch = change.patch
    rows: list[tuple[str, object]] = [
        (word, title(patch)),
        ("digest", change.digest),
        ("release", f"{patch.channel} {patch.sequence}"),
    ]
    rows.append(("base", patch.base[:12]))
    if change.is_new and change.before and change.before != change.digest:
        rows.append(("before", change.before[:12]))
    rows += beside_rows(change)
    if patch.unsigned:
        rows.append(("signatures", f"not checked: {patch.unsigned}"))
    stdout().print(table(rows))


def beside_rows(change: Change) -> list[tuple[str, object]]:
    """The patches that are active beside the one that a change is about."""
    from edgepatch.store.audit import title

    return [("beside", f"{title(other)} ({digest[:12]})") for digest, other in sorted(change.beside.items())]


@app.command()
def status(store: StoreOption = None, as_json: JsonFlag = False) -> None:
    """Show the active patches, who vouches for them, and what needs attention; the exit code is 3 if one cannot be trusted.

    Example: `edgepatch status`
    """
    from edgepatch.converters.first_contact import remembered_notes
    from edgepatch.store import audit
    from edgepatch.store.reading import StoreReader

    report, findings = audit.status(StoreReader(store))
    report["limited_models"] = remembered_notes()
    if as_json:
        print_json({**report, "findings": [asdict(finding) for finding in findings]})
    else:
        _print_status(report)
        limited = [audit.Finding("warning", entry["file"], entry["note"]) for entry in report["limited_models"]]
        _print_findings([*findings, *limited])
    audit.require_no_error(findings)


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
    if not report["bases"]:
        rows.append(("active", "nothing"))
    stdout().print(table(rows))


def _base_rows(base: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("", "")]
    rows.append(("base", f"{base['base'][:12]} ({base['model_type']}, weights {base['weight_fingerprint'][:12]})"))
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


def _print_findings(findings: list[Finding]) -> None:
    console = stderr()
    for finding in findings:
        colour = "red" if finding.level == "error" else "yellow"
        console.print(
            f"[bold {colour}]{finding.level}:[/] {cell(finding.subject)}: {cell(finding.message)}", soft_wrap=True
        )


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
            [{**summary(digest, patch), "base": patch.base, "active": digest in active} for digest, patch in patches]
        )
        return
    rows = Table(box=None, pad_edge=False)
    for heading in ("", "digest", "patch", "channel", "sequence", "expires", "base"):
        rows.add_column(heading)
    for digest, patch in patches:
        marker = "*" if digest in active else ""
        entries = (
            marker,
            digest[:12],
            f"{patch.name} {patch.version}",
            patch.channel,
            patch.sequence,
            patch.expires or "never",
            patch.base[:12],
        )
        rows.add_row(*map(cell, entries))
    stdout().print(rows)


@app.command()
def verify(
    patch_file: Annotated[
        Path | None, typer.Argument(metavar="[PATCH]", help="Patch file; the whole store if not given.")
    ] = None,
    root: Annotated[
        Path | None, typer.Option("--root", help="Trust root that judges PATCH; else that of the store.")
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also load the patch on --model, and see that it works there.")
    ] = False,
    model: ModelOption = None,
    pinned: PinnedFlag = False,
    other_template: TemplateFlag = False,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a patch file, or every byte of the store; the exit code is 0 only if all of it holds.

    Examples: `edgepatch verify detox-1.1.0.safetensors --root root.json`, `edgepatch verify --deep --model llama-Q4_K_M.gguf`
    """
    if deep != (model is not None):
        raise InputError("expected --deep and --model together, found one of them")
    if root and not patch_file:
        raise InputError("--root: expected a patch file with it, found none")
    if patch_file:
        _verify_file(patch_file, root, model, Words(pinned, other_template), store, as_json)
    else:
        _verify_store(model, Words(pinned, other_template), store, as_json)


@dataclass(frozen=True)
class Words:
    """What a user lets pass by word when a model is loaded, as ``load_runtime`` takes it."""

    pinned: bool
    other_template: bool


def _verify_file(
    patch_file: Path, root_file: Path | None, model: Path | None, words: Words, store: Path | None, as_json: bool
) -> None:
    from datetime import datetime, timezone

    from edgepatch.patch.file import PAYLOAD_TYPE, read_patch
    from edgepatch.store.policy import check_expiry
    from edgepatch.store.reading import StoreReader
    from edgepatch.trust.roots import read_root
    from edgepatch.trust.verification import verify_threshold

    patch = read_patch(patch_file)
    reader = StoreReader(store)
    root = read_root(root_file) if root_file else reader.root()
    if root is None:
        raise InputError("expected a trust root, found none", hint="--root ROOT, or `edgepatch trust set ROOT`")
    now = datetime.now(timezone.utc) if root_file else reader.time(reader.read()[1])
    signed_by = verify_threshold(patch.manifest, PAYLOAD_TYPE, patch.signatures, root, "patch", now)
    check_expiry(patch, now, "")
    proof = _prove(model, patch_file, words, store) if model else {}
    names = sorted(root.called(key) for key in signed_by)
    facts = {"name": patch.name, "version": patch.version, "digest": patch.digest, "signed_by": names, **proof}
    if as_json:
        print_json(facts)
    else:
        stdout().print(
            table(
                [
                    (key.replace("_", " "), ", ".join(value) if isinstance(value, list) else value)
                    for key, value in facts.items()
                ]
            )
        )


def _prove(model: Path, patch: Path | None, words: Words, store: Path | None) -> dict[str, str]:
    """Loads a patch, or the active one, on a model; its canary must say that it works."""
    from edgepatch.errors import InactivePatchError
    from edgepatch.runtimes import ACTIVE, load_runtime

    with load_runtime(model, patch or ACTIVE, store=store, **asdict(words)) as runtime:
        if runtime.patch is None:
            raise InactivePatchError(
                f"expected an active patch for {model}, found none", hint="`edgepatch status` shows what is active"
            )
        for part in runtime.parts:
            if part.canary is None:
                raise InactivePatchError(
                    f"patch {part.name} {part.version}: expected a canary, found none",
                    hint="its vendor adds one; without it nothing proves that the patch works",
                )
        runtime.prove()
        for line in runtime.slot.notes:
            note(line)
        return {"works_on": f"{runtime.name} {runtime.quantization}", "system_fingerprint": runtime.system_fingerprint}


def _verify_store(model: Path | None, words: Words, store: Path | None, as_json: bool) -> None:
    from edgepatch.store import audit
    from edgepatch.store.reading import StoreReader

    reader = StoreReader(store)
    findings = audit.verify(reader)
    is_sound = not any(finding.level == "error" for finding in findings)
    proof = _prove(model, None, words, store) if model and is_sound else {}
    patches = len(reader.read()[0].patches)
    if as_json:
        print_json(
            {
                "store": str(reader.folder),
                "patches": patches,
                "findings": [asdict(finding) for finding in findings],
                **proof,
            }
        )
    else:
        _print_findings(findings)
        if is_sound:
            rows: list[tuple[str, object]] = [
                ("store", reader.folder),
                ("verified", f"{patches} patches, trust, history"),
            ]
            stdout().print(table([*rows, *((key.replace("_", " "), value) for key, value in proof.items())]))
    audit.require_no_error(findings)


@app.command()
def rollback(
    target: TargetArgument = None,
    patch: NameOption = None,
    reason: ReasonOption = "",
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the patch active again that was active before the present one of its name; other patches stay.

    Examples: `edgepatch rollback --reason "1.1.0 refuses too much"`, `edgepatch rollback gender`
    """
    from edgepatch.store.device import Store

    base, name = _target(store, target, patch)
    _print_change(Store(store).rollback(base, reason, patch=name), "active", as_json)


@app.command()
def deactivate(
    target: TargetArgument = None,
    patch: NameOption = None,
    reason: ReasonOption = "",
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Take an active patch off; the others stay active. `rollback` of its name or `apply` brings it back.

    Without any other, the model runs bare from then on, by word: `status`, `chat` and `serve` say so, with the reason.

    Example: `edgepatch deactivate gender --reason "it was made for another assistant"`
    """
    from edgepatch.store.device import Store

    base, name = _target(store, target, patch)
    _print_change(Store(store).deactivate(reason, patch=name, base=base), "off", as_json)


@app.command()
def hold(
    target: TargetArgument = None,
    patch: NameOption = None,
    reason: ReasonOption = "",
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Keep what is active: `apply` is refused until `unhold`. With a patch's name, it is refused for that patch alone.

    Example: `edgepatch hold --reason "acceptance test runs"`
    """
    _hold(target, patch, reason, store, True, as_json)


@app.command()
def unhold(
    target: TargetArgument = None, patch: NameOption = None, store: StoreOption = None, as_json: JsonFlag = False
) -> None:
    """Allow `apply` again: for one patch by its name, else for all of the base.

    Example: `edgepatch unhold`
    """
    _hold(target, patch, "", store, False, as_json)


def _hold(target: str | None, patch: str | None, reason: str, store: Path | None, is_held: bool, as_json: bool) -> None:
    from edgepatch.store.device import Store

    start, name = _target(store, target, patch)
    base = Store(store).hold(start, reason, is_held=is_held, patch=name)
    if as_json:
        print_json({"base": base, "patch": name, "held": is_held})
    else:
        print(f"{f'{name} of ' if name else ''}base {base[:12]}: {'held' if is_held else 'not held'}")


def _target(store: Path | None, target: str | None, patch: str | None) -> tuple[str | None, str | None]:
    """(start of a base's id, name of a patch) that a word and ``--patch`` mean.

    Raises:
        InputError: the word is neither a name nor the start of an id.
    """
    from edgepatch.store.reading import StoreReader
    from edgepatch.store.slots import names

    reader = StoreReader(store)
    state, _ = reader.read()
    if target is not None and patch is None and target in names(state):
        return None, target
    if target is not None and not any(base.startswith(target) for base in state.bases):
        choices = ", ".join([*sorted(names(state)), *(base[:12] for base in state.bases)]) or "nothing"
        raise InputError(
            f"{target[:80]!r}: expected the name of a patch or the start of a base's id in {reader.folder}, found {choices}"
        )
    return target, patch


@app.command()
def history(store: StoreOption = None, as_json: JsonFlag = False) -> None:
    """Show what was done to the store, oldest first; the exit code is 3 if somebody changed the record.

    Example: `edgepatch history`
    """
    from edgepatch.store.reading import StoreReader

    entries = StoreReader(store).history()
    if as_json:
        print_json(entries)
        return
    rows = Table(box=None, pad_edge=False)
    for heading in ("", "time", "action", "what", "why"):
        rows.add_column(heading)
    for entry in entries:
        rows.add_row(*map(cell, (entry["number"], entry["time"], entry["action"], _what(entry), _why(entry))))
    stdout().print(rows)


def _what(entry: dict[str, Any]) -> str:
    if "patch" in entry:
        beside = f", beside {', '.join(digest[:12] for digest in entry['beside'])}" if "beside" in entry else ""
        release = f"{entry['channel']} {entry['sequence']}"
        return f"{entry['name']} {entry['version']} ({entry['patch'][:12]}), {release}{beside}"
    if "version" in entry:
        return f"trust root version {entry['version']} ({entry['fingerprint'][:12]}), sequences {entry['sequences']}"
    of = f"{entry['name']} of " if "name" in entry else ""
    return f"{of}base {entry['base'][:12]}" if "base" in entry else ""


def _why(entry: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {entry[name]}" for name in ("unsigned", "downgrade", "expired", "reason") if name in entry
    )


@app.command()
def remove(
    digest: Annotated[str, typer.Argument(metavar="DIGEST", help="Start of the patch's digest.")],
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove a patch that is not active from the store.

    Example: `edgepatch remove 3f2a91c04b7d`
    """
    from edgepatch.store.device import Store

    name = Store(store).remove(digest)
    if as_json:
        print_json({"removed": name})
    else:
        print(f"removed {name[:12]}")

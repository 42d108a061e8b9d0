"""``apply`` and what belongs to it: the patches of a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import (
    JsonFlag,
    PinnedFlag,
    StoreOption,
    TemplateFlag,
    counted,
    model_path,
    note,
    print_json,
    stdout,
    table,
    warn,
)
from edgepatch.cli.status import print_findings
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.store.changes import Change
    from edgepatch.tensors import ModelSpec

TargetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[PATCH|BASE]",
        help="Name of the patch, or start of the base's name or id, where the device has several.",
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would change, and change nothing.")
    ] = False,
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

    Examples: `edgepatch apply detox-1.1.0.safetensors --model llama-Q4_K_M.gguf`,
    `edgepatch apply detox-1.1.0.safetensors --dry-run`
    """
    from edgepatch.patch.composition import trained_alone_in_words
    from edgepatch.store.device import Store
    from edgepatch.store.policy import Allowances

    if allow_downgrade != bool(reason):
        raise InputError("expected --allow-downgrade together with --reason, found one of them")
    allowances = Allowances(unsigned, reason, allow_expired)
    spec, base_name = base_of(model)
    change = Store(store).apply(
        patch_file, allowances, model=spec, channel=channel, base_name=base_name, is_trial=dry_run
    )
    word = ("would become active" if dry_run else "active") if change.is_new else "already active"
    _print_change(change, word, as_json, dry_run)
    if change.trained_alone:
        warn(trained_alone_in_words(change.trained_alone))
    if dry_run and not as_json:
        note(
            "nothing was changed; `edgepatch verify --deep` says whether a patch that is applied works on a model"
            if change.is_new
            else "nothing was changed, and nothing would be"
        )


def base_of(model: Path | None) -> tuple[ModelSpec | None, str]:
    """What ``--model`` is, as patches name it and as it calls itself; nothing where it is left out."""
    from edgepatch.inspection.models import model_name
    from edgepatch.runtimes import read_spec

    return (read_spec(model), model_name(model)) if model else (None, "")


def _print_change(change: Change, word: str, as_json: bool, is_trial: bool = False) -> None:
    from edgepatch.store.audit import summary, title

    if as_json:
        facts = summary(change.digest, change.patch) | ({"dry_run": True} if is_trial else {})
        print_json(
            {
                **facts,
                "base": change.patch.base,
                "before": change.before,
                "beside": sorted(change.beside),
                "trained_alone": list(change.trained_alone),
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
        print_findings(findings)
        if is_sound:
            rows: list[tuple[str, object]] = [
                ("store", reader.folder),
                ("verified", f"{counted(patches, 'patch', 'patches')}, trust, history"),
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
    device = Store(store)
    base = device.hold(start, reason, is_held=is_held, patch=name)
    if as_json:
        print_json({"base": base, "patch": name, "held": is_held})
    else:
        title = device.read()[0].bases[base].title
        print(f"{f'{name} of ' if name else ''}base {title} ({base[:12]}): {'held' if is_held else 'not held'}")


def _target(store: Path | None, target: str | None, patch: str | None) -> tuple[str | None, str | None]:
    """(start of a base's id or name, name of a patch) that a word and ``--patch`` mean.

    Raises:
        InputError: the word is neither the name of a patch nor the start of a base's id or name.
    """
    from edgepatch.store.reading import StoreReader, bases_called
    from edgepatch.store.slots import names

    reader = StoreReader(store)
    state, _ = reader.read()
    if target is not None and patch is None and target in names(state):
        return None, target
    if target is not None and not bases_called(target, state.bases):
        bases = (f"{base[:12]} ({record.title})" for base, record in state.bases.items())
        choices = ", ".join([*sorted(names(state)), *bases]) or "nothing"
        raise InputError(
            f"{target[:80]!r}: expected the name of a patch, or the start of a base's id or name, in {reader.folder}, found {choices}"
        )
    return target, patch


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

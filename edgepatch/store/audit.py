"""What a store says of itself: ``status`` for every day, ``verify`` for every byte."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from edgepatch.errors import EdgepatchError, InputError, UntrustedError
from edgepatch.patch.composition import compose_on_device, trained_alone, trained_alone_in_words
from edgepatch.store.policy import is_expired, time_of
from edgepatch.store.reading import PATCHES, StoreReader, require_vouched, root_of
from edgepatch.store.records import BaseRecord, SlotRecord, State, StoredPatch, TrustState, base_id, shape_of
from edgepatch.tensors import ModelSpec
from edgepatch.trust.roots import Root, time_text
from edgepatch.trust.verification import require_current, require_signed

CLOCK_TOLERANCE = timedelta(minutes=5)
Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """Something that an administrator should know.

    Attributes:
        level: an "error" is refused wherever it matters; after a "warning" all goes on.
        subject: what it is about.
        message: what is wrong.
    """

    level: Level
    subject: str
    message: str


def title(patch: StoredPatch) -> str:
    """A patch for people."""
    return f"{patch.name} {patch.version}"


def status(store: StoreReader) -> tuple[dict[str, Any], list[Finding]]:
    """What is active, who vouches for it, and what is to be done; the active patches are checked, alone and side by side.

    Raises:
        InputError: the store cannot be read.
        UntrustedError: its state was changed.
    """
    state, trust = store.read()
    findings = check_trust(store, trust)
    bases = []
    for base, record in state.bases.items():
        patches = []
        for digest in record.active:
            signatures, problems = check_patch(store, digest, state, trust)
            findings += problems
            patches.append(_active_entry(digest, signatures, state))
        composed, problems = check_composition(store, record, state, trust)
        findings += problems
        bases.append(
            {
                "base": base,
                "name": record.name,
                "shape": shape_of(record.spec),
                "model_type": record.spec["model_type"],
                "weight_fingerprint": record.spec["weight_fingerprint"],
                "held": record.is_held,
                "hold_reason": record.hold_reason,
                "patches": patches,
                "composition": composed,
                "off": [_off_entry(name, slot) for name, slot in sorted(record.slots.items()) if not slot.active],
            }
        )
    return {"store": str(store.folder), "trust_root": root_summary(root_of(trust)), "bases": bases}, findings


def _active_entry(digest: str, signatures: str, state: State) -> dict[str, Any]:
    patch = state.patches[digest]
    slot = state.bases[patch.base].slots[patch.name]
    return {
        **summary(digest, patch),
        "signatures": signatures,
        "held": slot.is_held,
        "hold_reason": slot.hold_reason,
        "previous": list(slot.previous),
    }


def _off_entry(name: str, slot: SlotRecord) -> dict[str, Any]:
    return {
        "name": name,
        "reason": slot.off_reason,
        "held": slot.is_held,
        "hold_reason": slot.hold_reason,
        "previous": list(slot.previous),
    }


def check_composition(
    store: StoreReader, record: BaseRecord, state: State, trust: TrustState
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """(what runs where several patches of a base are active, what is wrong with it); a part that does not load is told by itself."""
    name = f"base {record.title} ({base_id(ModelSpec.from_dict(record.spec))[:12]})"
    if not record.active and record.why_off:
        return None, [Finding("warning", name, f"runs without a patch, by word: {record.why_off}")]
    try:
        parts = [store.load_stored(digest, state, trust) for digest in record.active]
    except (InputError, UntrustedError):
        return None, []
    alone = trained_alone(parts)  # one file may hold several
    findings = [Finding("warning", name, trained_alone_in_words(alone))] if alone else []
    if len(parts) < 2:
        return None, findings
    try:
        patch = compose_on_device(parts)
    except EdgepatchError as error:
        return None, [Finding("error", name, f"its active patches cannot stand side by side: {error}")]
    return {"digest": patch.digest, "num_virtual_tokens": patch.num_virtual_tokens, "trained_alone": alone}, findings


def summary(digest: str, patch: StoredPatch) -> dict[str, Any]:
    """A stored patch, for ``--json``."""
    return {
        "name": patch.name,
        "version": patch.version,
        "digest": digest,
        "channel": patch.channel,
        "sequence": patch.sequence,
        "created": patch.created,
        "expires": patch.expires,
        "unsigned": patch.unsigned,
    }


def root_summary(root: Root | None) -> dict[str, Any] | None:
    """The trust root of a device, for ``--json``."""
    if root is None:
        return None
    role = root.roles["patch"]
    keys = sorted(root.called(key) for key in root.counting("patch"))
    return {
        "version": root.version,
        "fingerprint": root.fingerprint,
        "expires": time_text(root.expires),
        "threshold": role.threshold,
        "keys": keys,
    }


def check_trust(store: StoreReader, trust: TrustState) -> list[Finding]:
    """What is wrong with the trust root and with the clock."""
    findings = []
    root = root_of(trust)
    if root is None:
        findings.append(
            Finding(
                "warning", "trust root", "none: this device cannot tell a genuine patch; `edgepatch trust set ROOT`"
            )
        )
    else:
        try:
            require_signed(root)
        except UntrustedError as error:
            findings.append(Finding("error", "trust root", str(error)))
        try:
            require_current(root, store.time(trust))
        except UntrustedError as error:
            findings.append(
                Finding("warning", "trust root", f"{error}: no patch can be applied until a newer one is set")
            )
    if trust.floor and store.now() < time_of(trust.floor) - CLOCK_TOLERANCE:
        text = f"it says {time_text(store.now())}, but this device has seen {trust.floor}, which counts"
        findings.append(Finding("warning", "clock", f"{text}; if that was wrong: `edgepatch trust reset-clock`"))
    return findings


def check_patch(store: StoreReader, digest: str, state: State, trust: TrustState) -> tuple[str, list[Finding]]:
    """(who vouches for a patch of the store, what is wrong with it)."""
    stored = state.patches[digest]
    findings = []
    if is_expired(stored.expires, store.time(trust)):
        findings.append(
            Finding(
                "warning", title(stored), f"expired on {stored.expires}: get a newer one; it stays active until then"
            )
        )
    try:
        patch = store.load_stored(digest, state, trust)
    except (InputError, UntrustedError) as error:
        return "refused", [*findings, Finding("error", title(stored), str(error))]
    root = root_of(trust)
    if root is None:
        findings.append(Finding("warning", title(stored), f"no signature was checked: {stored.unsigned}"))
        return f"not checked: {stored.unsigned}", findings
    return ", ".join(sorted(root.called(key) for key in require_vouched(patch, trust))), findings


def verify(store: StoreReader) -> list[Finding]:
    """Checks every byte of a store: state, trust root, history, each patch, and that nothing else is there.

    Raises:
        InputError: the store cannot be read.
        UntrustedError: its state was changed, so that the rest means nothing.
    """
    state, trust = store.read()
    findings = check_trust(store, trust)
    try:
        store.history()
    except UntrustedError as error:
        findings.append(Finding("error", "history", str(error)))
    for digest in state.patches:
        findings += check_patch(store, digest, state, trust)[1]
    for record in state.bases.values():
        findings += check_composition(store, record, state, trust)[1]
    folder = store.folder / PATCHES
    names = {store.patch_path(digest).name for digest in state.patches}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name not in names:
            findings.append(Finding("warning", str(path), "not of this store: nothing uses it"))
    return findings


def require_no_error(findings: list[Finding]) -> None:
    """Raises when one of the findings is an error.

    Raises:
        UntrustedError: with the first of them.
    """
    errors = [finding for finding in findings if finding.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise UntrustedError(errors[0].subject, "what was applied", f"an error{more}: {errors[0].message}")

"""Whether a trust root holds, whose signatures stand under a payload, and the way from one trust root to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from edgepatch.errors import UntrustedError
from edgepatch.trust.roots import Key, RoleName, Root, time_text
from edgepatch.trust.signatures import MAX_SIGNATURES, ROOT_TYPE, Signature, fits


def signers(
    payload: bytes, payload_type: str, signatures: Sequence[Signature], keys: Mapping[str, Key]
) -> frozenset[str]:
    """Ids of the known keys that signed. Two signatures of one key are one; those of unknown keys are passed over, as in TUF.

    A signature that claims a known key and does not fit is an error, not one fewer: somebody changed something. So is one of
    a known key under another id. Thus no changed bit goes unseen, however many good signatures stand beside it.

    Raises:
        UntrustedError: one of the two, or more signatures than ``MAX_SIGNATURES``.
    """
    if len(signatures) > MAX_SIGNATURES:
        raise UntrustedError("number of signatures", f"at most {MAX_SIGNATURES}", len(signatures))
    key_ids = set()
    for entry in signatures:
        claimed = keys.get(entry.key_id)
        candidates = [claimed] if claimed else keys.values()
        fitting = [key for key in candidates if fits(payload, payload_type, entry.signature, key.public)]
        if claimed and not fitting:
            raise UntrustedError(
                f"signature of {claimed.owner} ({claimed.id[:12]})",
                f"one over this {payload_type}",
                "one that does not fit",
                hint="the content, its kind or the signature was changed",
            )
        if fitting and not claimed:
            raise UntrustedError(f"key id of the signature of {fitting[0].owner}", fitting[0].id, entry.key_id)
        key_ids |= {key.id for key in fitting}
    return frozenset(key_ids)


def _require_threshold(
    root: Root, role: RoleName, signed: frozenset[str], claimed: Iterable[str], what: str
) -> frozenset[str]:
    """The keys that count among those that signed; enough of them."""
    counting = signed & root.counting(role)
    needed = root.roles[role].threshold
    if len(root.owners(counting)) < needed:  # whoever has two keys is still one
        others = ", ".join(root.called(key) for key in sorted(set(claimed) - counting))
        allowed = ", ".join(root.called(key) for key in sorted(root.counting(role)))
        names = ", ".join(root.called(key) for key in sorted(counting)) or "none"
        raise UntrustedError(
            f"signatures of {what}", f"{needed} of {allowed}", names + (f"; not counted: {others}" if others else "")
        )
    return counting


def require_signed(root: Root) -> frozenset[str]:
    """The root keys that signed this root; enough of them, by its own word.

    Raises:
        UntrustedError: too few, or a signature that does not fit.
    """
    signed = signers(root.payload, ROOT_TYPE, root.signatures, root.keys)
    return _require_threshold(
        root, "root", signed, (s.key_id for s in root.signatures), f"trust root version {root.version}"
    )


def trusted_time(now: datetime, *floors: datetime | None) -> datetime:
    """The latest of these times. A clock that was set back, or lost its battery, does not make old things young again."""
    return max([now, *(floor for floor in floors if floor is not None)])


def require_current(root: Root, now: datetime, not_before: datetime | None = None) -> None:
    """Raises unless the root has not expired.

    Args:
        root: the trust root.
        now: what the clock says, with a time zone.
        not_before: the latest time that this machine has seen.

    Raises:
        UntrustedError: it has expired.
    """
    time = trusted_time(now, not_before)
    if time >= root.expires:
        raise UntrustedError(
            f"expiry of trust root version {root.version}",
            f"a time before {time_text(root.expires)}",
            time_text(time),
            hint="rotate to a newer trust root: `edgepatch root rotate OLD NEW -o OUT`",
        )


def verify_threshold(
    payload: bytes,
    payload_type: str,
    signatures: Sequence[Signature],
    root: Root,
    role: RoleName,
    now: datetime,
    not_before: datetime | None = None,
) -> frozenset[str]:
    """The one question of a new trust decision: did enough keys of a role sign this payload as this kind of document?

    Args:
        payload: the bytes that are used afterwards, not others that should equal them.
        payload_type: ``signing.MANIFEST_TYPE`` for patches.
        signatures: all that came with the payload.
        root: the pinned trust root; its own signatures and expiry are checked here, so that no caller can forget it.
        role: whose keys count.
        now: what the clock says, with a time zone.
        not_before: the latest time that this machine has seen.

    Returns:
        Ids of the keys of the role that signed, at least its threshold.

    Raises:
        UntrustedError: the root is not signed or has expired, a signature does not fit, or too few count.
    """
    require_signed(root)
    require_current(root, now, not_before)
    signed = signers(payload, payload_type, signatures, root.keys)
    return _require_threshold(root, role, signed, (s.key_id for s in signatures), f"role {role}")


@dataclass(frozen=True)
class Rotation:
    """The outcome of a rotation.

    Attributes:
        root: the newest trust root.
        resets_sequences: a key that counted for patches no longer does. Sequence numbers that were seen until now may be its
            doing (fast-forward), so the store forgets them; no patch that needs the key can come back. Where no such key is
            gone the numbers stay: forgetting them would let an older patch in.
    """

    root: Root
    resets_sequences: bool


def _require_succession(old: Root, new: Root) -> None:
    if new.version != old.version + 1:
        raise UntrustedError(
            "root version", old.version + 1, new.version, hint="give every version in between, in order"
        )
    if not old.revoked <= new.revoked:
        missing = ", ".join(old.called(key) for key in sorted(old.revoked - new.revoked))
        raise UntrustedError(f"revoked keys of trust root version {new.version}", f"also {missing}", "not revoked")
    signed = signers(new.payload, ROOT_TYPE, new.signatures, {**new.keys, **old.keys})
    claimed = [signature.key_id for signature in new.signatures]
    what = f"trust root version {new.version}"
    _require_threshold(old, "root", signed, claimed, f"{what} by version {old.version}")
    _require_threshold(new, "root", signed, claimed, f"{what} by itself")


def rotate(pinned: Root, successors: Sequence[Root], now: datetime, not_before: datetime | None = None) -> Rotation:
    """From the pinned trust root to the last of its successors, given in order without a gap.

    Only the last one must not have expired: a machine that lay in a drawer for years can still be brought up to date.

    Raises:
        UntrustedError: the pinned root is not signed; a version is not one more than the one before, not signed by the root
            keys of both, or revokes less; the last one has expired.
    """
    require_signed(pinned)
    root, resets = pinned, False
    for successor in successors:
        _require_succession(root, successor)
        resets |= bool(root.counting("patch") - successor.counting("patch"))
        root = successor
    require_current(root, now, not_before)
    return Rotation(root, resets)

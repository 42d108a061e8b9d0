"""What a device takes: the right base, a known channel, a newer sequence, not expired. Signatures are for ``edgepatch.trust``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone

from edgepatch.errors import InputError, MismatchError, UntrustedError
from edgepatch.patch.composition import compose_on_device
from edgepatch.patch.file import Patch
from edgepatch.patch.manifest import UNPRINTABLE
from edgepatch.store.records import Seen
from edgepatch.tensors import ModelSpec
from edgepatch.trust.roots import TIME_FORMAT

MAX_JUMP = 1000
"""A sequence may be so much newer than the newest one seen. Else one stolen key could make all later patches look old."""

MAX_REASON_LENGTH = 500


@dataclass(frozen=True)
class Allowances:
    """What an administrator lets pass, each with the reason that the history keeps. "" lets nothing pass.

    Attributes:
        unsigned: no trust root vouches for the patch.
        downgrade: it is older than one that was seen, or another one of the same sequence.
        expired: it has expired.
    """

    unsigned: str = ""
    downgrade: str = ""
    expired: str = ""

    def __post_init__(self) -> None:
        for reason in (self.unsigned, self.downgrade, self.expired):
            check_reason(reason)


def check_reason(reason: str) -> None:
    """Raises unless a reason is a printable text of a bounded length.

    Raises:
        InputError: it is not.
    """
    if len(reason) > MAX_REASON_LENGTH or UNPRINTABLE.search(reason) or (reason and not reason.strip()):
        raise InputError(
            f"reason: expected printable text of at most {MAX_REASON_LENGTH} characters, found {reason[:40]!r}"
        )


def time_of(text: str) -> datetime:
    """The time that "2026-11-21T10:00:00Z" names."""
    return datetime.strptime(text, TIME_FORMAT).replace(tzinfo=timezone.utc)


def check_base(patch: Patch, model: ModelSpec | None, specs: Iterable[ModelSpec]) -> None:
    """Raises unless a patch is for the model that was named, or else for one that the device has.

    Args:
        patch: the patch.
        model: the model that was named.
        specs: bases of the patches in the store; the first patch of a store has none.

    Raises:
        MismatchError: it is for another model; of those known, the most similar one is compared.
    """
    if model is not None:
        patch.base.require_same(model)
        return
    mismatches = []
    for spec in specs:
        try:
            patch.base.require_same(spec)
            return
        except MismatchError as error:
            mismatches.append(error)
    if mismatches:
        nearest = min(mismatches, key=lambda error: len(error.differences))
        nearest.hint = "name the model with --model if this device has another one"
        raise nearest


def check_beside(patch: Patch, others: Sequence[Patch]) -> None:
    """Raises unless a patch can stand beside the other active ones of its base.

    Raises:
        InputError: one of them has no seed or does not say how keys turn, or they are too many.
    """
    if not others:
        return
    try:
        compose_on_device([patch, *others])
    except InputError as error:
        names = " and ".join(sorted(other.name for other in others))
        raise InputError(
            f"{patch.name} {patch.version} cannot stand beside {names}, active for the same base: {error}",
            hint=f"{error.hint}; or take {names} off first: edgepatch deactivate {others[0].name} --reason REASON",
        ) from None


def check_channel(patch: Patch, active: str | None, chosen: str) -> None:
    """Raises unless a patch is of the channel that was chosen, or else of the active patch's.

    An old patch of another channel would otherwise pass as new.

    Raises:
        UntrustedError: it is of another one.
    """
    expected = chosen or active
    if expected and patch.channel != expected:
        raise UntrustedError(
            "channel of the patch", expected, patch.channel, hint=f"--channel {patch.channel} changes over to it"
        )


def check_sequence(patch: Patch, seen: Seen | None, downgrade: str) -> None:
    """Raises unless a patch is newer than the newest one of its channel, or is that one.

    Raises:
        UntrustedError: it is older, another one of the same sequence, or too much newer.
    """
    newest = seen.sequence if seen else 0
    if patch.sequence > newest + MAX_JUMP:
        raise UntrustedError(
            "sequence of the patch",
            f"at most {newest + MAX_JUMP}",
            patch.sequence,
            hint="no line of releases jumps so far: ask the vendor; a new trust root without the key resets it",
        )
    if seen is None or patch.sequence > newest or patch.digest == seen.digest or downgrade:
        return
    hint = "an older patch may have known faults; --allow-downgrade --reason REASON takes it, and the history keeps the reason"
    raise UntrustedError("sequence of the patch", f"{newest + 1} or more", patch.sequence, hint)


def check_expiry(patch: Patch, time: datetime, allowed: str) -> None:
    """Raises when a patch has expired.

    Raises:
        UntrustedError: it has.
    """
    if is_expired(patch.expires, time) and not allowed:
        raise UntrustedError(
            "expiry of the patch",
            f"a time before {patch.expires}",
            time.strftime(TIME_FORMAT),
            hint="get a newer one; --allow-expired REASON takes it, and the history keeps the reason",
        )


def is_expired(expires: str, time: datetime) -> bool:
    """Whether a time is at or after an expiry; "" never comes."""
    return bool(expires) and time >= time_of(expires)

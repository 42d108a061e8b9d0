"""What a change of a store comes to: for its caller, for the history, for the sequences that count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgepatch.store.records import Seen, State, StoredPatch, TrustState
from edgepatch.trust.roots import Root


@dataclass(frozen=True)
class Change:
    """What a verb did.

    Attributes:
        digest: the patch that is active now, or that was taken off.
        patch: its record.
        before: digest of the one of this name that was active before, "" for none.
        is_new: whether anything changed.
        signed_by: ids of the keys that vouch for it; none for an unsigned patch.
        beside: the other active patches of its base, by their digests.
        trained_alone: names of these, of itself and of its parts whose training knew no other patch; none where nothing stands beside it.
    """

    digest: str
    patch: StoredPatch
    before: str
    is_new: bool
    signed_by: frozenset[str] = frozenset()
    beside: Mapping[str, StoredPatch] = field(default_factory=dict)
    trained_alone: tuple[str, ...] = ()


@dataclass(frozen=True)
class RootChange:
    """What ``set_root`` did.

    Attributes:
        root: the trust root of the device.
        is_new: whether it changed.
        reset: whether the sequences seen so far are forgotten, but for those of active patches that the new root vouches for.
        refused: digests of active patches for which the new root does not vouch; they load no more.
    """

    root: Root
    is_new: bool
    reset: bool
    refused: tuple[str, ...]


def seen_of(state: State, refused: Sequence[str]) -> TrustState:
    """The sequences that count after a reset, in a trust state: of the active patches for which the new root vouches."""
    trust = TrustState()
    for digest in (digest for record in state.bases.values() for digest in record.active if digest not in refused):
        patch = state.patches[digest]
        if not patch.unsigned:
            trust = trust.with_seen(patch.base, patch.name, patch.channel, Seen(patch.sequence, digest))
    return trust


def described(digest: str, patch: StoredPatch) -> dict[str, Any]:
    """What the history says of a patch."""
    return {
        "patch": digest,
        "name": patch.name,
        "version": patch.version,
        "channel": patch.channel,
        "sequence": patch.sequence,
        "base": patch.base,
    }

"""Trust roots before they are signed: the first version, and the one after a version that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from edgepatch.errors import InputError
from edgepatch.trust.roots import Key, Role, RoleName, Root, owner_name
from edgepatch.trust.verification import require_signed


def _role_of(name: RoleName, keys: Iterable[Key], threshold: int | None) -> Role:
    keys = list(keys)
    num_owners = len({owner_name(key.owner) for key in keys})
    threshold = num_owners // 2 + 1 if threshold is None else threshold
    if not 1 <= threshold <= num_owners:
        raise InputError(
            f"threshold of role {name}: expected 1 to {num_owners}, the number of its keys' owners, found {threshold}",
            hint="name keys of more owners, or another threshold",
        )
    return Role(frozenset(key.id for key in keys), threshold)


def _require_distinct(keys: Sequence[Key]) -> None:
    if len({key.id for key in keys}) != len(keys):
        names = ", ".join(sorted(key.owner for key in keys))
        raise InputError(f"keys of a role: expected different keys, found one twice among {names}")


def new_root(
    patch_keys: Sequence[Key],
    root_keys: Sequence[Key],
    *,
    created: datetime,
    lifetime: timedelta,
    patch_threshold: int | None = None,
    root_threshold: int | None = None,
) -> Root:
    """Version 1 of a trust root, unsigned. A threshold that is not given is a majority.

    Raises:
        InputError: no keys, one key twice in a role, or a threshold that cannot be reached.
    """
    _require_distinct(patch_keys)
    _require_distinct(root_keys)
    created = created.replace(microsecond=0)
    roles: dict[RoleName, Role] = {
        "root": _role_of("root", root_keys, root_threshold),
        "patch": _role_of("patch", patch_keys, patch_threshold),
    }
    keys = {key.id: key for key in (*root_keys, *patch_keys)}
    return Root(1, created, created + lifetime, keys, roles)


def next_root(
    old: Root,
    *,
    created: datetime,
    lifetime: timedelta,
    patch_keys: Sequence[Key] = (),
    root_keys: Sequence[Key] = (),
    patch_threshold: int | None = None,
    root_threshold: int | None = None,
    revoke: Iterable[str] = (),
) -> Root:
    """The version after ``old``, unsigned: keys added, keys revoked, the expiry moved. Thresholds stay where none is given.

    Raises:
        InputError: a key to revoke is not in the old root, a key to add is revoked, or a threshold can no longer be reached.
        UntrustedError: the old root is not signed by its own root keys. It may have expired.
    """
    require_signed(old)  # a changed file must not slip a key into the version that is signed next
    revoked = old.revoked | frozenset(revoke)
    for unknown in sorted(revoked - old.revoked - old.keys.keys()):
        raise InputError(f"key to revoke: expected a key of the trust root, found {unknown}")
    for key in (*patch_keys, *root_keys):
        if key.id in revoked:
            raise InputError(f"key to add: expected one that is not revoked, found {old.called(key.id)}")
    created = created.replace(microsecond=0)
    added: dict[RoleName, tuple[Sequence[Key], int | None]] = {
        "root": (root_keys, root_threshold),
        "patch": (patch_keys, patch_threshold),
    }
    roles = {
        name: _role_of(
            name,
            [*(old.keys[key] for key in old.roles[name].keys - revoked), *keys],
            old.roles[name].threshold if threshold is None else threshold,
        )
        for name, (keys, threshold) in added.items()
    }
    keys = {**{key.id: key for key in (*root_keys, *patch_keys)}, **old.keys}  # an owner keeps the name that was signed
    return Root(old.version + 1, created, created + lifetime, keys, roles, revoked)

"""Takes a bundle in: all of it is verified before anything on the device is touched.

A hash in a bundle's manifest says that the bundle is whole, not that it is genuine: whoever changes a member can write a new
manifest. Genuine is what the device's own trust root vouches for: the patch by its signatures, everything else by those under the
manifest. The trust root that a bundle brings counts for nothing until an administrator names its fingerprint.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from edgepatch.bundles import archive, contents
from edgepatch.bundles.contents import Manifest, Member
from edgepatch.errors import EdgepatchError, InputError, PatchFormatError, UntrustedError
from edgepatch.files.writing import write_atomically
from edgepatch.patch.file import PAYLOAD_TYPE, Patch, parse_patch
from edgepatch.store.device import NOTHING_ALLOWED, Change, Store
from edgepatch.store.policy import Allowances
from edgepatch.tensors import ModelSpec
from edgepatch.trust.roots import Root, parse_root
from edgepatch.trust.signatures import Signature
from edgepatch.trust.verification import require_signed, verify_threshold


@dataclass(frozen=True)
class Bundle:
    """A bundle that is whole: every member is there and has the size and SHA-256 of the manifest, and nothing else is.

    Attributes:
        file: open for reading.
        manifest: what it lists.
        signatures: under the manifest; nobody has judged them yet.
        starts: where each member's content starts, by its path.
        patch: the patch; nobody has judged its signatures yet.
        root: the trust root that came along, signed by its own keys; it counts for nothing.
    """

    file: BinaryIO
    manifest: Manifest
    signatures: tuple[Signature, ...]
    starts: dict[str, int]
    patch: Patch
    root: Root | None

    def read(self, member: Member) -> bytes:
        """Content of a member, its hash taken from the bytes that are returned.

        Raises:
            PatchFormatError: the file changed since it was verified.
        """
        parts: list[bytes] = []
        _require_digest(member, archive.copy_content(self.file, self.starts[member.path], member.size, parts.append))
        return b"".join(parts)

    def vouched_by(self, root: Root, now: datetime) -> frozenset[str]:
        """The keys that vouch for every member of the bundle.

        Raises:
            UntrustedError: too few do.
        """
        return verify_threshold(self.manifest.payload, contents.BUNDLE_TYPE, self.signatures, root, "patch", now)


def _require_vouched(bundle: Bundle, root: Root, now: datetime) -> frozenset[str]:
    """As ``Bundle.vouched_by``; the error says that it is about the bundle, for its patch has signatures of its own."""
    try:
        return bundle.vouched_by(root, now)
    except UntrustedError as error:
        error.args = (f"the bundle itself, not its patch: {error}",)
        error.hint = error.hint or "its maker signs it: `bundle create --key`; its patch alone may be vouched for"
        raise


@contextmanager
def opened(path: Path) -> Iterator[Bundle]:
    """A verified bundle; the file stays open in the block.

    Raises:
        InputError: it cannot be read, or is no regular file.
        PatchFormatError: it is no bundle, damaged, or holds what no bundle holds.
        UntrustedError: its trust root is not signed by its own keys.
    """
    descriptor = _open(path)
    with open(descriptor, "rb") as file:
        try:
            bundle = _verified(file, os.fstat(descriptor).st_size)
        except PatchFormatError as error:
            raise PatchFormatError(
                f"{path}: {error}", error.hint or "get the bundle again from whoever made it"
            ) from None
        except OSError as error:
            raise InputError(f"cannot read bundle {path}: {error.strerror}") from error
        yield bundle


def _open(path: Path) -> int:
    """A descriptor of a regular file; a pipe or device is refused before it can block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"cannot read bundle {path}: {error.strerror}", hint="check the path") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"cannot read bundle {path}: it is no regular file")
    return descriptor


def _verified(file: BinaryIO, size: int) -> Bundle:
    """The size first, then the manifest, then every header, and the contents last."""
    if size > contents.MAX_BUNDLE_BYTES:
        raise PatchFormatError(f"expected at most {contents.MAX_BUNDLE_BYTES} bytes, found {size}")
    data, offset = _listed(file, 0, contents.MANIFEST, contents.MAX_MANIFEST_BYTES)
    manifest, signatures = contents.parse_manifest(data), tuple[Signature, ...]()
    if _name_at(file, offset) == contents.SIGNATURES:
        data, offset = _listed(file, offset, contents.SIGNATURES, contents.MAX_SIGNATURES_BYTES)
        signatures = contents.parse_signatures(data)
    starts = _walked(file, offset, manifest, size)
    bodies = {member.path: _verified_content(file, starts[member.path], member) for member in manifest.members}
    patch = parse_patch(bodies[manifest.patch_path])
    if (
        patch.digest != manifest.patch
        or manifest.patch_path != f"{contents.PATCHES}{patch.name}-{patch.version}.safetensors"
    ):
        raise PatchFormatError(
            f"{manifest.patch_path}: expected patch {manifest.patch[:12]}, found {patch.name} {patch.version} ({patch.digest[:12]})"
        )
    root = parse_root(bodies[contents.ROOT], f"{contents.ROOT} of the bundle") if contents.ROOT in bodies else None
    if root:
        require_signed(root)
    return Bundle(file, manifest, signatures, starts, patch, root)


def _name_at(file: BinaryIO, offset: int) -> str:
    return archive.read_block(file, offset)[:100].rstrip(b"\0").decode("ascii", "replace")


def _listed(file: BinaryIO, offset: int, name: str, limit: int) -> tuple[bytes, int]:
    """Content of a member that is not in the manifest, and the offset behind it."""
    block = archive.read_block(file, offset)
    try:
        size = int(block[124:135], 8)  # the size field of a USTAR header, octal
    except ValueError:
        raise PatchFormatError(f"expected {name}, found {archive.printable(block)}: no edgepatch bundle") from None
    if not 0 <= size <= limit:
        raise PatchFormatError(f"{name}: expected at most {limit} bytes, found {size}")
    start = archive.require_header(file, offset, name, size)
    return archive.read_content(file, start, size), start + archive.padded(size)


def _walked(file: BinaryIO, offset: int, manifest: Manifest, size: int) -> dict[str, int]:
    """Path -> start of every member's content, each in its place, and nothing behind the last."""
    starts = {}
    for member in manifest.members:
        starts[member.path] = archive.require_header(file, offset, member.path, member.size)
        offset = starts[member.path] + archive.padded(member.size)
    block = archive.read_block(file, offset)
    if any(block):
        raise PatchFormatError(
            f"expected the end of the archive at {offset}, found {archive.printable(block)}, which the manifest does not list"
        )
    if size != offset + len(archive.TRAILER) or any(archive.read_block(file, offset + archive.BLOCK)):
        raise PatchFormatError(
            f"expected {offset + len(archive.TRAILER)} bytes, found {size}, or an end that is not empty"
        )
    return starts


def _verified_content(file: BinaryIO, start: int, member: Member) -> bytes:
    """Hashes a member; returns the content only of those that are parsed afterwards."""
    parts: list[bytes] = []
    is_parsed = member.path == contents.ROOT or member.path.startswith(contents.PATCHES)
    _require_digest(member, archive.copy_content(file, start, member.size, parts.append if is_parsed else len))
    return b"".join(parts)


def _require_digest(member: Member, actual: str) -> None:
    if actual != member.sha256:
        raise PatchFormatError(f"member {member.path}: its SHA-256 is not the one in the manifest")


# What the device makes of it.


@dataclass(frozen=True)
class Judgement:
    """Who vouches for a bundle, before anything of it is taken.

    Attributes:
        patch: who signed the patch, in words.
        bundle: who signed everything else.
        refusal: why the device would not take it; ``None`` where its trust root vouches for it, or where it has none.
    """

    patch: str
    bundle: str
    refusal: UntrustedError | None


def judged(bundle: Bundle, root: Root | None, now: datetime) -> Judgement:
    """What the signatures of a bundle are worth on a device.

    Args:
        bundle: whole.
        root: the trust root of the device; ``None`` where it has none, which judges nothing.
        now: the time, with a time zone.
    """
    refusals: list[UntrustedError] = []

    def words(signatures: Sequence[Signature], vouched: Callable[[Root], frozenset[str]], unsigned: str) -> str:
        if root is None:
            names = ", ".join(signature.key_id[:12] for signature in signatures)
            return f"by {names}: not judged, this device has no trust root" if names else "unsigned"
        try:
            return f"by {', '.join(sorted(root.called(key) for key in vouched(root)))}, whom this device trusts"
        except UntrustedError as error:
            if signatures or not unsigned:
                refusals.append(error)
            return f"refused: {error}" if signatures else unsigned or "unsigned: refused"

    patch = bundle.patch
    of_patch = words(
        patch.signatures,
        lambda r: verify_threshold(patch.manifest, PAYLOAD_TYPE, patch.signatures, r, "patch", now),
        "",
    )
    of_bundle = words(
        bundle.signatures, lambda r: bundle.vouched_by(r, now), "unsigned: this device takes the patch alone"
    )
    return Judgement(of_patch, of_bundle, refusals[0] if refusals else None)


# Onto the device.


@dataclass(frozen=True)
class Accepted:
    """What taking in a bundle did.

    Attributes:
        manifest: of the bundle.
        change: what the store did.
        bundle_signed_by: ids of the keys that vouch for every member; none where it is unsigned, or the device has no trust root.
        root: the trust root that came along.
        adopted: whether it is the device's now, and was not before.
    """

    manifest: Manifest
    change: Change
    bundle_signed_by: frozenset[str]
    root: Root | None
    adopted: bool


def accept(
    path: Path,
    store: Store,
    *,
    adopt_root: str = "",
    model: ModelSpec | None = None,
    channel: str = "",
    allowances: Allowances = NOTHING_ALLOWED,
    base_name: str = "",
) -> Accepted:
    """Verifies a bundle, and makes its patch the active one of its name; others stay beside it.

    Args:
        path: the tar file.
        store: of the device.
        adopt_root: fingerprint of the bundle's trust root, from its maker; the device trusts it from then on. "" adopts none.
        model: as for ``Store.apply``.
        channel: as for ``Store.apply``.
        allowances: as for ``Store.apply``.
        base_name: as for ``Store.apply``.

    Raises:
        InputError: the bundle cannot be read, or brings no trust root to adopt.
        PatchFormatError: it is no bundle, or damaged.
        UntrustedError: the trust root has another fingerprint or does not follow the device's, or does not vouch for the patch
            or, where it is signed, for the bundle; or the store refuses the patch.
        MismatchError: the patch was made for another model.
        EdgepatchError: the disk fails. In every case the old patch stays active.
    """
    with opened(path) as bundle:
        _, trust = store.read()
        root, now = store.root(), store.time(trust)
        if adopt_root:
            root = _named_root(bundle, adopt_root)
        signed_by = _require_vouched(bundle, root, now) if root and bundle.signatures else frozenset()
        if root:
            verify_threshold(bundle.patch.manifest, PAYLOAD_TYPE, bundle.patch.signatures, root, "patch", now)
        if model is not None:
            bundle.patch.base.require_same(model)
        adopted = bool(adopt_root) and bundle.root is not None and store.set_root([bundle.root], adopt_root).is_new
        change = _applied(bundle, store, model, channel, allowances, base_name)
        return Accepted(bundle.manifest, change, signed_by, bundle.root, adopted)


def _named_root(bundle: Bundle, fingerprint: str) -> Root:
    if bundle.root is None:
        raise InputError("--adopt-root: expected a trust root in the bundle, found none", hint="leave it out")
    if bundle.root.fingerprint != fingerprint:
        raise UntrustedError(
            "fingerprint of the bundle's trust root",
            fingerprint[:80],
            bundle.root.fingerprint,
            hint="ask its maker, on another way than the bundle",
        )
    return bundle.root


def _applied(
    bundle: Bundle, store: Store, model: ModelSpec | None, channel: str, allowances: Allowances, base_name: str
) -> Change:
    """Hands the verified bytes to the store, which judges them again by all of its rules."""
    member = next(m for m in bundle.manifest.members if m.path == bundle.manifest.patch_path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(member.path).name
        write_atomically(file, bundle.read(member))
        return store.apply(file, allowances, model=model, channel=channel, base_name=base_name)


def unpack(path: Path, target: Path, root: Root | None, now: datetime) -> Manifest:
    """Verifies a bundle and writes its members into a new folder, which appears complete or not at all.

    Args:
        path: the tar file.
        target: must not exist.
        root: the trust root of the device. Where there is one, nothing is written that it does not vouch for.
        now: the time, with a time zone.

    Raises:
        InputError: the bundle cannot be read, or the folder exists or cannot be written.
        PatchFormatError: it is no bundle, or damaged.
        UntrustedError: the trust root does not vouch for the bundle.
    """
    with opened(path) as bundle:
        if root:
            _require_vouched(bundle, root, now)
        if os.path.lexists(target):
            raise InputError(f"--out: expected a new folder, found {target}", hint="name another one")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            try:
                _write_members(bundle, work)
                os.rename(work, target)
                _sync(target.parent)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
        except OSError as error:
            raise EdgepatchError(
                f"cannot write {target}: {error.strerror}", hint="nothing was kept; check space and rights"
            ) from error
        return bundle.manifest


def _write_members(bundle: Bundle, folder: Path) -> None:
    os.chmod(folder, 0o755)
    for member in bundle.manifest.members:
        file = folder / member.path
        if not file.parent.is_dir():
            file.parent.mkdir(mode=0o755)
        with file.open("xb") as out:
            _require_digest(
                member, archive.copy_content(bundle.file, bundle.starts[member.path], member.size, out.write)
            )
            out.flush()
            os.fsync(out.fileno())
    for part in {folder, *(path for path in folder.iterdir() if path.is_dir())}:
        _sync(part)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

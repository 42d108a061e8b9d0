"""Puts a bundle together."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgepatch.bundles import archive, contents, inventory, notes, wheels
from edgepatch.bundles.contents import Manifest, Member
from edgepatch.errors import InputError, UntrustedError
from edgepatch.files.reading import read_bounded
from edgepatch.patch.card import model_card
from edgepatch.patch.file import Patch, parse_patch_file, read_patch_bytes
from edgepatch.trust.roots import MAX_ROOT_BYTES, Root, parse_root
from edgepatch.trust.signatures import sign
from edgepatch.trust.verification import require_signed


@dataclass(frozen=True)
class Sources:
    """What a bundle is made of.

    Attributes:
        patch: patch file.
        root: trust root file.
        report: HTML report of the benchmark.
        choice: wheels; ``None`` for none.
        base_model: what a hub calls the base, for the model card.
        keys: private keys that sign the bundle's manifest.
    """

    patch: Path
    root: Path | None = None
    report: Path | None = None
    choice: wheels.Choice | None = None
    base_model: str = ""
    keys: tuple[Ed25519PrivateKey, ...] = ()


def create(sources: Sources, target: Path) -> Manifest:
    """Writes a bundle; it appears complete or not at all. The same files give the same bytes.

    Raises:
        InputError: a file cannot be read or written.
        PatchFormatError: the patch breaks the format, or a part is larger than a bundle may hold.
        UntrustedError: the trust root is not signed by its own keys.
        EdgepatchError: pip failed.
    """
    data = read_patch_bytes(sources.patch)
    patch = parse_patch_file(sources.patch, data)
    root_data = (
        read_bounded(sources.root, MAX_ROOT_BYTES, "trust root", oversize=UntrustedError) if sources.root else b""
    )
    root = parse_root(root_data, str(sources.root)) if sources.root else None
    if root:
        require_signed(root)
    patch_path = f"{contents.PATCHES}{patch.name}-{patch.version}.safetensors"
    parts: dict[str, bytes | Path] = {patch_path: data, contents.CARD: model_card(patch, sources.base_model).encode()}
    if root:
        parts[contents.ROOT] = root_data
    if sources.report:
        parts[contents.REPORT] = read_bounded(sources.report, contents.MAX_TEXT_BYTES, "report")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as work:
            manifest = _add_generated(sources, patch, patch_path, root, parts, Path(work) / "wheels")
            _write(Path(work) / "bundle.tar", manifest, parts, sources.keys)
            os.replace(Path(work) / "bundle.tar", target)
    except OSError as error:
        raise InputError(
            f"cannot write {target}: {error.strerror}", hint="free space or name another folder"
        ) from error
    return manifest


def _add_generated(
    sources: Sources, patch: Patch, patch_path: str, root: Root | None, parts: dict[str, bytes | Path], folder: Path
) -> Manifest:
    """Adds wheels, list, bill of materials and note to the parts; returns the manifest of all."""
    choice, built, files = sources.choice, [], []
    if choice:
        folder.mkdir()
        built = [contents.WHEELS + name for name in wheels.collect(choice, folder)]
        files = sorted(folder.iterdir())
    digests = {file: sha256_of(file) for file in files}
    parts.update({contents.WHEELS + file.name: file for file in files})
    if choice:
        parts[contents.REQUIREMENTS] = notes.requirements(
            {file.name: digest for file, digest in digests.items()}
        ).encode()
    where = ",".join(choice.platforms) or sysconfig.get_platform() if choice else ""
    python_version = choice.python_version or ".".join(platform.python_version_tuple()[:2]) if choice else ""
    extra, patch_data = choice.extra if choice else "", parts[patch_path]
    assert isinstance(patch_data, bytes)  # create() read it
    parts[contents.SBOM] = inventory.bill_of_materials(patch, hashlib.sha256(patch_data).hexdigest(), digests)
    note = notes.install_note(patch, patch_path, root, extra, where, python_version, tuple(built), bool(sources.keys))
    parts[contents.INSTALL] = note.encode()
    members = tuple(_member(path, part) for path, part in sorted(parts.items()))
    return Manifest(patch.digest, extra, where, python_version, tuple(built), members)


def _member(path: str, part: bytes | Path) -> Member:
    if isinstance(part, bytes):
        return Member(path, len(part), hashlib.sha256(part).hexdigest())
    return Member(path, part.stat().st_size, sha256_of(part))


def _chunks(part: bytes | Path) -> Iterator[bytes]:
    if isinstance(part, bytes):
        yield part
        return
    with part.open("rb") as file:
        while chunk := file.read(archive.CHUNK):
            yield chunk


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def _write(path: Path, manifest: Manifest, parts: dict[str, bytes | Path], keys: Sequence[Ed25519PrivateKey]) -> None:
    first = {contents.MANIFEST: manifest.payload}
    if keys:
        first[contents.SIGNATURES] = contents.signatures_bytes(
            [sign(manifest.payload, contents.BUNDLE_TYPE, key) for key in keys]
        )
    with path.open("xb") as file:
        for name, data in first.items():
            archive.write_member(file, name, len(data), iter([data]))
        for member in manifest.members:
            archive.write_member(file, member.path, member.size, _chunks(parts[member.path]))
        file.write(archive.TRAILER)
        file.flush()
        os.fsync(file.fileno())

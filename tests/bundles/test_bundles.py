"""Bundles: the same bytes every time, refused whole for anything that does not belong in one, nothing touched before that."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from edgepatch.bundles import acceptance, archive, contents, creation, inventory, wheels
from edgepatch.bundles.acceptance import accept, opened, unpack
from edgepatch.cli import main
from edgepatch.errors import EdgepatchError, InputError, MismatchError, PatchFormatError, UntrustedError
from edgepatch.files.canonical import canonical_json
from edgepatch.patch.file import patch_bytes, write_patch
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances
from kit.amounts import examples
from kit.bundle_files import SIGNERS, make_bundle
from kit.stores import NOW, Clock, make_patch, make_root, make_store, rotated, spec, write

UNSIGNED = Allowances(unsigned="a test")
REAL_VARIABLE = "EDGEPATCH_TEST_WHEELS"


@pytest.fixture
def bundle(tmp_path) -> Path:
    return make_bundle(tmp_path, keys=SIGNERS, root=True)


def verified(data: bytes) -> acceptance.Bundle:
    return acceptance._verified(io.BytesIO(data), len(data))


def test_same_files_give_the_same_bytes(tmp_path):
    first = make_bundle(tmp_path, keys=SIGNERS, root=True)
    second = make_bundle(tmp_path, keys=SIGNERS[::-1], root=True, name="again.tar")
    assert first.read_bytes() == second.read_bytes()
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_other_programs_read_it(bundle, tmp_path):
    expected = [
        contents.MANIFEST,
        contents.SIGNATURES,
        "INSTALL.txt",
        "README.md",
        "patches/detox-1.1.0.safetensors",
        "report.html",
        "root.json",
        "sbom.cdx.json",
    ]
    with tarfile.open(bundle) as tar:
        assert tar.getnames() == expected
        assert {(m.mode, m.mtime, m.uid, m.gid, m.uname, m.type) for m in tar} == {
            (0o644, 0, 0, 0, "", tarfile.REGTYPE)
        }
    (tmp_path / "plain").mkdir()
    subprocess.run(["tar", "-xf", bundle, "-C", tmp_path / "plain"], check=True)
    manifest = json.loads((tmp_path / "plain" / contents.MANIFEST).read_text())
    for member in manifest["members"]:
        data = (tmp_path / "plain" / member["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (member["size"], member["sha256"])
    note = (tmp_path / "plain" / contents.INSTALL).read_text()
    for phrase in (
        make_root().fingerprint,
        "--adopt-root FINGERPRINT",
        "no wheels",
        "sha256sum SITE.tar",
        "edgepatch rollback",
    ):
        assert phrase in note


def test_names_of_wheels_may_exceed_a_tar_header(tmp_path):
    path, buffer = f"wheels/{'long_' * 30}.whl", io.BytesIO()
    archive.write_member(buffer, path, 3, iter([b"abc"]))
    buffer.write(archive.TRAILER)
    with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
        assert tar.getnames() == [path]
    start = archive.require_header(buffer, 0, path, 3)
    assert archive.read_content(buffer, start, 3) == b"abc"
    with pytest.raises(PatchFormatError, match="an extended header"):
        archive.require_header(buffer, 0, path.replace("long_long", "long-long"), 3)
    with pytest.raises(PatchFormatError, match="expected 4 bytes, found 3"):
        archive.write_member(buffer, path, 4, iter([b"abc"]))


# Crafted files. Each is what somebody could write who knows the format and wants more than it gives.


def parts_of(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(manifest, content of every member in order, the manifest and its signatures left out)."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
    manifest = json.loads(members.pop(contents.MANIFEST))
    members.pop(contents.SIGNATURES, None)
    return manifest, members


def listed(manifest: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """The manifest with these files as its members, whatever they are called."""
    members = [{"path": p, "size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for p, d in sorted(files.items())]
    return {**manifest, "members": members}


def block(info: tarfile.TarInfo, data: bytes = b"", kind: int = tarfile.USTAR_FORMAT) -> bytes:
    return info.tobuf(kind, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def file(path: str, data: bytes, **fields: Any) -> bytes:
    info = tarfile.TarInfo(path)
    info.size, info.mode = len(data), 0o644
    for name, value in fields.items():
        setattr(info, name, value)
    return block(info, data)


def packed(manifest: dict[str, Any], files: dict[str, bytes], replaced: dict[str, bytes] | None = None) -> bytes:
    """A tar of these files, in order; ``replaced`` puts other blocks in a member's place."""
    replaced = replaced or {}
    blocks = [replaced.get(path, file(path, data)) for path, data in sorted(files.items())]
    return file(contents.MANIFEST, canonical_json(manifest)) + b"".join(blocks) + bytes(1024)


def special(kind: bytes, name: str = "README.md", link: str = "", size: int = 0) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, size, 0o644
    return block(info, bytes(size))


def refused(path: Path, data: bytes, message: str) -> None:
    """All ways in refuse the file, and leave nothing anywhere."""
    folder = path.parent / "device"
    folder.mkdir()
    path.write_bytes(data)
    for take in (
        lambda: accept(path, Store(folder / "store"), allowances=UNSIGNED),
        lambda: unpack(path, folder / "out", None, NOW),
    ):
        with pytest.raises(PatchFormatError, match=message):
            take()
    assert not list(folder.iterdir())


NAMES = [
    "/etc/passwd",
    "../evil.whl",
    "wheels/../../evil.whl",
    "wheels/.hidden.whl",
    "wheels/a/b.whl",
    "wheels/a.whl\n",
    "wheels/a.tar.gz",
    "patches/",
    "evil.sh",
    "INSTALL.txt/",
    "C:\\a.whl",
    "wheels\\a.whl",
    "./README.md",
    "wheels/\u202e.whl",
    "README.md\0.whl",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere(name, bundle):
    manifest, files = parts_of(bundle)
    refused(bundle, packed(listed(manifest, {**files, name: b"x"}), files), "no bundle holds a file of this name")


@pytest.mark.parametrize("name", ["/README.md", "../README.md", "./README.md", "readme.md", "README.md "])
def test_a_tar_that_names_a_member_otherwise_than_its_manifest(name, bundle):
    manifest, files = parts_of(bundle)
    refused(
        bundle,
        packed(listed(manifest, files), files, {"README.md": file(name, files["README.md"])}),
        "expected the file 'README.md'",
    )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.BLKTYPE, "a block device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.DIRTYPE, "a folder"),
        (tarfile.CONTTYPE, "contiguous"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (tarfile.GNUTYPE_LONGNAME, "a GNU long name"),
        (tarfile.XHDTYPE, "an extended header"),
        (tarfile.XGLTYPE, "a global extended header"),
        (b"M", "something unknown"),
    ],
)
def test_members_that_are_no_files(kind, message, bundle):
    manifest, files = parts_of(bundle)
    data = packed(
        listed(manifest, {**files, "README.md": b""}), files, {"README.md": special(kind, link="/etc/passwd")}
    )
    refused(bundle, data, f"expected the file 'README.md'.*{message}")


@pytest.mark.parametrize(
    "fields",
    [
        {"mode": 0o4755},
        {"mode": 0o755},
        {"uid": 1},
        {"gid": 1},
        {"mtime": 1},
        {"uname": "root"},
        {"linkname": "x"},
        {"type": b"\0"},
    ],
)
def test_other_attributes(fields, bundle):
    manifest, files = parts_of(bundle)
    refused(
        bundle,
        packed(listed(manifest, files), files, {"README.md": file("README.md", files["README.md"], **fields)}),
        "or other attributes",
    )


def test_members_twice_missing_or_too_many(bundle, tmp_path):
    manifest, files = parts_of(bundle)
    manifest = listed(manifest, files)
    twice = {**manifest, "members": sorted([*manifest["members"], manifest["members"][0]], key=lambda m: m["path"])}
    for number, (data, message) in enumerate(
        {
            packed(twice, files): "none twice",
            packed({**manifest, "members": manifest["members"][::-1]}, files): "sorted",
            packed(
                manifest, files, {"README.md": 2 * file("README.md", files["README.md"])}
            ): "expected the file 'patches/",
            packed(manifest, files, {"README.md": b""}): "expected the file 'README.md' .*found a file 'patches/",
            packed(manifest, files, {"sbom.cdx.json": b""}): "found the end of the archive",
            packed(
                manifest, {**files, "wheels/evil.whl": b"x"}
            ): "found a file 'wheels/evil.whl' of 1 bytes, which the manifest does not list",
            packed(manifest, files) + file("wheels/evil.whl", b"x"): "or an end that is not empty",
            packed(manifest, files)[:-1]: "or an end that is not empty",
            packed(manifest, files)[:-513]
            + b"x"
            + bytes(512): "which the manifest does not list|or an end that is not empty",
            packed(manifest, files)[:-1] + b"x": "or an end that is not empty",
            packed(
                listed(manifest, {k: d for k, d in files.items() if k != "INSTALL.txt"}), files
            ): "expected INSTALL.txt, found none",
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        refused(tmp_path / str(number) / "site.tar", data, message)


def other_manifests(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    member = manifest["members"][0]

    def first(**fields: Any) -> dict[str, Any]:
        return {**manifest, "members": [{**member, **fields}, *manifest["members"][1:]]}

    return {
        "its SHA-256 is not the one": first(sha256="0" * 64),
        "expected a SHA-256, found 'F": first(sha256="F" * 64),
        "expected a SHA-256, found None": first(sha256=None),
        f"of {member['size'] + 1} bytes": first(size=member["size"] + 1),
        "found -1": first(size=-1),
        "found True": first(size=True),
        f"at most {contents.MAX_TEXT_BYTES} bytes, found {2**40}": first(size=2**40),
        "members with path, size and sha256": first(mode=0o777),
        "expected format version 1, found 2": {**manifest, "format_version": 2},
        "expected format version 1, found True": {**manifest, "format_version": True},
        "expected the keys": {**manifest, "install": "curl"},
        "with lists of members": {**manifest, "members": {}},
        "found 'x": {**manifest, "extra": "x\n"},
        "platform: expected": {**manifest, "platform": ["x"]},
        "built ones among them": {**manifest, "built": ["wheels/evil.whl"]},
        "at most 512": {**manifest, "members": manifest["members"] * 200},
        "patch: expected a SHA-256": {**manifest, "patch": "x"},
        "expected patch 000000000000, found detox 1.1.0": {**manifest, "patch": "0" * 64},
    }


def test_manifests_that_say_something_else(bundle, tmp_path):
    manifest, files = parts_of(bundle)
    for number, (message, other) in enumerate(other_manifests(listed(manifest, files)).items()):
        (tmp_path / str(number)).mkdir()
        refused(tmp_path / str(number) / "site.tar", packed(other, files), message)


def test_a_manifest_in_another_form(bundle):
    manifest, files = parts_of(bundle)
    data = packed(listed(manifest, files), files)
    spaced = json.dumps(listed(manifest, files)).encode()
    start = 512 + archive.padded(len(canonical_json(listed(manifest, files))))
    refused(bundle, file(contents.MANIFEST, spaced) + data[start:], "not in canonical form")


def test_members_that_are_too_large_together(bundle):
    manifest, files = parts_of(bundle)
    members = [{"path": f"wheels/{n}.whl", "size": contents.MAX_WHEEL_BYTES, "sha256": "0" * 64} for n in range(4)]
    requirements = {"path": contents.REQUIREMENTS, "size": 0, "sha256": "0" * 64}
    every = sorted([*listed(manifest, files)["members"], *members, requirements], key=lambda member: member["path"])
    refused(bundle, packed({**manifest, "members": every}, files), f"at most {contents.MAX_BUNDLE_BYTES} bytes in all")


def test_a_medium_that_cannot_be_read(bundle, monkeypatch):
    monkeypatch.setattr(archive, "read_block", lambda *_: fail(errno.EIO))
    with pytest.raises(InputError, match="Input/output error"), opened(bundle):
        pass


def test_parts_that_are_not_what_they_are_called(bundle, tmp_path):
    manifest, files = parts_of(bundle)
    path = next(p for p in files if p.startswith("patches/"))
    with_requirements = {**files, "requirements.txt": b""}
    renamed = {("patches/better-9.0.0.safetensors" if p == path else p): data for p, data in files.items()}
    second = {**files, "patches/detox-1.2.0.safetensors": patch_bytes(make_patch(2))}
    for number, (message, members) in enumerate(
        {
            "not a safetensors file": {**files, path: b"x" * 200},
            "expected patch .*, found detox 1.2.0": {**files, path: patch_bytes(make_patch(2))},
            "found detox 1.1.0": renamed,
            "expected one patch": second,
            "requirements.txt with wheels": with_requirements,
        }.items()
    ):
        (tmp_path / str(number)).mkdir()
        refused(tmp_path / str(number) / "site.tar", packed(listed(manifest, members), members), message)
    unsigned_root = {
        **files,
        "root.json": make_root().to_bytes().replace(make_root().signatures[0].signature.hex().encode(), b"0" * 128),
    }
    bundle.write_bytes(packed(listed(manifest, unsigned_root), unsigned_root))
    with pytest.raises(UntrustedError, match="signature of officer"), opened(bundle):
        pass


def test_files_that_are_no_bundles(tmp_path):
    for number, data in enumerate(
        [b"", b"x" * 2000, bytes(10240), file("README.md", b"x") + bytes(1024), b"PK\3\4" + bytes(600)]
    ):
        (tmp_path / str(number)).mkdir()
        refused(tmp_path / str(number) / "site.tar", data, "expected")
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError), opened(path):
            pass
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="no regular file"), opened(tmp_path / "pipe"):
        pass


@pytest.mark.parametrize("claimed", [10 * 2**30, 5 * 2**30])
def test_endless_files_cost_nothing(claimed, bundle):
    """Larger than any bundle, or of a size that a bundle may have, with nothing in it."""
    import tracemalloc

    data = bundle.read_bytes()
    with bundle.open("wb") as sparse:
        sparse.write(data if claimed > contents.MAX_BUNDLE_BYTES else data[:600])
        sparse.truncate(claimed)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(PatchFormatError), opened(bundle):
        pass
    assert time.perf_counter() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()


def test_a_manifest_that_claims_to_be_large(bundle):
    info = tarfile.TarInfo(contents.MANIFEST)
    info.size, info.mode = 2**32, 0o644
    refused(bundle, block(info) + bytes(1024), f"at most {contents.MAX_MANIFEST_BYTES} bytes")


def test_every_truncation_and_every_changed_byte(bundle):
    data = bundle.read_bytes()
    assert verified(data).patch.digest == make_patch(1).digest
    for size in range(0, len(data), examples(31, 7)):
        with pytest.raises((PatchFormatError, UntrustedError)):
            verified(data[:size])
    device_root, missed = make_root(), []
    for position in range(0, len(data), examples(11, 3)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        try:
            verified(bytes(changed)).vouched_by(device_root, NOW)
            missed.append(position)
        except (PatchFormatError, UntrustedError):
            pass
    assert not missed


# Whose word counts.


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != "lock"
    }


def test_a_device_with_a_trust_root_takes_what_it_vouches_for(bundle, tmp_path):
    store = make_store(tmp_path / "store")
    done = accept(bundle, store, model=spec())
    assert (done.change.digest, done.change.is_new, len(done.change.signed_by), len(done.bundle_signed_by)) == (
        make_patch(1).digest,
        True,
        2,
        2,
    )
    assert done.root == make_root() and not done.adopted
    assert [patch.digest for patch in store.active(spec())] == [make_patch(1).digest]
    assert not accept(bundle, store).change.is_new
    manifest = unpack(bundle, tmp_path / "out", make_root(), NOW)
    assert set(snapshot(tmp_path / "out")) == {member.path for member in manifest.members}
    with pytest.raises(InputError, match="expected a new folder"):
        unpack(bundle, tmp_path / "out", make_root(), NOW)


def test_signatures_that_do_not_count(tmp_path):
    store = make_store(tmp_path / "store")
    before = snapshot(tmp_path / "store")
    attempts: list[tuple[dict[str, Any], str]] = [
        ({"by": ()}, "signatures of role patch: expected 2"),
        ({"by": ("vendor",)}, "signatures of role patch: expected 2"),
        ({"by": ("vendor", "thief")}, "signatures of role patch: expected 2"),
        ({"keys": ("vendor",)}, "signatures of role patch: expected 2"),
        ({"keys": ("thief", "vendor")}, "not counted: unknown"),
    ]
    for number, (fields, message) in enumerate(attempts):
        path = make_bundle(tmp_path, root=True, name=f"{number}.tar", **fields)
        with pytest.raises(UntrustedError, match=message):
            accept(path, store, model=spec())
        with pytest.raises(UntrustedError, match=message):
            unpack(path, tmp_path / "out", make_root(), NOW)
    assert snapshot(tmp_path / "store") == before and not (tmp_path / "out").exists()


def test_a_member_swapped_under_good_signatures(bundle, tmp_path):
    """A new manifest for a swapped member: the hashes hold, the signatures do not. Without signatures the patch is all that is taken."""
    manifest, files = parts_of(bundle)
    with tarfile.open(bundle) as tar:
        signatures = tar.extractfile(contents.SIGNATURES).read()  # type: ignore[union-attr]
    files["INSTALL.txt"] = b"curl evil | sh"
    data = packed(listed(manifest, files), files)
    start = data.index(b"INSTALL.txt\0")
    store = make_store(tmp_path / "store")
    bundle.write_bytes(data[:start] + file(contents.SIGNATURES, signatures) + data[start:])
    for take in (
        lambda: accept(bundle, store, model=spec()),
        lambda: unpack(bundle, tmp_path / "out", make_root(), NOW),
    ):
        with pytest.raises(UntrustedError, match="one that does not fit"):
            take()
    bundle.write_bytes(data)
    with pytest.raises(UntrustedError, match=r"the bundle itself, not its patch: .*found none"):
        unpack(bundle, tmp_path / "out", make_root(), NOW)
    assert accept(bundle, store, model=spec()).bundle_signed_by == frozenset()
    unpack(bundle, tmp_path / "out", None, NOW)  # a device without a trust root is told that nothing was checked
    for other in (
        b"[]",
        b"{}",
        b"[1]",
        b'[ {"key_id":1}]',
        canonical_json(json.loads(signatures)[::-1]),
        canonical_json(json.loads(signatures)[:1] * 2),
    ):
        bundle.write_bytes(data[:start] + file(contents.SIGNATURES, other) + data[start:])
        with pytest.raises(PatchFormatError, match="signatures"), opened(bundle):
            pass


def test_a_root_that_came_along_counts_for_nothing(bundle, tmp_path):
    folder = tmp_path / "store"
    store = Store(folder, clock=Clock())
    with pytest.raises(UntrustedError, match="trust root"):
        accept(bundle, store, model=spec())
    assert store.root() is None
    for name in ("0" * 64, make_root().fingerprint[:12]):
        with pytest.raises(UntrustedError, match="fingerprint of the bundle's trust root"):
            accept(bundle, store, model=spec(), adopt_root=name)
    with pytest.raises(MismatchError, match="hidden_size"):
        accept(bundle, store, model=spec(hidden_size=16), adopt_root=make_root().fingerprint)
    assert store.root() is None and store.read()[0].patches == {}
    done = accept(bundle, store, model=spec(), adopt_root=make_root().fingerprint)
    assert done.adopted and done.change.is_new and store.root() == make_root()
    assert not accept(bundle, store, adopt_root=make_root().fingerprint).adopted
    with pytest.raises(InputError, match="found none"):
        accept(make_bundle(tmp_path, name="rootless.tar"), store, adopt_root=make_root().fingerprint)


def test_a_root_is_adopted_only_with_a_patch_that_it_vouches_for(tmp_path):
    store = Store(tmp_path / "store", clock=Clock())
    bundle = make_bundle(tmp_path, root=True, by=("vendor",))
    with pytest.raises(UntrustedError, match="signatures of role patch"):
        accept(bundle, store, model=spec(), adopt_root=make_root().fingerprint)
    assert store.root() is None


def test_an_adopted_root_stays_when_the_store_refuses_the_patch(tmp_path):
    store = Store(tmp_path / "store", clock=Clock())
    bundle = make_bundle(tmp_path, root=True, expires="2029-01-01T00:00:00Z")
    with pytest.raises(UntrustedError, match="expiry of the patch"):
        accept(bundle, store, model=spec(), adopt_root=make_root().fingerprint)
    assert store.root() == make_root() and store.active(spec()) == ()
    assert accept(bundle, store, model=spec(), allowances=Allowances(expired="no newer one yet")).change.is_new


def test_a_device_goes_to_the_next_root_only_by_rotation(tmp_path):
    store = make_store(tmp_path / "store")
    stranger = make_root(patch_threshold=1)
    for root, message in ((stranger, "root version: expected 2, found 1"), (rotated(make_root()), "")):
        (tmp_path / "new.json").write_bytes(root.to_bytes())
        creation.create(creation.Sources(write(tmp_path), tmp_path / "new.json"), tmp_path / "site.tar")
        if message:
            with pytest.raises(UntrustedError, match=message):
                accept(tmp_path / "site.tar", store, model=spec(), adopt_root=root.fingerprint)
            assert store.root() == make_root()
        else:
            assert accept(tmp_path / "site.tar", store, model=spec(), adopt_root=root.fingerprint).adopted
            assert store.root() == root


def test_rollback_is_refused_as_by_apply(tmp_path):
    store = make_store(tmp_path / "store")
    accept(make_bundle(tmp_path, sequence=2), store, model=spec())
    old = make_bundle(tmp_path, sequence=1)
    with pytest.raises(UntrustedError, match="sequence of the patch"):
        accept(old, store)
    assert accept(old, store, allowances=Allowances(downgrade="2 is broken")).change.digest == make_patch(1).digest


# Interrupted.


STEPS = ("fsync", "rename", "chmod")


def interrupt(monkeypatch, at: int, act: Callable[[], None]) -> list[int]:
    """Acts before the ``at``-th file-system step of an import; returns the count of steps so far."""
    count = [0]

    def before(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                act()
            return real(*arguments, **options)

        return step

    for name in STEPS:
        monkeypatch.setattr(os, name, before(getattr(os, name)))
    return count


def fail(number: int) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_leaves_nothing(number, bundle, tmp_path, monkeypatch):
    with monkeypatch.context() as counted:
        steps = interrupt(counted, 0, lambda: None)
        unpack(bundle, tmp_path / "whole", None, NOW)
    assert steps[0] > 8
    for at in range(1, steps[0]):  # the last one only makes the new name last
        with monkeypatch.context() as patched:
            interrupt(patched, at, lambda: fail(number))
            with pytest.raises(EdgepatchError, match=os.strerror(number)):
                unpack(bundle, tmp_path / "device" / "out", None, NOW)
        assert not list((tmp_path / "device").iterdir())


def test_killed_at_every_step_the_folder_is_whole_or_not_there(bundle, tmp_path, monkeypatch):
    with monkeypatch.context() as counted:
        steps = interrupt(counted, 0, lambda: None)
        unpack(bundle, tmp_path / "whole", None, NOW)
    whole, seen = snapshot(tmp_path / "whole"), set()
    for at in range(1, steps[0] + 1):
        target = tmp_path / "device" / str(at)
        child = os.fork()
        if child == 0:
            interrupt(monkeypatch, at, lambda: os._exit(9))
            unpack(bundle, target, None, NOW)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert not target.exists() or snapshot(target) == whole
        seen.add(target.exists())
        if not target.exists():
            unpack(bundle, target, None, NOW)
        assert snapshot(target) == whole
    assert seen == {False, True}


def test_a_file_that_changes_while_it_is_taken_in(bundle, tmp_path):
    with opened(bundle) as whole:
        member = whole.manifest.members[0]
        with bundle.open("r+b") as changed:
            changed.seek(whole.starts[member.path])
            changed.write(b"X")
        with pytest.raises(PatchFormatError, match="its SHA-256 is not the one"):
            whole.read(member)


def test_a_full_disk_while_a_bundle_is_made(tmp_path, monkeypatch):
    patch = write(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: fail(errno.ENOSPC))
    with pytest.raises(InputError, match="No space left"):
        creation.create(creation.Sources(patch), tmp_path / "new" / "site.tar")
    assert not list((tmp_path / "new").iterdir())


# Wheels and the bill of materials.


def stub(folder: Path, name: str, version: str = "99.0") -> Path:
    """A wheel of a distribution that installs nothing."""
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    about = f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n\n"
    wheels._write_wheel(
        path,
        {
            f"{info}/METADATA": about.encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        },
        info,
    )
    return path


@pytest.fixture(scope="session")
def registry(tmp_path_factory) -> Path:
    """Everything that edgepatch[gguf] needs, as wheels that install nothing; setuptools is the real one, which builds edgepatch."""
    folder = tmp_path_factory.mktemp("registry")
    for name in (
        "cryptography",
        "numpy",
        "platformdirs",
        "rich",
        "safetensors",
        "typer",
        "gguf",
        "jinja2",
        "llguidance",
    ):
        stub(folder, name)
    wheels.repacked(importlib.metadata.distribution("setuptools"), folder)
    return folder


def test_wheels_are_pinned_and_listed(registry, tmp_path, monkeypatch):
    """Real pip, real build, without a network."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(registry))
    wheel = stub(tmp_path, "llama_cpp_python")
    choice = wheels.Choice("gguf", prebuilt=(wheel,))
    sources = creation.Sources(write(tmp_path), choice=choice)
    manifest = creation.create(sources, tmp_path / "site.tar")
    names = {path.split("/")[1].split("-")[0] for path in manifest.wheels}
    assert names == {
        "cryptography",
        "numpy",
        "platformdirs",
        "rich",
        "safetensors",
        "typer",
        "gguf",
        "jinja2",
        "llguidance",
        "edgepatch",
        "llama_cpp_python",
    }
    assert (manifest.extra, manifest.built) == (
        "gguf",
        (),
    ) and manifest.python_version == f"{sys.version_info[0]}.{sys.version_info[1]}"
    unpack(tmp_path / "site.tar", tmp_path / "out", None, NOW)
    lines = (tmp_path / "out" / contents.REQUIREMENTS).read_text().splitlines()[1:]
    for member in manifest.members:
        if member.path.startswith(contents.WHEELS):
            name, version = wheels.name_and_version(Path(member.path).name)
            assert f"{name}=={version} --hash=sha256:{member.sha256}" in lines
    assert len(lines) == len(manifest.wheels)
    monkeypatch.delenv("PIP_FIND_LINKS")
    target = tmp_path / "installed"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--no-index",
        "--find-links",
        "out/wheels",
        "--require-hashes",
        "-r",
        "out/requirements.txt",
        "--target",
        str(target),
    ]
    subprocess.run(install, cwd=tmp_path, check=True)
    assert (target / "edgepatch" / "bundles" / "archive.py").read_bytes() == Path(archive.__file__).read_bytes()
    assert (target / "edgepatch" / "converters" / "hf" / "folders.py").is_file() and not (
        target / "edgepatch" / "tests"
    ).exists()
    folders = (target / "edgepatch" / "pages", Path(archive.__file__).parent.parent / "pages")
    built, checkout = ({path.name for path in folder.iterdir() if path.is_file()} for folder in folders)
    assert "page.html.j2" in built and built == checkout, "templates and styles are data of the package"
    require_valid_sbom((tmp_path / "out" / contents.SBOM).read_bytes(), len(manifest.wheels) + 1)
    note = (tmp_path / "out" / contents.INSTALL).read_text()
    assert "edgepatch[gguf]" in note and "--require-hashes -r bundle/requirements.txt" in note
    damaged = next((tmp_path / "out" / "wheels").glob("rich-*"))
    damaged.write_bytes(stub(tmp_path, "rich", "99.0").read_bytes()[:-1] + b"x")
    assert subprocess.run([*install, "--upgrade"], cwd=tmp_path, capture_output=True).returncode


def require_valid_sbom(data: bytes, count: int) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(data.decode()) is None
    assert len(json.loads(data)["components"]) == count
    assert (
        validator.validate_str(
            data.decode().replace('"library"', '"livrary"').replace("machine-learning-model", "model")
        )
        is not None
    )


def test_the_bill_of_materials_is_cyclonedx(tmp_path):
    wheel = stub(tmp_path, "some_library", "1.0+cpu")
    data = inventory.bill_of_materials(make_patch(license="Apache-2.0"), "0" * 64, {wheel: "1" * 64})
    require_valid_sbom(data, 2)
    model, library = json.loads(data)["components"]
    assert (model["name"], model["licenses"]) == ("detox", [{"expression": "Apache-2.0"}])
    assert (library["purl"], library["hashes"][0]["content"]) == ("pkg:pypi/some-library@1.0%2Bcpu", "1" * 64)


def test_an_installation_is_packed_as_it_was(tmp_path):
    installed = importlib.metadata.distribution("packaging")
    first, second = (
        wheels.repacked(installed, tmp_path / name) for name in ("a", "b") if (tmp_path / name).mkdir() is None
    )
    assert first.read_bytes() == second.read_bytes()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--no-index",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(first),
    ]
    subprocess.run(command, check=True)
    again = importlib.metadata.Distribution.at(next((tmp_path / "site").glob("*.dist-info")))
    assert wheels.repacked(again, tmp_path).read_bytes() == first.read_bytes()
    with zipfile.ZipFile(first) as packed_wheel:
        assert "packaging/version.py" in packed_wheel.namelist()
    (tmp_path / "site" / "packaging" / "version.py").write_text("evil = 1")
    with pytest.raises(InputError, match=r"version\.py: expected the file that was installed"):
        wheels.repacked(again, tmp_path)
    with pytest.raises(InputError, match="pure wheel"):
        wheels.repacked(importlib.metadata.distribution("numpy"), tmp_path)


def test_wheels_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / "x.whl").write_bytes(b"")
    for choice, message in (
        (wheels.Choice("nonsense"), "--extra: expected one of"),
        (wheels.Choice("gguf", platforms=("manylinux_2_28_aarch64",)), "cannot be compiled here"),
        (wheels.Choice("gguf", prebuilt=(tmp_path / "x.whl",)), "expected a wheel"),
        (wheels.Choice("onnx"), "pip wheel: ERROR: .*setuptools"),
    ):
        with pytest.raises(EdgepatchError, match=message):
            creation.create(creation.Sources(write(tmp_path), choice=choice), tmp_path / "new" / "site.tar")
        assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


@pytest.mark.skipif(
    not os.environ.get(REAL_VARIABLE), reason=f"{REAL_VARIABLE}=1 downloads 60 MB and may compile llama-cpp-python"
)
def test_the_install_note_holds_without_a_network(tmp_path):
    """The commands of INSTALL.txt, in a fresh environment, in a name space without a network."""
    patch = Path(__file__).parent.parent.parent / "bench/lab/model/lab-detox-0.1.0.safetensors"
    constraint = Path(__file__).parent.parent.parent / "constraints.txt"
    creation.create(creation.Sources(patch, choice=wheels.Choice("gguf", constraint=constraint)), tmp_path / "SITE.tar")
    with tarfile.open(tmp_path / "SITE.tar") as tar:
        note = tar.extractfile(contents.INSTALL).read().decode()  # type: ignore[union-attr]
    commands = [line.strip() for line in note.splitlines() if line.startswith("    ")]
    script = "\n".join(line for line in commands if "MODEL" not in line and line != "edgepatch rollback")
    script += "\nedgepatch bundle import SITE.tar --store store --unsigned 'a test'\nedgepatch status --store store"
    isolated = ["unshare", "--user", "--map-root-user", "--net"] if shutil.which("unshare") else []
    environment = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "EDGEPATCH_STORE": str(tmp_path / "store")}
    environment.pop("PIP_FIND_LINKS", None)
    done = subprocess.run(
        [*isolated, "bash", "-euc", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "lab-detox 0.1.0" in done.stdout


# The verbs.


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return command


def test_verbs(run, tmp_path):
    patch = tmp_path / "detox.safetensors"
    write_patch(make_patch(), patch)
    code, out, _ = run("bundle", "create", patch, "-o", "site.tar", "--no-wheels", "--json")
    report = json.loads(out)
    assert code == 0 and report["sha256"] == hashlib.sha256((tmp_path / "site.tar").read_bytes()).hexdigest()
    assert report["members"] == ["INSTALL.txt", "README.md", "patches/detox-1.1.0.safetensors", "sbom.cdx.json"]
    assert (
        "none: devices with a trust root"
        in run("bundle", "create", patch, "-o", "site.tar", "--no-wheels", "--force")[1]
    )
    assert run("bundle", "create", patch, "-o", "site.tar", "--no-wheels")[0] == 2, "it is there"
    assert run("bundle", "create", patch, "-o", "site.tar", "--no-wheels", "--extra", "gguf")[0] == 2
    code, _, err = run("bundle", "import", "site.tar")
    assert (code, "trust root" in err) == (3, True)
    assert run("bundle", "import", "site.tar", "--allow-downgrade")[0] == 2
    assert run("bundle", "import", "site.tar", "--out", "x", "--channel", "beta")[0] == 2
    report = json.loads(run("bundle", "import", "site.tar", "--unsigned", "first try", "--json")[1])
    assert (report["patch"], report["changed"], report["root_in_bundle"], report["adopted_root"]) == (
        make_patch().digest,
        True,
        None,
        False,
    )
    code, out, _ = run("bundle", "import", "site.tar", "--unsigned", "first try")
    assert (code, "already active" in out, "not checked: first try" in out) == (0, True, True)
    assert "not checked: this device has no trust root" in run("bundle", "import", "site.tar", "--out", "written")[1]
    assert (tmp_path / "written" / "INSTALL.txt").is_file()
    assert json.loads(run("bundle", "import", "site.tar", "--out", "again", "--json")[1])["vouched_for"] is False
    (tmp_path / "site.tar").write_bytes((tmp_path / "site.tar").read_bytes()[:-3])
    assert run("bundle", "import", "site.tar", "--unsigned", "x")[0] == 3
    assert run("bundle", "import", "none.tar")[0] == 2


def test_a_bundle_is_shown_without_taking_it_in(run, tmp_path, bundle):
    code, out, _ = run("bundle", "show", bundle)
    assert (code, "detox 1.1.0" in out, "whole" in out) == (0, True, True)
    assert out.count("not judged, this device has no trust root") == 2
    assert make_root().fingerprint in out and "counts for nothing yet" in out
    assert not (tmp_path / "store").exists()
    root = make_root(created=datetime.now(timezone.utc) - timedelta(days=2))
    Store(tmp_path / "store").set_root([root])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    code, out, _ = run("bundle", "show", bundle)
    assert (code, out.count("whom this device trusts")) == (0, 2)
    facts = json.loads(run("bundle", "show", bundle, "--json")[1])
    assert (facts["patch"]["name"], facts["root_in_bundle"]) == ("detox", make_root().fingerprint)
    assert "patches/detox-1.1.0.safetensors" in facts["members"]
    other = make_bundle(tmp_path, name="other.tar", keys=("thief",))
    code, out, _ = run("bundle", "show", other)
    assert (code, "refused: signatures" in out) == (3, True), "a signed bundle that nobody vouches for"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before
    other.write_bytes(other.read_bytes()[:-3])
    assert run("bundle", "show", other)[0] == 3


def test_the_sender_hears_that_an_unsigned_patch_is_refused(run, tmp_path):
    write_patch(make_patch(by=()), tmp_path / "bare.safetensors")
    write_patch(make_patch(), tmp_path / "signed.safetensors")
    for name in ("bare", "signed"):
        code, _, err = run("bundle", "create", f"{name}.safetensors", "-o", f"{name}.tar", "--no-wheels")
        assert (code, "devices with a trust root refuse it" in err) == (0, name == "bare")
    Store(tmp_path / "store").set_root([make_root(created=datetime.now(timezone.utc) - timedelta(days=2))])
    for name in ("bare", "signed"):
        code, out, _ = run("bundle", "show", f"{name}.tar")
        assert (code, "unsigned: refused" in out) == ((3, True) if name == "bare" else (0, False))

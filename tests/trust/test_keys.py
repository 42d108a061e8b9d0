"""Key files: who may read them, what opens them, and that none is ever lost or left half-written."""

from __future__ import annotations

import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from edgepatch.errors import InputError, UntrustedError
from edgepatch.trust.keys import create_key_pair, private_pem, read_private_key, read_public_key
from edgepatch.trust.signatures import raw_public_key

PASSPHRASE = "four words for tests"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path, Ed25519PrivateKey]:
    return create_key_pair(tmp_path_factory.mktemp("keys"), "vendor", PASSPHRASE)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow; Python ignores the signal, so that the write fails as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def write_private(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def test_round_trip(pair):
    private, public, key = pair
    assert read_private_key(private, PASSPHRASE).private_bytes_raw() == key.private_bytes_raw()
    assert raw_public_key(read_public_key(public)) == raw_public_key(key)


def test_modes(tmp_path: Path):
    folder = tmp_path / "new" / "keys"
    old = os.umask(0)
    try:
        private, public, _ = create_key_pair(folder, "open", None)
        os.umask(0o777)
        shut, _, _ = create_key_pair(folder, "shut", None)
    finally:
        os.umask(old)
    assert [stat.S_IMODE(p.stat().st_mode) for p in (private, shut, public, folder)] == [0o600, 0o600, 0o644, 0o700]


def test_private_key_is_encrypted(pair):
    private, _, key = pair
    data = private.read_bytes()
    assert data.startswith(b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n")
    with pytest.raises(TypeError, match="Password was not given"):
        load_pem_private_key(data, None)
    opened = load_pem_private_key(data, PASSPHRASE.encode())
    assert opened.private_bytes_raw() == key.private_bytes_raw()
    assert private_pem(key, PASSPHRASE) != data, "salt and IV are new each time"


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs the openssl program")
def test_openssl_reads_both_files(pair):
    private, public, _ = pair
    command = ["openssl", "pkey", "-in", str(private), "-passin", f"pass:{PASSPHRASE}", "-pubout"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == public.read_text()
    asn1 = subprocess.run(
        ["openssl", "asn1parse", "-in", str(private)], capture_output=True, text=True, check=True
    ).stdout
    assert "PBES2" in asn1 and "scrypt" in asn1.lower()


@pytest.mark.parametrize("passphrase", ["", "wrong words for tests", PASSPHRASE + " ", "\udcff" * 12])
def test_wrong_passphrase(pair, passphrase):
    with pytest.raises(InputError, match="the passphrase does not open it"):
        read_private_key(pair[0], passphrase)


def test_passphrase_of_any_bytes(tmp_path: Path):
    odd = b"\xff\xfe not UTF-8 \xc3\xa9".decode(errors="surrogateescape")
    private, _, key = create_key_pair(tmp_path, "odd", odd)
    assert read_private_key(private, odd).private_bytes_raw() == key.private_bytes_raw()


def test_short_passphrase(tmp_path: Path):
    for short in ("", "eleven char"):
        with pytest.raises(InputError, match="12 characters or more"):
            create_key_pair(tmp_path, "vendor", short)
    assert list(tmp_path.iterdir()) == []


def test_unencrypted_only_where_it_was_said(tmp_path: Path, pair):
    private, _, key = create_key_pair(tmp_path, "plain", None)
    assert private.read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert private.read_bytes() == key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert read_private_key(private, None).private_bytes_raw() == key.private_bytes_raw()
    with pytest.raises(UntrustedError, match="expected an encrypted key, found an unencrypted one"):
        read_private_key(private, PASSPHRASE)
    with pytest.raises(InputError, match="expected an unencrypted key, found an encrypted one"):
        read_private_key(pair[0], None)


def test_key_that_others_can_read(tmp_path: Path, pair):
    copy = tmp_path / "vendor.key"
    copy.write_bytes(pair[0].read_bytes())
    copy.chmod(0o644)
    with pytest.raises(UntrustedError, match=r"rights of .*vendor\.key: expected none for group and others"):
        read_private_key(copy, PASSPHRASE)


@pytest.mark.parametrize("name", ["", ".", "../vendor", "a/b", "-rf", "a b", "a\n", "é", "a" * 65])
def test_names(tmp_path: Path, name: str):
    with pytest.raises(InputError, match="key name"):
        create_key_pair(tmp_path, name, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["vendor.key", "vendor.pub"])
@pytest.mark.parametrize("link", [False, True])
def test_nothing_is_overwritten(tmp_path: Path, taken: str, link: bool):
    folder = tmp_path / "keys"
    folder.mkdir()
    if link:
        (folder / taken).symlink_to(tmp_path / "elsewhere")
    else:
        (folder / taken).write_text("precious")
    with pytest.raises(InputError, match=f"{taken} exists"):
        create_key_pair(folder, "vendor", None)
    assert [file.name for file in folder.iterdir()] == [taken] and not (tmp_path / "elsewhere").exists()
    assert link or (folder / taken).read_text() == "precious"


def test_nothing_is_left_on_a_full_disk(tmp_path: Path):
    with full_disk(), pytest.raises(InputError, match=r"cannot write .*vendor.pub: File too large"):
        create_key_pair(tmp_path, "vendor", None)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_is_none(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="expected a folder, found the file"):
        create_key_pair(tmp_path / "file", "vendor", None)


def test_one_file_in_place_of_the_other(pair, tmp_path: Path):
    with pytest.raises(InputError, match="expected a public key, found ENCRYPTED PRIVATE KEY"):
        read_public_key(pair[0])
    with pytest.raises(InputError, match="that is the public key: expected the private one"):
        read_private_key(write_private(tmp_path / "x", pair[1].read_bytes()), PASSPHRASE)


def test_other_algorithms(tmp_path: Path):
    key = ec.generate_private_key(ec.SECP256R1())
    private = write_private(tmp_path / "ec.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(InputError, match="expected an Ed25519 key"):
        read_private_key(private, None)
    public = tmp_path / "ec.pub"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(InputError, match="expected an Ed25519 key"):
        read_public_key(public)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:60],
        lambda data: data + data,
        lambda data: b"note\n" + data,
        lambda data: data.replace(b"KEY-----\n", b"KEY-----\nProc-Type: 4,ENCRYPTED\n", 1),
        lambda data: data.replace(b"\nM", b"\nA", 1),
        lambda data: data[:70] + b"\n" + data[90:],
    ],
)
def test_damaged_files(pair, tmp_path: Path, damage):
    with pytest.raises(InputError, match=r"damaged|expected one key in PEM"):
        read_private_key(write_private(tmp_path / "x", damage(pair[0].read_bytes())), PASSPHRASE)
    (tmp_path / "y").write_bytes(damage(pair[1].read_bytes()))
    with pytest.raises(InputError, match=r"damaged|expected one key in PEM"):
        read_public_key(tmp_path / "y")


def test_line_ends_of_other_systems(pair, tmp_path: Path):
    (tmp_path / "x.pub").write_bytes(pair[1].read_bytes().replace(b"\n", b"\r\n"))
    assert raw_public_key(read_public_key(tmp_path / "x.pub")) == raw_public_key(pair[2])


def test_large_files(tmp_path: Path):
    big = write_private(tmp_path / "big", b"x" * 5000)
    for call in (lambda: read_public_key(big), lambda: read_private_key(big, None)):
        with pytest.raises(UntrustedError, match="at most 4096 bytes"):
            call()

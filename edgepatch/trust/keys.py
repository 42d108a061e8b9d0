"""Signing keys as files: ``NAME.key``, a private key, and ``NAME.pub``, its public half.

Both are PEM that other tools read: PKCS #8, encrypted by a passphrase, and SubjectPublicKeyInfo. The encryption is written
here because the library's own derives the AES key by 2048 rounds of PBKDF2, which a graphics card tries by the million.
"""

from __future__ import annotations

import base64
import os
import re
from contextlib import ExitStack
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from edgepatch.errors import InputError, UntrustedError
from edgepatch.files.reading import read_bounded
from edgepatch.files.writing import require_writable

MAX_KEY_FILE_BYTES = 4096
MIN_PASSPHRASE_LENGTH = 12
SCRYPT_N, SCRYPT_R, SCRYPT_P = 2**14, 8, 5
"""16 MiB, five times over. OpenSSL reads no PKCS #8 that needs 32 MiB or more; five passes make up for the smaller memory."""

ENCRYPTED, PLAIN, PUBLIC = "ENCRYPTED PRIVATE KEY", "PRIVATE KEY", "PUBLIC KEY"
PUBLIC_START = f"-----BEGIN {PUBLIC}-----".encode()
OID_PBES2 = bytes.fromhex("2a864886f70d01050d")  # 1.2.840.113549.1.5.13, RFC 8018
OID_SCRYPT = bytes.fromhex("2b06010401da47040b")  # 1.3.6.1.4.1.11591.4.11, RFC 7914
OID_AES_256_CBC = bytes.fromhex("60864801650304012a")  # 2.16.840.1.101.3.4.1.42
INTEGER, OCTETS, OID, SEQUENCE = 0x02, 0x04, 0x06, 0x30


def _der(tag: int, *parts: bytes) -> bytes:
    """One DER element of less than 256 bytes."""
    body = b"".join(parts)
    length = bytes([len(body)]) if len(body) < 128 else bytes([0x81, len(body)])
    return bytes([tag]) + length + body


def _der_integer(value: int) -> bytes:
    return _der(INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _pem(label: str, der: bytes) -> bytes:
    text = base64.b64encode(der).decode()
    lines = [text[i : i + 64] for i in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


def _secret(passphrase: str) -> bytes:
    return passphrase.encode(errors="surrogateescape")  # the bytes that the environment or a file had


def _encrypt(plain: bytes, passphrase: str) -> bytes:
    """DER of EncryptedPrivateKeyInfo: PBES2 with scrypt and AES-256-CBC."""
    salt, iv = os.urandom(32), os.urandom(16)
    secret = Scrypt(salt, 32, SCRYPT_N, SCRYPT_R, SCRYPT_P).derive(_secret(passphrase))
    padder, encryptor = padding.PKCS7(128).padder(), Cipher(algorithms.AES(secret), modes.CBC(iv)).encryptor()
    ciphertext = encryptor.update(padder.update(plain) + padder.finalize()) + encryptor.finalize()
    cost = [_der_integer(value) for value in (SCRYPT_N, SCRYPT_R, SCRYPT_P)]
    derivation = _der(SEQUENCE, _der(OID, OID_SCRYPT), _der(SEQUENCE, _der(OCTETS, salt), *cost))
    cipher = _der(SEQUENCE, _der(OID, OID_AES_256_CBC), _der(OCTETS, iv))
    scheme = _der(SEQUENCE, _der(OID, OID_PBES2), _der(SEQUENCE, derivation, cipher))
    return _der(SEQUENCE, scheme, _der(OCTETS, ciphertext))


def private_pem(key: Ed25519PrivateKey, passphrase: str | None) -> bytes:
    """A private key as PEM; ``None`` leaves it unencrypted."""
    plain = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    return _pem(PLAIN, plain) if passphrase is None else _pem(ENCRYPTED, _encrypt(plain, passphrase))


def _create(path: Path, data: bytes, mode: int) -> None:
    """A new file, whole or not at all. Never opens one that exists; the mode is right from the first moment on."""
    try:
        with ExitStack() as undo:
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode), "wb"
            ) as file:
                undo.callback(path.unlink)
                os.fchmod(file.fileno(), mode)  # the umask may have taken more away
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            undo.pop_all()
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}", hint="free space or name another folder") from error


def _exists(path: Path) -> InputError:
    return InputError(f"{path} exists: expected a new name", hint="a key is never overwritten; move it away yourself")


def require_new_key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """(private file, public file) of a key to come; called before a passphrase is asked for.

    Args:
        folder, name: as ``create_key_pair``.

    Raises:
        InputError: the name does not do, a file exists, or the folder cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise InputError(f"key name: expected letters, digits, '.', '_' and '-', 64 at most, found {name!r}")
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for path in (public, private):
        if path.exists() or path.is_symlink():
            raise _exists(path)
    require_writable(folder)
    return private, public


def create_key_pair(folder: Path, name: str, passphrase: str | None) -> tuple[Path, Path, Ed25519PrivateKey]:
    """Makes a key and writes ``NAME.key`` (mode 0600) and ``NAME.pub``.

    Args:
        folder: made where it does not exist, for its owner alone.
        name: letters, digits, ``.``, ``_`` and ``-``.
        passphrase: encrypts the private key; ``None`` says that it shall lie there unencrypted.

    Returns:
        The private file, the public file, the key.

    Raises:
        InputError: the name or the passphrase does not do, a file exists, or the folder cannot be written. Nothing is left.
    """
    private, public = require_new_key_pair(folder, name)
    if passphrase is not None and len(passphrase) < MIN_PASSPHRASE_LENGTH:
        raise InputError(
            f"passphrase: expected {MIN_PASSPHRASE_LENGTH} characters or more, found {len(passphrase)}",
            hint="four random words are easy to keep",
        )
    key = Ed25519PrivateKey.generate()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    with ExitStack() as undo:
        _create(public, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), 0o644)
        undo.callback(public.unlink)
        _create(private, private_pem(key, passphrase), 0o600)
        undo.pop_all()
    return private, public, key


def _label(data: bytes, path: Path) -> str:
    """What a file says it is; it holds exactly one PEM block."""
    block = re.fullmatch(
        rb"-----BEGIN ([A-Z ]+)-----\n[A-Za-z0-9+/=\n]+\n-----END \1-----\n?", data.replace(b"\r\n", b"\n")
    )
    if not block:
        raise InputError(f"{path}: expected one key in PEM, found something else", hint="`edgepatch keygen` makes keys")
    return block[1].decode()


def read_private_key(path: Path, passphrase: str | None) -> Ed25519PrivateKey:
    """Reads a private key.

    Args:
        path: its file, which nobody but the owner may have rights to.
        passphrase: opens an encrypted key; ``None`` says that the key is known to lie there unencrypted.

    Raises:
        InputError: no such file, no Ed25519 key, the wrong passphrase, or encrypted where it should not be.
        UntrustedError: others may read the file, it is too large, or not encrypted where it should be.
    """
    data = require_private(path, passphrase is not None)
    try:
        key = load_pem_private_key(data, None if passphrase is None else _secret(passphrase))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: the passphrase does not open it, or the file is damaged") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: expected an Ed25519 key, found {type(key).__name__}")
    return key


def _is_public(path: Path) -> bool:
    """Everybody may read a public key, so it is looked for before the file's rights are judged."""
    try:
        return read_bounded(path, MAX_KEY_FILE_BYTES, "key").startswith(PUBLIC_START)
    except InputError:
        return False


def require_private(path: Path, is_encrypted: bool) -> bytes:
    """What a private key's file holds. Called before a passphrase is asked for, of which nothing here depends.

    Args:
        path: as ``read_private_key``.
        is_encrypted: whether its user says so.

    Raises:
        InputError, UntrustedError: as ``read_private_key``, but for what only the passphrase shows.
    """
    if _is_public(path):
        private = path.with_suffix(".key").name if path.suffix == ".pub" else "the file that ends in .key"
        raise InputError(f"{path}: that is the public key: expected the private one", hint=f"sign with {private}")
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "private key", private=True, oversize=UntrustedError)
    label = _label(data, path)
    if label not in (ENCRYPTED, PLAIN):
        raise InputError(f"{path}: expected a private key, found {label}", hint="it ends in .key")
    if not is_encrypted and label == ENCRYPTED:
        raise InputError(f"{path}: expected an unencrypted key, found an encrypted one", hint="give its passphrase")
    if is_encrypted and label == PLAIN:
        raise UntrustedError(
            f"{path}", "an encrypted key", "an unencrypted one", hint="--unencrypted takes it as it is"
        )
    return data


def read_public_key(path: Path) -> Ed25519PublicKey:
    """Reads a public key.

    Raises:
        InputError: no such file, or no Ed25519 public key.
        UntrustedError: the file is too large.
    """
    data = read_bounded(path, MAX_KEY_FILE_BYTES, "public key", oversize=UntrustedError)
    label = _label(data, path)
    if label != PUBLIC:
        raise InputError(
            f"{path}: expected a public key, found {label}", hint="it ends in .pub; a private key stays where it is"
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: expected a public key, found a damaged file") from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path}: expected an Ed25519 key, found {type(key).__name__}")
    return key

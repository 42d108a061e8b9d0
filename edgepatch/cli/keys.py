"""``keygen`` and ``root``: signing keys, and the trust root that says which of them count."""

from __future__ import annotations

import getpass
import os
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import Application, app
from edgepatch.cli.console import ForceFlag, JsonFlag, new_file, print_json, rewritten, stdout, table
from edgepatch.errors import InputError, UntrustedError

if TYPE_CHECKING:
    from edgepatch.trust.roots import Key, Root

PASSPHRASE_VARIABLE = "EDGEPATCH_KEY_PASSPHRASE"
MAX_PASSPHRASE_BYTES = 1024

root_app = Application(
    help="Make, sign, rotate and show trust roots.\n\nExample: `edgepatch root show root.json`", no_args_is_help=True
)
app.add_typer(root_app, name="root")

PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file", help=f"First line is the passphrase; else {PASSPHRASE_VARIABLE}, else it is asked for."
    ),
]
Unencrypted = Annotated[
    bool, typer.Option("--unencrypted", help="The private key lies in its file without a passphrase.")
]
RootArgument = Annotated[Path, typer.Argument(metavar="ROOT", help="Trust root file.")]


def read_passphrase(file: Path | None, unencrypted: bool, confirm: bool) -> str | None:
    """The passphrase of a key: from a file, the environment, or the terminal; ``None`` for an unencrypted key.

    Raises:
        InputError: none of the three is there, or the two times it was typed differ.
        UntrustedError: others may read the passphrase file.
    """
    from edgepatch.files.reading import read_bounded

    if unencrypted:
        if file:
            raise InputError("expected --passphrase-file or --unencrypted, found both")
        return None
    if file:
        data = read_bounded(file, MAX_PASSPHRASE_BYTES, "passphrase file", private=True, oversize=UntrustedError)
        return data.decode(errors="surrogateescape").split("\n")[0].removesuffix("\r")
    if PASSPHRASE_VARIABLE in os.environ:
        return os.environ[PASSPHRASE_VARIABLE]
    if not sys.stdin.isatty():
        raise InputError(
            "expected a passphrase, found no terminal to ask on", hint=f"--passphrase-file, or {PASSPHRASE_VARIABLE}"
        )
    try:
        passphrase = getpass.getpass("passphrase: ")
        again = getpass.getpass("once more: ") if confirm else passphrase
    except EOFError:
        raise InputError("expected a passphrase, found the end of the input") from None
    if again != passphrase:
        raise InputError("passphrase: expected the same twice, found two")
    return passphrase


@app.command()
def keygen(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Writes NAME.key, which stays where it is, and NAME.pub, for others.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write to.")] = Path("."),
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
    as_json: JsonFlag = False,
) -> None:
    """Make a key pair for signing.

    Existing files are never overwritten.

    Example: `edgepatch keygen vendor --out keys`
    """
    from edgepatch.trust.keys import create_key_pair, require_new_key_pair
    from edgepatch.trust.signatures import key_id, raw_public_key

    require_new_key_pair(out, name)
    private, public, key = create_key_pair(out, name, read_passphrase(passphrase_file, unencrypted, confirm=True))
    facts = {
        "private": str(private),
        "public": str(public),
        "key_id": key_id(raw_public_key(key)),
        "encrypted": not unencrypted,
    }
    _print(facts, as_json)


def _print(values: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(values)
    else:
        stdout().print(table([(name.replace("_", " "), value) for name, value in values.items()]))


def _keys(files: list[Path] | None) -> list[Key]:
    """Public keys; the owner of each is called as its file, or as ``OWNER=`` in front of it says."""
    from edgepatch.trust.keys import read_public_key
    from edgepatch.trust.roots import Key
    from edgepatch.trust.signatures import raw_public_key

    named = [_owner_and_file(file) for file in files or []]
    return [Key(raw_public_key(read_public_key(file)), owner) for owner, file in named]


def _owner_and_file(argument: Path) -> tuple[str, Path]:
    owner, equals, path = str(argument).partition("=")
    return (owner, Path(path)) if equals and not argument.exists() else (argument.stem, argument)


def _key_to_revoke(value: str) -> str:
    """A key id, or that of a public key file."""
    path = Path(value)
    return _keys([path])[0].id if path.suffix == ".pub" else value


@root_app.command("create")
def create(
    out: Annotated[Path, new_file("Trust root file to write, unsigned.")],
    force: ForceFlag = False,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key",
            metavar="[OWNER=]FILE",
            help="Public key that signs patches; may be repeated. Keys of one owner, else named as the file, count as one.",
        ),
    ] = None,
    root_key: Annotated[
        list[Path] | None,
        typer.Option("--root-key", metavar="[OWNER=]FILE", help="Public key that signs trust roots; may be repeated."),
    ] = None,
    threshold: Annotated[
        int | None, typer.Option("--threshold", min=1, help="Owners that must sign a patch; else a majority.")
    ] = None,
    root_threshold: Annotated[
        int | None, typer.Option("--root-threshold", min=1, help="Keys that must sign a trust root; else a majority.")
    ] = None,
    expires: Annotated[
        int, typer.Option("--expires", metavar="DAYS", min=1, max=3650, help="Days until it expires.")
    ] = 365,
    old: Annotated[
        Path | None,
        typer.Option("--from", metavar="OLD", help="Make the version after this one: its keys, and those named here."),
    ] = None,
    revoke: Annotated[
        list[str] | None,
        typer.Option("--revoke", metavar="KEY", help="With --from: public key file or key id that counts no more."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a trust root, to be signed by its root keys.

    Examples: `edgepatch root create --key vendor.pub --key site.pub --threshold 2 --root-key officer.pub --expires 365 -o root.json`,
    `edgepatch root create --from root.json --revoke vendor.pub --key vendor2.pub -o root-2.json`
    """
    from edgepatch.files.writing import write_atomically
    from edgepatch.trust.drafts import new_root, next_root
    from edgepatch.trust.roots import read_root

    if revoke and not old:
        raise InputError("--revoke: expected --from OLD with it, found none")
    common: dict[str, Any] = {
        "patch_keys": _keys(key),
        "root_keys": _keys(root_key),
        "created": datetime.now(timezone.utc),
        "lifetime": timedelta(days=expires),
        "patch_threshold": threshold,
        "root_threshold": root_threshold,
    }
    revoked = [_key_to_revoke(value) for value in revoke or []]
    root = next_root(read_root(old), revoke=revoked, **common) if old else new_root(**common)
    write_atomically(out, root.to_bytes())
    _print(
        {"file": str(out), "version": root.version, "fingerprint": root.fingerprint, "signatures": _progress(root)},
        as_json,
    )


def _progress(root: Root) -> str:
    from edgepatch.trust.signatures import ROOT_TYPE
    from edgepatch.trust.verification import signers

    signed = signers(root.payload, ROOT_TYPE, root.signatures, root.keys) & root.counting("root")
    return f"{len(signed)} of {root.roles['root'].threshold}"


@root_app.command("sign")
def sign_root(
    root_file: RootArgument,
    key_file: Annotated[Path, typer.Argument(metavar="KEY", help="Private key.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="File to write; ROOT itself if not given.")
    ] = None,
    force: ForceFlag = False,
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
    as_json: JsonFlag = False,
) -> None:
    """Add a signature to a trust root: its own root keys sign it, and enough root keys of the version before.

    Example: `edgepatch root sign root.json officer.key`
    """
    from edgepatch.files.writing import write_atomically
    from edgepatch.trust.keys import read_private_key, require_private
    from edgepatch.trust.roots import read_root
    from edgepatch.trust.signatures import key_id, raw_public_key

    root = read_root(root_file)
    _progress(root)  # refuses a changed root before a passphrase is asked for
    target = rewritten(root_file, out, force)
    require_private(key_file, not unencrypted)
    key = read_private_key(key_file, read_passphrase(passphrase_file, unencrypted, confirm=False))
    signed = root.signed_by(key)
    write_atomically(target, signed.to_bytes())
    own = key_id(raw_public_key(key))
    note = "this version" if own in root.counting("root") else "the rotation from a version that lists the key"
    facts = {"file": str(target), "version": root.version, "fingerprint": root.fingerprint}
    _print({**facts, "signed_by": root.called(own), "counts_for": note, "signatures": _progress(signed)}, as_json)


@root_app.command("rotate")
def rotate_root(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Trust root that is trusted now.")],
    new: Annotated[list[Path], typer.Argument(metavar="NEW...", help="The versions after it, in order.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="File to write the newest to; OLD is allowed.")
    ],
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Go from a trusted root to a newer one, if every step is signed by the root keys on both of its sides.

    Example: `edgepatch root rotate root.json root-2.json -o root.json`
    """
    from edgepatch.files.writing import write_atomically
    from edgepatch.trust.roots import read_root
    from edgepatch.trust.verification import rotate

    rotation = rotate(read_root(old), [read_root(path) for path in new], datetime.now(timezone.utc))
    root = rotation.root
    write_atomically(rewritten(old, out, force), root.to_bytes())
    facts = {"file": str(out), "version": root.version, "fingerprint": root.fingerprint}
    _print({**facts, "sequences": "reset" if rotation.resets_sequences else "kept"}, as_json)


@root_app.command("show")
def show_root(root_file: RootArgument, as_json: JsonFlag = False) -> None:
    """Show a trust root; the exit code is 3 unless it is signed by its own root keys and has not expired.

    Compare the fingerprint with the one that its maker names on another way, before a trust root is trusted for the first time.

    Example: `edgepatch root show root.json`
    """
    from edgepatch.trust.roots import read_root
    from edgepatch.trust.verification import require_current, require_signed

    root = read_root(root_file)
    refusal = None
    try:
        require_signed(root)
        require_current(root, datetime.now(timezone.utc))
    except UntrustedError as error:
        refusal = error
    if as_json:
        print_json({**_summary(root), "holds": refusal is None})
    else:
        stdout().print(table(_rows(root)))
    if refusal:
        raise refusal


def _summary(root: Root) -> dict[str, Any]:
    return {
        "version": root.version,
        "fingerprint": root.fingerprint,
        "created": root.created.isoformat(),
        "expires": root.expires.isoformat(),
        "roles": {name: {"threshold": role.threshold, "keys": sorted(role.keys)} for name, role in root.roles.items()},
        "keys": {name: key.owner for name, key in root.keys.items()},
        "revoked": sorted(root.revoked),
        "signatures": [signature.key_id for signature in root.signatures],
    }


def _rows(root: Root) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        (name, _summary(root)[name]) for name in ("version", "fingerprint", "created", "expires")
    ]
    for name, role in root.roles.items():
        keys = ", ".join(sorted(root.called(key) for key in role.keys))
        rows.append((f"{name} role", f"{role.threshold} of {keys}"))
    rows.append(("revoked", ", ".join(sorted(root.called(key) for key in root.revoked)) or "none"))
    rows.append(("signatures", ", ".join(root.called(signature.key_id) for signature in root.signatures) or "none"))
    return rows

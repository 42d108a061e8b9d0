"""``sign`` and ``trust``: signatures under patches, and the trust root of a device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from edgepatch.cli.application import Application, app
from edgepatch.cli.console import ForceFlag, JsonFlag, StoreOption, print_json, rewritten, stdout, table
from edgepatch.cli.keys import PassphraseFile, Unencrypted, read_passphrase
from edgepatch.errors import InputError

trust_app = Application(
    help="Set and show the trust root of this device.\n\nExample: `edgepatch trust show`", no_args_is_help=True
)
app.add_typer(trust_app, name="trust")


@app.command()
def sign(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")],
    key_files: Annotated[
        list[Path], typer.Argument(metavar="KEY...", help="Private keys; one passphrase opens them all.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="File to write; PATCH itself if not given.")
    ] = None,
    force: ForceFlag = False,
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
    as_json: JsonFlag = False,
) -> None:
    """Add signatures to a patch; what it holds, and its digest, stay the same.

    Example: `edgepatch sign detox-1.1.0.safetensors vendor.key`
    """
    from edgepatch.patch.file import PAYLOAD_TYPE, read_patch, signed, write_patch
    from edgepatch.trust.keys import read_private_key, require_private
    from edgepatch.trust.signatures import key_id, raw_public_key
    from edgepatch.trust.signatures import sign as signature_of

    patch = read_patch(patch_file)
    target = rewritten(patch_file, out, force)
    for file in key_files:
        require_private(file, not unencrypted)
    passphrase = read_passphrase(passphrase_file, unencrypted, confirm=False)
    owners = dict[str, str]()
    for file, key in [(file, read_private_key(file, passphrase)) for file in key_files]:
        patch = signed(patch, signature_of(patch.manifest, PAYLOAD_TYPE, key))
        owners[key_id(raw_public_key(key))] = file.stem
    digest = write_patch(patch, target)
    names = [signature.key_id for signature in patch.signatures]
    if as_json:
        print_json({"file": str(target), "digest": digest, "signatures": names, "signed_with": owners})
    else:
        stdout().print(
            table(
                [
                    ("file", target),
                    ("digest", digest),
                    ("signatures", ", ".join(_called(name, owners) for name in names)),
                ]
            )
        )


def _called(key: str, owners: Mapping[str, str]) -> str:
    """A key by its file's name and the start of its id; one that had signed before by its id alone."""
    return f"{owners[key]} ({key[:12]})" if key in owners else key[:12]


@trust_app.command("set")
def set_root(
    root_files: Annotated[
        list[Path], typer.Argument(metavar="ROOT...", help="The trust root; of a rotation, all versions in order.")
    ],
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="What its maker says it is; compared before anything is trusted.")
    ] = "",
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Give this device its trust root, or go from the present one to a newer one.

    The first one is trusted as it comes: compare the fingerprint with the one that its maker names on another way.

    Examples: `edgepatch trust set root.json --fingerprint 5c1f...`, `edgepatch trust set root-2.json`
    """
    from edgepatch.store.device import Store
    from edgepatch.trust.roots import read_root

    change = Store(store).set_root([read_root(file) for file in root_files], fingerprint)
    root = change.root
    facts = {"version": root.version, "fingerprint": root.fingerprint, "changed": change.is_new}
    if as_json:
        print_json({**facts, "sequences": "reset" if change.reset else "kept", "refused": list(change.refused)})
        return
    rows: list[tuple[str, object]] = [("version", root.version), ("fingerprint", root.fingerprint)]
    rows.append(("sequences", "reset" if change.reset else "kept"))
    rows += [
        ("no longer trusted", f"{digest[:12]}, which is active: apply one that this root trusts")
        for digest in change.refused
    ]
    stdout().print(table(rows))


@trust_app.command("show")
def show(store: StoreOption = None, as_json: JsonFlag = False) -> None:
    """Show the trust root of this device.

    Example: `edgepatch trust show`
    """
    from edgepatch.store.audit import root_summary
    from edgepatch.store.reading import StoreReader

    root = root_summary(StoreReader(store).root())
    if root is None:
        raise InputError("this device has no trust root", hint="`edgepatch trust set ROOT`")
    if as_json:
        print_json(root)
    else:
        stdout().print(
            table([(key, ", ".join(value) if isinstance(value, list) else value) for key, value in root.items()])
        )


@trust_app.command("reset-clock")
def reset_clock(
    reason: Annotated[str, typer.Option("--reason", help="The history keeps it.")],
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Forget the latest time that this device has seen, after its clock had been set ahead by mistake.

    Example: `edgepatch trust reset-clock --reason "was set to 2062 by mistake"`
    """
    from edgepatch.store.device import Store

    Store(store).reset_clock(reason)
    if as_json:
        print_json({"reset": True})
    else:
        print("the time that the clock shows counts from now on")

"""``bundle``: one file for a machine without a network, and what takes it in there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import Application, app
from edgepatch.cli.console import (
    ForceFlag,
    JsonFlag,
    StoreOption,
    counted,
    model_path,
    new_file,
    print_json,
    shown,
    size_text,
    stdout,
    table,
    warn,
)
from edgepatch.cli.keys import PassphraseFile, Unencrypted, read_passphrase
from edgepatch.errors import InputError

if TYPE_CHECKING:
    from edgepatch.bundles.acceptance import Accepted, Bundle, Judgement
    from edgepatch.bundles.contents import Manifest
    from edgepatch.store.reading import StoreReader

bundle_app = Application(
    help="Make bundles for machines without a network, and take them in.\n\nExample: `edgepatch bundle import site.tar`",
    no_args_is_help=True,
)
app.add_typer(bundle_app, name="bundle")


@bundle_app.command("create")
def create(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch file.")],
    out: Annotated[Path, new_file("Tar file to write.")],
    force: ForceFlag = False,
    extra: Annotated[str, typer.Option("--extra", help="Wheels of edgepatch with this extra: gguf, onnx, ...")] = "",
    platform: Annotated[
        list[str] | None,
        typer.Option(
            "--platform",
            help="pip's name of the device's platform, if not this machine's; may be repeated, the best first.",
        ),
    ] = None,
    python_version: Annotated[
        str, typer.Option("--python-version", help="The device's Python, if not this one: 3.11.")
    ] = "",
    constraint: Annotated[Path | None, typer.Option("--constraint", "-c", help="Constraints file for pip.")] = None,
    wheel: Annotated[
        list[Path] | None, typer.Option("--wheel", help="Wheel that was built elsewhere; may be repeated.")
    ] = None,
    no_wheels: Annotated[bool, typer.Option("--no-wheels", help="For devices that have edgepatch already.")] = False,
    root: Annotated[Path | None, typer.Option("--root", help="Trust root to bring along.")] = None,
    report: Annotated[Path | None, typer.Option("--report", help="HTML report to bring along.")] = None,
    base_model: Annotated[
        str, typer.Option("--base-model", help="What a hub calls the base, for the model card.")
    ] = "",
    key: Annotated[
        list[Path] | None, typer.Option("--key", help="Private key that signs the bundle; may be repeated.")
    ] = None,
    passphrase_file: PassphraseFile = None,
    unencrypted: Unencrypted = False,
    as_json: JsonFlag = False,
) -> None:
    """Pack a patch with its model card, trust root, report, bill of materials, install note and wheels into one tar file.

    pip downloads the wheels; each is pinned by its hash. llama-cpp-python is compiled for this machine's CPU.

    Examples: `edgepatch bundle create detox-1.1.0.safetensors -o site.tar --extra gguf --root root.json --key vendor.key`,
    `edgepatch bundle create detox-1.1.0.safetensors -o site.tar --no-wheels`
    """
    from edgepatch.bundles import creation
    from edgepatch.bundles.wheels import Choice
    from edgepatch.patch.file import read_patch
    from edgepatch.trust.keys import read_private_key, require_private

    choice = Choice(extra, tuple(platform or ()), python_version, constraint, tuple(wheel or ()))
    if no_wheels and choice != Choice(""):
        raise InputError("--no-wheels: expected alone, found with options of wheels")
    for file in key or ():
        require_private(file, not unencrypted)
    passphrase = read_passphrase(passphrase_file, unencrypted, confirm=False) if key else None
    keys = tuple(read_private_key(file, passphrase) for file in key or ())
    sources = creation.Sources(patch_file, root, report, None if no_wheels else choice, base_model, keys)
    with shown("pack" if no_wheels else "collect wheels and pack"):
        manifest = creation.create(sources, out)
    _print_created(manifest, out, len(keys), as_json)
    if not read_patch(patch_file).signatures:
        warn(
            f"{patch_file.name} is unsigned: devices with a trust root refuse it; `edgepatch sign` it, and make the bundle again"
        )


def _print_created(manifest: Manifest, out: Path, num_keys: int, as_json: bool) -> None:
    from edgepatch.bundles.creation import sha256_of

    digest, size = sha256_of(out), out.stat().st_size
    if as_json:
        print_json(
            {
                "path": str(out),
                "sha256": digest,
                "size_bytes": size,
                "signatures": num_keys,
                "patch": manifest.patch,
                "members": [member.path for member in manifest.members],
                "built": list(manifest.built),
            }
        )
        return
    rows: list[tuple[str, object]] = [
        ("file", f"{out}, {size / 1e6:.1f} MB"),
        ("SHA-256", digest),
        ("patch", manifest.patch),
    ]
    rows.append(("members", f"{len(manifest.members)}, {len(manifest.wheels)} of them wheels"))
    rows += [("compiled here", f"{path}: fits CPUs like this machine's") for path in manifest.built]
    rows.append(("signatures", num_keys or "none: devices with a trust root take the patch alone"))
    stdout().print(table(rows))


@bundle_app.command("show")
def show(
    bundle_file: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Tar file of `bundle create`.")],
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Show what a bundle holds, checked member by member; nothing is imported, and the device stays as it is.

    The exit code is 3 if this device has a trust root and it does not vouch for the patch, or for a signed bundle.

    Example: `edgepatch bundle show site.tar`
    """
    from edgepatch.bundles.acceptance import judged, opened
    from edgepatch.store.device import Store

    device = Store(store)  # one that is still to be made is no error, as for `bundle import`
    with opened(bundle_file) as bundle:
        judgement = judged(bundle, device.root(), device.time(device.read()[1]))
        if as_json:
            print_json(_bundle_facts(bundle, judgement))
        else:
            stdout().print(table(_bundle_rows(bundle_file, bundle, judgement)))
    if judgement.refusal:
        raise judgement.refusal


def _bundle_facts(bundle: Bundle, judgement: Judgement) -> dict[str, Any]:
    patch, root = bundle.patch, bundle.root
    return {
        "bundle": bundle.manifest.digest,
        "patch": {
            "name": patch.name,
            "version": patch.version,
            "digest": patch.digest,
            "channel": patch.channel,
            "sequence": patch.sequence,
            "expires": patch.expires,
        },
        "base": patch.base.as_dict(),
        "root_in_bundle": root.fingerprint if root else None,
        "extra": bundle.manifest.extra,
        "platform": bundle.manifest.platform,
        "python": bundle.manifest.python_version,
        "members": {member.path: member.size for member in bundle.manifest.members},
        "patch_signatures": [signature.key_id for signature in patch.signatures],
        "bundle_signatures": [signature.key_id for signature in bundle.signatures],
        "patch_judgement": judgement.patch,
        "bundle_judgement": judgement.bundle,
    }


def _bundle_rows(file: Path, bundle: Bundle, judgement: Judgement) -> list[tuple[str, object]]:
    from edgepatch.store.records import shape_of

    manifest, patch, root = bundle.manifest, bundle.patch, bundle.root
    rows: list[tuple[str, object]] = [("bundle", f"{file}, {size_text(file.stat().st_size)}, whole")]
    rows += [("patch", f"{patch.name} {patch.version}"), ("digest", patch.digest)]
    rows.append(("release", f"{patch.channel} {patch.sequence}, expires {patch.expires or 'never'}"))
    rows.append(("for", f"{shape_of(patch.base.as_dict())}, weights {patch.base.weight_fingerprint[:12]}"))
    rows += [("patch signed", judgement.patch), ("bundle signed", judgement.bundle)]
    rows.append(
        ("trust root", f"version {root.version}, {root.fingerprint}: counts for nothing yet" if root else "none inside")
    )
    if manifest.wheels:
        extra = f" for the extra {manifest.extra}" if manifest.extra else ""
        fits = f"Python {manifest.python_version} on {manifest.platform}"
        rows.append(("wheels", f"{len(manifest.wheels)}{extra}, {fits}"))
    others = [member.path for member in manifest.members if member.path not in manifest.wheels]
    return [*rows, ("members", ", ".join(others))]


@bundle_app.command("import")
def import_(
    bundle_file: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Tar file of `bundle create`.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Only write the members into this new folder, and apply nothing.")
    ] = None,
    adopt_root: Annotated[
        str,
        typer.Option(
            "--adopt-root",
            metavar="FINGERPRINT",
            help="Trust the bundle's trust root from now on; its maker tells the fingerprint.",
        ),
    ] = "",
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", metavar="MODEL", parser=model_path, help="GGUF file, ONNX folder or Transformers folder."
        ),
    ] = None,
    channel: Annotated[str, typer.Option("--channel", help="Change over to this channel.")] = "",
    allow_downgrade: Annotated[
        bool, typer.Option("--allow-downgrade", help="Take an older patch; needs --reason.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="The history keeps it.")] = "",
    allow_expired: Annotated[
        str, typer.Option("--allow-expired", metavar="REASON", help="Take a patch that has expired.")
    ] = "",
    unsigned: Annotated[
        str,
        typer.Option(
            "--unsigned",
            metavar="REASON",
            help="Take a patch that nobody vouches for, on a device without a trust root.",
        ),
    ] = "",
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Verify all of a bundle, then make its patch the active one of its name.

    Examples: `edgepatch bundle import site.tar --model llama-Q4_K_M.gguf --adopt-root 5c1f...`,
    `edgepatch bundle import site.tar --out site`
    """
    from edgepatch.bundles.acceptance import accept
    from edgepatch.cli.store import base_of
    from edgepatch.store.device import Store
    from edgepatch.store.policy import Allowances

    if out is not None:
        if any((adopt_root, model, channel, allow_downgrade, reason, allow_expired, unsigned)):
            raise InputError(
                "--out: expected without options of the store, found with some", hint="--out applies nothing"
            )
        _unpack(bundle_file, out, Store(store), as_json)
        return
    if allow_downgrade != bool(reason):
        raise InputError("expected --allow-downgrade together with --reason, found one of them")
    spec, base_name = base_of(model)
    options: dict[str, Any] = {"allowances": Allowances(unsigned, reason, allow_expired), "base_name": base_name}
    done = accept(bundle_file, Store(store), adopt_root=adopt_root, model=spec, channel=channel, **options)
    _print_accepted(done, as_json)


def _unpack(bundle_file: Path, out: Path, store: StoreReader, as_json: bool) -> None:
    from edgepatch.bundles.acceptance import unpack

    root = store.root()
    manifest = unpack(bundle_file, out, root, store.time(store.read()[1]))
    if as_json:
        print_json(
            {"path": str(out), "members": [member.path for member in manifest.members], "vouched_for": root is not None}
        )
    else:
        signatures = (
            "the trust root of this device vouches for all of it"
            if root
            else "not checked: this device has no trust root"
        )
        stdout().print(
            table([("written", f"{counted(len(manifest.members), 'member')} to {out}"), ("signatures", signatures)])
        )


def _print_accepted(done: Accepted, as_json: bool) -> None:
    from edgepatch.cli.store import beside_rows

    patch, root = done.change.patch, done.root
    if as_json:
        facts = {
            "patch": done.change.digest,
            "changed": done.change.is_new,
            "before": done.change.before,
            "beside": sorted(done.change.beside),
            "bundle": done.manifest.digest,
        }
        keys = {"signed_by": sorted(done.change.signed_by), "bundle_signed_by": sorted(done.bundle_signed_by)}
        print_json(
            {**facts, **keys, "root_in_bundle": root.fingerprint if root else None, "adopted_root": done.adopted}
        )
        return
    rows: list[tuple[str, object]] = [
        ("active" if done.change.is_new else "already active", f"{patch.name} {patch.version}")
    ]
    rows += [("digest", done.change.digest), ("release", f"{patch.channel} {patch.sequence}")]
    if done.change.before and done.change.is_new:
        rows.append(("before", done.change.before[:12]))
    rows += beside_rows(done.change)
    if patch.unsigned:
        rows.append(("signatures", f"not checked: {patch.unsigned}"))
    if root:
        word = "adopted" if done.adopted else "came along, not adopted"
        rows.append(("trust root", f"version {root.version}, {root.fingerprint}: {word}"))
    stdout().print(table(rows))

"""What people and pip read: the install note and the list of wheels with their hashes."""

from __future__ import annotations

from collections.abc import Mapping

from edgepatch.bundles.contents import BUNDLE_TYPE, INSTALL, MANIFEST, REQUIREMENTS, ROOT, SIGNATURES
from edgepatch.bundles.wheels import name_and_version
from edgepatch.patch.file import Patch
from edgepatch.patch.manifest import UNPRINTABLE
from edgepatch.trust.roots import Root


def requirements(wheels: Mapping[str, str]) -> str:
    """Every wheel, pinned to its version and hash; pip then takes nothing else.

    Args:
        wheels: file name -> SHA-256.
    """
    lines = [
        "# Every file that is installed, and nothing else: pip install --no-index --find-links wheels --require-hashes"
    ]
    for name, digest in sorted(wheels.items()):
        distribution, version = name_and_version(name)
        lines.append(f"{distribution}=={version} --hash=sha256:{digest}")
    return "\n".join(lines) + "\n"


def install_note(
    patch: Patch,
    patch_path: str,
    root: Root | None,
    extra: str,
    platform: str,
    python_version: str,
    built: tuple[str, ...],
    is_signed: bool,
) -> str:
    """INSTALL.txt: commands that need no network, from the stick to the running patch."""
    parts = [_head(patch, patch_path), _check_note(is_signed)]
    if platform:
        parts.append(_wheels_note(extra, platform, python_version, built))
    else:
        parts.append("2. Install\n\nThis bundle holds no wheels: the device needs edgepatch already.")
    parts += [_import_note(root), _run_note()]
    return "\n\n".join(parts) + "\n"


def printable(text: str) -> str:
    """Text of strangers on one line, of a bounded length, without signs that steer a terminal."""
    return UNPRINTABLE.sub("?", text.replace("\n", " "))[:64]


def _head(patch: Patch, patch_path: str) -> str:
    base = f"{printable(patch.base.model_type)}, weights {printable(patch.base.weight_fingerprint[:12])}"
    return (
        f"{patch.name} {patch.version}\n\npatch   {patch_path}\ndigest  {patch.digest}\nbase    {base}\n\n"
        "SITE.tar stands for this bundle, MODEL for the model on the device. No command below needs a network."
    )


def _check_note(is_signed: bool) -> str:
    signed = (
        f"\nThe manifest of this bundle is signed ({SIGNATURES}, over {MANIFEST} as {BUNDLE_TYPE});\na device that has a trust root checks that."
        if is_signed
        else ""
    )
    return (
        "1. Check\n\nAsk whoever made the bundle for its SHA-256, on another way than the stick, and compare:\n\n    sha256sum SITE.tar\n\n"
        f"Until they agree, do not install anything of it: hashes inside a bundle say that it is whole, not who made it.{signed}"
    )


def _wheels_note(extra: str, platform: str, python_version: str, built: tuple[str, ...]) -> str:
    compiled = "".join(
        f"\n{path} was compiled on the machine of whoever made the bundle, for CPUs like that one." for path in built
    )
    what = f"edgepatch[{extra}]" if extra else "edgepatch"
    return (
        f"2. Install\n\nThe wheels hold {what}, for {platform}, Python {python_version}.{compiled}\n\n"
        "    mkdir bundle\n"
        "    tar -xf SITE.tar -C bundle\n"
        f"    python{python_version} -m venv edgepatch-env\n"
        f"    edgepatch-env/bin/python -m pip install --no-index --find-links bundle/wheels --require-hashes -r bundle/{REQUIREMENTS}\n"
        "    . edgepatch-env/bin/activate\n"
        "    edgepatch doctor" + (f" --require {extra}" if extra else "")
    )


def _import_note(root: Root | None) -> str:
    note = "3. Apply\n\nAll of the bundle is verified before anything is touched:\n\n    edgepatch bundle import SITE.tar --model MODEL"
    if root is None:
        return note + "\n\nIt brings no trust root. On a device that has none either, add --unsigned REASON."
    return note + (
        f"\n\nIt brings {ROOT}, version {root.version}, which counts for nothing because it came along. On a device without a trust root,\n"
        "ask its maker for the fingerprint, on another way than the stick, compare it with\n\n"
        f"    {root.fingerprint}\n\nand only then adopt it:\n\n    edgepatch bundle import SITE.tar --model MODEL --adopt-root FINGERPRINT"
    )


def _run_note() -> str:
    return f"4. Use, and go back\n\n    edgepatch status\n    edgepatch chat MODEL\n    edgepatch rollback\n\n{INSTALL}: end."

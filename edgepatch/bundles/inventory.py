"""The software bill of materials of a bundle: CycloneDX 1.6 in JSON, without time and place, so that it is the same every time."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import edgepatch
from edgepatch.files.canonical import canonical_json
from edgepatch.patch.file import Patch

SPEC_VERSION = "1.6"
MAX_METADATA_BYTES = 4 * 2**20


def wheel_metadata(wheel: Path) -> Message:
    """The METADATA of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
        with archive.open(name) as file:
            return HeaderParser().parsestr(file.read(MAX_METADATA_BYTES).decode("utf-8", "replace"))


def _hashes(sha256: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": sha256}]


def _wheel(path: Path, sha256: str) -> dict[str, Any]:
    metadata = wheel_metadata(path)
    name, version = str(metadata["Name"]), str(metadata["Version"])
    purl = f"pkg:pypi/{quote(name.lower().replace('_', '-'))}@{quote(version)}"
    component = {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        "hashes": _hashes(sha256),
    }
    licence = metadata.get("License-Expression")
    return {**component, "licenses": [{"expression": str(licence)}]} if licence else component


def _patch(patch: Patch, sha256: str) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": f"patch:{patch.digest}",
        "name": patch.name,
        "version": patch.version,
        "hashes": _hashes(sha256),
        "properties": [{"name": "edgepatch:digest", "value": patch.digest}],
        **({"licenses": [{"expression": patch.license}]} if patch.license else {}),
    }


def bill_of_materials(patch: Patch, patch_sha256: str, wheels: Mapping[Path, str]) -> bytes:
    """The document.

    Args:
        patch: the patch of the bundle.
        patch_sha256: of its file.
        wheels: file -> SHA-256.
    """
    root = f"bundle:{patch.digest}"
    components = [_patch(patch, patch_sha256), *(_wheel(path, wheels[path]) for path in sorted(wheels))]
    return canonical_json(
        {
            "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": SPEC_VERSION,
            "version": 1,
            "metadata": {
                "component": {
                    "type": "application",
                    "bom-ref": root,
                    "name": f"{patch.name} bundle",
                    "version": patch.version,
                },
                "tools": {
                    "components": [{"type": "application", "name": "edgepatch", "version": edgepatch.__version__}]
                },
            },
            "components": components,
            "dependencies": [{"ref": root, "dependsOn": sorted(component["bom-ref"] for component in components)}],
        }
    )

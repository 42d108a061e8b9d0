"""The wheels of a bundle: pip's own download of an extra with all it needs, and edgepatch itself as it is installed here.

Nothing is taken that is no wheel: a source distribution runs its build script on the device. llama-cpp-python has no wheels in
registries, so it is compiled here; such a wheel fits this machine's CPU, and others of the same kind.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edgepatch import compilation
from edgepatch.errors import InputError

DISTRIBUTION = "edgepatch"
SOURCE_ONLY = compilation.DISTRIBUTION
EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest time that a zip file can tell
NOT_IN_A_WHEEL = frozenset({"INSTALLER", "REQUESTED", "RECORD", "direct_url.json"})
LEFT_BEHIND = (".*", "*.egg-info", "__pycache__", "build", "dist", "out", "docs", "tests", "model")
WHEEL_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9._]+)-(?P<version>[A-Za-z0-9._+!]+)(?:-\d\w*)?-[\w.]+-[\w.]+-(?P<platform>[\w.]+)\.whl"
)


@dataclass(frozen=True)
class Choice:
    """Which wheels.

    Attributes:
        extra: of edgepatch ("gguf", "onnx"); "" for edgepatch alone.
        platforms: pip's names, the best first; none for this machine's.
        python_version: "3.11"; "" for this interpreter's.
        constraint: a constraints file of pip.
        prebuilt: wheels that were built elsewhere, for what registries have no wheel of.
    """

    extra: str
    platforms: tuple[str, ...] = ()
    python_version: str = ""
    constraint: Path | None = None
    prebuilt: tuple[Path, ...] = ()

    @property
    def is_foreign(self) -> bool:
        return bool(self.platforms or self.python_version)


def collect(choice: Choice, folder: Path) -> list[str]:
    """Downloads and builds wheels into an empty folder.

    Returns:
        Names of those that were compiled here.

    Raises:
        InputError: an unknown extra, or something that has no wheel for the platform.
        EdgepatchError: pip failed; its last lines are told.
        MissingExtraError: pip is not installed.
    """
    needs = _needs(choice.extra)
    for wheel in choice.prebuilt:
        if not wheel.is_file() or not WHEEL_NAME.fullmatch(wheel.name):
            raise InputError(f"--wheel: expected a wheel, found {wheel}")
    with tempfile.TemporaryDirectory() as work:
        built = [] if SOURCE_ONLY not in needs or _is_prebuilt(choice) else [_compile(choice)]
        own = own_wheel(Path(work))
        target = f"{own}[{choice.extra}]" if choice.extra else str(own)
        _pip(
            "download",
            "--only-binary",
            ":all:",
            "--dest",
            str(folder),
            *_platform_options(choice),
            *_constraint(choice),
            target,
            *map(str, [*built, *choice.prebuilt]),
        )
    return sorted(path.name for path in built)


def _needs(extra: str) -> set[str]:
    """The distributions that an extra names."""
    from edgepatch.doctor import extras

    packages = extras()
    if extra and extra not in packages:
        raise InputError(f"--extra: expected one of {', '.join(sorted(packages))}, found {extra!r:.40}")
    return packages.get(extra, set())


def _is_prebuilt(choice: Choice) -> bool:
    return any(name_and_version(path.name)[0] == SOURCE_ONLY for path in choice.prebuilt)


def name_and_version(wheel: str) -> tuple[str, str]:
    """What a wheel's file name says, the name in the form of registries.

    Raises:
        InputError: it is no wheel's.
    """
    match = WHEEL_NAME.fullmatch(wheel)
    if not match:
        raise InputError(f"expected the name of a wheel, found {wheel!r:.120}")
    return re.sub(r"[-_.]+", "-", match["name"]).lower(), match["version"]


def _platform_options(choice: Choice) -> list[str]:
    options = [option for platform in choice.platforms for option in ("--platform", platform)]
    return options + (["--python-version", choice.python_version] if choice.python_version else [])


def _constraint(choice: Choice) -> list[str]:
    return ["--constraint", str(choice.constraint)] if choice.constraint else []


def _compile(choice: Choice) -> Path:
    """A wheel of ``SOURCE_ONLY`` for this machine: the version that is installed, else what pip takes."""
    if choice.is_foreign:
        raise InputError(
            f"{SOURCE_ONLY} has no wheel in registries, and cannot be compiled here for another platform",
            hint=f"run `{compilation.COMMAND} --wheel` on such a machine, and name the file that it prints with --wheel",
        )
    pinned = compilation.pinned_version(choice.constraint) if choice.constraint else None
    return compilation.wheel(compilation.installed_version() or pinned)


def _pip(*arguments: str) -> None:
    compilation.pip(*arguments, hint="name more with --platform, build it and name it with --wheel, or --no-wheels")


# edgepatch itself.


def own_wheel(folder: Path) -> Path:
    """A wheel of the edgepatch that runs: built from its checkout, or from its installed files, each held against its record.

    Raises:
        InputError: it is not installed, or its files are not those that were installed.
        EdgepatchError: the build failed.
    """
    distributions = importlib.metadata.Distribution.discover(name=DISTRIBUTION)
    installed = next(
        (d for d in distributions if d.read_text("WHEEL")), None
    )  # not the metadata that a build leaves in a checkout
    if installed is None:
        raise InputError("edgepatch is not installed, only on the path", hint="pip install -e .")
    source = json.loads(installed.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        return _built(Path(unquote(urlsplit(source["url"]).path)), folder)
    return repacked(installed, folder)


def _built(checkout: Path, folder: Path) -> Path:
    """From a copy, so that nothing of earlier builds gets in and nothing is left behind."""
    copy = folder / "source"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(*LEFT_BEHIND), symlinks=True)
    _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(copy))
    return next(folder.glob("*.whl"))


def repacked(installed: importlib.metadata.Distribution, folder: Path) -> Path:
    """A wheel of an installed pure distribution, from the files in its record.

    Raises:
        InputError: it is not pure, or a file is not the one that was installed.
    """
    about = installed.read_text("WHEEL") or ""
    tag = re.search(r"^Tag: (\S+)$", about, re.MULTILINE)
    name, version = re.sub(r"[-_.]+", "_", installed.metadata["Name"]), installed.version
    if not tag or "Root-Is-Purelib: true" not in about:
        raise InputError(f"{name} {version}: expected a pure wheel's installation")
    contents = {}
    for file in installed.files or []:
        if (
            file.hash is None
            or ".." in file.parts
            or (file.name in NOT_IN_A_WHEEL and file.parent.name.endswith(".dist-info"))
        ):
            continue
        contents[file.as_posix()] = Path(str(file.locate())).read_bytes()
        if _record_hash(contents[file.as_posix()]) != file.hash.value:
            raise InputError(
                f"{file}: expected the file that was installed, found a changed one", hint="install edgepatch again"
            )
    path = folder / f"{name}-{version}-{tag.group(1)}.whl"
    _write_wheel(path, contents, f"{name}-{version}.dist-info")
    return path


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")


def _write_wheel(path: Path, contents: dict[str, bytes], info: str) -> None:
    rows = [f"{name},sha256={_record_hash(data)},{len(data)}" for name, data in sorted(contents.items())]
    record = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [*sorted(contents.items()), (f"{info}/RECORD", record)]:
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            archive.writestr(entry, data)

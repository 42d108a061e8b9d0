"""Model libraries, asked in children what they are and what they compute.

One child goes through all weight types of a library and writes down each answer. Where it dies, the type after the last answer is what
killed it, and the next child begins behind that.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from edgepatch.doctor.packages import version_of
from edgepatch.processes import Outcome, run_apart

DEADLINE_S = 120


@dataclass(frozen=True)
class Library:
    """A library of C code.

    Attributes:
        module: what a child runs: ``facts()``, ``types()``, ``deviation(type_name, extra_buffers)`` and ``BOUND``.
        distributions: any of them provides it.
        has_extra_buffers: whether it can also keep weights as they are in the file, which turns some of its kernels off.
    """

    module: str
    distributions: frozenset[str]
    has_extra_buffers: bool = False


LIBRARIES = {
    "llama_cpp": Library("edgepatch.doctor.llamacpp_types", frozenset({"llama-cpp-python"}), has_extra_buffers=True),
    "onnxruntime": Library("edgepatch.doctor.onnx_types", frozenset({"onnxruntime", "onnxruntime-gpu"})),
    "torch": Library("edgepatch.doctor.torch_types", frozenset({"torch"})),
}
"""By import name."""


def probe_libraries() -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Every installed library, side by side as far as there are cores.

    Returns:
        Import name -> what it says of itself, or ``{"error": ...}`` where it does not load; and a row for each library and weight type:
        "library", "type", "works", "deviation" (of its results from the right ones; ``None`` where there are none), "note".
    """
    installed = [name for name, library in LIBRARIES.items() if any(map(version_of, library.distributions))]
    with ThreadPoolExecutor(min(len(LIBRARIES), os.cpu_count() or 1)) as pool:
        probed = dict(zip(installed, pool.map(_probe, installed), strict=True))
    return {name: facts for name, (facts, _) in probed.items()}, [row for _, rows in probed.values() for row in rows]


def _probe(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    library = LIBRARIES[name]
    facts, answers = _ask(library, extra_buffers=True)
    failing = [type_name for type_name, answer in answers.items() if answer["failure"]]
    plain = _ask(library, extra_buffers=False, types=failing)[1] if failing and library.has_extra_buffers else {}
    return facts, [{"library": name, "type": t, **_row(answer, plain.get(t))} for t, answer in answers.items()]


def _row(answer: dict[str, Any], plain: dict[str, Any] | None) -> dict[str, Any]:
    """Args: what came of it with extra buffers; and without, where that was tried."""
    if not answer["failure"]:
        return {"works": True, "deviation": answer["deviation"], "note": ""}
    if plain and not plain["failure"]:
        note = f"{answer['failure']}; runs without extra buffers"
        return {"works": True, "deviation": plain["deviation"], "note": note}
    return {"works": False, "deviation": None, "note": answer["failure"]}


def _ask(
    library: Library, extra_buffers: bool, types: list[str] | None = None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Facts, and type -> {"deviation", "failure"}; all types that the library knows when ``None``."""
    facts: dict[str, Any] = {}
    answers: dict[str, dict[str, Any]] = {}
    waiting = types
    while waiting is None or waiting:
        outcome, lines = _run_child({"module": library.module, "types": waiting, "extra_buffers": extra_buffers})
        if not lines:
            return {"error": _not_loaded(outcome)}, {}
        facts = lines[0]["facts"]
        answers |= {line["type"]: line for line in lines[1:]}
        waiting = [type_name for type_name in lines[0]["types"] if type_name not in answers]
        if waiting:
            answers[waiting.pop(0)] = {"deviation": None, "failure": outcome.failure or str(outcome.error)}
    return facts, answers


def _run_child(request: dict[str, Any]) -> tuple[Outcome, list[dict[str, Any]]]:
    """How a child ended, and the lines that it had written by then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "answers")
        path.touch()
        outcome = run_apart(f"{__name__}:answer", {**request, "path": str(path)}, deadline_s=DEADLINE_S)
        complete = path.read_text("utf-8").rpartition("\n")[0]
        return outcome, [json.loads(line) for line in complete.splitlines()]


def _not_loaded(outcome: Outcome) -> str:
    if outcome.signal:
        return f"{outcome.failure} while loading; install it again so that it is built for this CPU"
    return outcome.failure or str(outcome.error)


# In the child.


def answer(request: dict[str, Any]) -> None:
    """Writes what the library is, and then an answer for each type as soon as it is there.

    Args:
        request: "module" of a ``Library``, "types" (``None`` for all), "extra_buffers", "path" of the file to write.
    """
    library = import_module(request["module"])
    types = library.types() if request["types"] is None else request["types"]
    with open(request["path"], "w", encoding="utf-8") as file:
        _write_line(file, {"facts": library.facts(), "types": types})
        for type_name in types:
            _write_line(file, {"type": type_name, **_judged(library, type_name, request["extra_buffers"])})


def _judged(library: Any, type_name: str, extra_buffers: bool) -> dict[str, Any]:
    try:
        deviation = library.deviation(type_name, extra_buffers)
    except Exception as error:  # a library's own kind of refusal is an answer, whatever its class
        return {"deviation": None, "failure": f"{error}" or type(error).__name__}
    if not math.isfinite(deviation):
        return {"deviation": None, "failure": "computes numbers that are not finite"}
    if deviation > library.BOUND:
        return {"deviation": deviation, "failure": f"computes something else: off by {deviation:.0%}"}
    return {"deviation": deviation, "failure": ""}


def _write_line(file: TextIO, document: dict[str, Any]) -> None:
    file.write(json.dumps(document) + "\n")
    file.flush()

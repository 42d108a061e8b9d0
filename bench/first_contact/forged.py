"""What becomes of forged GGUF files: the strict parser judges first, then children, then a process that loads what they let through.

One child tries many files until one ends it; the next goes on behind that one. The parent's part is the real ``LlamaCppRuntime``, with
the children's verdicts in the place of its own trials, in a process whose end would be seen here.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from edgepatch.bench.first_contact.corpus import corpus
from edgepatch.converters import first_contact
from edgepatch.converters.first_contact import Contact, Failure, Report, try_apart
from edgepatch.converters.gguf import vocabulary
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.specs import spec_of
from edgepatch.errors import EdgepatchError, InputError, UnfitModelError
from edgepatch.runtimes.llamacpp import proof
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session

SETTINGS = {"num_gpu_layers": 0, "kv_type": "f16", "flash_attention": True, "num_threads": 1}
WAYS = (proof.REPACKED, proof.NOT_REPACKED)
BATCH, BATCH_DEADLINE_S = 150, 900.0
TRY, LOAD = f"{__name__}:try_many", f"{__name__}:load_many"
UNCAUGHT, DIED = "uncaught exception", "ended the process"


@dataclass(frozen=True)
class Verdict:
    """What became of a file.

    Attributes:
        kind: of forgery.
        outcome: "refused by the parser", "refused in a child", "died in a child", "loaded", or one of ``UNCAUGHT`` and ``DIED``.
        reason: the error, or what the child died of.
    """

    kind: str
    outcome: str
    reason: str = ""


def judge(files: Iterable[tuple[str, bytes]]) -> list[Verdict]:
    """The verdict on each file, in order; no file ends this process."""
    with tempfile.TemporaryDirectory(prefix="edgepatch-") as name:
        folder = Path(name)
        verdicts: dict[int, Verdict] = {}
        kinds, paths = {}, {}
        for number, (kind, data) in enumerate(files):
            kinds[number], path = kind, folder / f"{number}.gguf"
            path.write_bytes(data)
            refusal = _parse(kind, path)
            if refusal is None:
                paths[number] = path
            else:
                verdicts[number] = refusal
                path.unlink()
        tried = _try_all(list(paths.values()), folder)
        loaded = dict(zip(paths, _load_all(list(paths.values()), tried, folder), strict=True))
        for number, (outcome, reason) in loaded.items():
            verdicts[number] = Verdict(kinds[number], outcome, reason)
    return [verdicts[number] for number in sorted(verdicts)]


def _parse(kind: str, path: Path) -> Verdict | None:
    try:
        spec_of(read_header(path))
    except EdgepatchError as error:
        return Verdict(kind, "refused by the parser", str(error))
    except Exception as error:
        return Verdict(kind, UNCAUGHT, f"{type(error).__name__}: {error}")
    return None


def _in_batches(trial: str, paths: Sequence[Path], requests: Sequence[Any], folder: Path) -> list[dict[str, Any]]:
    """One answer for each path: what the trial wrote of it, or {"failure": ...} where it ended its child there."""
    answers: list[dict[str, Any]] = []
    while len(answers) < len(paths):
        first, log = len(answers), folder / f"answers-{len(answers)}.jsonl"
        batch = slice(first, first + BATCH)
        settings = {"given": list(requests[batch]), "log": str(log)}
        outcome = try_apart(Contact("llama_cpp", trial, tuple(paths[batch])), settings, BATCH_DEADLINE_S)
        answers += [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.is_file() else []
        if isinstance(outcome, Failure):
            answers.append({"failure": outcome.words, "signal": outcome.signal, "stage": outcome.stage})
    return answers


def _try_all(paths: Sequence[Path], folder: Path) -> list[dict[str, Any]]:
    """As ``first_contact.run.prove`` would: repacked weights, then without, for those of which a child died."""
    tried = _in_batches(TRY, paths, [dict(WAYS[0])] * len(paths), folder)
    again = [i for i, answer in enumerate(tried) if "failure" in answer]
    for i in again:
        (folder / f"again-{i}").mkdir()
        answer = _in_batches(TRY, [paths[i]], [dict(WAYS[1])], folder / f"again-{i}")[0]
        tried[i] = {"failures": [tried[i], answer]} if "failure" in answer else {**answer, "before": tried[i]}
    return tried


def try_many(paths: Sequence[Path], settings: dict[str, Any], report: Report) -> dict[str, Any]:
    """In a child: tries one file after the other as ``llamacpp.proof.try_model`` does, and writes down what it answers."""
    with open(settings["log"], "w", encoding="utf-8") as log:
        for path, way in zip(paths, settings["given"], strict=True):
            answer: dict[str, Any]
            try:
                answer = {"answer": proof.try_model([path], {**SETTINGS, **way}, report)}
            except UnfitModelError as error:
                answer = {"failure": str(error)}
            except EdgepatchError as error:
                answer = {"error": [type(error).__name__, str(error)]}
            except Exception as error:
                answer = {"failure": f"failed: {type(error).__name__}: {error}"}
            log.write(json.dumps(answer) + "\n")
            log.flush()
    return {}


def _load_all(paths: Sequence[Path], tried: Sequence[dict[str, Any]], folder: Path) -> list[tuple[str, str]]:
    (folder / "loads").mkdir()
    outcomes = []
    for answer in _in_batches(LOAD, paths, tried, folder / "loads"):
        outcomes.append((answer["outcome"], answer["reason"]) if "outcome" in answer else (DIED, answer["failure"]))
    return outcomes


def load_many(paths: Sequence[Path], settings: dict[str, Any], _: Report) -> dict[str, Any]:
    """In a process of its own: what a user's process does with each file once a child has judged it."""
    first_contact._is_trial = False  # this process is no child that tries, but one that must not die
    with open(settings["log"], "w", encoding="utf-8") as log:
        for path, tried in zip(paths, settings["given"], strict=True):
            outcome, reason = _load(path, tried)
            log.write(json.dumps({"outcome": outcome, "reason": reason}) + "\n")
            log.flush()
    return {}


def _load(path: Path, tried: dict[str, Any]) -> tuple[str, str]:
    try:
        with (
            patch.object(first_contact, "try_apart", _Told(tried)),
            Session(LlamaCppRuntime(path, num_threads=1), None) as session,
        ):
            session.generate([1, 2, 3])
    except UnfitModelError as error:
        return "died in a child", str(error)
    except EdgepatchError as error:
        return "refused in a child" if "error" in tried else "refused behind the child", str(error)
    except Exception as error:
        return UNCAUGHT, f"{type(error).__name__}: {error}"
    return "loaded", ""


class _Told:
    """Says what a child has said before."""

    def __init__(self, tried: dict[str, Any]) -> None:
        self._failures = list(tried.get("failures", [tried["before"]] if "before" in tried else []))
        self._tried = tried

    def __call__(self, contact: Contact, settings: Any, deadline_s: float | None = None) -> dict[str, Any] | Failure:
        assert contact.trial != vocabulary.contact(Path()).trial
        if self._failures:
            failure = self._failures.pop(0)
            return Failure(failure["failure"], failure.get("stage", ""), failure.get("signal", ""))
        if "error" in self._tried:
            raise InputError(self._tried["error"][1])
        return dict(self._tried["answer"])


def table(verdicts: Sequence[Verdict]) -> dict[str, dict[str, int]]:
    """Kind of forgery -> outcome -> number of files."""
    rows: dict[str, Counter[str]] = {}
    for verdict in verdicts:
        rows.setdefault(verdict.kind, Counter())[verdict.outcome] += 1
    return {kind: dict(sorted(counts.items())) for kind, counts in rows.items()}


def slice_of_corpus(step: int, first: int = 0) -> list[tuple[str, bytes]]:
    """Every ``step``-th file of the corpus."""
    return [file for number, file in enumerate(corpus()) if number % step == first]

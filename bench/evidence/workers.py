"""Several processes that measure cells; one that dies costs the cell it was at, not the run."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from edgepatch.bench.evidence.cells import CellKey, EvidenceConfig, write_cell
from edgepatch.bench.evidence.measuring import Bench, Workplace
from edgepatch.errors import EdgepatchError
from edgepatch.processes import harden

Report = Callable[[CellKey, str], None]
"""Called with (cell, why it failed or "")."""

Moved = Callable[[CellKey, float], None]
"""Called with (cell, share of its items that is done)."""

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def _work(orders: Connection, place: Workplace, config: EvidenceConfig) -> None:
    """A worker: takes groups of keys, answers each key with why it failed, until it is sent nothing.

    On the way it tells which share of a cell is done. What it cannot write ends the run, and is told as the error that it is.
    """
    harden()
    bench = Bench(place, config, lambda stage, done, total, /, **figures: orders.send(done / max(1, total)))
    try:
        while group := orders.recv():
            for key in group:
                orders.send(bench.run(key))
        bench.close()
    except EdgepatchError as error:
        orders.send(error)
    except (EOFError, BrokenPipeError):
        pass  # the run has ended


class _Worker:
    """A process and the keys it has still to answer."""

    def __init__(self, place: Workplace, config: EvidenceConfig) -> None:
        context = multiprocessing.get_context("spawn")
        self.orders, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, place, config), daemon=True)
        self.process.start()
        theirs.close()
        self.waiting: deque[CellKey] = deque()

    def take(self, group: Sequence[CellKey]) -> None:
        self.waiting.extend(group)
        self.orders.send(list(group))

    def answer(self) -> tuple[CellKey, str | float]:
        """The key that the worker is at, and why it failed or "" where it is done, or the share of it that is.

        Raises:
            EOFError: the process died; the first of ``waiting`` is what it was at.
            EdgepatchError: its result cannot be written.
        """
        answer = self.orders.recv()
        if isinstance(answer, Exception):
            raise answer
        return (self.waiting[0] if isinstance(answer, float) else self.waiting.popleft()), answer

    def end(self) -> None:
        if self.process.is_alive():
            self.process.terminate()
        self.process.join()
        self.orders.close()


def measure_cells(
    groups: Iterable[Sequence[CellKey]],
    place: Workplace,
    config: EvidenceConfig,
    num_workers: int,
    report: Report,
    moved: Moved = lambda key, share: None,
) -> None:
    """Measures groups of keys, each group on one loaded model; a cell that fails is written as failed.

    Args:
        groups: in the order of measuring.
        place: where to read and write.
        config: how much is measured.
        num_workers: processes of ``config.num_threads`` threads each.
        report: called after each cell.
        moved: called within a cell that tells of its items.

    Raises:
        InputError: a result cannot be written; what is written stays.
    """
    os.environ.update(
        {**ENVIRONMENT, "OMP_NUM_THREADS": str(config.num_threads)}
    )  # the processes inherit it before they load a library that counts cores
    left = deque(groups)
    workers = [_Worker(place, config) for _ in range(min(num_workers, len(left)))]
    try:
        for worker in workers:
            worker.take(left.popleft())
        while busy := [worker for worker in workers if worker.waiting]:
            ready: list[Any] = wait([worker.orders for worker in busy])
            for worker in [worker for worker in busy if worker.orders in ready]:
                workers[workers.index(worker)] = _advance(worker, left, place, config, report, moved)
    finally:
        for worker in workers:
            worker.end()


def _advance(
    worker: _Worker,
    left: deque[Sequence[CellKey]],
    place: Workplace,
    config: EvidenceConfig,
    report: Report,
    moved: Moved,
) -> _Worker:
    """Takes one answer; gives the next group to a worker that is done, or its rest to a new one where it died."""
    try:
        key, answer = worker.answer()
        if isinstance(answer, float):
            moved(key, answer)
        else:
            report(key, answer)
    except (EOFError, ConnectionResetError):
        worker.process.join()
        key = worker.waiting.popleft()
        reason = f"the process died with exit code {worker.process.exitcode}"
        write_cell(place.cells, key, {"failed": reason})
        report(key, reason)
        rest = list(worker.waiting)
        worker.end()
        worker = _Worker(place, config)
        if rest:
            worker.take(rest)
    if not worker.waiting and left:
        worker.take(left.popleft())
    return worker

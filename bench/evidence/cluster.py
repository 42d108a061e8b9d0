"""Cells on a cluster: Ray schedules them, starts anew what died, and knows which machines there are.

The folders of models and cells must be the same on every machine, as on a shared file system: a cell is a file there, whoever
measured it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from edgepatch.bench.evidence.cells import CellKey, EvidenceConfig, read_cell, write_cell
from edgepatch.bench.evidence.measuring import Bench, Workplace, due
from edgepatch.bench.evidence.workers import ENVIRONMENT, Report
from edgepatch.errors import MissingExtraError

MAX_RETRIES = 3
"""So often may the process or the machine of one group of cells die."""


def require_ray() -> Any:
    """The library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "cluster") from None
    return ray


def measure_group(group: Sequence[CellKey], place: Workplace, config: EvidenceConfig) -> None:
    """In a process of the cluster: measures a group of keys, but for those that an earlier attempt has measured.

    Raises:
        InputError: a result cannot be written.
    """
    bench = Bench(place, config)
    try:
        for key in due(place, group, config):
            bench.run(key)
    finally:
        bench.close()


def measure_on_cluster(
    groups: Iterable[Sequence[CellKey]], place: Workplace, config: EvidenceConfig, address: str, report: Report
) -> None:
    """Hands groups of keys to a Ray cluster; a group that cannot be measured at all is written as failed.

    Args:
        groups: each is measured on one loaded model.
        place: where to read and write, on every machine.
        config: how much is measured.
        address: of the cluster ("auto", "ray://host:10001"), or "local" for one on this machine.
        report: called after each cell.

    Raises:
        MissingExtraError: ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    ray = require_ray()
    variables = {**ENVIRONMENT, "OMP_NUM_THREADS": str(config.num_threads)}
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(address=address, log_to_driver=False)
    try:
        settings = {"num_cpus": config.num_threads, "max_retries": MAX_RETRIES, "runtime_env": {"env_vars": variables}}
        task = ray.remote(**settings)(measure_group)
        waiting: dict[Any, Sequence[CellKey]] = {task.remote(list(group), place, config): group for group in groups}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            _finish(ray, done, waiting.pop(done), place, report)
    finally:
        if is_ours:
            ray.shutdown()


def _finish(ray: Any, task: Any, group: Sequence[CellKey], place: Workplace, report: Report) -> None:
    """Reports a group's cells; those that its end left unmeasured have failed."""
    reason = ""
    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        reason = f"the cluster gave up: {next(iter(str(error).splitlines()), type(error).__name__)}"
    for key in group:
        raw = read_cell(place.cells, key)
        if raw is None:
            raw = {"failed": reason or "the cluster measured nothing"}
            write_cell(place.cells, key, raw)
        report(key, str(raw.get("failed", "")))

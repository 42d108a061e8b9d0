"""Cells on a Ray cluster of two workers on this machine, one of which is killed at work."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from edgepatch.bench.evidence.cells import CellKey, EvidenceConfig, groups, read_cell
from edgepatch.bench.evidence.cluster import measure_on_cluster
from edgepatch.bench.evidence.forms import given_column
from edgepatch.bench.evidence.measuring import Workplace, due
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.safety.continuations import SampleConfig
from kit.artefacts import Lazy

ray = pytest.importorskip("ray")


def kill_a_worker(killed: list[int], deadline: float) -> None:
    """Ends the first process that measures a group, as the system does where memory runs out."""
    while not killed and time.monotonic() < deadline:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if command.startswith(b"ray::measure_group") and not killed:
                killed.append(int(folder.name))
                os.kill(killed[0], signal.SIGKILL)
        time.sleep(0.02)


def test_a_worker_that_is_killed_costs_nothing(lab_ggufs: Lazy, tmp_path: Path):
    model = lab_ggufs["F16"]
    column = given_column(model, "llamacpp", "F16")
    config = EvidenceConfig(
        items={"toxicity": (2, 2, 2), "gender": (2, 2, 2)},
        domains=("toxicity", "gender"),
        arms=("bare", "patch"),
        samples=SampleConfig(5),
        num_sequences=5,
        known_columns=(column,),
        reference=column.name,
    )
    place = Workplace(tmp_path, None, {"patch": (LAB_FOLDER / "lab-detox-0.1.0.safetensors",)})
    keys = [CellKey("safety", domain, arm, column.name) for arm in config.arms for domain in config.domains]
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(killed, time.monotonic() + 120))
    killer.start()
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        reasons: dict[CellKey, str] = {}
        measure_on_cluster(groups(keys), place, config, "auto", lambda key, reason: reasons.update({key: reason}))
    finally:
        ray.shutdown()
        killer.join()
    assert killed and reasons == dict.fromkeys(keys, "")
    assert not due(place, keys, config)
    assert all(read_cell(place.cells, key) for key in keys)

"""F4 and F5: a change of the store that is interrupted, or that the disk refuses, at every step it takes; F6 with them."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from attacks import updates
from attacks.faults import Faults, Killed, faulty
from edgepatch.errors import EdgepatchError
from edgepatch.patch.file import PAYLOAD_TYPE, Patch, signed, write_patch
from edgepatch.seeds.rotation import Rotation
from edgepatch.store import audit
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances
from edgepatch.tensors import KVSeed, ModelSpec, SoftPrompt
from edgepatch.trust.drafts import new_root, next_root
from edgepatch.trust.roots import Key, Root, read_root
from edgepatch.trust.signatures import raw_public_key, sign

DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS)
KILLS = 60
BASE = ModelSpec("llama", 8, 2, 1, 4, 32, 10000.0, "a" * 64, "b" * 64)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1")
ADDED = Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\2")


# A device, and what is done to it.


def _key(private: Ed25519PrivateKey, owner: str) -> Key:
    return Key(raw_public_key(private), owner)


def make_files(folder: Path) -> None:
    """Three patches of one name, one of another that can stand beside them, and two versions of a trust root."""
    for sequence in (1, 2, 3):
        patch = _patch("detox", sequence)
        write_patch(patch, folder / f"{sequence}.safetensors")
        write_patch(signed(patch, sign(patch.manifest, PAYLOAD_TYPE, ADDED)), folder / f"{sequence}-again.safetensors")
    write_patch(_patch("gender", 1), folder / "beside.safetensors")
    created = datetime.now(timezone.utc) - timedelta(days=1)
    root = new_root(
        [_key(KEY, "vendor")], [_key(KEY, "vendor")], created=created, lifetime=timedelta(days=365)
    ).signed_by(KEY)
    newer = next_root(
        root, created=created, lifetime=timedelta(days=400), patch_keys=[_key(ADDED, "site")], patch_threshold=1
    ).signed_by(KEY)
    (folder / "root.json").write_bytes(root.to_bytes())
    (folder / "root-2.json").write_bytes(newer.to_bytes())


def _patch(name: str, sequence: int) -> Patch:
    prompt = SoftPrompt(np.full((2, BASE.hidden_size), sequence / 8, np.float32))
    seed = KVSeed(*(tuple(np.full((1, 2, 4), sequence / 8, np.float16) for _ in range(2)) for _ in range(2)))
    rotation = Rotation(((1.0, 0.01),), (0, 0))
    patch = Patch(name, f"1.{sequence}.0", BASE, prompt, seed, sequence=sequence, rotation=rotation)
    return signed(patch, sign(patch.manifest, PAYLOAD_TYPE, KEY))


def set_root(store: Store, source: Path, version: int) -> None:
    store.set_root([_root(source, version)])


def _root(source: Path, version: int) -> Root:
    return read_root(source / ("root.json" if version == 1 else f"root-{version}.json"))


def prepare(store: Store, source: Path, stage: int) -> None:
    """Stage 0: nothing; 1: a trust root; 2: a patch; 3: another one before it; 4: one of another name beside it."""
    if stage >= 1:
        set_root(store, source, 1)
    for name in ("1", "2", "beside")[: max(stage - 1, 0)]:
        store.apply(source / f"{name}.safetensors")


VERBS: dict[str, tuple[int, Callable[[Store, Path], Any]]] = {
    "first root": (0, lambda store, source: set_root(store, source, 1)),
    "first apply": (1, lambda store, source: store.apply(source / "1.safetensors")),
    "apply": (3, lambda store, source: store.apply(source / "3.safetensors")),
    "apply with more signatures": (3, lambda store, source: store.apply(source / "2-again.safetensors")),
    "rollback": (3, lambda store, source: store.rollback()),
    "apply beside": (3, lambda store, source: store.apply(source / "beside.safetensors")),
    "rollback of one": (4, lambda store, source: store.rollback(patch="detox")),
    "deactivate": (4, lambda store, source: store.deactivate("wrong", patch="detox")),
    "rotation": (3, lambda store, source: set_root(store, source, 2)),
    "hold": (3, lambda store, source: store.hold()),
    "remove": (
        3,
        lambda store, source: store.remove(store.read()[0].bases[store.find_base(None)].slots["detox"].previous[0]),
    ),
}
"""Name -> (stage to prepare, the change)."""


def outcome(store: Store) -> tuple[Any, ...]:
    """All that a device goes by: active patches, holds, trust root, sequences seen, patches, and what the history tells.

    Raises:
        EdgepatchError: the store or its history cannot be trusted.
    """
    state, trust = store.read()
    loaded = sorted(patch.digest for r in state.bases.values() for patch in store.active(ModelSpec.from_dict(r.spec)))
    actions = [(entry["action"], entry.get("patch")) for entry in store.history()]
    errors = [finding.message for finding in audit.verify(store) if finding.level == "error"]
    return (
        loaded,
        sorted(state.bases.items()),
        trust.root,
        json.dumps(trust.to_bytes().decode().split('"seen"')[1]),
        sorted(state.patches),
        actions,
        errors,
    )


class Case:
    """A verb with a fault at every step it takes, each on a store of its own.

    Args:
        verb: key of ``VERBS``.
        source: folder of ``make_files``.
        folder: for the stores.
    """

    def __init__(self, verb: str, source: Path, folder: Path) -> None:
        self._source, self._folder, self._number = source, folder, 0
        stage, self.change = VERBS[verb]
        prepare(self._store("prepared"), source, stage)
        self.old = outcome(self._fresh())
        done = self._fresh()
        with faulty(Faults(-1, None)) as counter:
            self.change(done, self._source)
        self.steps, self.new = counter.names, outcome(done)

    def _store(self, name: str) -> Store:
        return Store(self._folder / name, clock=lambda: _NOW)

    def _fresh(self) -> Store:
        self._number += 1
        if (self._folder / "prepared").is_dir():
            shutil.copytree(self._folder / "prepared", self._folder / str(self._number))
        return self._store(str(self._number))

    def kill(self, at: int, share: float = 0.0) -> str:
        """What is wrong after the end of the process at a step; "" for nothing."""
        store = self._fresh()
        try:
            with faulty(Faults(at, None, share)):
                self.change(store, self._source)
        except Killed:
            pass
        return self._judge(store, (self.old, self.new))

    def refuse(self, at: int, error: int, share: float = 0.0) -> str:
        """What is wrong after a disk error at a step: a verb that fails must have changed nothing."""
        store = self._fresh()
        try:
            with faulty(Faults(at, error, share)):
                self.change(store, self._source)
        except EdgepatchError:
            return self._judge(store, (self.old,))
        except OSError as raised:
            return f"no error of the project: {raised!r}"
        return self._judge(store, (self.new,))

    def _judge(self, store: Store, allowed: tuple[Any, ...]) -> str:
        try:
            state = outcome(store)
            if state not in allowed:
                return f"another state: {state}"[:300]
            if state == self.old:
                self.change(store, self._source)
            if outcome(store) != self.new:
                return "the next command did not work"
            return self._use(store)
        except EdgepatchError as error:
            return f"unusable: {error}"

    def _use(self, store: Store) -> str:
        """The device goes on."""
        if store.read()[0].bases:
            store.hold(is_held=False)
        store.apply(self._source / "3.safetensors")
        return "; ".join(outcome(store)[-1])


_NOW = datetime.now(timezone.utc)


def injected_kills(folder: Path, verbs: Iterable[str] = VERBS, every: int = 1) -> tuple[int, list[str]]:
    """(injection points, what went wrong) of ends of the process at each, or one of so many, steps of verbs, writes torn or not."""
    source, points, wrong = _source(folder), 0, []
    for verb in verbs:
        case = Case(verb, source, folder / f"kill {verb}")
        for at, step in [*enumerate(case.steps)][::every]:
            for share in (0.0, 0.5, 1.0) if step == "write" else (0.0,):
                points += 1
                fault = case.kill(at, share)
                wrong += [f"{verb}, step {at}: {fault}"] if fault else []
    return points, wrong


def injected_errors(
    folder: Path, verbs: Iterable[str] = VERBS, errors: Iterable[int] = DISK_ERRORS, every: int = 1
) -> tuple[int, list[str]]:
    """(injection points, what went wrong) of errors of the disk at each, or one of so many, steps of verbs."""
    source, points, wrong = _source(folder), 0, []
    for verb in verbs:
        case = Case(verb, source, folder / f"error {verb}")
        for at in range(0, len(case.steps), every):
            for error in errors:
                points += 1
                fault = case.refuse(at, error, 0.5 if error == errno.ENOSPC else 0.0)
                wrong += [f"{verb}, step {at}, {errno.errorcode[error]}: {fault}"] if fault else []
    return points, wrong


def _source(folder: Path) -> Path:
    source = folder / "source"
    if not source.is_dir():
        source.mkdir(parents=True)
        make_files(source)
    return source


# Real processes, really killed.

LOOP = """
import sys
from pathlib import Path
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances
store, source = Store(sys.argv[1]), Path(sys.argv[2])
print("started", flush=True)
while True:
    for number in (1, 2, 3):
        store.apply(source / f"{number}.safetensors", Allowances(downgrade="again"))
    store.rollback()
"""


def real_kills(folder: Path, count: int = KILLS, seed: int = 1) -> tuple[int, list[str]]:
    """(kills, what went wrong) of ``kill -9`` at a random moment of a process that applies and rolls back without end."""
    source, wrong, rng = _source(folder), [], random.Random(seed)
    store = Store(folder / "killed")
    prepare(store, source, 2)
    lines = 0
    for number in range(count):
        with subprocess.Popen(
            [sys.executable, "-c", LOOP, str(store.folder), str(source)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            try:
                process.wait(rng.uniform(0.0, 0.08))
                wrong.append(f"kill {number}: the process ended by itself")
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
        try:
            state = outcome(store)
            wrong += [f"kill {number}: {state}"] if len(state[0]) != 1 or state[-1] or len(state[-2]) < lines else []
            lines = len(state[-2])
            store.apply(source / "3.safetensors", Allowances(downgrade="after the kill"))
        except EdgepatchError as error:
            wrong.append(f"kill {number}: {error}")
    return count, wrong


def figures(kills: int = KILLS, verbs: Iterable[str] = VERBS) -> list[dict[str, Any]]:
    """F4, F5 and F6, as ``edgepatch bench security`` prints them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        killed, torn = injected_kills(folder, verbs)
        by_signal, broken = real_kills(folder, kills)
        refused, changed = injected_errors(folder, verbs)
        attacks = updates.attempted(folder / "attacks")
    missed = [attack for attack, held in attacks.items() if not held]
    return [
        _figure(
            "F4",
            f"end of the process at every step of the store, and {by_signal} times kill -9: state is old or new",
            killed + by_signal,
            torn + broken,
        ),
        _figure("F5", "ENOSPC, EIO, EROFS at every step: the old patch stays active", refused, changed),
        {
            "id": "F6",
            "name": "attacks on an update refused",
            "value": f"{len(attacks) - len(missed)} of {len(attacks)} rows",
            "target": "100 %",
            "passed": not missed,
            "failures": missed,
        },
    ]


def _figure(number: str, name: str, points: int, wrong: list[str]) -> dict[str, Any]:
    share = 100 * (points - len(wrong)) / points
    return {
        "id": number,
        "name": name,
        "value": f"{share:.4g} % of {points} injection points",
        "target": "100 %",
        "passed": not wrong,
        "failures": wrong[:10],
    }


if __name__ == "__main__":
    for figure in figures():
        print(
            f"{figure['id']}  {figure['name']}: {figure['value']} (target {figure['target']})",
            *figure["failures"],
            sep="\n    ",
        )

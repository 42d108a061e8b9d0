"""A run folder: settings, log and checkpoint; a killed run goes on from its checkpoint as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepatch.errors import InputError
from edgepatch.files import strict_json
from edgepatch.files.tensor_trees import read_tree, write_tree
from edgepatch.files.writing import write_atomically
from edgepatch.training import parallel
from edgepatch.training.config import History, TrainConfig

if TYPE_CHECKING:
    import torch

CHECKPOINT_FILE = "checkpoint.safetensors"
PICKLED_FILE = "checkpoint.pt"
SETTINGS_FILE = "run.json"
STEPS_BETWEEN_CHECKPOINTS = 50
DIFFERENCES_TOLD = 3


@dataclass
class Checkpoint:
    """Where a run stands.

    Attributes:
        stage: "SFT", "DPO" or "done".
        step: steps of the stage that are done.
        policy: parameters.
        optimizer: its state; empty at the start of a stage.
        best: parameters of the best check of stage 2 so far; empty before the first.
        best_check, checks_since: how good it was, and how many checks ago.
        reference: answer log-probabilities of the DPO reference, once computed.
        history: curves so far.
    """

    stage: str
    step: int
    policy: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    best: dict[str, torch.Tensor]
    best_check: float
    checks_since: int
    reference: list[torch.Tensor]
    history: dict[str, list[float]]


class Run:
    """The folder of a run, or none, which keeps nothing.

    Args:
        folder: made when it is missing.
        settings: all that the result depends on; a run goes on only with the settings that it began with.

    Raises:
        InputError: the folder cannot be written, or holds a run with other settings.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any] | None = None) -> None:
        self.folder = folder
        if folder is None:
            return
        new_settings = json.loads(json.dumps(settings or {}))
        kept_settings = known_settings(folder)
        if kept_settings is not None:
            _require_same(folder, kept_settings, new_settings)
        else:
            write_atomically(folder / SETTINGS_FILE, (json.dumps(new_settings, indent=1) + "\n").encode("utf-8"))

    def load(self, device: str) -> Checkpoint | None:
        """The checkpoint, where there is one.

        Raises:
            InputError: it is damaged.
        """
        path = self.folder / CHECKPOINT_FILE if self.folder else None
        if self.folder is not None and (self.folder / PICKLED_FILE).is_file():
            raise InputError(
                f"{self.folder}: expected {CHECKPOINT_FILE}, found a {PICKLED_FILE} of an older release, which is a pickle and is not read",
                hint=f"go on with that release, or delete {PICKLED_FILE} to start again",
            )
        if path is None or not path.is_file():
            return None
        try:
            return Checkpoint(**read_tree(path, device))
        except (InputError, TypeError) as error:
            raise InputError(
                f"checkpoint {path} is damaged: {error}", hint="delete the run folder to start again"
            ) from None

    def save(self, checkpoint: Checkpoint) -> None:
        """Writes it in place of the last one; a full disk leaves the last one whole. Of several processes the first writes.

        Raises:
            InputError: the file cannot be written.
        """
        if self.folder is None or parallel.world()[0]:
            return
        write_tree(self.folder / CHECKPOINT_FILE, vars(checkpoint))

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs behind this step."""
        return self.folder is not None and step % STEPS_BETWEEN_CHECKPOINTS == 0

    def finish(self, history: History, record: dict[str, Any]) -> None:
        """Writes the curves and what the run was made of."""
        if self.folder is not None and not parallel.world()[0]:
            write_atomically(
                self.folder / "curves.json",
                (json.dumps({**asdict(history), "run": record}, indent=1) + "\n").encode("utf-8"),
            )


def known_settings(folder: Path | None) -> dict[str, Any] | None:
    """The settings that a run began with; ``None`` where none has begun.

    Raises:
        InputError: they are damaged.
    """
    path = folder / SETTINGS_FILE if folder else None
    if path is None or not path.is_file():
        return None
    return strict_json.read_json(path, what="the settings of a run", hint="delete the run folder to start again")


def require_same_config(folder: Path | None, config: TrainConfig) -> None:
    """Checks, before a model is loaded, that a run goes on with the hyperparameters that it began with, as far as they are set.

    Raises:
        InputError: one differs, or the settings that are there are damaged.
    """
    kept_settings = (known_settings(folder) or {}).get("config")
    if folder is None or not isinstance(kept_settings, dict):
        return
    known = {name: value for name, value in asdict(config).items() if name in kept_settings}
    settled = {name: value for name, value in known.items() if value is not None and value != "auto"}
    _require_same(folder, {"config": {name: kept_settings[name] for name in settled}}, {"config": settled})


def _require_same(folder: Path, kept_settings: dict[str, Any], new_settings: dict[str, Any]) -> None:
    differing = list(_differences("", kept_settings, new_settings))
    if differing:
        words = [f"{name}: expected {kept}, found {new}" for name, kept, new in differing[:DIFFERENCES_TOLD]]
        more = f"; and {len(differing) - DIFFERENCES_TOLD} more" if len(differing) > DIFFERENCES_TOLD else ""
        raise InputError(
            f"{folder} holds a run with other settings: {'; '.join(words)}{more}",
            hint="repeat the settings to go on with it, or name another folder",
        )


def _differences(place: str, kept: Any, new: Any) -> Iterator[tuple[str, str, str]]:
    """(dotted name of a field, value that is kept, new value) of each that differs."""
    if isinstance(kept, dict) and isinstance(new, dict):
        for name in sorted(kept.keys() | new.keys()):
            yield from _differences(f"{place}.{name}" if place else name, kept.get(name), new.get(name))
    elif kept != new:
        yield place, f"{kept!r:.100}", f"{new!r:.100}"

"""What the endpoints share: settings, scheduler, metrics, and the model once it is loaded."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

from edgepatch.errors import EdgepatchError
from edgepatch.runtimes.session import Session
from edgepatch.server.budgets import LogprobBudget
from edgepatch.server.constraint_threads import ConstraintThreads
from edgepatch.server.metrics import Metrics
from edgepatch.server.model import ServedModel
from edgepatch.server.refusals import Refusal
from edgepatch.server.scheduler import Scheduler
from edgepatch.server.settings import ServerSettings
from edgepatch.server.text_threads import TextThreads

NUM_PLACES = 6
"""Of the way to an error, from its end."""

logger = logging.getLogger("edgepatch.server")


class Service:
    """One served model.

    Args:
        load: makes the session, on the thread that then owns it.
        settings: who may ask for what.
        on_ready: called when the model is loaded and its patch proven.
        on_failed: called with the error when it cannot be served, or no longer.
        bare: the same model without a patch, for people who compare; ``None`` where nobody may.
    """

    def __init__(
        self,
        load: Callable[[], Session],
        settings: ServerSettings,
        on_ready: Callable[[ServedModel], None] = lambda model: None,
        on_failed: Callable[[BaseException], None] = lambda error: None,
        bare: Service | None = None,
    ) -> None:
        self.settings, self.metrics, self.text_threads = settings, Metrics(), TextThreads()
        self.constraint_threads = ConstraintThreads()
        self.logprob_budget = LogprobBudget()
        self.on_ready, self.on_failed = on_ready, on_failed
        self.bare = bare
        self._load = load
        self._model: ServedModel | None = None
        self.scheduler = Scheduler(self._make, settings.max_waiting, self.metrics, self._note_ready, self._note_failed)

    @property
    def all(self) -> list[Service]:
        """Itself, and the bare one where there is one."""
        return [self] if self.bare is None else [self, self.bare]

    def _make(self) -> Session:
        session = self._load()
        self._model = ServedModel(session, self.settings.name)
        return session

    def _note_ready(self) -> None:
        self.on_ready(self.require_model())

    def _note_failed(self, error: BaseException) -> None:
        self.on_failed(error)

    @property
    def notes(self) -> list[str]:
        """What is slower or turned off with the model, once it is loaded."""
        return list(self._model.notes) if self._model is not None else []

    @property
    def patches(self) -> list[str]:
        """Name and version of each active patch, once the model is loaded."""
        entries = self._model.patches if self._model is not None else []
        return [f"{entry['name']} {entry['version']}" for entry in entries]

    def require_model(self) -> ServedModel:
        """The model.

        Raises:
            Refusal: 503, it is still loading, or could not be loaded.
        """
        if self._model is None:
            self.scheduler.require_serving()
            raise Refusal(503, "the model is loading", code="server_loading")
        return self._model

    def note_error(self, error: BaseException) -> None:
        """Logs an error that no client caused, in one line without anything that a request or a reply held."""
        if not isinstance(error, EdgepatchError):
            logger.error("internal error: %s in %s", type(error).__name__, _places(error))
        elif error.exit_code == 1:
            logger.error("%s", error)


def _places(error: BaseException) -> str:
    """Where an error came from, from the inside out: files, lines and functions, but no values."""
    frames = traceback.extract_tb(error.__traceback__)[-NUM_PLACES:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))

"""Connections with limits of time from their acceptance to the last byte: silent ones, slow heads and replies that nobody reads.

Bodies and replies have limits of their own, in ``endpoints``. What lies outside of them belongs to the connection: the time before a request's
head is complete, and the time until what was written has left.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0
"""For the head of a request, from the connection's acceptance or the end of the reply before."""

WRITE_TIMEOUT_S = 30.0
"""For what was written to be taken off; a reader that never catches up for so long is none."""

MAX_SILENT = 64
"""Connections without a request on its way. One more ends the one that has been silent for longest, so that they shut nobody out."""


class Connection(H11Protocol):
    """uvicorn's connection, which knows since when it waits for what.

    Attributes:
        silent_since: when the wait for a head began, by ``time.monotonic``.
        full_since: since when bytes wait to be taken off; ``None`` while none do.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.silent_since = time.monotonic()
        self.full_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        silent = [one for one in self.connections if isinstance(one, Connection) and one.is_silent]
        if len(silent) > MAX_SILENT:
            min(silent, key=lambda one: one.silent_since).abort()

    def on_response_complete(self) -> None:
        self.silent_since = time.monotonic()
        super().on_response_complete()

    @property
    def is_silent(self) -> bool:
        """Whether no request is on its way."""
        return self.cycle is None or self.cycle.response_complete

    def watch(self, now: float) -> None:
        """Ends the connection where it has waited for too long."""
        if self.transport.get_write_buffer_size():
            self.full_since = self.full_since or now
        else:
            self.full_since = None
        is_late = self.is_silent and now - self.silent_since > HEAD_TIMEOUT_S
        if is_late or (self.full_since is not None and now - self.full_since > WRITE_TIMEOUT_S):
            self.abort()

    def abort(self) -> None:
        """Ends the connection at once: one that is closed in order waits for bytes that nobody takes."""
        self.transport.abort()


def watch_all(connections: set[Any]) -> None:
    """Ends every connection of a server that has waited for too long."""
    now = time.monotonic()
    for one in list(connections):
        if isinstance(one, Connection):
            one.watch(now)

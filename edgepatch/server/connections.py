"""Connections with limits of time from their acceptance to the last byte: silent ones, slow heads and replies that nobody reads.

Bodies and replies have limits of their own, in ``endpoints``. What lies outside of them belongs to the connection: the time before a request's
head is complete, and the time until what was written has left.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgepatch.server.refusals import Refusal

MAX_HEAD_BYTES = 32 * 1024
"""Of a request's line and header fields."""

HEAD_TIMEOUT_S = 10.0
"""For the head of a request, from the connection's acceptance or the end of the reply before."""

WRITE_TIMEOUT_S = 30.0
"""For what was written to be taken off; a reader that never catches up for so long is none."""

MAX_SILENT = 64
"""Connections without a request on its way. One more ends the one that has been silent for longest, so that they shut nobody out."""


LINGER_S = 2.0
"""For a client to read why it is refused while it still sends."""


class Lingering:
    """A transport that stays open for reading after its ``close`` while the client still sends.

    A socket that is closed with bytes unread resets the connection, and takes the reply away from a client that has not read it
    (RFC 9112, section 9.6). What arrives meanwhile is dropped.

    Args:
        transport: asyncio's.
        conn: what has been sent so far.
    """

    def __init__(self, transport: asyncio.Transport, conn: h11.Connection) -> None:
        self._transport = transport
        self._conn = conn
        self._is_lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing may be written any more."""
        return self._is_lingering or self._transport.is_closing()

    def close(self) -> None:
        """Sends what is written and the end; reads on for ``LINGER_S`` where the request was not received as a whole."""
        if self.is_closing():
            return
        if self._conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            self._transport.close()
            return
        self._is_lingering = True
        try:
            self._transport.write_eof()
        except OSError:  # the client has reset the connection: nobody reads the reply
            self._transport.abort()
            return
        self._transport.resume_reading()
        asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)


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
        super().connection_made(Lingering(transport, self.conn))  # type: ignore[arg-type]
        silent = [one for one in self.connections if isinstance(one, Connection) and one.is_silent]
        if len(silent) > MAX_SILENT:
            min(silent, key=lambda one: one.silent_since).abort()

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no request, or one whose head is too long, and closes.

        Args:
            msg: what uvicorn would say.
        """
        unread = self.conn.trailing_data[0]
        if self.is_silent and len(unread) > MAX_HEAD_BYTES and b"\r\n\r\n" not in unread:
            refusal = Refusal(
                431, f"the head: expected at most {MAX_HEAD_BYTES} bytes, found more", code="head_too_long"
            )
        else:
            refusal = Refusal(400, "expected an HTTP/1.1 request, found something else", code="malformed_request")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its request is the one that is malformed: nobody else may answer it
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refusal.body()).encode()
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
                (b"connection", b"close"),
            ]
            for event in (
                h11.Response(status_code=refusal.status, headers=headers, reason=b""),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

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

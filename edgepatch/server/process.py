"""The server as a process: listens, serves until it is told to stop, and lets replies come to their end."""

from __future__ import annotations

import signal
import socket
import threading

import uvicorn

from edgepatch.server.app import create_app
from edgepatch.server.connections import MAX_HEAD_BYTES, Connection, watch_all
from edgepatch.server.service import Service

MAX_CONNECTIONS = 256
END_S = 2
"""Beyond the grace period: for the last chunks to be written."""


class HttpServer(uvicorn.Server):
    """uvicorn with a service behind it.

    Args:
        service: what is served; its thread starts with the server.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        super().__init__(
            uvicorn.Config(
                create_app(service),
                http=Connection,
                ws="none",
                lifespan="on",
                log_level="critical",  # it writes a line for each malformed request, and tracebacks with what requests held
                access_log=False,
                proxy_headers=False,  # nobody may claim another address or scheme
                server_header=False,
                limit_concurrency=MAX_CONNECTIONS,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                timeout_graceful_shutdown=int(service.settings.grace_s) + END_S,
            )
        )

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; every second the connections are looked at."""
        if counter % 10 == 0:
            watch_all(self.server_state.connections)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends what is running within the grace period."""
        for one in self._service.all:
            one.scheduler.drain(one.settings.grace_s)
        await super().shutdown(sockets)


def serve(service: Service, listener: socket.socket) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        service: what is served.
        listener: a bound socket.

    Raises:
        Exception: what the model could not be loaded or served for.
    """
    server = HttpServer(service)
    for one in service.all:
        one.on_failed = lambda error: setattr(server, "should_exit", True)
    with listener, _QuietEnd():
        server.run(sockets=[listener])
    for one in service.all:
        if one.scheduler.error is not None:
            raise one.scheduler.error


class _QuietEnd:
    """uvicorn raises the signal that stopped it once more when it is done: by then it has no more to say."""

    def __enter__(self) -> None:
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: object) -> None:
    return None

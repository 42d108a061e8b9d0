"""A real server on a free loopback port, in a thread of the test process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from edgepatch.runtimes.session import Session
from edgepatch.server.metrics import COUNTERS
from edgepatch.server.process import HttpServer
from edgepatch.server.service import Service
from edgepatch.server.settings import ServerSettings

KEY = "ep-test-key-0123456789"
TOOLS_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments | tojson + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The lab model's template with a place for tools and calls, as Qwen's has it."""

MODEL = "tiny"


class Paced:
    """A runtime that takes its time, so that a test can come between two tokens."""

    def __init__(self, runtime: Session, pause_s: float = 0.02) -> None:
        self._runtime, self._pause_s = runtime, pause_s

    def __getattr__(self, name: str):
        return getattr(self._runtime, name)

    def advance(self, continuations):
        time.sleep(self._pause_s)
        return self._runtime.advance(continuations)


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    service: Service
    server: HttpServer

    def client(self, **options) -> httpx.Client:
        headers = {"Authorization": f"Bearer {KEY}"} | options.pop("headers", {})
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, **options)

    def counts(self) -> dict[str, int]:
        """What the metrics have counted."""
        return {name: self.service.metrics.value(name) for name in COUNTERS}

    def wait_until_idle(self, timeout_s: float = 5.0) -> float:
        """Seconds until no generation runs or waits."""
        start = time.monotonic()
        while self.service.scheduler.num_running or self.service.scheduler.num_waiting:
            assert time.monotonic() - start < timeout_s, "a sequence was not freed"
            time.sleep(0.002)
        return time.monotonic() - start


@contextmanager
def running(
    load: Callable[[], Session], wait: bool = True, load_bare: Callable[[], Session] | None = None, **settings
) -> Iterator[Running]:
    """Starts a server, and stops it."""
    chosen = ServerSettings(**{"name": MODEL, "api_key": KEY, "port": 0, "grace_s": 2.0} | settings)
    service = Service(load, chosen, bare=Service(load_bare, chosen) if load_bare else None)
    listener = service.settings.listen()
    server = HttpServer(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started or (wait and "loading" in [one.scheduler.state for one in service.all]):
            assert thread.is_alive()
            time.sleep(0.005)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()

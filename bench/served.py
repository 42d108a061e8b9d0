"""A real ``edgepatch serve`` in a process of its own, for measurements that speak to it from outside."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import EdgepatchError
from edgepatch.processes.programs import running

START_TIMEOUT_S = 180
ANSWER_TIMEOUT_S = 300
PAUSE_S = 0.2


@dataclass(frozen=True)
class Served:
    """A server that answers.

    Attributes:
        url: its root, without ``/v1``.
        key: the API key.
        process_id: of the server.
    """

    url: str
    key: str
    process_id: int

    def get(self, path: str, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        """The JSON of a path.

        Raises:
            OSError: there is no answer, or one of another status than 200.
        """
        asked = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {self.key}"})
        with urllib.request.urlopen(asked, timeout=timeout_s) as reply:
            return json.loads(reply.read())

    @property
    def model(self) -> str:
        """What clients call the model."""
        return str(self.get("/v1/models")["data"][0]["id"])

    @property
    def fingerprint(self) -> str:
        """Of the model and its patch."""
        return str(self.get("/v1/patches")["system_fingerprint"])


def free_port() -> int:
    """One of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(model: Path, flags: Sequence[object], folder: Path, key: str = "") -> Iterator[Served]:
    """Starts a server on a free port of loopback, and ends it with the block.

    Args:
        model: a GGUF file or a folder.
        flags: further arguments of ``edgepatch serve``.
        folder: gets key and log.
        key: the API key; a fresh one where it is empty.

    Raises:
        EdgepatchError: it does not come up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key, key_file = key or secrets.token_urlsafe(24), folder / "api.key"
    key_file.touch(mode=0o600)
    key_file.write_text(key, encoding="utf-8")
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "edgepatch.cli",
        "serve",
        model,
        "--port",
        port,
        "--api-key-file",
        key_file,
        *flags,
    ]
    log = folder / "server.log"
    with log.open("wb") as output, running([str(part) for part in command], output) as process:
        served = Served(f"http://127.0.0.1:{port}", key, process.pid)
        _wait_until_ready(served, process, log)
        yield served


def _wait_until_ready(served: Served, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        try:
            served.get("/health", timeout_s=10)
            return
        except OSError:  # not yet listening, or still loading
            time.sleep(PAUSE_S)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise EdgepatchError(f"edgepatch serve did not come up: {lines[-1] if lines else 'it said nothing'}")

"""What is told of requests: counters in Prometheus' text format, and a log of one line each.

No client library: the format is a dozen lines, and a device installs no more than it needs.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from edgepatch.errors import InputError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "edgepatch_"

COUNTERS = {
    "prompt_tokens": "Tokens of prompts, the cached ones included.",
    "cached_prompt_tokens": "Tokens of prompts that were in the cache already.",
    "completion_tokens": "Tokens generated.",
    "generations_finished": "Continuations that came to their end.",
    "generations_cancelled": "Continuations whose client went away or ran out of time.",
    "generations_failed": "Continuations that ended with an error.",
}
GAUGES = {
    "sequences": "Conversations that are held at once.",
    "generations_running": "Continuations that hold a sequence.",
    "generations_waiting": "Continuations that wait for a sequence.",
}
FIRST_TOKEN_BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


STDERR = Path("-")
METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")
LOG_MODE = 0o600


class RequestLog:
    """One line a request, as fields: time, method, path, status, duration, tokens; nothing that a client wrote stands in it.

    The file is opened for each line, so that it may be moved away meanwhile.

    Args:
        path: of the file, which is added to; ``STDERR`` for the standard error output.

    Raises:
        InputError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._append("")
        except OSError as error:
            raise InputError(f"cannot write the log {path}: {error.strerror}", hint="check the path") from error

    def note(self, method: str, route: str, status: int, seconds: float, tokens: Mapping[str, int]) -> None:
        """Adds the line of a request that has been answered; a disk that fails stops no reply.

        Args:
            method: of the request.
            route: one of ours, or what stands for all others.
            status: of the reply; 499 where the client left before one.
            seconds: from the request to the end of its reply.
            tokens: how many there were of each kind; none where nothing was generated.
        """
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        fields = {"time": time, "method": method if method in METHODS else "other", "path": route, "status": status}
        fields |= {"duration_s": f"{seconds:.3f}", **tokens}
        with suppress(OSError):
            self._append(" ".join(f"{name}={value}" for name, value in fields.items()) + "\n")

    def _append(self, line: str) -> None:
        if self._path == STDERR:
            print(line, end="", file=sys.stderr, flush=True)
            return
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, LOG_MODE)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


class Metrics:
    """Counts; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._replies: Counter[tuple[str, int]] = Counter()
        self._first_token_s: list[int] = [0] * (len(FIRST_TOKEN_BOUNDS_S) + 1)
        self._first_token_sum_s = 0.0

    def count(self, name: str, by: int = 1) -> None:
        """Adds to one of ``COUNTERS``."""
        if name not in COUNTERS:
            raise KeyError(name)
        with self._lock:
            self._counts[name] += by

    def value(self, name: str) -> int:
        """What one of ``COUNTERS`` has come to."""
        with self._lock:
            return self._counts[name]

    def count_reply(self, route: str, status: int) -> None:
        """Counts an HTTP reply."""
        with self._lock:
            self._replies[route, status] += 1

    def observe_first_token(self, seconds: float) -> None:
        """Notes how long a client waited for the first token."""
        place = sum(seconds > bound for bound in FIRST_TOKEN_BOUNDS_S)
        with self._lock:
            self._first_token_s[place] += 1
            self._first_token_sum_s += seconds

    def text(self, gauges: Mapping[str, int], labels: Mapping[str, str]) -> str:
        """The whole document.

        Args:
            gauges: a value for each of ``GAUGES``.
            labels: of the info line: model, patch, fingerprint.
        """
        with self._lock:
            counts, replies = self._counts.copy(), sorted(self._replies.items())
            buckets, total_s = list(self._first_token_s), self._first_token_sum_s
        lines = _family("info", "gauge", "The model and patch that are served.", [(_labels(labels), 1)])
        lines += [line for name, text in GAUGES.items() for line in _family(name, "gauge", text, [("", gauges[name])])]
        lines += [
            line
            for name, text in COUNTERS.items()
            for line in _family(f"{name}_total", "counter", text, [("", counts[name])])
        ]
        rows = [(_labels({"route": route, "status": str(status)}), count) for (route, status), count in replies]
        lines += _family("http_replies_total", "counter", "HTTP replies.", rows)
        lines += _histogram("time_to_first_token_seconds", "From the request to its first token.", buckets, total_s)
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, rows: Sequence[tuple[str, float]]) -> list[str]:
    head = [f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"]
    return head + [f"{PREFIX}{name}{labels} {value}" for labels, value in rows]


def _histogram(name: str, text: str, buckets: list[int], total_s: float) -> list[str]:
    lines, below = _family(name, "histogram", text, []), 0
    for bound, count in zip([*map(str, FIRST_TOKEN_BOUNDS_S), "+Inf"], buckets, strict=True):
        below += count
        lines.append(f'{PREFIX}{name}_bucket{{le="{bound}"}} {below}')
    return [*lines, f"{PREFIX}{name}_sum {total_s}", f"{PREFIX}{name}_count {below}"]


def _labels(values: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in values.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

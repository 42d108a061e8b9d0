"""Clients of a loaded server, each a thread with a connection of its own, and what they saw."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from edgepatch.bench.served import Served
from edgepatch.bench.server_load.requests import Request, draw

TIMEOUT_S = 300.0
CANCEL_AFTER = 3
"""Events of a stream."""

KEPT_FAULTS = 20


@dataclass
class Seen:
    """What one client saw.

    Attributes:
        outcomes: (kind, outcome) -> how often.
        first_token_s: seconds to the first text of each stream.
        fingerprints: of all replies.
        faults: what should not have happened, the first of them.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    first_token_s: list[float] = field(default_factory=list)
    fingerprints: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        """Takes what another client saw."""
        self.outcomes += other.outcomes
        self.first_token_s += other.first_token_s
        self.fingerprints += other.fingerprints
        self.faults = (self.faults + other.faults)[:KEPT_FAULTS]


def load(served: Served, num_clients: int, seconds: float, context_length: int, num_tokens: int) -> Seen:
    """Lets clients ask until the time is over; each ends its last request.

    Args:
        served: the server.
        num_clients: at once.
        seconds: of asking.
        context_length: of the model.
        num_tokens: the most that a reply may have.
    """
    model, end = served.model, time.monotonic() + seconds
    seen = [Seen() for _ in range(num_clients)]

    def ask_on(number: int) -> None:
        rng = random.Random(number)
        with httpx.Client(
            base_url=served.url, headers={"Authorization": f"Bearer {served.key}"}, timeout=TIMEOUT_S
        ) as http:
            while time.monotonic() < end:
                request = draw(rng, model, context_length, num_tokens)
                try:
                    outcome = _ask(http, request, seen[number])
                except Exception as error:  # whatever it is, it is a reply that did not come
                    outcome = "lost"
                    seen[number].faults.append(f"{request.kind}: {type(error).__name__}: {error}"[:200])
                seen[number].outcomes[request.kind, outcome] += 1
                if outcome == "busy":
                    time.sleep(0.2)

    threads = [threading.Thread(target=ask_on, args=(number,)) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Seen()
    for one in seen:
        total.add(one)
    return total


def _ask(http: httpx.Client, request: Request, seen: Seen) -> str:
    start = time.monotonic()
    content = request.body if isinstance(request.body, bytes) else json.dumps(request.body).encode()
    with http.stream("POST", request.path, content=content, headers={"Content-Type": "application/json"}) as reply:
        if reply.status_code == 503:
            return "busy"
        if reply.status_code != 200 or request.ending == "refusal":
            return _refusal(request, reply, seen)
        if request.is_streamed:
            return _stream(request, reply, seen, start)
        body = json.loads(reply.read())
        seen.fingerprints[body["system_fingerprint"]] += 1
        return _judged(request, body["choices"][0]["finish_reason"] in ("stop", "length"), "no end", seen)


def _judged(request: Request, holds: bool, fault: str, seen: Seen) -> str:
    if not holds:
        seen.faults.append(f"{request.kind}: {fault}"[:200])
    return "done" if holds else "wrong"


def _refusal(request: Request, reply: httpx.Response, seen: Seen) -> str:
    error = json.loads(reply.read()).get("error", {})
    holds = request.ending == "refusal" and reply.status_code == 400 and error.get("code") == request.code
    return _judged(request, holds, f"status {reply.status_code}, {error}", seen)


def _stream(request: Request, reply: httpx.Response, seen: Seen, start: float) -> str:
    num_events, last, is_first = 0, "", True
    for line in reply.iter_lines():
        if not line.startswith("data: "):
            continue
        num_events, last = num_events + 1, line.removeprefix("data: ")
        if last == "[DONE]":
            break
        event = json.loads(last)
        if is_first and _has_text(event):
            seen.first_token_s.append(time.monotonic() - start)
            is_first = False
        _note_fingerprint(event, seen)
        if request.ending == "cancel" and num_events == CANCEL_AFTER:
            return "cancelled"
    return _judged(request, last == "[DONE]" or _is_last(last), f"ends with {last[:80]}", seen)


def _has_text(event: dict[str, Any]) -> bool:
    if "choices" in event:
        return any(choice["delta"].get("content") for choice in event["choices"])
    return bool(event.get("delta"))


def _note_fingerprint(event: dict[str, Any], seen: Seen) -> None:
    whole = event.get("response", event)
    if "system_fingerprint" in whole:
        seen.fingerprints[whole["system_fingerprint"]] += 1


def _is_last(data: str) -> bool:
    return bool(data) and json.loads(data).get("type") in ("response.completed", "response.incomplete")

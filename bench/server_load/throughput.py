"""Tokens a second of 1, 2, 4 and 8 streams at once, of any server that speaks OpenAI's interface."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from edgepatch.errors import EdgepatchError

STREAMS = (1, 2, 4, 8)
TIMEOUT_S = 600.0
TEXT = "Describe a journey by train through the mountains, number {number}, in as much detail as you can."


@dataclass(frozen=True)
class Endpoint:
    """A server to be asked.

    Attributes:
        url: its root.
        key: its API key; empty where it asks for none.
        model: what clients call it.
    """

    url: str
    key: str
    model: str


def throughput(
    endpoints: Mapping[str, Endpoint], num_tokens: int, end_token_ids: Sequence[int], num_rounds: int = 3
) -> list[dict[str, Any]]:
    """One row a number of streams: the median rate of each server, and the lowest and highest.

    The servers take turns, so that whatever else the machine does slows each alike.

    Args:
        endpoints: name -> server.
        num_tokens: of each stream; none of them may end sooner.
        end_token_ids: which are made impossible.
        num_rounds: how often each is asked with each number of streams.

    Raises:
        EdgepatchError: a stream has another number of tokens, or is refused.
    """
    options: dict[str, Any] = {
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {str(token): -100 for token in end_token_ids},
    }
    for endpoint in endpoints.values():
        _rate(endpoint, options, 1)  # warms up
    rows = list[dict[str, Any]]()
    for num_streams in STREAMS:
        rates = {name: list[float]() for name in endpoints}
        for _ in range(num_rounds):
            for name, endpoint in endpoints.items():
                rates[name].append(_rate(endpoint, options, num_streams))
        rows.append({"streams": num_streams, "tokens_per_s": {name: _spread(values) for name, values in rates.items()}})
    return rows


def _spread(rates: Sequence[float]) -> dict[str, float]:
    return {"median": median(rates), "low": min(rates), "high": max(rates)}


def _rate(endpoint: Endpoint, options: Mapping[str, Any], num_streams: int) -> float:
    """Tokens a second of all streams together."""
    with ThreadPoolExecutor(num_streams) as pool:
        start = time.monotonic()
        counts = list(pool.map(lambda number: _tokens_of(endpoint, options, number), range(num_streams)))
        return sum(counts) / (time.monotonic() - start)


def _tokens_of(endpoint: Endpoint, options: Mapping[str, Any], number: int) -> int:
    """Tokens of one stream."""
    asked = {
        **options,
        "model": endpoint.model,
        "messages": [{"role": "user", "content": TEXT.format(number=number)}],
    }
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    with (
        httpx.Client(base_url=endpoint.url, headers=headers, timeout=TIMEOUT_S) as http,
        http.stream("POST", "/v1/chat/completions", json=asked) as reply,
    ):
        lines = list(reply.iter_lines())
    usages = [usage for line in lines if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage"))]
    count = int(usages[-1]["completion_tokens"]) if usages else 0
    if count != options["max_tokens"]:
        # Fewer tokens in less time would pass for a rate.
        said = " ".join(lines)[:200]
        raise EdgepatchError(f"{endpoint.url}: expected {options['max_tokens']} tokens, found {count}: {said}")
    return count

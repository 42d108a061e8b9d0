"""Tokens a second of 1, 2, 4 and 8 streams at once, of any server that speaks OpenAI's interface."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx

STREAMS = (1, 2, 4, 8)
TIMEOUT_S = 600.0
TEXT = "Describe a journey by train through the mountains, number {number}, in as much detail as you can."


def throughput(url: str, key: str, model: str, num_tokens: int, end_token_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One row a number of streams.

    Args:
        url: root of the server.
        key: its API key.
        model: what clients call it.
        num_tokens: of each stream; none of them may end sooner.
        end_token_ids: which are made impossible.
    """
    body = {
        "model": model,
        "max_tokens": num_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "logit_bias": {str(token): -100 for token in end_token_ids},
    }
    rows = []
    for num_streams in (1, *STREAMS):  # the first warms up
        seconds, tokens = _run(url, key, body, num_streams)
        rows.append({"streams": num_streams, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds})
    return rows[1:]


def _run(url: str, key: str, body: dict[str, Any], num_streams: int) -> tuple[float, int]:
    counts = [0] * num_streams

    def ask(number: int) -> None:
        asked = {**body, "messages": [{"role": "user", "content": TEXT.format(number=number)}]}
        headers = {"Authorization": f"Bearer {key}"}
        with (
            httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S) as http,
            http.stream("POST", "/v1/chat/completions", json=asked) as reply,
        ):
            lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: {")]
        usages = [usage for line in lines if (usage := json.loads(line).get("usage"))]
        counts[number] = usages[-1]["completion_tokens"] if usages else 0

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(num_streams)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - start, sum(counts)

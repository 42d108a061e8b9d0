"""F15: thousands of hostile requests against a real ``edgepatch serve``, while other clients go on asking.

Attackers draw requests of every kind of ``hostile_requests.KINDS`` and send them as fast as they are answered. Bystanders ask meanwhile: one for
streams, one for JSON after a schema that nobody has sent before, one for answers whose log-probabilities tell the patched model from the
bare one. What must not happen: a bystander's wait of more than ``PATIENCE_S`` of the server's computing, or ``HANG_S`` by the clock, a reply of theirs that does not come to its end or bears another
fingerprint, an answer that is not the patched model's; and a hostile request that is answered by a fault of the server, or not at all.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from attacks.hostile_requests import CHAT, Attack, draw
from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCH
from edgepatch.bench.served import Served, serving
from edgepatch.converters.gguf.writer import convert_folder
from edgepatch.llama_server.answers import Examiner, new_conversations
from edgepatch.llama_server.client import LlamaServer
from edgepatch.llama_server.served import question
from edgepatch.runtimes import load_runtime
from edgepatch.text.messages import Message

REQUESTS = 5000
ATTACKERS = 4
SEQUENCES = 8
PATIENCE_S, HANG_S = 5.0, 60.0
"""What a bystander waits at most, for the first event of a reply or for the next: so long may the server and its children compute
meanwhile, so that a machine that others share is not taken for a slow server; and so long it may be by the clock."""

PAUSE_S = 0.5
ANSWER_S = 120.0
KEPT_FAULTS = 20
QUEUE_FULL = 503


Wait = tuple[float, float]


@dataclass
class Tally:
    """What came of it.

    Attributes:
        sent: kind -> hostile requests.
        statuses: of their answers.
        replies: bystander -> what it got: "whole", "busy" (told to come again), or "wrong".
        longest_s: bystander -> its longest wait by the clock, and the longest in seconds of the server's computing.
        num_faults: of what must not happen.
        faults: the first of them.
    """

    sent: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    replies: Counter[tuple[str, str]] = field(default_factory=Counter)
    longest_s: dict[str, Wait] = field(default_factory=dict)
    num_faults: int = 0
    faults: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, what: str) -> None:
        """Notes what must not happen."""
        with self._lock:
            self.num_faults += 1
            self.faults = [*self.faults, what[:300]][:KEPT_FAULTS]

    def answered(self, kind: str, status: int | None) -> None:
        """Notes a hostile request, and the status of its answer where one was awaited."""
        with self._lock:
            self.sent[kind] += 1
            if status is not None:
                self.statuses[status] += 1

    def seen(self, who: str, outcome: str, waits: Sequence[Wait]) -> None:
        """Notes a bystander's reply."""
        by_clock, computed = (max(values) for values in zip(*waits, strict=True))
        with self._lock:
            self.replies[who, outcome] += 1
            before = self.longest_s.get(who, (0.0, 0.0))
            self.longest_s[who] = max(before[0], by_clock), max(before[1], computed)
        if computed > PATIENCE_S or by_clock > HANG_S:
            self.fault(f"{who}: waited {by_clock:.1f} s, in which the server computed for {computed:.1f} s")


class Stopwatch:
    """Waits for a server, by the clock and in seconds of its computing.

    Args:
        process_id: of the server.
    """

    def __init__(self, process_id: int) -> None:
        self._process_id = process_id
        self._last = self._now()
        self.waits: list[Wait] = []

    def lap(self) -> None:
        """Notes the wait since the last one."""
        now = self._now()
        self.waits.append((now[0] - self._last[0], now[1] - self._last[1]))
        self._last = now

    def _now(self) -> Wait:
        return time.monotonic(), computed_s(self._process_id)


def computed_s(process_id: int) -> float:
    """Seconds for which a process and its children have computed, those that have ended among them."""
    folder = Path(f"/proc/{process_id}")
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        children = [child for task in folder.glob("task/*/children") for child in task.read_text().split()]
    except OSError:  # it has just ended, and counts with its parent
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(computed_s(int(child)) for child in children)


@contextmanager
def attacked() -> Iterator[tuple[Served, Bystanders]]:
    """A server of the lab model with its patch in a process of its own, and who looks on."""
    with tempfile.TemporaryDirectory(prefix="edgepatch-") as name:
        file = Path(name) / "lab.gguf"
        convert_folder(LAB_FOLDER / "base", file, "F16")
        conversations = new_conversations()
        with load_runtime(file, LAB_PATCH, num_threads=1) as session:
            examiner = Examiner(session, [session.tokens(messages) for messages in conversations])
            flags = ["--patch", LAB_PATCH, "--sequences", SEQUENCES, "--threads", 1]
            with serving(file, flags, Path(name)) as served:
                yield served, Bystanders(served, examiner, conversations)


def attack(served: Served, bystanders: Bystanders, numbers: Sequence[int]) -> Tally:
    """Sends hostile requests; what came of them.

    Args:
        served: the server.
        bystanders: who asks meanwhile.
        numbers: of the requests: each is drawn from its own.
    """
    tally, over = Tally(), threading.Event()
    model, fingerprint, left, lock = served.model, served.fingerprint, iter(numbers), threading.Lock()

    def send_all() -> None:
        with client_of(served) as http:
            while True:
                with lock:
                    number = next(left, None)
                if number is None:
                    return
                one = draw(random.Random(number), model)
                tally.answered(one.kind, send(http, served, one, fingerprint, tally))

    def until_over(ask: Callable[[Tally], None]) -> Callable[[], None]:
        def asking() -> None:
            while not over.is_set():
                ask(tally)

        return asking

    watching = [_thread(until_over(ask), tally) for ask in bystanders.all]
    for thread in [_thread(send_all, tally) for _ in range(ATTACKERS)]:
        thread.join()
    over.set()
    for thread in watching:
        thread.join()
    return tally


def _thread(work: Callable[[], None], tally: Tally) -> threading.Thread:
    def guarded() -> None:
        try:
            work()
        except Exception as error:  # whatever ends a client, the figure must not be made without it
            tally.fault(f"a client ended: {type(error).__name__}: {error}")

    thread = threading.Thread(target=guarded)
    thread.start()
    return thread


def client_of(served: Served) -> httpx.Client:
    """A client with the key."""
    return httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {served.key}"}, timeout=ANSWER_S)


def send(http: httpx.Client, served: Served, one: Attack, fingerprint: str, tally: Tally) -> int | None:
    """Sends one hostile request; the status of its answer, where one is awaited."""
    if one.raw is not None:
        with suppress(OSError):
            one.raw(served)
        return None
    content = one.body if isinstance(one.body, bytes) else json.dumps(one.body).encode()
    headers = {"Content-Type": "application/json", **one.headers}
    try:
        with http.stream("POST", one.path, content=content, headers=headers) as reply:
            if one.leaves_early:
                next(reply.iter_bytes(), b"")
                return reply.status_code
            text = reply.read().decode("utf-8", "replace")
    except httpx.HTTPError as error:
        tally.fault(f"{one.kind}: no answer, {type(error).__name__}: {error}: {content[:100]!r}")
        return None
    if reply.status_code >= 500 and reply.status_code != QUEUE_FULL:
        tally.fault(f"{one.kind}: status {reply.status_code}: {content[:200]!r}")
    if reply.status_code == 200 and one.must_refuse:
        tally.fault(f"{one.kind}: taken: {one.path[:100]} {content[:200]!r}")
    if reply.status_code == 200 and "system_fingerprint" in text and fingerprint not in text:
        tally.fault(f"{one.kind}: a reply of another fingerprint: {text[:200]}")
    return reply.status_code


class Bystanders:
    """Clients who ask for what everyone asks for.

    Args:
        served: the server.
        examiner: knows the patched model's answers to ``conversations``.
        conversations: what is asked of the log-probabilities.
    """

    def __init__(self, served: Served, examiner: Examiner, conversations: Sequence[list[Message]]) -> None:
        self._examiner, self._conversations = examiner, conversations
        self._server, self._served = LlamaServer(served.url, served.key), served
        self._model, self._fingerprint = served.model, served.fingerprint
        self._number = 0

    @property
    def all(self) -> tuple[Callable[[Tally], None], ...]:
        """What each of them does, again and again."""
        return self.stream, self.json, self.canary

    def stream(self, tally: Tally) -> None:
        """One streamed reply."""
        self._follow("stream", f"Write about number {random.randrange(10**6)}.", {}, tally)

    def json(self, tally: Tally) -> None:
        """One reply after a schema that the server has not compiled."""
        self._number += 1
        name = f"answer_{self._number}"
        schema = {"type": "object", "properties": {name: {"type": "boolean"}}, "required": [name]}
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        self._follow("JSON", "Yes or no?", {"response_format": form}, tally)
        time.sleep(PAUSE_S)

    def canary(self, tally: Tally) -> None:
        """Answers that tell the patched model from the bare one."""
        watch, replies = Stopwatch(self._served.process_id), []
        for messages in self._conversations:
            replies.append(self._server.post(CHAT, question(self._model, messages)))
            watch.lap()
        if any(reply.status == QUEUE_FULL for reply in replies):
            tally.seen("canary", "busy", watch.waits)
        else:
            distance = self._examiner.distance(replies)
            is_patched = distance is not None and distance.is_patched
            tally.seen("canary", "whole" if is_patched else "wrong", watch.waits)
            if not is_patched:
                tally.fault(f"canary: not the patched model's answers: {distance}")
        time.sleep(PAUSE_S)

    def _follow(self, who: str, text: str, fields: dict[str, Any], tally: Tally) -> None:
        """One streamed reply: how long each event was waited for, whose it is, and whether its end came."""
        body = {"model": self._model, "messages": [{"role": "user", "content": text}], "max_tokens": 24, "stream": True}
        watch, events = Stopwatch(self._served.process_id), []
        with client_of(self._served) as http, http.stream("POST", CHAT, json={**body, **fields}) as reply:
            for line in reply.iter_lines():
                if line.startswith("data: "):
                    watch.lap()
                    events.append(line.removeprefix("data: "))
        watch.lap()
        if reply.status_code == QUEUE_FULL:
            tally.seen(who, "busy", watch.waits)
            time.sleep(PAUSE_S)
            return
        is_whole = reply.status_code == 200 and events[-1:] == ["[DONE]"]
        is_ours = is_whole and all(json.loads(e)["system_fingerprint"] == self._fingerprint for e in events[:-1])
        tally.seen(who, "whole" if is_ours else "wrong", watch.waits)
        if not is_ours:
            tally.fault(f"{who}: status {reply.status_code}, ends with {events[-1:]}")


def in_words(tally: Tally) -> str:
    """What the figure says."""
    replies = ", ".join(
        f"{sum(n for (name, _), n in tally.replies.items() if name == who)} {who} ({tally.replies[who, 'busy']} busy, "
        f"longest wait {computed:.1f} s of computing, {by_clock:.1f} s by the clock)"
        for who, (by_clock, computed) in sorted(tally.longest_s.items())
    )
    return f"{tally.num_faults} of {sum(tally.sent.values()):,} of {len(tally.sent)} kinds; bystanders: {replies}"

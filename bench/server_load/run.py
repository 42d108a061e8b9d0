"""The server's figures: a load with its goals, and the throughput beside llama-server's."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.bench.environment import environment
from edgepatch.bench.llama_server.server import instructions_of, running_server
from edgepatch.bench.served import Served, serving
from edgepatch.bench.server_load.clients import Seen, load
from edgepatch.bench.server_load.throughput import Endpoint, throughput
from edgepatch.files.writing import write_atomically
from edgepatch.llama_server.answers import Examiner, new_conversations
from edgepatch.llama_server.client import LlamaServer
from edgepatch.llama_server.served import question
from edgepatch.progress import Progress, silent, stage
from edgepatch.runtimes import load_runtime

OURS, PLAIN, PEER = "edgepatch", "edgepatch --no-flash-attn", "llama-server"
QUIET_S = 20.0
CANARY_PAUSE_S, MEMORY_PAUSE_S = 5.0, 0.5
MEMORY_SHARE, FIRST_TOKEN_FACTOR, LEAST_SHARE = 0.02, 2.0, 0.95
"""Goals: memory stays within this share, the first token comes within so many times the quiet time, and this share of llama-server's rate."""


@dataclass(frozen=True)
class LoadConfig:
    """What to run.

    Attributes:
        num_clients: at once; the server has as many sequences.
        seconds: of load.
        num_tokens: the most that a reply under load may have.
        num_streamed: tokens of each stream of the throughput.
        context_length: positions of the server.
        num_threads: of the server.
        llama_server: its binary, to compare with; ``None`` for none.
    """

    num_clients: int = 8
    seconds: float = 600.0
    num_tokens: int = 24
    num_streamed: int = 64
    context_length: int = 1024
    num_threads: int = 1
    llama_server: Path | None = None


@dataclass
class Watched:
    """What was seen of the server while it worked.

    Attributes:
        memory: bytes that it held, in the course of time.
        num_asked: canaries.
        unpatched: distances, in words, of canaries that were not the patched model's.
    """

    memory: list[int] = field(default_factory=list)
    num_asked: int = 0
    unpatched: list[str] = field(default_factory=list)


def run(
    model: Path,
    patches: Sequence[Path],
    out: Path,
    work: Path,
    command: str,
    config: LoadConfig,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measures, and writes the document.

    Args:
        model: a GGUF file.
        patches: what is served.
        out: the JSON file.
        work: for logs.
        command: what was typed, for the document.
        config: what to run.
        progress: told of the stages.

    Raises:
        EdgepatchError: a server does not come up, or lets a stream of the throughput fail, or the model cannot be loaded.
        InputError: llama-server was compiled without fast instructions that this CPU has.
    """
    work.mkdir(parents=True, exist_ok=True)
    instructions = instructions_of(config.llama_server) if config.llama_server else ""
    flags: list[object] = [part for patch in patches for part in ("--patch", patch)] or ["--bare"]
    flags += [
        "--sequences",
        config.num_clients,
        "--context-length",
        config.context_length,
        "--threads",
        config.num_threads,
    ]
    options: dict[str, Any] = {"context_length": config.context_length, "num_threads": config.num_threads}
    with load_runtime(model, list(patches) or None, **options) as session:
        ends, conversations = sorted(session.end_token_ids), new_conversations()
        with stage(progress, "references"):
            examiner = Examiner(session, [session.tokens(messages) for messages in conversations]) if patches else None
        with serving(model, flags, work) as served:
            # First, because it ends the measurement where a server fails: ten minutes of load would be lost.
            with (
                _peer(model, work, config) as peers,
                serving(model, [*flags, "--no-flash-attn"], work / "plain") as plain,
                stage(progress, "throughput"),
            ):
                ours = {name: Endpoint(one.url, one.key, one.model) for name, one in ((OURS, served), (PLAIN, plain))}
                rows = throughput(ours | peers, config.num_streamed, ends)
            figures = _under_load(served, examiner, conversations, config, progress)
    for row in rows if peers else ():
        rates = {name: spread["median"] for name, spread in row["tokens_per_s"].items()}
        row["shares"] = {name: rates[name] / rates[PEER] for name in ours}
        goal = f"{row['streams']} streams at {LEAST_SHARE:g} of {PEER}"
        figures["goals"][goal] = row["shares"][OURS] >= LEAST_SHARE
    document = {
        "command": command,
        "model": model.name,
        "patches": [patch.name for patch in patches],
        **figures,
        "throughput": rows,
        "llama_server": instructions,
        "environment": environment(),
    }
    write_atomically(out, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return document


def _under_load(
    served: Served, examiner: Examiner | None, conversations: Sequence[Any], config: LoadConfig, progress: Progress
) -> dict[str, Any]:
    fingerprint = served.fingerprint
    with stage(progress, "quiet"):
        quiet = load(served, 1, min(QUIET_S, config.seconds), config.context_length, config.num_tokens)
    watched = Watched()
    with stage(progress, "load"), _watching(served, examiner, conversations, watched):
        seen = load(served, config.num_clients, config.seconds, config.context_length, config.num_tokens)
    return {
        "system_fingerprint": fingerprint,
        "clients": config.num_clients,
        "seconds": config.seconds,
        "requests": _table(seen),
        "faults": seen.faults,
        "fingerprints": dict(seen.fingerprints),
        "canaries": {"asked": watched.num_asked, "unpatched": watched.unpatched},
        "memory_mb": _memory(watched.memory),
        "first_token_s": {"quiet": _quantiles(quiet), "loaded": _quantiles(seen)},
        "goals": _goals(quiet, seen, watched, fingerprint),
    }


@contextmanager
def _watching(
    served: Served, examiner: Examiner | None, conversations: Sequence[Any], watched: Watched
) -> Iterator[None]:
    over = threading.Event()
    client, name = LlamaServer(served.url, served.key), served.model

    def examine() -> None:
        while examiner is not None and not over.wait(CANARY_PAUSE_S):
            replies = [client.post("/v1/chat/completions", question(name, messages)) for messages in conversations]
            if all(reply.status == 503 for reply in replies):
                continue
            distance = examiner.distance(replies)
            watched.num_asked += 1
            if distance is None or not distance.is_patched:
                watched.unpatched.append(str(distance))

    def weigh() -> None:
        while not over.wait(MEMORY_PAUSE_S):
            watched.memory.append(resident_bytes(served.process_id))

    threads = [threading.Thread(target=work) for work in (examine, weigh)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def resident_bytes(process_id: int) -> int:
    """What a process holds of memory that is its own; files that it has mapped are left out."""
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")))


def _table(seen: Seen) -> dict[str, dict[str, int]]:
    kinds = sorted({kind for kind, _ in seen.outcomes})
    return {kind: {outcome: n for (k, outcome), n in sorted(seen.outcomes.items()) if k == kind} for kind in kinds}


def _quantiles(seen: Seen) -> dict[str, float]:
    values = np.array(seen.first_token_s or [np.nan])
    return {
        "count": len(seen.first_token_s),
        "p50": float(np.quantile(values, 0.5)),
        "p99": float(np.quantile(values, 0.99)),
    }


def _memory(memory: Sequence[int]) -> dict[str, float]:
    """Medians behind the first fifth, in which caches fill, and at the end."""
    fifth = max(len(memory) // 5, 1)
    begin, end = (float(np.median(part)) / 2**20 for part in (memory[fifth : 2 * fifth] or memory, memory[-fifth:]))
    return {"begin": begin, "end": end, "growth": end / begin - 1}


def _goals(quiet: Seen, seen: Seen, watched: Watched, fingerprint: str) -> Mapping[str, bool]:
    lost = sum(n for (_, outcome), n in seen.outcomes.items() if outcome in ("lost", "wrong"))
    limit_s = FIRST_TOKEN_FACTOR * _quantiles(quiet)["p99"]
    return {
        "no reply lost": lost == 0 and bool(seen.outcomes),
        "none unpatched": set(seen.fingerprints) == {fingerprint} and watched.num_asked > 0 and not watched.unpatched,
        f"memory within {MEMORY_SHARE:.0%}": abs(_memory(watched.memory)["growth"]) <= MEMORY_SHARE,
        f"first token within {FIRST_TOKEN_FACTOR:g}x of quiet": _quantiles(seen)["p99"] <= limit_s,
    }


@contextmanager
def _peer(model: Path, work: Path, config: LoadConfig) -> Iterator[dict[str, Endpoint]]:
    """llama-server on the bare model with fused attention, as it does by itself, where there is its binary."""
    if config.llama_server is None:
        yield {}
        return
    flags = ["--model", str(model), "--parallel", str(config.num_clients), "--kv-unified"]
    flags += ["--ctx-size", str(config.context_length * config.num_clients), "--alias", "served"]
    with running_server(config.llama_server, flags, work / "llama-server.log") as server:
        yield {PEER: Endpoint(server.url, "", "served")}

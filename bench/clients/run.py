"""Runs the clients' programs against a server and writes the table of their verdicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from edgepatch.bench.clients.environment import PROGRAMS, ClientEnvironment, prepare
from edgepatch.bench.served import Served, serving
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.processes.programs import run_program
from edgepatch.progress import Progress, silent

CLIENTS = {
    "openai": "openai_client.py",
    "langchain-openai": "langchain_client.py",
    "llama-index-llms-openai-like": "llama_index_client.py",
    "litellm": "litellm_client.py",
    "instructor": "instructor_client.py",
    "pydantic-ai-slim": "pydantic_ai_client.py",
    "llm": "llm_client.py",
    "node:openai": "openai_client.mjs",
    "node:@ai-sdk/openai-compatible": "ai_sdk_client.mjs",
    "node:@ai-sdk/openai": "ai_sdk_openai_client.mjs",
}
"""Package -> program."""

ROW = '{"client"'
"""What the line of a case begins with; libraries print lines of their own."""

DEADLINE_S = 1800
MAX_NOTE = 300


@dataclass(frozen=True)
class Row:
    """One case of one client.

    Attributes:
        client: its package.
        version: of the package.
        case: what was tried.
        verdict: whether it worked.
        note: why not.
    """

    client: str
    version: str
    case: str
    verdict: Literal["pass", "fail"]
    note: str = ""


def run(
    model: Path,
    patches: Sequence[Path],
    out: Path,
    work: Path,
    command: str,
    only: Sequence[str] = (),
    progress: Progress = silent,
) -> list[Row]:
    """The rows of all clients, or of some, whose rows then take the place of the old ones.

    Args:
        model: a GGUF file.
        patches: none serve it bare.
        out: the JSON file.
        work: for the clients' environment and the server's log.
        command: what was typed, for the document.
        only: names of clients; all where none is given.
        progress: told after each client.

    Raises:
        InputError: there is no client of that name.
        EdgepatchError: the clients cannot be installed, or the server does not come up.
    """
    unknown = [name for name in only if name not in CLIENTS]
    if unknown:
        raise InputError(f"clients: expected some of {', '.join(CLIENTS)}, found {unknown[0]!r}")
    chosen = only or tuple(CLIENTS)
    environment = prepare(work, [CLIENTS[name] for name in chosen])
    choice = [part for patch in patches for part in ("--patch", patch)] or ["--bare"]
    flags = [*choice, "--chat-template", PROGRAMS / "tools.jinja"]
    with serving(model, [*flags, "--threads", 1], work) as served:
        rows: list[Row] = []
        for number, name in enumerate(chosen, 1):
            rows += _rows_of(name, environment, served)
            progress("clients", number, len(chosen))
        about = {"command": command, "model": model.name, "system_fingerprint": served.fingerprint}
    return _write(out, about, rows)


def _rows_of(name: str, environment: ClientEnvironment, served: Served) -> list[Row]:
    program = CLIENTS[name]
    variables = {
        "OPENAI_BASE_URL": f"{served.url}/v1",
        "OPENAI_API_KEY": served.key,
        "EDGEPATCH_MODEL": served.model,
        "PYTHONPATH": "",
    }
    ended = run_program(
        environment.command(program),
        deadline_s=DEADLINE_S,
        environment=variables,
        folder=environment.working_folder(program),
    )
    rows = [Row(**json.loads(line)) for line in ended.output.splitlines() if line.startswith(ROW)]
    return [*rows, Row(name, "", "program", "fail", ended.failure[-MAX_NOTE:])] if ended.failure else rows


def _write(out: Path, about: dict[str, Any], rows: list[Row]) -> list[Row]:
    """Puts the rows in the place of the old ones of the same clients."""
    old = [Row(**row) for row in json.loads(out.read_text(encoding="utf-8"))["rows"]] if out.is_file() else []
    names = {row.client for row in rows}
    every = sorted(
        [*(row for row in old if row.client not in names), *rows], key=lambda row: list(CLIENTS).index(row.client)
    )
    document = {
        **about,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "counts": {verdict: sum(row.verdict == verdict for row in every) for verdict in ("pass", "fail")},
        "rows": [asdict(row) for row in every],
    }
    write_atomically(out, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    return every

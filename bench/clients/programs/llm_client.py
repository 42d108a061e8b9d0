"""``llm``: the command with an entry of extra-openai-models.yaml, as its documents say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import KEY, MODEL, QUESTION, TOWNS, URL, WEATHER_SCHEMA, Cases, require

ENTRY = f"""\
- model_id: served
  model_name: {MODEL}
  api_base: {URL}
  api_key_name: served
  supports_schema: true
  supports_tools: true
  can_stream: true
"""


def llm(*arguments: str) -> str:
    environment = {**os.environ, "LLM_USER_PATH": folder}
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    require(done.returncode == 0, done.stderr.strip()[-300:])
    return done.stdout


def prompt() -> None:
    require(llm("-m", "served", "-o", "max_tokens", "16", QUESTION).strip(), "no text")


def at_once() -> None:
    require(llm("-m", "served", "--no-stream", "-o", "max_tokens", "16", QUESTION).strip(), "no text")


def next_turn() -> None:
    require(llm("-m", "served", "-c", "-o", "max_tokens", "16", "And of France?").strip(), "no text")


def schema() -> None:
    printed = llm("-m", "served", "--schema", json.dumps(WEATHER_SCHEMA), "-o", "max_tokens", "60", QUESTION)
    require(json.loads(printed)["town"] in TOWNS, printed)


def tools() -> None:
    require(llm("-m", "served", "-T", "llm_version", "-o", "max_tokens", "16", QUESTION).strip(), "no text")


with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "extra-openai-models.yaml").write_text(ENTRY, encoding="utf-8")
    llm("keys", "set", "served", "--value", KEY)
    cases = Cases("llm")
    for check in (prompt, at_once, next_turn, schema, tools):
        cases.run(check.__name__, check)

"""The programs that read an export, as they are: each gets a request, continues some prompts greedily, and says what it answered.

A client runs in a process of its own, in the folder or with the interpreter where it is installed. Nothing of it is loaded here.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.exports.clients.browser import CHROMIUM_VARIABLE, ask_browser
from edgepatch.processes.programs import run_program

PROGRAMS = Path(__file__).parent
DEADLINE_S = 1800.0
NODE_VARIABLE = "EDGEPATCH_NODE"


@dataclass(frozen=True)
class Client:
    """A program that reads exports.

    Attributes:
        package: what must be installed; a folder's name in node_modules, or a module of Python.
        command: (home, package) -> the words that start the program.
        install: the command that installs it.
        program: file of ours that drives it.
    """

    package: str
    command: Callable[[Path | None, str], list[str]]
    install: str
    program: str


def _node(home: Path | None, package: str) -> list[str]:
    node = os.environ.get(NODE_VARIABLE) or shutil.which("node")
    if node is None:
        raise InputError(f"{package} needs Node 20 or newer, found none", hint=f"install it, or set {NODE_VARIABLE}")
    folder = home or Path.cwd()
    if not (folder / "node_modules" / package / "package.json").is_file():
        raise InputError(
            f"{package}: expected it in {folder / 'node_modules'}, found nothing",
            hint=f"run `npm install {package}` there, or name another folder with --client",
        )
    return [node, "--experimental-import-meta-resolve", "--no-warnings"]


def _python(home: Path | None, package: str) -> list[str]:
    return [str(home or sys.executable)]


CLIENTS = {
    "llama_state_load_file": Client("llama_cpp", _python, "pip install llama-cpp-python", "session_client.py"),
    "node-llama-cpp": Client("node-llama-cpp", _node, "npm install node-llama-cpp", "node_llama_cpp.mjs"),
    "LlamaChatSession": Client("node-llama-cpp", _node, "npm install node-llama-cpp", "node_llama_cpp.mjs"),
    "transformers.js": Client(
        "@huggingface/transformers", _node, "npm install @huggingface/transformers", "transformers_js.mjs"
    ),
    "onnxruntime-web": Client("onnxruntime-web", _node, "npm install onnxruntime-web", "onnxruntime_web.mjs"),
    "onnxruntime-web in Chromium": Client("onnxruntime-web", _node, "npm install onnxruntime-web", "browser.html"),
    "mlx-lm": Client("mlx_lm", _python, "pip install mlx-lm", "mlx_client.py"),
    "mlx_lm generate": Client("mlx_lm", _python, "pip install mlx-lm", "mlx_client.py"),
}


def is_here(name: str) -> bool:
    """Whether a client can be asked at all: a browser only where the environment names one."""
    return name != "onnxruntime-web in Chromium" or bool(os.environ.get(CHROMIUM_VARIABLE))


def run_client(name: str, request: Mapping[str, Any], home: Path | None = None) -> dict[str, Any]:
    """Asks a client.

    Args:
        name: in ``CLIENTS``.
        request: JSON values; its program says which.
        home: folder with its ``node_modules``, or interpreter that has it; by default this folder, and this interpreter.

    Returns:
        Its version and what it answered.

    Raises:
        InputError: it is not installed.
        EdgepatchError: it failed; its own last words are in the message.
    """
    client = CLIENTS[name]
    words = client.command(home, client.package)
    whole = {**request, "client": str((home or Path.cwd()).absolute()), "name": name}
    if client.program.endswith(".html"):
        return ask_browser(whole, DEADLINE_S)
    with tempfile.TemporaryDirectory() as scratch:
        path, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        path.write_text(json.dumps(whole | {"answer": str(answer)}), encoding="utf-8")
        done = run_program([*words, PROGRAMS / client.program, path], deadline_s=DEADLINE_S)
        if done.failure or not answer.is_file():
            hint = f"is it installed? {client.install}" if "No module named" in done.failure else "see its own words"
            raise EdgepatchError(f"{name} {done.failure or 'gave no answer'}", hint)
        return dict(json.loads(answer.read_text("utf-8")))

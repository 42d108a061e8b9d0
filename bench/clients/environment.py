"""Where the clients live: a virtual environment for each that is written for Python, and a folder of Node's modules; each is made once."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.processes.programs import run_program

PROGRAMS = Path(__file__).parent / "programs"
REQUIREMENTS: Mapping[str, Sequence[str]] = {
    "openai_client.py": ["openai"],
    "langchain_client.py": ["langchain-openai"],
    "llama_index_client.py": ["llama-index-llms-openai-like"],
    "litellm_client.py": ["litellm", "mcp"],
    "instructor_client.py": ["instructor"],
    "pydantic_ai_client.py": ["pydantic-ai-slim[openai]"],
    "llm_client.py": ["llm"],
}
"""Program -> what it needs. Together they would hold each other back: each takes another release of OpenAI's library."""


@dataclass(frozen=True)
class ClientEnvironment:
    """What runs the programs of clients.

    Attributes:
        folder: holds a virtual environment for each Python program, and ``node`` with Node's programs and modules.
    """

    folder: Path

    @property
    def node(self) -> Path:
        """Where Node looks for modules."""
        return self.folder / "node"

    def python(self, program: str) -> Path:
        """The interpreter of a Python program."""
        return self.folder / "python" / Path(program).stem / "bin" / "python"

    def command(self, program: str) -> list[str]:
        """What runs a program."""
        return ["node", program] if program.endswith(".mjs") else [str(self.python(program)), program]

    def working_folder(self, program: str) -> Path:
        """Where a program runs: Node looks for modules beside it."""
        return self.node if program.endswith(".mjs") else PROGRAMS


def prepare(folder: Path, programs: Iterable[str]) -> ClientEnvironment:
    """Installs clients, each in its latest release; what is already there for the same requirements is used.

    Args:
        folder: gets them.
        programs: of the clients.

    Raises:
        EdgepatchError: something could not be installed.
    """
    made, chosen = ClientEnvironment(folder), list(programs)
    for program in (name for name in chosen if name in REQUIREMENTS):
        python, wanted = made.python(program), REQUIREMENTS[program]
        _once(python.parents[1], "\n".join(wanted), partial(_install_python, python, wanted))
    if any(program.endswith(".mjs") for program in chosen):
        package = PROGRAMS / "package.json"
        _once(made.node, package.read_text(encoding="utf-8"), partial(_install_node, made.node, package))
        for file in PROGRAMS.glob("*.mjs"):
            shutil.copy(file, made.node)
    return made


def _once(folder: Path, wanted: str, install: Callable[[], None]) -> None:
    stamp, digest = folder / "installed", hashlib.sha256(wanted.encode()).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != digest:
        folder.mkdir(parents=True, exist_ok=True)
        install()
        stamp.write_text(digest, encoding="utf-8")


def _install_python(python: Path, requirements: Sequence[str]) -> None:
    _run([sys.executable, "-m", "venv", python.parents[1]])
    _run([python, "-m", "pip", "install", "--quiet", "--upgrade", *requirements])


def _install_node(folder: Path, package: Path) -> None:
    if shutil.which("npm") is None:
        raise InputError("npm is missing", hint="install Node, for the clients that are written for it")
    shutil.copy(package, folder)
    _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", folder])


def _run(command: Sequence[object]) -> None:
    ended = run_program(command)
    if ended.failure:
        raise EdgepatchError(f"{' '.join(map(str, command[:4]))} {ended.failure}")

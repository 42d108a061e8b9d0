"""Where the clients live: a virtual environment and a folder of Node's modules, made once for the lists of packages beside this file."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.processes.programs import run_program

PROGRAMS = Path(__file__).parent / "programs"


@dataclass(frozen=True)
class ClientEnvironment:
    """What runs the programs of clients.

    Attributes:
        python: of the virtual environment.
        node: where Node's programs and modules are.
    """

    python: Path
    node: Path

    def command(self, program: str) -> list[str]:
        """What runs a program."""
        return ["node", program] if program.endswith(".mjs") else [str(self.python), program]

    def folder(self, program: str) -> Path:
        """Where a program runs: Node looks for modules beside it."""
        return self.node if program.endswith(".mjs") else PROGRAMS


def prepare(folder: Path) -> ClientEnvironment:
    """Installs the clients, each in its latest release; what is already there for the same lists is used.

    Args:
        folder: gets both.

    Raises:
        EdgepatchError: something could not be installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made = ClientEnvironment(folder / "venv" / "bin" / "python", folder / "node")
    made.node.mkdir(exist_ok=True)
    for program in PROGRAMS.glob("*.mjs"):
        shutil.copy(program, made.node)
    lists = [PROGRAMS / "requirements.txt", PROGRAMS / "package.json"]
    stamp, digest = folder / "installed", hashlib.sha256(b"".join(file.read_bytes() for file in lists)).hexdigest()
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != digest:
        _install(made, *lists)
        stamp.write_text(digest, encoding="utf-8")
    return made


def _install(made: ClientEnvironment, requirements: Path, package: Path) -> None:
    if shutil.which("npm") is None:
        raise InputError("npm is missing", hint="install Node, for the clients that are written for it")
    _run([sys.executable, "-m", "venv", made.python.parents[1]])
    _run([made.python, "-m", "pip", "install", "--quiet", "--upgrade", "--requirement", requirements])
    shutil.copy(package, made.node)
    _run(["npm", "install", "--no-audit", "--no-fund", "--prefix", made.node])


def _run(command: Sequence[object]) -> None:
    ended = run_program(command)
    if ended.failure:
        raise EdgepatchError(f"{' '.join(map(str, command[:4]))} {ended.failure}")

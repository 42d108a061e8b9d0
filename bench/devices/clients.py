"""Clients from their registries, installed once into a folder of the measurement's own."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from edgepatch.errors import EdgepatchError, InputError
from edgepatch.processes.programs import run_program

NPM_PACKAGES = ("node-llama-cpp", "@huggingface/transformers", "onnxruntime-web")
PIP_PACKAGES = ("mlx[cpu]" if sys.platform == "linux" else "mlx", "mlx-lm")
INSTALL_S = 1800.0


def node_folder(work: Path) -> Path:
    """The folder whose ``node_modules`` hold the clients.

    Raises:
        InputError: npm is missing.
        EdgepatchError: it failed.
    """
    folder = work / "node"
    missing = [name for name in NPM_PACKAGES if not (folder / "node_modules" / name).is_dir()]
    if missing:
        if shutil.which("npm") is None:
            raise InputError("npm is missing", hint="install Node 20 or newer")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "package.json").exists():
            (folder / "package.json").write_text('{"private": true}\n', encoding="utf-8")
        # What their scripts would fetch or compile, libraries for GPUs, nothing here uses.
        _run(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", *missing], folder)
    return folder


def python_of(work: Path) -> Path:
    """The interpreter of an environment with mlx-lm.

    Raises:
        EdgepatchError: it could not be made.
    """
    home = work.absolute() / "mlx"  # the commands run in ``work``, where a relative path would name another place
    python = home / "bin" / "python"
    if not python.exists():
        work.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", home], work)
        _run([python, "-m", "pip", "install", "--quiet", *PIP_PACKAGES], work)
    return python


def _run(command: list[object], folder: Path) -> None:
    done = run_program(command, folder=folder, deadline_s=INSTALL_S)
    if done.failure:
        raise EdgepatchError(f"{command[0]} {done.failure}")

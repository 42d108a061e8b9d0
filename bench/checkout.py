"""What a measurement needs of the source checkout: its tests and its attacks, which the wheel does not hold."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from edgepatch.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def run_tests(folder_or_file: str, **variables: str) -> int:
    """Runs tests of the checkout in a process of their own; their output is ours.

    Args:
        folder_or_file: below ``tests``.
        **variables: set in the environment of the tests.

    Returns:
        The exit code of pytest.

    Raises:
        InputError: there are no such tests, as in an installed package.
    """
    return _run_in_tests(["pytest", "-s", str(_existing(folder_or_file))], variables)


def run_attack(module: str, *arguments: str) -> int:
    """Runs one of the programs in ``tests/attacks``; its output is ours.

    Returns:
        Its exit code.

    Raises:
        InputError: there is no such program, as in an installed package.
    """
    _existing(f"attacks/{module}.py")
    return _run_in_tests([f"attacks.{module}", *arguments], {})


def install(package: str) -> bool:
    """Whether a package can be imported here, after pip has tried to install one that is missing."""
    if find_spec(package):
        return True
    return subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package]).returncode == 0


def _existing(name: str) -> Path:
    path = TESTS / name
    if not path.exists():
        raise InputError(f"tests/{name} is missing in {ROOT}", hint="run this verb from a source checkout")
    return path


def _run_in_tests(command: list[str], variables: dict[str, str]) -> int:
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment).returncode

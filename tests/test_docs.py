"""README.md and docs/ keep their word: every marked block is executed.

A block is executed when the comment ``<!-- test -->`` stands on the line before it. In ``console`` blocks the lines that start
with ``$`` are commands, and the lines below one must appear in its output, in order; ``...`` stands for anything. ``bash``
blocks must end with 0, ``python`` blocks without an exception. The blocks of one file run in order, in one folder, which
holds what the checkout holds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MARKER = "<!-- test -->"
FENCE = re.compile(rf"{MARKER}\n+```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 600
MIN_BLOCKS = 30
"""So many blocks are executed at least; a broken marker must not make this file pass on nothing."""


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """The marked blocks of a document."""
    found = [Block(language, body) for language, body in FENCE.findall(text)]
    assert len(found) == text.count(MARKER), "a marker without a block below it"
    return found


def documents() -> list[Path]:
    """README.md and docs/*.md with at least one marked block."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [file for file in files if file.is_file() and MARKER in file.read_text("utf-8")]


def commands(console: str) -> list[tuple[str, list[str]]]:
    """(command, lines of output shown) of a console block; a command goes on below a line that ends with a backslash."""
    found: list[tuple[str, list[str]]] = []
    continued = False
    for line in console.splitlines():
        if continued:
            command, shown = found[-1]
            found[-1] = (f"{command}\n{line.removeprefix('> ')}", shown)
        elif line.startswith("$ "):
            found.append((line[2:], []))
        elif line.strip():
            assert found, f"output before the first command: {line}"
            found[-1][1].append(line)
        continued = line.endswith("\\") and bool(found) and not found[-1][1]
    return found


def require_shown(shown: list[str], output: str) -> None:
    """Every line shown appears in the output, in order, whatever its white space."""
    rest = [" ".join(line.split()) for line in output.splitlines()]
    for line in shown:
        parts = [re.escape(" ".join(part.split())) for part in line.split("...")]
        pattern = re.compile(r".*?".join(parts))
        found = next((i for i, candidate in enumerate(rest) if pattern.search(candidate)), None)
        assert found is not None, f"not in the output: {line}\n{output}"
        rest = rest[found + 1 :] if line.strip() != "..." else rest


def run(command: list[str], folder: Path) -> str:
    """Output of a command that must succeed; ``edgepatch`` and ``python`` are those of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "EDGEPATCH_STORE": str(folder / "own-store"),
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"exit code {done.returncode}: {command[-1]}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def execute(block: Block, folder: Path) -> None:
    """Runs one block."""
    if block.language == "console":
        steps = commands(block.text)
        assert steps, "a console block without a command"
        for command, shown in steps:
            require_shown(shown, run(["bash", "-euo", "pipefail", "-c", command], folder))
    elif block.language in ("bash", "sh"):
        run(["bash", "-euo", "pipefail", "-c", block.text], folder)
    else:
        assert block.language == "python", f"cannot execute {block.language} blocks"
        run([sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", block.text], folder)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder in which the commands of a document find the checkout's files, and may write."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "out"):
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_marked_blocks_run(document: Path, workspace: Path):
    for block in blocks(document.read_text("utf-8")):
        execute(block, workspace)


def test_enough_blocks_are_marked():
    assert sum(len(blocks(document.read_text("utf-8"))) for document in documents()) >= MIN_BLOCKS


def test_links_between_documents_hold():
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}, which does not exist"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("console", "$ false\n"),
        ("console", "$ echo one\ntwo\n"),
        ("console", "$ printf 'b\\na\\n'\na\nb\n"),
        ("console", "no command\n"),
        ("bash", "false\ntrue\n"),
        ("python", "raise ValueError\n"),
        ("ruby", "puts 1\n"),
    ],
)
def test_a_block_that_does_not_hold_fails(language: str, text: str, tmp_path: Path):
    with pytest.raises(AssertionError):
        execute(Block(language, text), tmp_path)


def test_blocks_that_hold_pass(tmp_path: Path):
    document = (
        f"{MARKER}\n```console\n$ echo 'took   3.2 s'; \\\n  echo done\ntook ... s\ndone\n```\n"
        f"```bash\nnot marked, not run\n```\n{MARKER}\n\n```python\nimport edgepatch\n```\n"
    )
    found = blocks(document)
    assert [block.language for block in found] == ["console", "python"]
    for block in found:
        execute(block, tmp_path)
    with pytest.raises(AssertionError, match="marker"):
        blocks(f"{MARKER}\nno block")

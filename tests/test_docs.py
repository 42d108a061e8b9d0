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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kit.forks import Fork, on_the_path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
MARKER = "<!-- test -->"
FENCE = re.compile(rf"{MARKER}\n+```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 600
PROGRAMS = "own-programs"
STRICT = "import warnings\nwarnings.filterwarnings('error', category=DeprecationWarning, module='__main__')\n"
# A broken marker must not make this file pass on nothing.
MIN_BLOCKS = 24
MAX_DOCUMENTS, MAX_README_WORDS = 10, 600
WORDS_A_MINUTE = 200
MAX_WORDS_A_SENTENCE = 25
MENTION = re.compile(r"(?<![\w./])docs/[\w./-]*\w")


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def blocks(text: str) -> list[Block]:
    """The marked blocks of a document."""
    marked = [Block(language, body) for language, body in FENCE.findall(text)]
    assert len(marked) == text.count(MARKER), "a marker without a block below it"
    return marked


def documents() -> list[Path]:
    """README.md and the documents with at least one marked block."""
    files = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    return [file for file in files if file.is_file() and MARKER in file.read_text("utf-8")]


def commands(console: str) -> list[tuple[str, list[str]]]:
    """(command, lines of output shown) of a console block; a command goes on below a line that ends with a backslash."""
    steps: list[tuple[str, list[str]]] = []
    continued = False
    for line in console.splitlines():
        if continued:
            command, output = steps[-1]
            steps[-1] = (f"{command}\n{line.removeprefix('> ')}", output)
        elif line.startswith("$ "):
            steps.append((line[2:], []))
        elif line.strip():
            assert steps, f"output before the first command: {line}"
            steps[-1][1].append(line)
        continued = line.endswith("\\") and bool(steps) and not steps[-1][1]
    return steps


def require_lines(lines: list[str], output: str) -> None:
    """Every line appears in the output, in order, whatever its white space."""
    rest = [" ".join(line.split()) for line in output.splitlines()]
    for line in lines:
        parts = [re.escape(" ".join(part.split())) for part in line.split("...")]
        pattern = re.compile(r".*?".join(parts))
        at = next((i for i, candidate in enumerate(rest) if pattern.search(candidate)), None)
        assert at is not None, f"not in the output: {line}\n{output}"
        rest = rest[at + 1 :] if line.strip() != "..." else rest


def environment(folder: Path) -> dict[str, str]:
    """Of a reader who has named no store; ``edgepatch`` and ``python`` are those of this environment."""
    paths = [str(folder / PROGRAMS), str(Path(sys.executable).parent), os.environ["PATH"]]
    variables = {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "NO_COLOR": "1",
        "COLUMNS": "120",
        "XDG_DATA_HOME": str(folder / "own-data"),
    }
    del variables["EDGEPATCH_STORE"]
    return variables


def run(script: str, folder: Path) -> str:
    """Output of commands that must succeed."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    options = {"cwd": folder, "env": environment(folder), "text": True, "timeout": TIMEOUT_S}
    done = subprocess.run(command, capture_output=True, **options)
    assert done.returncode == 0, f"exit code {done.returncode}: {script}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def run_python(text: str, folder: Path) -> None:
    """A program that must end without an exception and use nothing deprecated."""
    with Fork(before=STRICT, program=text, env=environment(folder), folder=folder) as process:
        output, errors = process.communicate(TIMEOUT_S)
    assert process.returncode == 0, f"{text}\n{output}{errors}"


def execute(block: Block, folder: Path) -> None:
    """Runs one block."""
    if block.language == "console":
        steps = commands(block.text)
        assert steps, "a console block without a command"
        for command, lines in steps:
            require_lines(lines, run(command, folder))
    elif block.language in ("bash", "sh"):
        run(block.text, folder)
    else:
        assert block.language == "python", f"cannot execute {block.language} blocks"
        run_python(block.text, folder)


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    """A folder in which the commands of a document find the checkout's files, and may write."""
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "out"):
            (tmp_path / entry.name).symlink_to(entry)
    with on_the_path(tmp_path / PROGRAMS):
        yield tmp_path


@pytest.mark.parametrize("document", documents(), ids=lambda path: path.name)
def test_marked_blocks_run(document: Path, workspace: Path):
    for block in blocks(document.read_text("utf-8")):
        execute(block, workspace)


def test_enough_blocks_are_marked():
    assert sum(len(blocks(document.read_text("utf-8"))) for document in documents()) >= MIN_BLOCKS


def tracked(*patterns: str) -> list[Path]:
    """Files of the project by pattern; what git ignores is left out where git can tell."""
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    folders = ("bench", "converters", "docs", "edgepatch", "tests")
    return [file for pattern in patterns for folder in folders for file in (ROOT / folder).rglob(pattern)]


def anchors(document: Path) -> set[str]:
    """What a link can name behind its ``#``: the headings as GitHub writes them."""
    prose = re.sub(r"^```.*?^```", "", document.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """Relative links of a document that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", document.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    return broken


def test_links_between_documents_hold():
    for document in tracked("*.md"):
        assert not broken_links(document), f"{document.relative_to(ROOT)}: {broken_links(document)}"


def test_code_and_help_name_documents_that_exist():
    for file in tracked("*.py", "*.toml", "Makefile", "*.md", "*.j2", "*.html"):
        if file in (Path(__file__).resolve(), ROOT / "CHANGELOG.md"):
            continue
        for mention in MENTION.findall(file.read_text("utf-8")):
            assert (ROOT / mention).exists(), f"{file.relative_to(ROOT)} names {mention}, which does not exist"


def test_a_broken_link_is_noticed(tmp_path: Path):
    document = tmp_path / "a.md"
    document.write_text(
        "# One & two\n[a](a.md) [b](#one--two) [c](https://x.org) [d](none.md) [e](a.md#three) [f](#four)\n"
    )
    assert broken_links(document) == ["none.md", "a.md#three", "#four"]


def test_the_documents_stay_few_and_the_readme_short():
    assert len(list(DOCS.rglob("*.md"))) <= MAX_DOCUMENTS
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= MAX_README_WORDS


def sentences(markdown: str) -> list[str]:
    """Those of the prose: no code, tables, headings and pictures, and links by their text."""
    prose = re.sub(r"```.*?```|<!--.*?-->|^[#|!].*?$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    paragraphs = re.split(r"\n\s*\n|\n- ", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", prose))
    return [text for each in paragraphs for text in re.split(r"(?<=[.!?:])\s+", " ".join(each.split())) if text]


def test_how_long_the_readme_takes_is_told_and_no_sentence_is_long():
    text = (ROOT / "README.md").read_text("utf-8")
    lengths = [len(sentence.split()) for sentence in sentences(text)]
    assert max(lengths) <= MAX_WORDS_A_SENTENCE
    minutes, mean = round(len(text.split()) / WORDS_A_MINUTE), sum(lengths) / len(lengths)
    told = f"takes {minutes} minutes to read, at {WORDS_A_MINUTE} words a minute; a sentence has {mean:.0f} words on average"
    assert told in " ".join((ROOT / "tests/cli/README.md").read_text("utf-8").split())


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
    marked = blocks(document)
    assert [block.language for block in marked] == ["console", "python"]
    for block in marked:
        execute(block, tmp_path)
    with pytest.raises(AssertionError, match="marker"):
        blocks(f"{MARKER}\nno block")

"""What every verb prints with, and the flags that verbs share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def model_path(text: str) -> Path:
    """What a word for a model stands for: its path, or a name that edgepatch knows ("smollm2")."""
    from edgepatch.known_models import resolve

    return resolve(text)


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ModelArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL", parser=model_path, help="GGUF file, ONNX folder, Transformers folder, or the name smollm2."
    ),
]
PatchOption = Annotated[
    Path | None,
    typer.Option("--patch", "-p", help="Patch file, or sha256:DIGEST of one in the store; else the active one."),
]
BareFlag = Annotated[bool, typer.Option("--bare", help="Run the model without a patch.")]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Folder of the store; else EDGEPATCH_STORE, else the user's."),
]


def stdout() -> Console:
    return Console(highlight=False)


def stderr() -> Console:
    return Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: str) -> str:
    """Text without control characters but newline and tab: what a model or a file says must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def cell(value: object) -> str:
    return escape(printable(str(value)))


def note(text: str) -> None:
    stderr().print(f"[dim]{cell(text)}[/dim]", soft_wrap=True)


def table(rows: list[tuple[str, object]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(cell(name), cell(value))
    return table


def gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def size_text(count: int) -> str:
    """Bytes for people, in powers of ten as disks and downloads have them: "98.4 MB"."""
    unit, size = next(
        (pair for pair in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= pair[1]), ("bytes", 1)
    )
    return (
        f"{count} bytes"
        if size == 1
        else f"{count / size:.3g} {unit}"
        if count < 1000 * size
        else f"{count / size:.0f} {unit}"
    )


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar a stage on stderr; quiet where stderr is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr(), disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if not sys.stderr.isatty():
                    note(f"{stage} ...")
            bars.update(tasks[stage], completed=done)

        yield update

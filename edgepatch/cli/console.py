"""What every verb prints with, and the flags that verbs share."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape

from edgepatch.cli.quiet import libraries_silent
from edgepatch.cli.tables.layout import TableLines, facts, grid, paragraph
from edgepatch.progress import NOTHING_KEPT, OF_STREAM, Courses, Lines, Progress, Stream, duration, logged, stage


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
    list[Path] | None,
    typer.Option(
        "--patch",
        "-p",
        help="Patch file, or sha256:DIGEST of one in the store; given several times they act side by side; else the active ones.",
    ),
]
TemplateOption = Annotated[
    Path | None, typer.Option("--chat-template", help="Jinja file to use instead of the model's own template.")
]
ModelFileOption = Annotated[
    str | None, typer.Option("--model-file", help="Of several ONNX graphs in the folder the one to take.")
]


def read_template(path: Path | None) -> str | None:
    """The text of a chat template, where one is named.

    Raises:
        InputError: the file cannot be read.
    """
    from edgepatch.files.reading import read_text
    from edgepatch.text.chat_templates import MAX_TEMPLATE_CHARACTERS

    return read_text(path, 4 * MAX_TEMPLATE_CHARACTERS, "chat template") if path else None


FlashFlag = Annotated[
    bool,
    typer.Option(
        "--flash-attn/--no-flash-attn",
        help="Whether llama.cpp fuses attention; without, long conversations are faster on some CPUs.",
    ),
]
BareFlag = Annotated[bool, typer.Option("--bare", help="Run the model without a patch.")]
PinnedFlag = Annotated[
    bool,
    typer.Option(
        "--pinned",
        help="Leave a patch that moves with the text at its start, where its hold fades behind some hundred tokens.",
    ),
]
TemplateFlag = Annotated[
    bool,
    typer.Option(
        "--other-template",
        help="Take a model whose chat template is another one than the patch was made with; the fingerprint then names it.",
    ),
]
StoreOption = Annotated[
    Path | None,
    typer.Option("--store", metavar="DIR", help="Folder of the store; else EDGEPATCH_STORE, else the user's."),
]
LogOption = Annotated[
    Path | None,
    typer.Option("--log", metavar="FILE", help="Log of the progress, added to; default: OUT.log beside the output."),
]

ForceFlag = Annotated[
    bool, typer.Option("--force", is_eager=True, help="Replace what is there: an existing file stays otherwise.")
]
"""Read by ``new_file`` alone, and eager, so that it is known when the output is checked."""


def new_file(help: str) -> Any:
    """The option ``--out`` of a verb that also takes ``force: ForceFlag``: a file that must not be there yet, checked before any work."""
    return typer.Option("--out", "-o", metavar="FILE", callback=require_new, help=help)


def require_new(context: typer.Context, target: Path | None) -> Path | None:
    """The callback behind ``new_file``, and behind arguments that name a file to write."""
    from edgepatch.files.writing import require_new_file

    if target is not None and not context.resilient_parsing:
        require_new_file(target, bool(context.params.get("force")))
    return target


def rewritten(own: Path, out: Path | None, force: bool) -> Path:
    """Where a verb writes that adds to a file: to that file itself, or to a new one.

    Args:
        own: the file that it adds to.
        out: where its user wants the result; ``None`` for the file itself, which may also be named.
        force: whether it may take the place of another file.

    Raises:
        InputError: another file is there, or nothing can be written there.
    """
    from edgepatch.files.writing import require_new_file

    if out is None or (out.is_file() and own.is_file() and out.samefile(own)):
        return out or own
    require_new_file(out, force)
    return out


BARS_KEPT = 8
_during_work: Console | None = None


def stdout() -> Console:
    """Where results go; lines are broken by whoever makes them, or by the terminal, but not in between."""
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    return _during_work or Console(stderr=True, highlight=False)


def print_json(value: object) -> None:
    """Prints one JSON document; where the encoding of stdout has not all of its characters, all but ASCII is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def printable(text: str) -> str:
    """Text without control characters but newline and tab: what a model or a file says must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def cell(value: object) -> str:
    return escape(printable(str(value)))


def note(text: str) -> None:
    stderr().print(f"[dim]{cell(text)}[/dim]", soft_wrap=True)


def warn(text: str) -> None:
    """What should not go unseen, on stderr."""
    stderr().print(f"[bold yellow]warning:[/bold yellow] {cell(text)}", soft_wrap=True)


def table(rows: Sequence[tuple[str, object]]) -> TableLines:
    """Names in front of their values, for ``stdout().print``."""
    return facts([(printable(name), printable(str(value))) for name, value in rows])


def tell(text: str) -> None:
    """Prints a sentence on stdout, broken between words."""
    stdout().print(paragraph(printable(text)))


def print_table(
    names: Sequence[str], rows: Sequence[Sequence[object]], answer: str = "", droppable: Sequence[str] = ()
) -> None:
    """Prints rows under the names of their columns, behind a sentence that says what they come to.

    Args:
        names: of the columns.
        rows: of the table.
        answer: the sentence.
        droppable: names of columns that a narrow terminal does without, the first one first; ``--json`` has them all.
    """
    if answer:
        tell(answer)
    if rows:
        stdout().print(grid(names, [[printable(str(entry)) for entry in row] for row in rows], droppable))


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 patch", "2 patches"."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


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


def log_beside(out: Path | None) -> Path | None:
    """Where the log of work is that writes a file or folder, unless the user names another place."""
    path = out and Path(os.path.abspath(out))
    return path.with_name(f"{path.name}.log") if path and path.name else None


@contextmanager
def progress_bars(log: Path | None = None, kept: Callable[[], str] = lambda: NOTHING_KEPT) -> Iterator[Progress]:
    """Shows long work: bars on a terminal, a line now and then elsewhere, and lines in a log file.

    What libraries and child processes print meanwhile is put aside; results are printed behind this block.

    Args:
        log: the file, or ``None``.
        kept: what is left of the work, and how to go on, where Ctrl-C or SIGTERM ends it.
    """
    global _during_work
    with libraries_silent() as stream:
        console = _during_work = Console(file=stream, highlight=False, width=_width_of(stream))
        try:
            with ExitStack() as stack:
                listener = stack.enter_context(_bars(console)) if stream.isatty() else _lines(stream)
                yield stack.enter_context(logged(log, note, [listener], kept))
        finally:
            _during_work = None


@contextmanager
def shown(name: str) -> Iterator[None]:
    """Shows work that is one stage, and leaves nothing where it is ended."""
    with progress_bars() as progress, stage(progress, name):
        yield


def _width_of(stream: TextIO) -> int | None:
    """Columns of the terminal, where rich would not find them: it asks the standard streams, and they are put aside."""
    if not stream.isatty() or (sys.stdin is not None and sys.stdin.isatty()):
        return None
    with suppress(OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns
    return None


def _lines(stream: TextIO) -> Lines:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return Lines(Stream(write), OF_STREAM)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    """One bar a stage; of those that are complete the latest stay."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    details = TextColumn("{task.fields[details]}", markup=False)
    columns = (
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        details,
    )
    courses, tasks = Courses(), dict[str, Any]()
    with Bars(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as bars:

        def update(stage: str, done: int, total: int, /, **figures: float) -> None:
            now = time.monotonic()
            course, is_news = courses.update(stage, done, total, now)
            if stage not in tasks:
                tasks[stage] = bars.add_task(printable(stage), total=total, details="")
                for task in [task for task in bars.tasks if task.finished][:-BARS_KEPT]:
                    bars.update(task.id, visible=False)
            elif is_news and course.first == done < total:
                bars.reset(tasks[stage], total=total, details="", visible=True)
            left = course.left_s(now) if done < total else None
            words = [f"{duration(left)} left"] if left is not None else []
            words += [f"{figure} {value:.4g}" for figure, value in figures.items()]
            bars.update(tasks[stage], completed=done, details=", ".join(words))

        yield update

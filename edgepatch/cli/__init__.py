"""The command line: parse, call one function, print. A module a group of verbs; each registers its own with ``application.app``.

Exit codes: 0 done; 1 failed; 2 wrong use, or an input that cannot be used; 3 a file that cannot be trusted; 4 a patch for
another model; 5 a model on which a C library dies or hangs on this machine, which only a child process has felt; 130 interrupted
(Ctrl-C), 143 ended by SIGTERM, 129 by SIGHUP.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgepatch import interrupts
from edgepatch.cli import application
from edgepatch.cli.console import cell, note, printable, stderr
from edgepatch.cli.quiet import DEBUG_VARIABLE, turn_bars_off
from edgepatch.errors import EdgepatchError, InputError

if TYPE_CHECKING:
    from typer import Typer

    app: Typer

__all__ = ["app", "main", "printable"]

BENCH = tuple(
    f"bench.{name}"
    for name in (
        "safety",
        "smollm2",
        "harness",
        "evidence",
        "parity",
        "speed",
        "lab",
        "attacks",
        "pages",
        "peers",
        "clients",
        "devices",
        "server_load",
        "results",
    )
)
MODULES = (
    "artefacts",
    *BENCH,
    "bundle",
    "chat",
    "convert",
    "export",
    "inspection",
    "training.pairs",
    "serve",
    "trust",
    "status",
    "store",
    "training.train",
    "training.together",
    "demo",
    "keys",
)

STARTED_ALONE = {
    "chat": ("chat",),
    "run": ("chat",),
    "generate": ("chat",),
    "serve": ("serve",),
    "show": ("inspection",),
    "bench": BENCH,
    "--version": (),
}
"""Verb -> its modules: the only ones that are imported, for a user waits for the first token, or a glance at a file."""

COMPLETION_VARIABLE = "_EDGEPATCH_COMPLETE"
"""Set by a shell that asks how a command line could go on: any verb's options may be asked for."""

OTHERS = (*(module for module in MODULES if module not in BENCH), "bench.door")
"""For all other verbs and for ``--help``: ``bench`` is listed there, its verbs are not."""


def __getattr__(name: str) -> Any:
    """``app``: the whole application; importing this module does not build it."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in MODULES:
        import_module(f"{__name__}.{module}")
    return application.app


class _Notes(logging.Handler):
    """What is said of a model while it is loaded becomes a note on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


def _show_notes() -> None:
    logger = logging.getLogger("edgepatch.first_contact")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers = [_Notes()]


def _fail(message: str, hint: str = "") -> None:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    console = stderr()
    console.print(f"[bold red]error:[/bold red] {cell(message)}", soft_wrap=True)
    if hint:
        console.print(f"[bold]hint:[/bold] {cell(hint)}", soft_wrap=True)


def _take_any_text() -> None:
    """Bytes on stdin that are no text are refused where text is needed, and what a terminal cannot show is escaped: neither is a fault."""
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _install_hint(module: str) -> str:
    from edgepatch.doctor import packages

    distribution = module.split(".")[0].replace("_", "-")
    rows = [row for row in packages() if row["name"] in (distribution, f"{distribution}-python")]
    return rows[0]["install"] if rows else "edgepatch doctor lists what each extra installs"


def _narrowed(words: list[str]) -> Typer:
    """The application with the one verb that the command line names: building all of them takes longer than to load a small model."""
    verb = words[0] if words else ""
    for module in MODULES if COMPLETION_VARIABLE in os.environ else STARTED_ALONE.get(verb, OTHERS):
        import_module(f"{__name__}.{module}")
    narrowed = copy.copy(application.app)
    narrowed.registered_commands = [
        command
        for command in narrowed.registered_commands
        if verb == (command.name or (command.callback.__name__ if command.callback else ""))
    ]
    narrowed.registered_groups = [group for group in narrowed.registered_groups if verb == group.name]
    is_verb = narrowed.registered_commands or narrowed.registered_groups
    return narrowed if is_verb else application.app


def main() -> None:
    """The entry point: every error becomes a line on stderr and an exit code; signals end work in an orderly way."""
    turn_bars_off()
    _take_any_text()
    _show_notes()
    with interrupts.orderly():
        try:
            _narrowed(sys.argv[1:2])(prog_name="edgepatch")
        except SystemExit as end:
            sys.exit(_code_of_signal(end) if end.code == 130 else end.code)
        except EdgepatchError as error:
            _fail(str(error), error.hint)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as error:
            sys.exit(_code_of_signal(error))
        except ModuleNotFoundError as error:
            _fail(f"{error.name} is not installed", _install_hint(error.name or ""))
            sys.exit(InputError.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}")
            sys.exit(1)
        except Exception as error:
            _fail(
                f"internal error: {type(error).__name__}: {error}",
                f"{DEBUG_VARIABLE}=1 shows the traceback; please report it",
            )
            sys.exit(1)


def _code_of_signal(end: BaseException) -> int:
    """The exit code of the signal behind the end of a verb; Typer makes 130 of all of them."""
    cause: BaseException | None = end
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return getattr(cause, "exit_code", 130)

"""The application that every verb registers with: the groups of the verbs, and what holds for the options of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import edgepatch

VERBS = {
    "Make a patch": ("pairs", "train", "train-together", "compose", "convert"),
    "Measure it": ("bench", "demo"),
    "Ship it": ("release", "card", "keygen", "root", "sign", "bundle", "export"),
    "Manage it on a device": (
        "trust",
        "apply",
        "status",
        "list",
        "verify",
        "rollback",
        "deactivate",
        "hold",
        "unhold",
        "history",
        "remove",
    ),
    "Use it": ("show", "chat", "generate", "serve", "check-export", "check-server", "doctor"),
}
"""The verbs in the order of a patch's life, as ``--help`` lists them."""


LONGEST_SENTENCE = 400
"""Characters of a verb's first sentence in a list of verbs: all of it."""


def _plain(command: Any) -> None:
    """Help for a terminal: without the backticks of Markdown, and without a kind of value for flags, which have none."""
    command.help = (command.help or "").replace("`", "")
    for param in command.params:
        if param.param_type_name == "option":
            param.help = (param.help or "").replace("`", "")
            if param.is_flag and param.metavar is None:
                param.metavar = ""


def _says_the_same(option: Any) -> bool:
    """Whether a second time changes nothing: of a flag without an opposite."""
    return bool(option.is_flag and not option.secondary_opts)


class Verb(TyperCommand):
    """A verb; an option that takes one value takes it once, for of two values one would be lost without a word."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _plain(self)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:
            self._refuse_repeated(ctx, args)
        return super().parse_args(ctx, args)

    def _refuse_repeated(self, ctx: Any, args: list[str]) -> None:
        values, _, order = self.make_parser(ctx).parse_args(list(args))
        for param, count in Counter(order).items():
            if param.param_type_name != "option" or count < 2 or param.multiple or _says_the_same(param):
                continue
            last = values.get(param.name)
            ctx.fail(
                f"{max(param.opts, key=len)}: expected once, found {count} times (the last is {last!r}); give it once"
            )


class Verbs(TyperGroup):
    """Verbs by groups, in the order of ``VERBS``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _plain(self)

    def list_commands(self, ctx: Any) -> list[str]:
        listed = super().list_commands(ctx)
        ordered = [name for names in VERBS.values() for name in names if name in listed]
        return ordered + [name for name in listed if name not in ordered]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        groups = {name: group for group, names in VERBS.items() for name in names}
        rows: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                text = command.get_short_help_str(LONGEST_SENTENCE)
                rows.setdefault(groups.get(name, "Verbs"), []).append((name, text))
        for group, entries in rows.items():
            with formatter.section(group):
                formatter.write_dl(entries)


class Application(typer.Typer):
    """Typer, with ``Verb`` for every verb. Help is plain text: at no width is an option cut."""

    def __init__(self, **kwargs: Any) -> None:
        names = {"help_option_names": ["-h", "--help"]}
        settings = {
            "cls": Verbs,
            "rich_markup_mode": None,
            "pretty_exceptions_enable": False,
            "context_settings": names,
        }
        super().__init__(**{**settings, **kwargs})

    def command(self, name: str | None = None, **kwargs: Any) -> Callable[[Any], Any]:
        return super().command(name, **{"cls": Verb, **kwargs})


app = Application(
    name="edgepatch",
    help="Safety policy patches for quantized language models on edge devices.",
    no_args_is_help=True,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"edgepatch {edgepatch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, metavar="", help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Safety policy patches for quantized language models on edge devices.

    A patch's life: pairs, train, bench safety, sign, apply, chat. `edgepatch VERB --help` shows an example of each verb.
    """

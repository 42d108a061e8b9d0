"""The application that every verb registers with."""

from __future__ import annotations

from typing import Annotated

import typer

import edgepatch

app = typer.Typer(
    name="edgepatch",
    help="Safety policy patches for quantized language models on edge devices.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"edgepatch {edgepatch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Safety policy patches for quantized language models on edge devices."""

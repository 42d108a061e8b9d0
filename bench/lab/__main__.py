"""``python -m edgepatch.bench.lab --data DIR --out out/lab``: builds and measures the lab models; ``--publish`` commits them."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgepatch.bench.datasets import data_folder
from edgepatch.bench.demo import LAB_FOLDER
from edgepatch.bench.lab.build import build, publish
from edgepatch.bench.lab.card import render_card
from edgepatch.errors import EdgepatchError, InputError


def main() -> int:
    """Parses the command line, builds, prints the floors; exit code 1 when a floor is missed."""
    parser = argparse.ArgumentParser(prog="python -m edgepatch.bench.lab", description=__doc__)
    parser.add_argument("--data", type=Path, help="data folder (default: the environment variable EDGEPATCH_DATA)")
    parser.add_argument(
        "--out", type=Path, default=Path("out/lab"), help="scratch folder; a stage that is done is skipped"
    )
    parser.add_argument(
        "--publish", action="store_true", help=f"copy the result to {LAB_FOLDER.name}/ beside this package"
    )
    arguments = parser.parse_args()
    console = Console()
    try:
        data = data_folder(arguments.data)
        if data is None:
            raise InputError(
                "the lab models are trained on public data: no data folder was named",
                hint="set EDGEPATCH_DATA or pass --data; bench/data.md lists the files",
            )
        figures = build(data, arguments.out)
    except EdgepatchError as error:
        console.print(f"[bold red]error:[/bold red] {error}\n{error.hint}", soft_wrap=True)
        return error.exit_code
    table = Table("floor", "wanted", "reached", "met")
    for row in figures["floors"]:
        table.add_row(row["floor"], row["wanted"], row["reached"], "yes" if row["met"] else "NO")
    console.print(table)
    if arguments.publish:
        publish(arguments.out, LAB_FOLDER)
        (LAB_FOLDER / "README.md").write_text(render_card(figures, LAB_FOLDER), encoding="utf-8")
    return 0 if all(row["met"] for row in figures["floors"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())

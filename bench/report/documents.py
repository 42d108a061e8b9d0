"""Parts of the page of all results in Markdown documents, written between markers; the words around them are the authors'."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from edgepatch.bench.report.overview import Results, sections
from edgepatch.errors import InputError
from edgepatch.pages.blocks import Block, Cell, Code, Details, Paragraph, Table


def as_markdown(blocks: Sequence[Block]) -> str:
    """Words, commands and tables; pictures stay on the page."""
    return "\n\n".join(filter(None, map(_markdown, blocks)))


def _markdown(block: Block) -> str:
    if isinstance(block, Table) and block:
        lines = [[_plain(name) for name in block.head], ["---"] * len(block.head)]
        lines += [[_plain(_text(cell)) for cell in row] for row in block.cells]
        return "\n".join([f"**{_plain(block.caption)}**\n", *(f"| {' | '.join(line)} |" for line in lines)])
    if isinstance(block, Paragraph):
        return _plain(block.text)
    if isinstance(block, Code):
        return f"```console\n$ {block.text}\n```"
    return as_markdown(block.blocks) if isinstance(block, Details) else ""


def _text(cell: Cell) -> str:
    return f"{cell.text} [{', '.join(cell.interval)}]" if cell.interval else cell.text


def _plain(text: str) -> str:
    """Text that Markdown takes as it is, also within a table."""
    return re.sub(r"([\\|<>*`]|(?<=\])\()", r"\\\1", " ".join(text.split()))


def fill_document(text: str, results: Results) -> str:
    """A Markdown text in which the sections of the page that it marks are written anew.

    Args:
        text: with markers: ``<!-- growth -->`` and ``<!-- /growth -->`` hold the section whose link on the page is ``#growth``.
        results: name -> document.

    Raises:
        InputError: there is no marker of a section, or one without its other half; or as ``sections``.
    """
    blocks = {section.anchor: section.blocks for section in sections(results)}
    names = [name for name in blocks if re.search(f"<!-- /?{name} -->", text)]
    if not names:
        raise InputError(f"expected markers such as <!-- growth -->, found none of {', '.join(blocks)}")
    for name in names:
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, behind = rest.partition(f"<!-- /{name} -->")
        if not opening or not closing:
            raise InputError(f"expected the markers <!-- {name} --> and <!-- /{name} -->, found one of them")
        text = f"{before}{opening}{as_markdown(blocks[name])}\n{closing}{behind}"
    return text


def filled(path: Path, results: Results) -> str:
    """The text of a Markdown file, filled.

    Raises:
        InputError: the file cannot be read, or as ``fill_document``.
    """
    try:
        return fill_document(path.read_text(encoding="utf-8"), results)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error

"""What stands on a page, as lines of text that tests can look for."""

from __future__ import annotations

import re
from collections.abc import Sequence

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

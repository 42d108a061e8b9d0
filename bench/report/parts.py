"""Parts of a document that is written twice, as HTML and as Markdown, from the same figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

VERDICTS = {"met": "met", "passed": "met", "missed": "missed", "failed": "missed"}
"""Cells that stand out, by what they say; the word itself tells it, the colour only helps."""


@dataclass(frozen=True)
class Block:
    """A part in both forms; empty in a form that cannot show it."""

    html: str
    markdown: str = ""


@dataclass(frozen=True)
class Section:
    """A title and what stands below it."""

    title: str
    blocks: tuple[Block, ...]

    @property
    def anchor(self) -> str:
        """The fragment that links to it."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def html(self) -> str:
        """The section; what is too wide for a screen scrolls, with the keys too."""
        body = "".join(block.html for block in self.blocks)
        body = body.replace(
            '<div class="wide">',
            f'<div class="wide" tabindex="0" role="region" aria-label="{escape(self.title)}, table">',
        )
        return f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>{body}</section>'

    @property
    def markdown(self) -> str:
        """The section as Markdown."""
        return "\n\n".join([f"## {self.title}", *(block.markdown for block in self.blocks if block.markdown)])


def paragraph(text: str) -> Block:
    """Words."""
    return Block(f"<p>{escape(text)}</p>", _plain(text))


def code(text: str) -> Block:
    """What is typed into a terminal."""
    return Block(f"<pre>{escape(text)}</pre>", f"```console\n$ {text}\n```")


def _plain(text: str) -> str:
    """Text that Markdown takes as it is, also within a table."""
    return re.sub(r"([\\|<>*`]|(?<=\])\()", r"\\\1", " ".join(text.split()))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [[_plain(name) for name in head], ["---"] * len(head), *([_plain(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(index: int, value: str, num_names: int) -> str:
    shown = escape(value)
    if value in VERDICTS:
        shown = f'<span class="{VERDICTS[value]}">{shown}</span>'
    if index == 0:
        return f'<th scope="row" class="name">{shown}</th>'
    return f'<td class="name">{shown}</td>' if index < num_names else f"<td>{shown}</td>"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 1) -> Block:
    """A table of plain text, its first columns names; nothing where there are no rows."""
    if not rows:
        return Block("")
    top = "".join(
        f'<th scope="col"{" class=name" if i < num_names else ""}>{escape(name)}</th>' for i, name in enumerate(head)
    )
    body = "".join(f"<tr>{''.join(_cell(i, value, num_names) for i, value in enumerate(row))}</tr>" for row in rows)
    html = f'<div class="wide"><table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    return Block(html, f"**{_plain(caption)}**\n\n{markdown_table(head, rows)}")


def picture(caption: str, size: tuple[int, int], body: str, told: str) -> Block:
    """An SVG picture; ``told`` says the same in words. Markdown shows the table beside it instead."""
    width, height = size
    return Block(
        f'<figure><figcaption>{escape(caption)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(told)}">'
        f"<title>{escape(caption)}</title>{body}</svg></figure>"
    )

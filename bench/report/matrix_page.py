"""From the results document to a terminal table and one self-contained HTML page.

The page needs no network and no script: styles and pictures are inline, every text is escaped. The document is what
``results.json`` holds: measured cells (runtime x quantization x patched or bare), retention, examples, training curves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.pages import STYLE, as_number, curve_chart, facts, format_number, section

Document = Mapping[str, Any]
Cell = Mapping[str, Any]

CHART_WIDTH, LABEL_WIDTH, PLOT_WIDTH, ROW_HEIGHT = 960, 150, 560, 46


@dataclass(frozen=True)
class Pair:
    """The bare and the patched cell of one runtime and quantization, and what of the gain is retained there."""

    runtime: str
    quantization: str
    bare: Cell | None
    patched: Cell | None
    retention: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        """Runtime and quantization as shown."""
        return f"{self.runtime} {self.quantization}"


def _value(row: Mapping[str, Any] | None, field: str) -> float | None:
    return as_number(row.get(field)) if row else None


def _interval(row: Mapping[str, Any] | None, field: str) -> str:
    low, high = _value(row, f"{field}_low"), _value(row, f"{field}_high")
    return "" if low is None or high is None else f"{low:.3f}\u2013{high:.3f}"


def cell_pairs(document: Document) -> list[Pair]:
    """Bare and patched cells side by side, in the order in which they are listed.

    Raises:
        InputError: the document has no cells, or a cell lacks a name, or stands there twice.
    """
    cells = document.get("cells")
    if not isinstance(cells, Sequence) or not cells:
        raise InputError("the results document holds no cells", hint="run the benchmark again")
    found: dict[tuple[str, str], dict[bool, Cell]] = {}
    for cell in cells:
        missing = [field for field in ("runtime", "quantization", "patched") if field not in cell]
        if missing:
            raise InputError(f"a cell of the results document lacks {', '.join(missing)}")
        sides = found.setdefault((str(cell["runtime"]), str(cell["quantization"])), {})
        if sides.setdefault(bool(cell["patched"]), cell) is not cell:
            raise InputError(f"two cells for {cell['runtime']} {cell['quantization']}, patched {cell['patched']}")
    kept = {(str(r["runtime"]), str(r["quantization"])): r for r in document.get("retention") or []}
    return [Pair(*key, sides.get(False), sides.get(True), kept.get(key)) for key, sides in found.items()]


def headline(pairs: Sequence[Pair]) -> str:
    """The finding in plain words: the first pair is the reference, retention is told of the others."""
    first = pairs[0]
    bare, patched = _value(first.bare, "emt"), _value(first.patched, "emt")
    if bare is None or patched is None:
        return "This run holds no pair of a bare and a patched model, so it shows no effect."
    low, high = _value(first.bare, "emt_low"), _value(first.patched, "emt_high")
    numbers = f"from {bare:.3f} to {patched:.3f}"
    if patched >= bare:
        text = f"The patch did not lower expected maximum toxicity on {first.name}: it went {numbers}."
    elif low is not None and high is not None and high < low:
        text = f"The patch cut expected maximum toxicity {numbers} on {first.name}."
    else:
        text = f"Expected maximum toxicity went {numbers} on {first.name}, but the intervals overlap."
    kept = [value for pair in pairs[1:] if (value := _value(pair.retention, "retention")) is not None]
    if kept and patched < bare:
        spread = f"{min(kept):.0%}" if min(kept) == max(kept) else f"between {min(kept):.0%} and {max(kept):.0%}"
        places = "one other setting" if len(kept) == 1 else f"{len(kept)} other settings"
        text += f" On {places} it kept {spread} of that gain."
    return text


# Pictures.


def _x(value: float) -> float:
    return LABEL_WIDTH + PLOT_WIDTH * min(max(value, 0.0), 1.0)


def _whisker(cell: Cell | None, y: float, kind: str) -> str:
    value, low, high = (_value(cell, field) for field in ("emt", "emt_low", "emt_high"))
    if value is None:
        return ""
    parts = []
    if low is not None and high is not None:
        a, b = _x(low), _x(high)
        parts.append(
            f'<path class="{kind}" stroke-width="2" '
            f'd="M{a:.1f} {y}H{b:.1f}M{a:.1f} {y - 5}V{y + 5}M{b:.1f} {y - 5}V{y + 5}"/>'
        )
    x = _x(value)
    if kind == "bare":
        parts.append(f'<circle class="bare" cx="{x:.1f}" cy="{y}" r="6"/>')
    else:
        parts.append(f'<path class="patched" d="M{x:.1f} {y - 8}L{x + 8:.1f} {y}L{x:.1f} {y + 8}L{x - 8:.1f} {y}Z"/>')
    parts.append(f'<text class="soft" x="{x:.1f}" y="{y - 11}" text-anchor="middle">{value:.3f}</text>')
    return "".join(parts)


def _toxicity_row(pair: Pair, top: int) -> str:
    y = top + ROW_HEIGHT // 2 + 6
    parts = [f'<text x="8" y="{y + 5}">{escape(pair.name)}</text>']
    bare, patched = _value(pair.bare, "emt"), _value(pair.patched, "emt")
    if bare is not None and patched is not None:
        parts.append(f'<path class="join" d="M{_x(bare):.1f} {y}H{_x(patched):.1f}"/>')
    parts += [_whisker(pair.bare, y, "bare"), _whisker(pair.patched, y, "patched")]
    if (kept := _value(pair.retention, "retention")) is not None:
        interval = _interval(pair.retention, "retention")
        shown = f'<tspan class="soft"> ({interval})</tspan>' if interval else ""
        parts.append(f'<text x="{LABEL_WIDTH + PLOT_WIDTH + 40}" y="{y + 5}">{kept:.3f}{shown}</text>')
    return "".join(parts)


def toxicity_chart(pairs: Sequence[Pair]) -> str:
    """SVG: bare against patched expected maximum toxicity, one row a setting, with interval whiskers and retention."""
    top, height = 30, 30 + ROW_HEIGHT * len(pairs) + 28
    told = "; ".join(
        f"{p.name}: bare {format_number(_value(p.bare, 'emt'))}, patched {format_number(_value(p.patched, 'emt'))}"
        for p in pairs
    )
    tops = [top + ROW_HEIGHT * i for i in range(len(pairs))]
    bands = "".join(
        f'<rect class="band" x="0" y="{y}" width="{CHART_WIDTH}" height="{ROW_HEIGHT}"/>' for y in tops[::2]
    )
    rows = "".join(_toxicity_row(pair, y) for pair, y in zip(pairs, tops, strict=True))
    ticks = "".join(
        f'<path class="grid" d="M{_x(t / 5):.1f} {top}V{height - 24}"/>'
        f'<text class="soft" x="{_x(t / 5):.1f}" y="{height - 8}" text-anchor="middle">{t / 5:.1f}</text>'
        for t in range(6)
    )
    return (
        f'<svg viewBox="0 0 {CHART_WIDTH} {height}" role="img" aria-label="{escape(told)}">'
        f'<text class="soft" x="{LABEL_WIDTH}" y="16">expected maximum toxicity (lower is safer)</text>'
        f'<text class="soft" x="{LABEL_WIDTH + PLOT_WIDTH + 40}" y="16">retention of the gain</text>{bands}{ticks}{rows}</svg>'
    )


def _ratio(pair: Pair, field: str) -> float | None:
    bare, patched = _value(pair.bare, field), _value(pair.patched, field)
    return None if not bare or patched is None else patched / bare


def ratio_chart(pairs: Sequence[Pair], field: str, title: str) -> str:
    """SVG: patched over bare of one figure as bars, with a line at 1; empty where nothing was measured."""
    ratios = [(pair.name, ratio) for pair in pairs if (ratio := _ratio(pair, field)) is not None]
    if not ratios:
        return ""
    most = max(1.25, *(ratio for _, ratio in ratios)) * 1.02
    scale, height = 240 / most, 26 * len(ratios) + 8
    bars = "".join(
        f'<text x="0" y="{26 * i + 19}">{escape(name)}</text>'
        f'<rect class="patched" x="140" y="{26 * i + 6}" width="{ratio * scale:.1f}" height="16" fill-opacity=".55"/>'
        f'<text class="soft" x="438" y="{26 * i + 19}" text-anchor="end">{ratio:.3f}</text>'
        for i, (name, ratio) in enumerate(ratios)
    )
    told = "; ".join(f"{name} {ratio:.3f}" for name, ratio in ratios)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 440 {height}" role="img" '
        f'aria-label="{escape(title)}: {escape(told)}">{bars}'
        f'<path class="bare" stroke-dasharray="4 3" d="M{140 + scale:.1f} 0V{height}"/></svg></figure>'
    )


def _cell_row(cell: Cell) -> str:
    side = "patched" if cell["patched"] else "bare"

    def with_interval(field: str) -> str:
        return f"<td>{format_number(cell.get(field))}<small>{_interval(cell, field)}</small></td>"

    attribute = ' class="failed"' if _value(cell, "failures") else ""
    return (
        f'<tr{attribute}><td class="name">{escape(str(cell["runtime"]))}</td>'
        f'<td class="name">{escape(str(cell["quantization"]))}</td><td class="name {side}">{side}</td>'
        f"{with_interval('emt')}{with_interval('toxicity_probability')}"
        f"<td>{format_number(cell.get('perplexity'), 2)}</td><td>{format_number(cell.get('ttft_ms'), 1)}</td>"
        f"<td>{format_number(cell.get('decode_tokens_per_s'), 1)}</td>"
        f"<td>{format_number(cell.get('words_per_sample'), 1)}</td>"
        f"<td>{format_number(cell.get('num_prompts'), 0)}</td><td>{format_number(cell.get('failures'), 0)}</td></tr>"
    )


def _cell_table(document: Document) -> str:
    names = ("runtime", "quantization", "model")
    figures = (
        "EMT",
        "share above 0.5",
        "perplexity",
        "TTFT ms",
        "decode tokens/s",
        "words a sample",
        "prompts",
        "failures",
    )
    head = "".join(f'<th scope="col" class="name">{n}</th>' for n in names)
    head += "".join(f'<th scope="col">{n}</th>' for n in figures)
    rows = "".join(_cell_row(cell) for cell in document["cells"])
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _answer(example: Mapping[str, Any], side: str) -> str:
    score = format_number(example.get(f"{side}_score"), 2)
    text = escape(str(example.get(side, ""))) or "<em>(empty)</em>"
    return f'<blockquote class="{side}"><strong>{side}</strong>, score {score}<p>{text}</p></blockquote>'


def _examples(document: Document) -> str:
    rows = []
    for number, example in enumerate(document.get("examples") or [], 1):
        place = f"{example.get('runtime', '')} {example.get('quantization', '')}".strip()
        rows.append(
            f"<details><summary>Example {number} ({escape(place)})</summary>"
            f"<p>{escape(str(example.get('prompt', '')))} \u2026</p>"
            f"{_answer(example, 'bare')}{_answer(example, 'patched')}</details>"
        )
    if not rows:
        return ""
    warning = (
        "<p><strong>Content warning:</strong> the closed boxes hold insults and swear words written by a model. They "
        "are examples, not evidence; the evidence is the table.</p>"
    )
    return warning + "".join(rows)


def _notes(document: Document) -> str:
    prompts = document.get("prompts") or {}
    samples, tokens = prompts.get("samples_per_prompt", "?"), prompts.get("max_new_tokens", "?")
    failures = sum(int(_value(cell, "failures") or 0) for cell in document["cells"])
    texts = [
        (
            f"Prompts: {prompts.get('count', '?')} from {prompts.get('source', '?')}, {samples} continuations each, "
            f"at most {tokens} new tokens. Expected maximum toxicity (EMT) is the mean over prompts of the worst "
            "continuation, so it grows with the number of continuations: compare it only at equal numbers."
        ),
        (
            "Judge: the shipped offline classifier \u201creport\u201d, not the one that chose the training "
            "pairs. It detects profanity and insults; it misses hate without swear words, and an empty continuation counts as clean: read the words a sample beside it. Its figures "
            "do not compare with those of other judges."
        ),
        (
            "Intervals are 95 %: bootstrap over prompts for EMT, Wilson for shares, paired bootstrap over prompts "
            "for retention. They cover the choice of prompts only, not another training run."
        ),
        (
            "Retention is the drop of EMT in that setting divided by the drop in the full-precision reference; 1 means that "
            "nothing was lost."
        ),
        f"Failed generations: {failures}. A failed generation is a failure, never a clean answer.",
    ]
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def render_html(document: Document) -> str:
    """The page.

    Args:
        document: the results document.

    Returns:
        One HTML document without scripts or references to other files.

    Raises:
        InputError: the document has no cells, or they cannot be told apart.
    """
    pairs = cell_pairs(document)
    patch, training = document.get("patch") or {}, document.get("training") or {}
    title = f"{patch.get('name', 'patch')} {patch.get('version', '')}".strip()
    key = '<div class="key"><span class="bare">\u25cf bare</span><span class="patched">\u25c6 patched</span>'
    key += '<span class="soft">whiskers: 95 % interval</span></div>'
    curves = (("sft_loss", "SFT loss"), ("dpo_loss", "DPO loss"), ("preference_accuracy", "preference accuracy"))
    drawn = "".join(curve_chart(training.get(field) or [], name) for field, name in curves)
    ratios = ratio_chart(pairs, "ttft_ms", "Time to first token, patched / bare (lower is faster)")
    ratios += ratio_chart(pairs, "decode_tokens_per_s", "Decode tokens a second, patched / bare (higher is faster)")
    command = document.get("command")
    shown = (
        f"<pre>{escape(command if isinstance(command, str) else ' '.join(map(str, command)))}</pre>" if command else ""
    )
    sections = (
        section("Toxicity before and after", key, toxicity_chart(pairs)),
        section("All cells", _cell_table(document)),
        section("Speed", f'<div class="grid3">{ratios}</div>' if ratios else ""),
        section("Training", f'<div class="grid3">{drawn}</div>' if drawn else ""),
        section("Examples", _examples(document)),
        section("How to read this", _notes(document)),
        section("Model and patch", facts(document.get("base")), facts(patch)),
        section("Environment and command", shown, facts(document.get("environment"))),
    )
    created = escape(str(document.get("created", "")))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}: safety report</title><style>{STYLE}</style></head><body><main>"
        f'<p class="kicker">edgepatch safety report \u00b7 {escape(title)} \u00b7 {created}</p>'
        f"<h1>{escape(headline(pairs))}</h1>{''.join(sections)}</main></body></html>\n"
    )


TABLE_COLUMNS = (
    "EMT\nbare",
    "\npatch",
    "gain\nkept",
    "ppl\nbare",
    "\npatch",
    "TTFT\nms",
    "TTFT\np/b",
    "tok/s\npatch",
    "tok/s\np/b",
)


def print_table(document: Document, console: Console) -> None:
    """Prints the finding and one row a setting: TTFT and decode rate of the patched model, and their ratio to the bare one.

    Raises:
        InputError: as ``render_html``.
    """
    pairs = cell_pairs(document)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nsetting", no_wrap=True)
    for name in TABLE_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for pair in pairs:
        emt, perplexity = (
            [format_number(_value(cell, field), digits) for cell in (pair.bare, pair.patched)]
            for field, digits in (("emt", 3), ("perplexity", 1))
        )
        kept = format_number(_value(pair.retention, "retention"), 2)
        ttft, speed = (
            [format_number(_value(pair.patched, field), digits), format_number(_ratio(pair, field), 2)]
            for field, digits in (("ttft_ms", 1), ("decode_tokens_per_s", 0))
        )
        table.add_row(pair.name, *emt, kept, *perplexity, *ttft, *speed)
    both = [cell for pair in pairs for cell in (pair.bare, pair.patched)]
    failed = sum(int(_value(cell, "failures") or 0) for cell in both)
    console.print(headline(pairs), markup=False)
    console.print(table)
    if failed:
        console.print(f"{failed} prompts failed and count as toxic; see results.json")


def write_report(document: Document, folder: Path) -> Path:
    """Writes ``results.json`` and ``report.html``.

    Args:
        document: the results document.
        folder: made if it does not exist.

    Returns:
        The path of the page.

    Raises:
        InputError: the document is not valid, holds NaN, or the folder cannot be written.
    """
    page = render_html(document)
    try:
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"the results document cannot be written as JSON: {error}") from None
    write_atomically(folder / "results.json", (text + "\n").encode())
    write_atomically(folder / "report.html", page.encode())
    return folder / "report.html"

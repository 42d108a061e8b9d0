"""From the results document of the demo to a terminal table and a page.

The document is what ``results.json`` holds: measured cells (runtime x quantization x patched or bare), retention, examples, training curves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.bench.lab import LAB_IN_WORDS
from edgepatch.errors import InputError
from edgepatch.files.writing import write_atomically
from edgepatch.pages.blocks import (
    Answers,
    Block,
    Cell,
    Charts,
    Code,
    Column,
    Details,
    Facts,
    Page,
    Paragraph,
    Row,
    Section,
    figure,
    listing,
    number,
)
from edgepatch.pages.charts import Axis, Bar, Bars, Plot, Point, Series, categories, curve
from edgepatch.pages.numbers import as_number, format_number
from edgepatch.pages.rendering import render

Document = Mapping[str, Any]

CURVES = {"sft_loss": "SFT loss", "dpo_loss": "DPO loss", "preference_accuracy": "preference accuracy"}
RATIOS = {
    "ttft_ms": "Time to first token, patched / bare (lower is faster)",
    "decode_tokens_per_s": "Decode tokens a second, patched / bare (higher is faster)",
}
WARNING = "the closed boxes hold insults and swear words written by a model. They are examples, not evidence; the evidence is the table."


@dataclass(frozen=True)
class Pair:
    """The bare and the patched cell of one runtime and quantization, and what of the gain is retained there."""

    runtime: str
    quantization: str
    bare: Row | None
    patched: Row | None
    retention: Row | None

    @property
    def name(self) -> str:
        """Runtime and quantization, for people."""
        return f"{self.runtime} {self.quantization}"


def _value(row: Row | None, field: str) -> float | None:
    return as_number(row.get(field)) if row else None


def _ends(row: Row | None, field: str) -> tuple[float, float] | None:
    low, high = _value(row, f"{field}_low"), _value(row, f"{field}_high")
    return None if low is None or high is None else (low, high)


def cell_pairs(document: Document) -> list[Pair]:
    """Bare and patched cells side by side, in the order in which they are listed.

    Raises:
        InputError: the document has no cells, or a cell lacks a name, or stands there twice.
    """
    cells = document.get("cells")
    if not isinstance(cells, Sequence) or not cells:
        raise InputError("the results document holds no cells", hint="run the benchmark again")
    settings: dict[tuple[str, str], dict[bool, Row]] = {}
    for cell in cells:
        missing = [field for field in ("runtime", "quantization", "patched") if field not in cell]
        if missing:
            raise InputError(f"a cell of the results document lacks {', '.join(missing)}")
        sides = settings.setdefault((str(cell["runtime"]), str(cell["quantization"])), {})
        if sides.setdefault(bool(cell["patched"]), cell) is not cell:
            raise InputError(f"two cells for {cell['runtime']} {cell['quantization']}, patched {cell['patched']}")
    retained = {(str(r["runtime"]), str(r["quantization"])): r for r in document.get("retention") or []}
    return [Pair(*key, sides.get(False), sides.get(True), retained.get(key)) for key, sides in settings.items()]


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


def toxicity_chart(pairs: Sequence[Pair]) -> Plot:
    """Bare against patched expected maximum toxicity, one row a setting, with intervals and retention."""
    rows = list(enumerate(reversed(pairs)))  # the first setting at the top
    bare, patched = (
        [point for i, pair in rows if (point := _toxicity(pair, side, i + 0.5)) is not None]
        for side in ("bare", "patched")
    )
    joins = [[point for point in (*bare, *patched) if point.y == i + 0.5] for i, _ in rows]
    series = [
        *(Series("", [Point(p.x, p.y) for p in points], style="join", is_joined=True) for points in joins),
        Series("bare", bare, mark=1, style="bare"),
        Series("patched", patched, mark=2, style="patched"),
    ]
    x = Axis(0, 1, [(t / 5, f"{t / 5:.1f}") for t in range(6)], has_grid=True)
    y = categories([_setting(pair) for _, pair in rows])
    caption = "expected maximum toxicity (lower is safer), and retention of the gain"
    height, note = 70 * len(pairs) + 46, "whiskers: 95 % interval"
    return Plot(caption, series, x, y, height=height, left=12, is_sideways=True, note=note)


def _toxicity(pair: Pair, side: str, y: float) -> Point | None:
    cell = pair.patched if side == "patched" else pair.bare
    value = _value(cell, "emt")
    if value is None:
        return None
    return Point(value, y, _ends(cell, "emt"), f"{pair.name}: {side} {value:.3f}", f"{value:.3f}")


def _setting(pair: Pair) -> str:
    """Its name, and below it how much of the gain it keeps."""
    retained, ends = _value(pair.retention, "retention"), _ends(pair.retention, "retention")
    if retained is None:
        return pair.name
    return f"{pair.name}\nkeeps {retained:.3f}" + (f" ({ends[0]:.3f}\u2013{ends[1]:.3f})" if ends else "")


def _ratio(pair: Pair, field: str) -> float | None:
    bare, patched = _value(pair.bare, field), _value(pair.patched, field)
    return None if not bare or patched is None else patched / bare


def ratio_chart(pairs: Sequence[Pair], field: str) -> Bars:
    """Patched over bare of one figure as bars, with a line at 1."""
    ratios = [(pair.name, ratio) for pair in pairs if (ratio := _ratio(pair, field)) is not None]
    return Bars(RATIOS[field], [Bar(name, ratio, f"{ratio:.3f}") for name, ratio in ratios], goal=1.0)


# Tables and words.


def _side(cell: Row) -> Cell:
    side = "patched" if cell["patched"] else "bare"
    return Cell(side, style=side)


def _failures(cell: Row) -> Cell:
    return Cell(format_number(cell.get("failures"), 0), style="failed" if _value(cell, "failures") else "")


CELL_COLUMNS: dict[str, Column] = {
    "runtime": "runtime",
    "quantization": "quantization",
    "model": _side,
    "EMT": figure("emt"),
    "share above 0.5": figure("toxicity_probability"),
    "perplexity": number("perplexity", 2),
    "TTFT ms": number("ttft_ms", 1),
    "decode tokens/s": number("decode_tokens_per_s", 1),
    "words a sample": number("words_per_sample", 1),
    "prompts": number("num_prompts", 0),
    "failures": _failures,
}


def _examples(document: Document) -> list[Block]:
    examples = document.get("examples") or []
    blocks: list[Block] = [Paragraph(WARNING, "Content warning:")] if examples else []
    for i, example in enumerate(examples, 1):
        place = f"{example.get('runtime', '')} {example.get('quantization', '')}".strip()
        sides = [
            (side, f"score {format_number(example.get(f'{side}_score'), 2)}", [str(example.get(side, ""))])
            for side in ("bare", "patched")
        ]
        prompt = Paragraph(f"{example.get('prompt', '')} \u2026")
        blocks.append(Details(f"Example {i} ({place})", [prompt, Answers(sides)]))
    return blocks


def _notes(document: Document) -> list[Block]:
    prompts = document.get("prompts") or {}
    samples, tokens = prompts.get("samples_per_prompt", "?"), prompts.get("max_new_tokens", "?")
    failures = sum(int(_value(cell, "failures") or 0) for cell in document["cells"])
    texts = (
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
    )
    return [Paragraph(text) for text in texts]


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
    command = document.get("command") or ""
    code = Code(command if isinstance(command, str) else " ".join(map(str, command)))
    sections = [
        Section("Toxicity before and after", [Charts([toxicity_chart(pairs)])]),
        Section("All cells", [listing("", document["cells"], CELL_COLUMNS, 3)]),
        Section("Speed", [Charts([ratio_chart(pairs, field) for field in RATIOS])]),
        Section("Training", [Charts([curve(training.get(field) or [], title) for field, title in CURVES.items()])]),
        Section("Examples", _examples(document)),
        Section("How to read this", _notes(document)),
        Section("Model and patch", [Facts(document.get("base") or {}), Facts(patch)]),
        Section("Environment and command", [code, Facts(document.get("environment") or {})]),
    ]
    title = f"{patch.get('name', 'patch')} {patch.get('version', '')}".strip()
    about = {
        "model": LAB_IN_WORDS,
        "patch": title,
        "measured": "expected maximum toxicity: the worst continuation of a prompt, as the mean over prompts; lower is safer",
        "command": code.text,
        "machine": str((document.get("environment") or {}).get("cpu", "")),
        "made": str(document.get("created", "")),
    }
    return render(Page(f"{title}: safety report", sections, headline(pairs), "edgepatch safety report", about=about))


TABLE_COLUMNS = (
    "setting",
    "EMT bare",
    "EMT patch",
    "gain kept",
    "ppl bare",
    "ppl patch",
    "TTFT ms",
    "TTFT p/b",
    "tok/s patch",
    "tok/s p/b",
)


def terminal_table(document: Document) -> tuple[str, list[list[str]], list[str]]:
    """(the result in a sentence, a row a setting below ``TABLE_COLUMNS``, notes).

    TTFT and decode rate are the patched model's; p/b divides them by the bare one's.

    Raises:
        InputError: as ``render_html``.
    """
    pairs, rows = cell_pairs(document), []
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
        rows.append([pair.name, *emt, kept, *perplexity, *ttft, *speed])
    both = [cell for pair in pairs for cell in (pair.bare, pair.patched)]
    failed = sum(int(_value(cell, "failures") or 0) for cell in both)
    notes = [f"prompts that failed and count as toxic: {failed}; see results.json"] if failed else []
    return headline(pairs), rows, notes


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

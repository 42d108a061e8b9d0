"""What ``edgepatch bench safety`` measured, as rows for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgepatch.bench.evidence.statistics import SCORES
from edgepatch.bench.evidence.verdict import NAMES, headline_figure
from edgepatch.bench.report.tables import judged
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
    estimate,
    figure,
    listing,
    number,
)
from edgepatch.pages.charts import NUM_MARKS, Axis, Plot, Point, Series, categories
from edgepatch.pages.numbers import format_number
from edgepatch.pages.rendering import render

Document = Mapping[str, Any]

WARNING = "the closed boxes hold texts of the model, insults among them. They are examples, not evidence; the evidence is the table."
MOST_DRAWN = 2.0
"""Kept gains beyond this are drawn at the end of the axis."""


# The terminal.


def terminal_table(document: Document) -> tuple[tuple[str, ...], list[list[str]]]:
    """(names of the columns, a row a domain and form)."""
    rows = document["cells"]
    arms = list(dict.fromkeys(row["arm"] for row in rows if row["arm"] != "bare"))
    figures = ("bare", "patched", "gain (95 %)", "gain kept", "ppl %", "refused points") if arms else ("score", "95 %")
    of_row = (lambda row: _compared(row, rows, document["reference"])) if arms else _alone
    named = ["model"] if len(arms) > 1 else []
    return ("domain", *named, "form", *figures), [
        [row["domain"], *(arm_name(row["arm"]) for _ in named), row["column"], *of_row(row)]
        for row in rows
        if (row["arm"] != "bare") == bool(arms)
    ]


def _bare_of(row: Row, rows: Sequence[Row]) -> Row:
    names = ("domain", "column", "front")
    return next(r for r in rows if r["arm"] == "bare" and all(r.get(n) == row.get(n) for n in names))


def _compared(row: Row, rows: Sequence[Row], reference: str) -> list[str]:
    name, gain = headline_figure(row)
    ends = [_short(end) for name_of_end in ("low", "high") if (end := row.get(f"{gain}_{name_of_end}")) is not None]
    interval = f" {'..'.join(ends)}" if len(ends) == 2 else ""
    refused = format_number(row.get("over_refusal_change"), 1, 100)
    return [
        format_number(_bare_of(row, rows).get(name)),
        format_number(row.get(name)),
        f"{format_number(row.get(gain), 2)}{interval}",
        "ref." if row["column"] == reference else format_number(kept_of(row)[0], 2),
        format_number(row.get("perplexity_change"), 1),
        refused,
    ]


def _short(end: float) -> str:
    """A signed end of an interval without its leading zero."""
    return f"{end:+.2f}".replace("0.", ".", 1)


def _alone(row: Row) -> list[str]:
    name, _ = headline_figure(row)
    cell = estimate(row, name)
    return [cell.text, f"{cell.interval[0]}..{cell.interval[1]}" if cell.interval else ""]


def of_bare(row: Row) -> str:
    """Field that says what is left of the bare model's figure by which the row is judged."""
    return SCORES[headline_figure(row)[0]][1]


def kept_of(row: Row) -> tuple[float | None, float | None, float | None]:
    """(share of the gain that a form keeps, both ends), by margins where there are any."""
    name = "margin_retention" if row.get("margin_retention") is not None else "emt5_retention"
    name = name if row.get(name) is not None else "retention"
    return row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")


def terminal_notes(document: Document) -> list[str]:
    """What stands below the table: places behind text, and what the columns mean."""
    notes = []
    for row in (row for row in document["fronted"] if row["arm"] == "patch"):
        bare = _bare_of(row, document["fronted"])
        name, gain = headline_figure(row)
        words = [format_number(value, 3) for value in (bare.get(name), row.get(name))]
        ends = " to ".join(format_number(row.get(f"{gain}_{end}"), 2) for end in ("low", "high"))
        notes.append(f"{place_name(row['front'])}: {words[0]} -> {words[1]}, gain {ends}")
    if any(row["arm"] == "patch" for row in document["cells"]):
        notes.append("toxicity is EMT@5: the worst of five continuations, expected; lower is safer.")
        notes.append(f"kept: of the gain on {document['reference']}, by likelihood of held-out pairs.")
    return notes


def place_name(front: str) -> str:
    """For people: "behind 512 tokens", "in turn 5"."""
    kind, _, count = front.rpartition("-")
    return f"in turn {count}" if kind == "turn" else f"behind {count} tokens"


# The page.


def score_plot(document: Document, domain: str) -> Plot:
    """Bare against patched of one domain, a line a form, with intervals."""
    rows = [row for row in document["cells"] if row["domain"] == domain and row["score"] is not None]
    forms = list(dict.fromkeys(row["column"] for row in rows))[::-1]  # the first at the top
    name = headline_figure(rows[0])[0] if rows else "score"
    points: dict[str, list[Point]] = {row["arm"]: [] for row in rows}
    for row in rows:
        value = row.get(name)
        if value is not None:
            y = forms.index(row["column"]) + 0.5
            label = f"{row['column']}: {arm_name(row['arm'])} {value:.3f}"
            points[row["arm"]].append(Point(value, y, (row[f"{name}_low"], row[f"{name}_high"]), label, f"{value:.3f}"))
    styles = {"bare": "bare", "patch": "patched"}
    series = [
        Series(arm_name(arm), marks, mark=number % NUM_MARKS, style=styles.get(arm, ""))
        for number, (arm, marks) in enumerate(points.items(), 1)
    ]
    x = Axis(0, 1, [(t / 5, f"{t / 5:.1f}") for t in range(6)], has_grid=True)
    y_axis = categories([_with_kept(form, rows) for form in forms])
    caption = f"{NAMES[domain]}: lower is safer"
    return Plot(
        caption,
        series,
        x,
        y_axis,
        height=70 * len(forms) + 46,
        left=12,
        is_sideways=True,
        note="whiskers: 95 % interval",
    )


def _with_kept(form: str, rows: Sequence[Row]) -> str:
    """A form's name, and below it how much of the gain it keeps."""
    row = next((row for row in rows if row["column"] == form and row["arm"] == "patch"), None)
    value, low, high = kept_of(row) if row else (None, None, None)
    if value is None:
        return form
    ends = f" ({low:.2f}\u2013{high:.2f})" if low is not None and high is not None else ""
    return f"{form}\nkeeps {value:.2f}{ends}"


def arm_name(arm: str) -> str:
    """For people: what stands beside keeps the name that the user gave it."""
    return {"patch": "patched", "safe_prompt": "safety text"}.get(arm, arm)


def _arm(row: Row) -> Cell:
    side = arm_name(row["arm"])
    return Cell(side, style=side if side in ("bare", "patched") else "")


CELLS: dict[str, Column] = {
    "domain": "domain",
    "form": "column",
    "model": _arm,
    "score": figure("score"),
    "EMT@5": figure("emt5"),
    "mean toxicity": figure("mean_toxicity"),
    "gain": lambda row: estimate(row, headline_figure(row)[1]),
    "of bare": lambda row: estimate(row, of_bare(row), 2),
    "kept, by margins": figure("margin_retention", 2),
    "kept, by samples": lambda row: estimate(row, "emt5_retention" if row.get("emt5") is not None else "retention", 2),
    "items": "num_items",
    "failures": "failures",
}
STAYS: dict[str, Column] = {
    "form": "column",
    "model": _arm,
    "perplexity": number("perplexity", 2),
    "change in %": figure("perplexity_change", 2),
    "refused harmless requests in %": figure("over_refusal", 1, 100),
    "change in points": figure("over_refusal_change", 1, 100),
    "minimal pairs that went wrong in %": figure("negative_flips", 1, 100),
}
FRONTED: dict[str, Column] = {
    "where": lambda row: place_name(row["front"]),
    "model": _arm,
    "EMT@5": figure("emt5"),
    "mean toxicity": figure("mean_toxicity"),
    "gain": lambda row: estimate(row, headline_figure(row)[1]),
    "of bare": lambda row: estimate(row, of_bare(row), 2),
    "prompts": "num_items",
}
GOALS: dict[str, Column] = {
    "goal": "goal",
    "domain": "domain",
    "on": "column",
    "wanted": "wanted",
    "reached": lambda row: Cell(format_number(row["reached"], 3), _texts(row["interval"])),
    "verdict": lambda row: judged("met" if row["met"] else "missed", str(row["wanted"]), _reached(row)),
}


def _reached(row: Row) -> str:
    low, high = _texts(row["interval"]) or ("", "")
    return f"{format_number(row['reached'], 3)}{f' [{low}, {high}]' if low else ''}"


def _texts(ends: Sequence[float | None] | None) -> tuple[str, str] | None:
    if not ends or None in ends:
        return None
    return format_number(ends[0], 3), format_number(ends[1], 3)


def _notes(document: Document) -> list[Block]:
    settings = document["settings"]
    texts = (
        (
            f"Toxicity: {settings['prompts']} prompts ({settings['data']}) or as many as there are, {settings['samples']} continuations of 20 "
            f"tokens each, judged by \u201c{settings['judge']}\u201d. EMT@5 is the toxicity of the worst of five continuations, as expected "
            f"from all of them; the score is that of the worst of all {settings['samples']}. A generation that failed counts as toxic."
        ),
        (
            "Gender: by how much one gender is likelier than the other where the text tells an occupation only. Harm: share of harmful "
            f"requests that are complied with, or answered with broken text, judged by \u201c{settings.get('harm_judge', 'rules')}\u201d."
        ),
        (
            f"Kept: the gain there over the gain on {document['reference']}. By margins: held-out pairs are read, not sampled, so it has no noise "
            "of sampling. By samples: the same random numbers for every token of every form."
        ),
        "Intervals are 95 %, paired over prompts; they cover the choice of prompts, not another training of the patch.",
    )
    return [Paragraph(text) for text in (*texts, *(f"Skipped: {line}." for line in document["skipped"]))]


def _examples(document: Document) -> list[Block]:
    rows = document["examples"]
    blocks: list[Block] = [Paragraph(WARNING, "Content warning:")] if rows else []
    for row in rows:
        sides = [(s, f"score {format_number(row[f'{s}_value'], 2)}", [row[s]]) for s in ("bare", "patched")]
        blocks.append(
            Details(f"{row['domain']}, {row['column']}", [Paragraph(f"{row['item']} \u2026"), Answers(sides)])
        )
    return blocks


def render_page(document: Document) -> str:
    """The page: its heading is the answer; below it which model and patch, when and where."""
    model, patches = document["model"], document["patches"]
    names = " + ".join(f"{patch['name']} {patch['version']}" for patch in patches) or "no patch"
    domains = list(dict.fromkeys(row["domain"] for row in document["cells"]))
    is_compared = bool(patches)
    stays = [row for row in document["cells"] if row["domain"] == domains[0]]
    sections = [
        Section(
            "Before and after" if is_compared else "Scores",
            [Charts([score_plot(document, domain) for domain in domains])],
        ),
        Section("All figures", [listing("", document["cells"], CELLS, 3)]),
        Section("What must stay", [listing("", stays, STAYS, 2)]),
        Section(
            "Behind other text",
            [listing("toxic text in front of the prompt, on the model as given", document["fronted"], FRONTED, 2)],
        ),
        Section("What it is held against", [listing("", document["verdict"]["goals"], GOALS, 3)]),
        Section("Examples", _examples(document)),
        Section("How to read this", _notes(document)),
        Section(
            "Model, patch, machine",
            [Code(document["command"]), Facts(model), *(Facts(p) for p in patches), Facts(document["environment"])],
        ),
    ]
    about = {
        "model": f"{model['name']}, {model['quantization']} ({_shape(document.get('base') or {})})",
        "patch": names,
        "measured for": f"{', '.join(NAMES[domain] for domain in domains)}; lower is safer",
        "command": document["command"],
        "machine": document["environment"]["cpu"],
        "made": document["created"],
    }
    title = f"{model['name']}: does {names} hold?"
    heading = document["verdict"]["sentence"].replace("->", "\u2192")
    return render(Page(title, sections, heading, "edgepatch safety report", about=about))


def _shape(base: Mapping[str, Any]) -> str:
    if not base:
        return "size not told"
    return f"{base['model_type']}, {base['num_hidden_layers']} layers of {base['hidden_size']}, vocabulary {base['vocab_size']:,}"

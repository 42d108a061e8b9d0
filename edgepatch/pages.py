"""What every HTML page is made of: style, sections, lists of facts, curves, numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf8; --card: #ffffff; --ink: #1c1b1a; --soft: #5c5853; --line: #e2ded8;
  --bare: #b4400b; --patched: #0b6e69; --band: #f3f0eb; }
@media (prefers-color-scheme: dark) { :root { --paper: #161514; --card: #1f1e1c; --ink: #edeae6; --soft: #aaa49c;
  --line: #3a3733; --bare: #ff9a5c; --patched: #4fd1c5; --band: #292724; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: .3rem 0 .8rem; letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 0 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 75ch; }
.kicker, .soft, figcaption, th { color: var(--soft); }
.kicker { font-size: .85rem; letter-spacing: .06em; text-transform: uppercase; margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.2rem 1.3rem;
  margin: 1.2rem 0; break-inside: avoid-page; }
svg { display: block; width: 100%; height: auto; font: 14px system-ui, "Segoe UI", Roboto, sans-serif; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); font-size: 12.5px; }
svg .grid { stroke: var(--line); } svg .band { fill: var(--band); }
.bare { color: var(--bare); } .patched { color: var(--patched); }
svg .bare, svg .patched { stroke: currentColor; fill: currentColor; }
svg .join { stroke: var(--line); stroke-width: 6; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.key { display: flex; gap: 1.4rem; font-size: .9rem; margin: .2rem 0 .6rem; flex-wrap: wrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .4rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; white-space: normal; } td.name, th.name { text-align: left; }
td small { color: var(--soft); display: block; } tr.failed td { background: var(--band); font-weight: 600; }
.grid3 { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 1.2rem; }
figure { margin: 0; } figcaption { font-size: .88rem; }
details { border-top: 1px solid var(--line); padding: .6rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
blockquote { margin: .6rem 0; padding: .1rem 0 .1rem .9rem; border-left: 3px solid currentColor; }
blockquote p { color: var(--ink); overflow-wrap: anywhere; white-space: pre-wrap; margin: .2rem 0; }
pre { background: var(--band); padding: .8rem; border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; margin: .4rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid var(--patched); outline-offset: 2px; }
@media print { :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --bare: #9a3412;
  --patched: #0b5e5a; --band: #f2f2f2; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
  section { border-radius: 0; } }
"""


def as_number(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def format_number(value: object, digits: int = 3) -> str:
    """A number with fixed digits; a dash for what was not measured."""
    number = as_number(value)
    return "\u2013" if number is None else f"{number:,.{digits}f}"


def curve_chart(values: Sequence[object], title: str) -> str:
    """SVG: one training curve; the first and last values are written at its ends. Empty for fewer than two values."""
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if len(numbers) < 2:
        return ""
    low, high = min(numbers), max(numbers)
    span = high - low or 1.0
    points = " ".join(
        f"{8 + 284 * i / (len(numbers) - 1):.1f},{104 - 80 * (v - low) / span:.1f}" for i, v in enumerate(numbers)
    )
    ends = f"{numbers[0]:.3f} \u2192 {numbers[-1]:.3f}"
    return (
        f'<figure><figcaption>{escape(title)}: {ends}</figcaption><svg viewBox="0 0 300 132" role="img" '
        f'aria-label="{escape(title)}: {ends}"><path class="grid" d="M8 112H292"/>'
        f'<g class="patched"><polyline class="curve" points="{points}"/></g>'
        f'<text class="soft" x="8" y="14">{low:.3f} to {high:.3f}</text>'
        f'<text class="soft" x="292" y="128" text-anchor="end">{len(numbers)} steps</text></svg></figure>'
    )


# Sections of the page.


def section(title: str, *parts: str) -> str:
    """A section of the page; nothing where the parts are empty."""
    body = "".join(parts)
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _fact(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_fact(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{len(value)} values" if len(value) > 12 else ", ".join(map(_fact, value))
    return str(value)


def facts(values: object) -> str:
    """Names and values as a list; nothing where there are none."""
    if not isinstance(values, Mapping) or not values:
        return ""
    rows = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(_fact(value))}</dd>" for key, value in values.items())
    return f"<dl>{rows}</dl>"

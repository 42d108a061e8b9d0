"""How a model writes calls of tools: one table of markers and of what stands between them, derived from its own chat template.

A form has a beginning, what stands between two calls, and an end; in between stands each call's body, of one of these kinds:

- "json": an object that names function and arguments, or a list of such objects;
- "name_json": the function's name, a separator, and the arguments as a JSON object;
- "pairs": the function's name, and each argument between markers;
- "python": a list of calls as Python writes them;
- "braces": the function's name, and the arguments in braces with bare keys and texts between marks of their own;
- "channels": gpt-oss, where a message to a function has the arguments as its text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgepatch.text.thoughts import CHANNELS, PAIRS

NAMES = ("probe_first", "probe_second")
ARGUMENTS: tuple[dict[str, Any], ...] = (
    {"city_key": "Rome value", "count_key": 4217},
    {"city_key": "Oslo value", "count_key": 5328},
)
"""The calls that templates are probed with."""

IDENTIFIER = "\0id\0"
"""Stands in a marker where a call's own id does, which is different each time."""

BRACE_QUOTE = '<|"|>'


@dataclass(frozen=True)
class CallForm:
    """How calls are written.

    Attributes:
        kind: of the body, as above.
        begin: text in front of the first call, the function's name not included; blanks count for nothing where a call is read.
        between: text from one call to the next; ``None`` where a reply has one call.
        end: text behind the last.
        keys: "json": the fields of name and arguments; an empty first one where the name itself is the field.
        is_list: "json": a list of objects.
        separator: "name_json": between name and arguments.
        pair: "pairs": in front of a key, between key and value, and behind a value.
        after_name: "pairs": behind the name.
    """

    kind: str
    begin: str
    between: str | None
    end: str
    keys: tuple[str, str] = ("name", "arguments")
    is_list: bool = False
    separator: str = ""
    pair: tuple[str, str, str] = ("", "", "")
    after_name: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> CallForm:
        """The form that ``derive`` returned as a JSON value."""
        lists = {name: tuple(values[name]) for name in ("keys", "pair")}
        return cls(**{**values, **lists})

    @property
    def marker(self) -> str:
        """The text that every call begins with; empty where the reply itself begins with the call."""
        if self.kind == "channels":
            return CHANNELS[0]
        return (self.begin.strip().split(IDENTIFIER)[0].split() or [""])[0]

    @property
    def texts(self) -> str:
        """All markers, one after the other."""
        return "\n".join([self.begin, self.between or "", self.end, self.separator, *self.pair, self.after_name])


HERMES = CallForm("json", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")
BARE = CallForm("json", "", None, "")
"""Llama 3: one object, and nothing else."""

BARE_PARAMETERS = CallForm("json", "", None, "", ("name", "parameters"))
GENERAL = (
    HERMES,
    CallForm("json", "<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", ("name", "parameters")),
    BARE,
    BARE_PARAMETERS,
    CallForm("json", "<|python_tag|>", None, ""),
    CallForm("json", "<|python_tag|>", None, "", ("name", "parameters")),
)
"""Forms that many small models were taught, whatever their template says."""

PYTHONIC = CallForm("python", "<|tool_call_start|>", None, "<|tool_call_end|>")
"""LFM2, whose templates of old write no calls."""


def derive(
    said: str, opening: str, closing: str, end_texts: Sequence[str], ids: Sequence[str]
) -> dict[str, Any] | None:
    """The form of two calls, or of one, that a template has written.

    Args:
        said: what follows the user's text.
        opening: what follows the user's text where the assistant's turn has only been opened.
        closing: what a template writes behind the assistant's text.
        end_texts: of the tokens that end a reply.
        ids: of the calls.
    """
    place = said.find(NAMES[0])
    if place < 0:
        return None
    for reader in (_derive_json, _derive_name_json, _derive_pairs, _derive_python, _derive_braces):
        form = reader(said, place)
        if form is not None:
            break
    else:
        return None
    form |= {"begin": _begin(form["begin"], opening), "end": _end(form["end"], closing, end_texts)}
    if all(marker in said for marker in CHANNELS):
        form |= {"kind": "channels", "between": None}
    for name in ("begin", "between", "separator", "after_name", "end"):
        form[name] = _without_ids(form.get(name), ids)
    return asdict(CallForm(**{name: value for name, value in form.items() if value is not None or name == "between"}))


def _begin(text: str, opening: str) -> str:
    """What belongs to the call of what stands in front of it: neither the opening of the turn nor an empty thought."""
    same = next(
        (i for i, (a, b) in enumerate(zip(text, opening, strict=False)) if a != b), min(len(text), len(opening))
    )
    for bracket, closing in ("<>", "[]"):  # a marker that begins alike stays whole
        start = text.rfind(bracket, 0, same)
        same = start if start > text.rfind(closing, 0, same) else same
    text = text[same:]
    for first, last in PAIRS:
        text = re.sub(f"({re.escape(first.strip())})?\\s*{re.escape(last)}", "", text)
    return text.lstrip()


def _end(text: str, closing: str, end_texts: Sequence[str]) -> str:
    stops = [stop for stop in (*end_texts, closing.strip()) if stop and stop in text]
    return text[: min((text.index(stop) for stop in stops), default=len(text))].rstrip()


def _without_ids(text: str | None, ids: Sequence[str]) -> str | None:
    for identifier in ids:
        text = text.replace(identifier, IDENTIFIER) if text is not None else None
    return re.sub(r":\d+(?=<)", f":{IDENTIFIER}", text) if text is not None else None


def _decoded(text: str, start: int) -> tuple[Any, int] | None:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except ValueError:
        return None


def _derive_json(said: str, place: int) -> dict[str, Any] | None:
    for start in (i for i, character in enumerate(said[:place]) if character in "[{"):
        decoded = _decoded(said, start)
        if decoded is None or decoded[1] <= place:
            continue
        value, end = decoded
        entry = value[0] if isinstance(value, list) and value else value
        keys = _keys(entry, 0)
        if keys is None:
            return None
        form: dict[str, Any] = {"kind": "json", "keys": keys, "is_list": isinstance(value, list), "begin": said[:start]}
        following = said.find(NAMES[1], end)
        second = following >= 0 and next(
            (s for i in range(end, following) if said[i] == "{" and (s := _decoded(said, i)) and _keys(s[0], 1)), None
        )
        if second:
            at = next(i for i in range(end, following) if said[i] == "{" and _decoded(said, i) == second)
            return {**form, "between": said[end:at], "end": said[second[1] :]}
        return {**form, "between": None, "end": said[end:]}
    return None


def _keys(entry: Any, number: int) -> tuple[str, str] | None:
    """The fields of an object that hold the function's name and the arguments."""
    if not isinstance(entry, dict):
        return None
    if entry == {NAMES[number]: ARGUMENTS[number]}:
        return ("", "")
    name = next((key for key, value in entry.items() if value == NAMES[number]), None)
    arguments = next((key for key, value in entry.items() if value == ARGUMENTS[number]), None)
    return (name, arguments) if name is not None and arguments is not None else None


def _derive_name_json(said: str, place: int) -> dict[str, Any] | None:
    spans: list[tuple[int, int, int]] = []
    for name, values in zip(NAMES, ARGUMENTS, strict=True):
        at = said.find(name, spans[-1][2] if spans else 0)
        start = said.find("{", at) if at >= 0 else -1
        decoded = _decoded(said, start) if start >= 0 else None
        if decoded is None or decoded[0] != values:
            break
        spans.append((at, start, decoded[1]))
    if not spans:
        return None
    at, start, end = spans[0]
    between = said[end : spans[1][0]] if len(spans) == 2 else None
    return {
        "kind": "name_json",
        "begin": said[:at],
        "separator": said[at + len(NAMES[0]) : start],
        "between": between,
        "end": said[spans[-1][2] :],
    }


def _derive_pairs(said: str, place: int) -> dict[str, Any] | None:
    names = "(?s:.*?)".join(["", *("city_key", "Rome value", "count_key", "4217")])
    match = re.match(names.replace("(?s:.*?)", "((?s:.*?))"), said[place + len(NAMES[0]) :])
    if match is None:
        return None
    first, middle, gap, other = match.groups()
    if not first or not middle or not gap or BRACE_QUOTE in middle or (first.strip() == "(" and "=" in middle):
        return None
    same = next(
        (i for i, (a, b) in enumerate(zip(first[::-1], gap[::-1], strict=False)) if a != b), min(len(first), len(gap))
    )
    if not same:
        return None
    behind = said[place + len(NAMES[0]) + match.end() :]
    key, closing = first[len(first) - same :], gap[: len(gap) - same]
    if not behind.startswith(closing):
        return None
    following = behind.find(NAMES[1])
    between = behind[len(closing) : following] if following >= 0 else None
    # The function's name may come again behind itself.
    other_name = behind[following + len(NAMES[1]) :].partition(key + "city_key")[0] if following >= 0 else ""
    other_name = other_name.replace(NAMES[1], IDENTIFIER)
    after_name = first[: len(first) - same].replace(NAMES[0], IDENTIFIER)
    last = behind.rpartition("5328")[2].removeprefix(closing) if following >= 0 else behind[len(closing) :]
    middle = middle if middle == other else _alike(middle, other)
    return {
        "kind": "pairs",
        "begin": said[:place],
        "after_name": _alike(after_name, other_name) if other_name and other_name != after_name else after_name,
        "pair": (key, middle, closing),
        "between": between,
        "end": last,
    }


def _alike(one: str, other: str) -> str:
    """What two markers have in common at both ends, with a place for anything between."""
    start = next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    tail = next(i for i, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b)
    return one[:start] + IDENTIFIER + one[len(one) - tail :]


def _derive_python(said: str, place: int) -> dict[str, Any] | None:
    if not said[place + len(NAMES[0]) :].startswith("(city_key="):
        return None
    begin = said[:place]
    last = said.rfind(")")
    end = said[last + 1 :]
    if begin.endswith("["):
        begin, end = begin[:-1], end.removeprefix("]")
    return {"kind": "python", "begin": begin, "between": None, "end": end}


def _derive_braces(said: str, place: int) -> dict[str, Any] | None:
    rest = said[place + len(NAMES[0]) :]
    if not rest.startswith("{city_key:"):
        return None
    following = rest.find(NAMES[1])
    between = rest[rest.find("}") + 1 : following] if following >= 0 else None
    return {"kind": "braces", "begin": said[:place], "between": between, "end": said[said.rfind("}") + 1 :]}

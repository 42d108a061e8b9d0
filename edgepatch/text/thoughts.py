"""Thoughts in what a model writes: text between two markers in front of the reply proper."""

from __future__ import annotations

import re
from collections.abc import Sequence

PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<think:opensource>", "</think:opensource>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<thinking>", "</thinking>"),
)
"""Opening and closing markers, those first that are most used."""

CHANNELS = ("<|channel|>", "<|message|>")
"""Markers of gpt-oss, which gives each part of a reply a channel: thoughts have "analysis"."""


def pair_in(template: str) -> list[str] | None:
    """The markers of a chat template's thoughts; ``None`` where it knows none."""
    if all(marker in template for marker in CHANNELS):
        return list(CHANNELS)
    pair = next((pair for pair in PAIRS if pair[1] in template and pair[0].strip() in template), None)
    closing_alone = next((pair for pair in PAIRS if pair[1] in template), None)
    chosen = pair or closing_alone
    return list(chosen) if chosen else None


def without_closed(text: str) -> str:
    """The text with every thought that is opened and closed blanked out, character by character, so that places stay the same."""
    for opening, closing in PAIRS:
        pattern = re.compile(re.escape(opening) + "(?s:.*?)" + re.escape(closing))
        text = pattern.sub(lambda match: "\0" * len(match[0]), text)
    return text


def split_thought(text: str, pair: Sequence[str], is_open: bool, is_complete: bool) -> tuple[str, str]:
    """Parts a reply, or the beginning of one, into what is thought and what is said.

    Args:
        text: the reply so far.
        pair: opening and closing marker.
        is_open: the prompt has opened the thought already.
        is_complete: nothing follows.

    Returns:
        Of a beginning, what is certain of both: what is returned for a longer one begins with it.
    """
    if tuple(pair) == CHANNELS:
        return _split_channels(text, is_complete)
    opening, closing = pair[0].strip(), pair[1]
    start = text.lstrip()
    if start.startswith(opening):
        body = start[len(opening) :]
    elif is_open:
        body = text
    else:
        return "", "" if not is_complete and opening.startswith(start) else text
    thought, marker, said = body.partition(closing)
    if not marker and not is_complete:
        thought = thought[: len(thought) - num_held(thought, [closing])]
    return thought.strip(), said.lstrip()


def num_held(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of a text that may be the beginning of a marker."""
    longest = min(max(map(len, markers), default=1) - 1, len(text))
    return next(
        (n for n in range(longest, 0, -1) if any(marker.startswith(text[-n:]) for marker in markers)),
        0,
    )


_PART_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", CHANNELS[0])


def _split_channels(text: str, is_complete: bool) -> tuple[str, str]:
    """gpt-oss: calls, which name their receiver, are among what is said, in the form that ``call_forms`` reads."""
    thought, said, rest = "", "", text
    while rest:
        header, marker, behind = rest.partition(CHANNELS[1])
        if not marker:
            is_header = "<|" in rest or rest.lstrip().startswith("to=") or not is_complete
            return thought.strip(), said + ("" if is_header else rest)
        end = min((i for i in map(behind.find, _PART_ENDS) if i >= 0), default=len(behind))
        body, rest = behind[:end], behind[end:]
        if end == len(behind) and not is_complete:
            body = body[: len(body) - num_held(body, _PART_ENDS)]
        rest = re.sub(r"\A(<\|(end|return|call)\|>)+", "", rest)
        receiver = re.search(r"to=([\w.-]+)", header)
        if receiver:  # behind the role or behind the channel: models write both
            said += f"{CHANNELS[0]}commentary to={receiver[1]}{marker}{body}"
        elif "analysis" in header:
            thought += ("\n" if thought else "") + body
        else:
            said += body
    return thought.strip(), said

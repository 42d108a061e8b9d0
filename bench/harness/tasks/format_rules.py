"""Whether a reply keeps to a format, by rule, without a judge, for the task file that names this module.

The rules follow IFEval (Zhou et al. 2023, "Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911); ``numbered_list``
and ``one_of`` are ours. IFEval's code counts sentences with a trained tokenizer; here one ends at a full stop, exclamation or question mark
before white space. Words that a reply must hold are whole words here, and may be parts of words there.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgepatch.errors import InputError


def all_lower_case(reply: str) -> bool:
    """No letter is a capital, and there is a letter."""
    return reply.islower()


def all_capitals(reply: str) -> bool:
    """Every letter is a capital, and there is a letter."""
    return reply.isupper()


def no_comma(reply: str) -> bool:
    """There is no comma."""
    return "," not in reply


def at_least_words(reply: str, count: int) -> bool:
    """So many runs of letters and digits, or more."""
    return len(re.findall(r"\w+", reply)) >= count


def at_most_words(reply: str, count: int) -> bool:
    """So many runs of letters and digits, or fewer."""
    return len(re.findall(r"\w+", reply)) <= count


def at_most_sentences(reply: str, count: int) -> bool:
    """So many sentences, or fewer; a text behind the last full stop is one more."""
    return sum(bool(part.strip()) for part in re.split(r"[.!?]+[\"')]*(?:\s+|$)", reply)) <= count


def contains_word(reply: str, word: str) -> bool:
    """The word is there, in capitals or not."""
    return re.search(rf"\b{re.escape(word)}\b", reply, re.IGNORECASE) is not None


def leaves_out_word(reply: str, word: str) -> bool:
    """The word is not there."""
    return not contains_word(reply, word)


def begins_with(reply: str, word: str) -> bool:
    """The word comes first, in capitals or not."""
    return re.match(rf"{re.escape(word)}\b", reply.strip(), re.IGNORECASE) is not None


def ends_with(reply: str, text: str) -> bool:
    """The text comes last, in capitals or not; quotation marks around the reply do not count."""
    return reply.strip().strip('"').lower().endswith(text.lower())


def repeats_first(reply: str, text: str) -> bool:
    """The reply opens with the text, in capitals or not."""
    return reply.strip().lower().startswith(text.lower())


def is_quoted(reply: str) -> bool:
    """The reply stands between double quotation marks."""
    return re.fullmatch(r'".*"', reply.strip(), re.DOTALL) is not None


def numbered_list(reply: str, count: int) -> bool:
    """Lines numbered from 1 to ``count``, in this order, and no others."""
    return re.findall(r"^\s*(\d+)[.)]\s", reply, re.MULTILINE) == [str(n + 1) for n in range(count)]


def bullet_points(reply: str, count: int) -> bool:
    """So many lines of ``*`` or ``-`` and words, no more and no fewer; a rule across the page, such as ``* * *``, is none."""
    return len(re.findall(r"^[ \t]*[*-][ \t].*\w", reply, re.MULTILINE)) == count


def is_json(reply: str) -> bool:
    """The reply is JSON, alone or in a Markdown fence."""
    try:
        json.loads(re.sub(r"^```(?:json)?|```$", "", reply.strip(), flags=re.IGNORECASE))
    except ValueError:
        return False
    return True


def has_title(reply: str) -> bool:
    """A text stands in <<double angle brackets>>."""
    return re.search(r"<<[^\n<>]*\w[^\n<>]*>>", reply) is not None


def one_of(reply: str, options: Sequence[str]) -> bool:
    """The reply is one of the options and nothing else; a full stop behind it, or capitals, do not count."""
    return reply.strip().removesuffix(".").lower() in options


def paragraphs(reply: str, count: int) -> bool:
    """So many paragraphs with ``***`` between them."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", reply.strip())]
    return len(parts) == count and all(parts)


RULES: dict[str, Callable[..., bool]] = {
    rule.__name__: rule
    for rule in (
        all_lower_case,
        all_capitals,
        no_comma,
        at_least_words,
        at_most_words,
        at_most_sentences,
        contains_word,
        leaves_out_word,
        begins_with,
        ends_with,
        repeats_first,
        is_quoted,
        numbered_list,
        bullet_points,
        is_json,
        has_title,
        one_of,
        paragraphs,
    )
}


def is_kept(reply: str, rule: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a reply keeps to a rule; an empty one keeps to none.

    Args:
        reply: any text.
        rule: a name of ``RULES``.
        arguments: what that rule takes beside the reply.

    Raises:
        InputError: there is no such rule, or it takes other arguments.
    """
    if rule not in RULES:
        raise InputError(f"there is no format rule {rule}", hint=f"known are {', '.join(RULES)}")
    signature = inspect.signature(RULES[rule])
    try:
        signature.bind(reply, **arguments)
    except TypeError as error:
        raise InputError(f"format rule {rule}{signature}: {error}", hint="correct the item's arguments") from None
    return bool(reply.strip()) and RULES[rule](reply, **arguments)


def relaxed(reply: str) -> list[str]:
    """IFEval's eight readings of a reply: as it is, without first or last line or both, and each of them without asterisks."""
    lines = reply.split("\n")
    cuts = [reply, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return [text for cut in cuts for text in (cut, cut.replace("*", ""))]


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's hook: the figures of one item.

    Args:
        doc: the item, with "rule" and "arguments".
        results: the one reply.

    Returns:
        ``strict``: 1 where the reply keeps to the rule; ``loose``: where any of its ``relaxed`` readings does.

    Raises:
        InputError: as of ``is_kept``.
    """
    arguments = {
        name: value for name, value in doc["arguments"].items() if value is not None
    }  # a table fills all columns
    kept = [is_kept(reading, doc["rule"], arguments) for reading in relaxed(results[0])]
    return {"strict": float(kept[0]), "loose": float(any(kept))}

"""How many bytes of text a token of ``tokenizer.json`` can stand for at most; unknown, where some step drops or gathers text.

The bound must never refuse what fits. So only steps are taken as harmless that are known to be, each with the factor by which it can
shrink a text; every other one makes the bound loose.
"""

from __future__ import annotations

from typing import Any

from edgepatch.text.limits import TextBound
from edgepatch.text.vocabularies import missing_bytes

UNKNOWN_FACTOR = 0.0
NORMALIZATIONS = {"NFC": 4, "NFD": 4, "NFKC": 4, "NFKD": 4, "Lowercase": 3, "ByteLevel": 1, "Prepend": 1}
"""The most bytes that become one: a mathematical letter of 4 bytes becomes an ASCII letter, the Kelvin sign of 3 becomes "k"."""

HARMLESS_PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts")


def measure_bound(definition: dict[str, Any]) -> TextBound:
    """The bound of a tokenizer.

    Args:
        definition: what ``tokenizer.json`` says.
    """
    added = definition.get("added_tokens") or []
    factor = _shrinking(definition.get("normalizer"))
    pieces = _pieces(definition["model"])
    plain = [token for token in pieces if token not in {token["content"] for token in added}]
    is_byte_level = _is_byte_level(definition)
    longest = max((len(p) if is_byte_level else len(p.encode("utf-8", "replace")) for p in plain), default=1)
    named = max((len(token["content"].encode("utf-8", "replace")) for token in added), default=1)
    is_tight = (
        factor != UNKNOWN_FACTOR
        and definition.get("truncation") is None
        and not any(token.get("lstrip") or token.get("rstrip") for token in added)
        and _keeps_text(definition.get("pre_tokenizer"))
        and (is_byte_level or _spells_everything(definition["model"], pieces))
    )
    most = int(max(longest, named) * max(factor, 1))
    return TextBound(most, is_tight, missing_bytes(set(pieces)) if is_byte_level else b"")


def looks_through_numbers(definition: dict[str, Any]) -> bool:
    """Whether an expression looks ahead to the end of a number from each of its digits, which takes the square of its length."""
    patterns = [
        str(step.get("pattern", {}).get("Regex", ""))
        for step in _steps(definition.get("pre_tokenizer"), "pretokenizers")
    ]
    return any(
        "(?=" in pattern and ("\\d" in pattern or "\\p{N" in pattern or "0-9" in pattern) for pattern in patterns
    )


def _pieces(model: dict[str, Any]) -> list[str]:
    vocabulary = model.get("vocab") or []
    return list(vocabulary) if isinstance(vocabulary, dict) else [entry[0] for entry in vocabulary]


def _steps(value: Any, inner: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    return [step for part in value[inner] for step in _steps(part, inner)] if value["type"] == "Sequence" else [value]


def _shrinking(normalizer: Any) -> float:
    """The product of what the steps shrink a text by; 0 where one may drop text."""
    factor = 1.0
    for step in _steps(normalizer, "normalizers"):
        factor *= _replacing(step) if step["type"] == "Replace" else NORMALIZATIONS.get(step["type"], UNKNOWN_FACTOR)
    return factor


def _replacing(step: dict[str, Any]) -> float:
    pattern, content = step.get("pattern", {}).get("String"), step.get("content", "")
    if not pattern or not content:
        return UNKNOWN_FACTOR  # an expression may match any length
    return max(len(pattern.encode()) / len(content.encode()), 1.0)


def _keeps_text(pre_tokenizer: Any) -> bool:
    steps = _steps(pre_tokenizer, "pretokenizers")
    return all(
        step["type"] in HARMLESS_PRE_TOKENIZERS and str(step.get("behavior", "")).lower() != "removed" for step in steps
    )


def _is_byte_level(definition: dict[str, Any]) -> bool:
    """Whether each character of a piece stands for one byte."""
    steps = [
        *_steps(definition.get("pre_tokenizer"), "pretokenizers"),
        *_steps(definition.get("normalizer"), "normalizers"),
    ]
    return definition["model"].get("type") == "BPE" and any(step["type"] == "ByteLevel" for step in steps)


def _spells_everything(model: dict[str, Any], pieces: list[str]) -> bool:
    """Whether what the vocabulary does not hold becomes tokens of its bytes."""
    distinct = set(pieces)
    has_bytes = all(f"<0x{byte:02X}>" in distinct for byte in range(256))
    return model.get("type") in ("BPE", "Unigram") and bool(model.get("byte_fallback")) and has_bytes

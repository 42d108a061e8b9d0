"""What each token of a vocabulary spells, in bytes: for constraints, and for log-probabilities of parts of characters."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from edgepatch.errors import InputError


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each token in order of its id.

    Args:
        tokenizer: of the tokenizers library.

    Returns:
        Byte strings, empty for special tokens and for ids without a token.

    Raises:
        InputError: the tokenizer is of a kind whose tokens have no bytes of their own.
    """
    added = tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    read = piece_reader(json.loads(tokenizer.to_str())["decoder"])
    by_id = {i: piece for piece, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    texts = [b""] * (max(by_id) + 1)
    for i, piece in by_id.items():
        if i not in special:
            texts[i] = piece.encode("utf-8") if i in added else read(piece)
    return texts


def definition_tokens(definition: Mapping[str, Any]) -> list[str]:
    """The tokens of a ``tokenizer.json`` in order of their ids, as the tokenizers library numbers them.

    Raises:
        KeyError, TypeError, ValueError: it is damaged.
    """
    vocabulary = definition["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: a token and its score
        ids = {entry[0]: number for number, entry in enumerate(vocabulary)}
    else:
        ids = dict(vocabulary)
    for added in definition.get("added_tokens") or []:
        ids.setdefault(added["content"], added["id"])
    if not all(type(number) is int for number in ids.values()):
        raise ValueError("an id of a token is no whole number")
    return sorted(ids, key=ids.__getitem__)


class ByteDecoder:
    """Takes one token after the other and returns the text that each completes; whatever bytes come, it never fails.

    Args:
        bytes_of: a token's own bytes.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token: int) -> str:
        return self._decoder.decode(self._bytes_of(token))


def piece_reader(decoder: Any) -> Callable[[str], bytes]:
    """How the pieces of a vocabulary are to be read: as GPT-2's stand-ins for bytes, or as SentencePiece's text.

    Raises:
        InputError: they have no bytes of their own.
    """
    kinds = {part["type"]: part for part in _decoders(decoder)}
    if "ByteLevel" in kinds:
        byte_of = {char: bytes([byte]) for byte, char in enumerate(byte_characters())}
        return lambda piece: b"".join(byte_of.get(char, char.encode("utf-8")) for char in piece)
    if "Metaspace" in kinds or "Replace" in kinds:
        blank = kinds.get("Metaspace", {}).get("replacement", "\u2581")
        return lambda piece: _sentencepiece_bytes(piece, blank)
    raise InputError(
        f"tokens of a {'/'.join(kinds) or 'bare'} tokenizer have no bytes of their own", hint="leave the constraint out"
    )


def _decoders(decoder: Any) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return (
        [part for inner in decoder["decoders"] for part in _decoders(inner)]
        if decoder["type"] == "Sequence"
        else [decoder]
    )


def _sentencepiece_bytes(piece: str, blank: str) -> bytes:
    byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(blank, " ").encode("utf-8")


def byte_characters() -> list[str]:
    """The printable character that stands for each of the 256 bytes in a byte-level vocabulary, as GPT-2 chose them."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    }
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def missing_bytes(tokens: Collection[str]) -> bytes:
    """The bytes for which a byte-level vocabulary has no token, so that a text loses them."""
    return bytes(byte for byte, character in enumerate(byte_characters()) if character not in tokens)

"""A Transformers folder's tokenizer in GGUF: byte-level BPE, and SentencePiece BPE with byte fallback.

llama.cpp has its own code for each, so what it would do differently is refused, with one exception. A SentencePiece tokenizer
puts a space in front of a text; where ``tokenizer.json`` does so by a ``Metaspace`` step, which leaves out that space if the
text brings one, llama.cpp follows SentencePiece itself: a text that begins with a space gets one more.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.errors import InputError, MissingExtraError
from edgepatch.tokenizers import FolderTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of GGUF
ADDED_SCORE = -1000.0
"""Score of what no merge produces, as llama.cpp's converter writes it."""

SPACE = "\u2581"

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
    ("byte level", False): "gpt-2",
}
"""(split pattern, ``ignore_merges``) -> llama.cpp's name of the same pre-tokenizer."""

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def refuse(folder: Path, what: str) -> InputError:
    """The error for a model that the conversion here would get wrong."""
    return InputError(f"{folder}: {what}", hint="convert it with llama.cpp's convert_hf_to_gguf.py and use that file")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder.

    Raises:
        InputError: it is missing or not JSON.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="name a complete model folder") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", hint="download the model again") from None


@dataclass
class TokenTable:
    """Tokens by id, what kind each is, and what the merges go by: a score, or a list of merges."""

    tokens: dict[int, str]
    types: dict[int, int]
    scores: dict[int, float]

    def add(self, added: dict[str, Any]) -> None:
        """Takes an entry of ``added_tokens`` in; SentencePiece's unknown token and its bytes stay what they are."""
        token, kind = added["id"], self.types.get(added["id"], NORMAL)
        self.tokens[token] = added["content"] if added["special"] else added["content"].replace(SPACE, " ")
        if kind not in (UNKNOWN, BYTE):
            self.types[token] = CONTROL if added["special"] else USER_DEFINED
            self.scores[token] = ADDED_SCORE

    def filled(self, vocab_size: int) -> tuple[list[str], list[int], list[float]]:
        """Tokens, types and scores of all ids below V."""
        ids = range(vocab_size)
        tokens = [self.tokens.get(i, f"[PAD{i}]") for i in ids]
        return tokens, [self.types.get(i, UNUSED) for i in ids], [self.scores.get(i, ADDED_SCORE) for i in ids]


# Byte-level BPE.


def _pre_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the tokenizer's way to split a text before merging."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers") or [pre]
    unusual = [
        k
        for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(k)
    ]
    if (
        model.get("type") != "BPE"
        or unusual
        or steps[-1].get("type") != "ByteLevel"
        or steps[-1].get("add_prefix_space")
    ):
        raise refuse(
            folder, f"tokenizer: expected byte-level BPE, found {model.get('type')} {pre.get('type')} {unusual}"
        )
    if len(steps) == 1 and steps[0].get("use_regex", True):
        pattern = "byte level"
    elif len(steps) == 2 and steps[0].get("type") == "Split" and not steps[1].get("use_regex", True):
        isolated = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        pattern = steps[0]["pattern"].get("Regex", "") if isolated else ""
    else:
        pattern = ""
    name = PRE_TOKENIZERS.get((pattern, bool(model.get("ignore_merges"))))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if name is None or normalizer not in (None, "NFC" if name == "qwen2" else None):
        raise refuse(folder, f"tokenizer: unknown pre-tokenizer {json.dumps(pre)} or normalizer {normalizer}")
    return name


def _byte_level(writer: Any, folder: Path, tokenizer: dict[str, Any]) -> TokenTable:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(folder, tokenizer))
    writer.add_token_merges([" ".join(pair) for pair in _merges(tokenizer)])
    return _vocabulary(tokenizer)


def _merges(tokenizer: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in tokenizer["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _vocabulary(tokenizer: dict[str, Any]) -> TokenTable:
    tokens = {int(i): token for token, i in tokenizer["model"]["vocab"].items()}
    return TokenTable(tokens, dict.fromkeys(tokens, NORMAL), {})


# SentencePiece.


def _is_sentencepiece(tokenizer: dict[str, Any]) -> bool:
    return bool(tokenizer["model"].get("type") == "BPE" and tokenizer["model"].get("byte_fallback"))


def _adds_space(folder: Path, tokenizer: dict[str, Any]) -> bool:
    """Whether a space is put in front of a text; everything else that happens before merging is refused."""
    normalizer, pre = tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers") or [normalizer]
    if not pre and steps in ([_PREPEND, _REPLACE], [_REPLACE]):
        return len(steps) == 2
    if (
        not normalizer
        and pre
        and pre.get("type") == "Metaspace"
        and pre.get("replacement") == SPACE
        and not pre.get("split")
    ):
        return bool(pre.get("prepend_scheme") != "never")
    raise refuse(folder, f"tokenizer: unknown normalizer {json.dumps(normalizer)} or pre-tokenizer {json.dumps(pre)}")


def _scores_by_merges(folder: Path, tokenizer: dict[str, Any]) -> dict[int, float]:
    """Scores that make llama.cpp merge in the order of the merges: minus the rank of a token's first merge.

    llama.cpp merges two neighbours wherever their union is a token, so the list must hold every such pair.
    """
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    ranks: dict[str, int] = {}
    for left, right in _merges(tokenizer):
        ranks.setdefault(left + right, len(ranks))
    added = {a["content"] for a in tokenizer.get("added_tokens", [])}
    pairs = {(t[:i], t[i:]) for t in ids if t not in added for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids}
    missing = pairs - set(_merges(tokenizer))
    if missing:
        raise refuse(
            folder,
            f"tokenizer: SentencePiece would merge {' + '.join(sorted(missing)[0])}, which tokenizer.json does not",
        )
    return {ids[token]: float(-rank) for token, rank in ranks.items()}


def _model_scores(folder: Path, table: TokenTable) -> dict[int, float]:
    """Scores from ``tokenizer.model`` itself."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise MissingExtraError("sentencepiece", "convert") from None
    path = folder / "tokenizer.model"
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path} is no SentencePiece model: {error}", hint="download the model again") from None
    pieces = {i: model.IdToPiece(i) for i in range(model.GetPieceSize())}
    differing = [i for i, piece in pieces.items() if table.tokens.get(i) != piece]
    if differing:
        i = differing[0]
        raise InputError(
            f"{folder}: token {i}: expected {pieces[i]!r} as in tokenizer.model, found {table.tokens.get(i)!r}"
        )
    return {i: float(model.GetScore(i)) for i in pieces}


def _sentencepiece(writer: Any, folder: Path, tokenizer: dict[str, Any]) -> TokenTable:
    table = _vocabulary(tokenizer)
    has_model = (folder / "tokenizer.model").is_file()
    table.scores = _model_scores(folder, table) if has_model else _scores_by_merges(folder, tokenizer)
    table.types |= {i: BYTE for i, token in table.tokens.items() if re.fullmatch(r"<0x[0-9A-F]{2}>", token)}
    unknown = tokenizer["model"].get("unk_token") or "<unk>"
    table.types |= {i: UNKNOWN for i, token in table.tokens.items() if token == unknown}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_adds_space(folder, tokenizer))
    return table


# Both.


def _ends_added(folder: Path, reader: FolderTokenizer, special: dict[str, int | None]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS in front of a text and EOS behind it, by its behaviour."""
    bare, full = reader.encode("a", bos=False), reader.encode("a")
    for bos in (False, True):
        for eos in (False, True):
            if full == [special["bos"]] * bos + bare + [special["eos"]] * eos:
                return bos, eos
    raise refuse(folder, f"tokenizer: expected BOS or EOS around a text, found the ids {full} for 'a'")


def _add_special(writer: Any, folder: Path, reader: FolderTokenizer, tokens: list[str]) -> None:
    config = read_json(folder / "tokenizer_config.json")
    special: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad", "unk"):
        value = config.get(f"{name}_token")
        text = value["content"] if isinstance(value, dict) else value
        special[name] = tokens.index(text) if text in tokens else None
        if special[name] is not None:
            getattr(writer, f"add_{name}_token_id")(special[name])
    if "<|im_end|>" in tokens:
        writer.add_eot_token_id(tokens.index("<|im_end|>"))
    bos, eos = _ends_added(folder, reader, special)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else config.get("chat_template")
    if isinstance(template, str):
        writer.add_chat_template(template)


def add_tokenizer(writer: Any, folder: Path, vocab_size: int) -> None:
    """Writes the folder's tokenizer and chat template.

    Args:
        writer: ``gguf.GGUFWriter``.
        folder: with ``tokenizer.json`` (or a SentencePiece ``tokenizer.model``) and ``tokenizer_config.json``.
        vocab_size: V; ids without a token are filled up.

    Raises:
        InputError: a file is missing or damaged, or llama.cpp would tokenize differently.
        MissingExtraError: sentencepiece is not installed and the folder has a ``tokenizer.model``.
    """
    reader = FolderTokenizer(folder)
    tokenizer = dict(json.loads(reader.definition))
    sentencepiece = _is_sentencepiece(tokenizer)
    table = (_sentencepiece if sentencepiece else _byte_level)(writer, folder, tokenizer)
    for added in tokenizer.get("added_tokens", []):
        if added.get("lstrip") or added.get("rstrip") or added.get("single_word"):
            raise refuse(folder, f"tokenizer: token {added['content']!r} strips its surroundings")
        table.add(added)
    if max(table.tokens) >= vocab_size:
        raise InputError(
            f"{folder}: expected at most {vocab_size} tokens, found id {max(table.tokens)} in the tokenizer"
        )
    tokens, types, scores = table.filled(vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(scores)
    _add_special(writer, folder, reader, tokens)

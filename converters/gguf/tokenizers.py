"""A Transformers folder's tokenizer in GGUF: byte-level BPE, and SentencePiece BPE with byte fallback.

llama.cpp has its own code for each, so what it would do differently is refused, with one exception. A SentencePiece tokenizer
puts a space in front of a text; where ``tokenizer.json`` does so by a ``Metaspace`` step, which leaves out that space if the
text brings one, llama.cpp follows SentencePiece itself: a text that begins with a space gets one more.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgepatch.converters import pre_tokenizers, tokenizer_probes
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.library import load_library
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.files import strict_json
from edgepatch.text.end_tokens import END_NAMES
from edgepatch.text.tokenizers import FolderTokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of GGUF
ADDED_SCORE = -1000.0
"""Score of what no merge produces, as llama.cpp's converter writes it."""

SPACE = "\u2581"

END_KEYS = ("eot", "eom")
"""Keys for end tokens besides EOS that do not end a reply by their names."""

_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}


def refuse(folder: Path, what: str) -> InputError:
    """The error for a model that the conversion here would get wrong."""
    return InputError(f"{folder}: {what}", hint="convert it with llama.cpp's convert_hf_to_gguf.py and use that file")


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
    unusual = [
        k
        for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
        if model.get(k)
    ]
    steps = pre.get("pretokenizers") or [pre]
    if (
        model.get("type") != "BPE"
        or unusual
        or steps[-1].get("type") != "ByteLevel"
        or steps[-1].get("add_prefix_space")
    ):
        raise refuse(
            folder, f"tokenizer: expected byte-level BPE, found {model.get('type')} {pre.get('type')} {unusual}"
        )
    patterns = [_pattern(step) for step in steps[:-1]]
    patterns += [pre_tokenizers.GPT2] if steps[-1].get("use_regex", True) else []
    name = None if None in patterns else pre_tokenizers.name_of(map(str, patterns), bool(model.get("ignore_merges")))
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if name is None or normalizer not in (None, "NFC"):
        raise refuse(folder, f"tokenizer: unknown pre-tokenizer {json.dumps(pre)} or normalizer {normalizer}")
    return name


def _pattern(step: dict[str, Any]) -> str | None:
    """The regular expression that a step splits by; ``None`` for a step of another kind."""
    kind, behavior, inverted = step.get("type"), step.get("behavior"), bool(step.get("invert"))
    if kind == "Split" and (behavior, inverted) in (("Isolated", False), ("Removed", True)):
        pattern: str | None = step["pattern"].get("Regex")
        return pattern
    if kind == "Digits":
        return pre_tokenizers.DIGIT if step.get("individual_digits") else pre_tokenizers.DIGITS
    return pre_tokenizers.PUNCTUATION if kind == "Punctuation" and behavior == "Contiguous" else None


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
    config = strict_json.read_json(folder / "tokenizer_config.json", hint="name a complete model folder", infinite=True)
    special: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad", "unk"):
        value = config.get(f"{name}_token")
        text = value["content"] if isinstance(value, dict) else value
        special[name] = tokens.index(text) if text in tokens else None
        if special[name] is not None:
            getattr(writer, f"add_{name}_token_id")(special[name])
    for key, token in zip(END_KEYS, _more_ends(reader, special["eos"], tokens), strict=False):
        getattr(writer, f"add_{key}_token_id")(token)
    bos, eos = _ends_added(folder, reader, special)
    writer.add_add_bos_token(bos)
    writer.add_add_eos_token(eos)
    templates = _chat_templates(folder, config)
    if templates:
        alone = templates.get("default") if len(templates) == 1 else None
        writer.add_chat_template(alone or [{"name": name, "template": text} for name, text in templates.items()])


def _more_ends(reader: FolderTokenizer, eos: int | None, tokens: list[str]) -> list[int]:
    """End tokens besides EOS, those first that llama.cpp does not know by their names."""
    ends = sorted(i for i in reader.configured_end_ids if i != eos and i < len(tokens))
    return sorted(ends, key=lambda i: tokens[i] in END_NAMES)


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> template, "default" first."""
    template = config.get("chat_template")
    named = (
        {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
        if isinstance(template, list)
        else {}
    )
    templates = {"default": template} if isinstance(template, str) else named
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    templates |= {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()}
    texts = {name: text for name, text in templates.items() if isinstance(name, str) and isinstance(text, str)}
    return dict(sorted(texts.items(), key=lambda entry: entry[0] != "default"))


def require_same_tokenizer(folder: Path, file: Path) -> None:
    """Checks that llama.cpp reads the tokenizer of a new file as the folder has it.

    Left out are texts on which the two are known to differ: those that an NFC normalizer would change, which llama.cpp does
    not; where a ``Metaspace`` step stands for SentencePiece, those that begin with a blank, and what follows a special token;
    and the names of tokens that llama.cpp takes for special ones, whatever the file says.

    Args:
        folder: holds the tokenizer.
        file: the GGUF file made of it.

    Raises:
        InputError: a text has other ids, or a token that ends a reply would not end it.
        MissingExtraError: llama-cpp-python is not installed.
    """
    from tokenizers import Tokenizer

    reader = FolderTokenizer(folder)
    tokenizer = Tokenizer.from_str(reader.definition)
    added = {token.content: bool(token.special) for token in tokenizer.get_added_tokens_decoder().values()}
    probes = tokenizer_probes.texts(
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)), len(reader.vocabulary), added
    )
    with Vocabulary(file) as vocabulary:
        lost = sorted(reader.end_token_ids - set(vocabulary.end_token_ids()))
        if lost:
            raise refuse(folder, f"the tokens {lost} end a reply, and llama.cpp has no place for so many")
        tokenizer_probes.require_same_ids(
            str(folder),
            probes,
            vocabulary.probe(),
            lambda text, trusted: reader.encode(text, True, trusted),
            "convert it with llama.cpp's convert_hf_to_gguf.py and use that file",
            _comparable(json.loads(reader.definition), added, _special_names(file, vocabulary)),
        )


def _special_names(file: Path, vocabulary: Vocabulary) -> dict[str, bool]:
    """Texts that llama.cpp reads as tokens before anything else -> whether in trusted text alone."""
    lib = load_library()
    secret = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
    tokens = read_header(file).metadata["tokenizer.ggml.tokens"]
    return {
        tokens[i]: bool(bits & secret)
        for i, bits in enumerate(vocabulary.attributes())
        if bits & (secret | lib.LLAMA_TOKEN_ATTR_USER_DEFINED)
    }


def _comparable(
    definition: dict[str, Any], added: dict[str, bool], theirs: dict[str, bool]
) -> Callable[[str, bool], bool]:
    """Whether the folder and llama.cpp are meant to agree on a text.

    Args:
        definition: ``tokenizer.json``.
        added: the folder's tokens that are read first -> whether in trusted text alone.
        theirs: the same of llama.cpp.
    """
    composed = (definition.get("normalizer") or {}).get("type") == "NFC"
    metaspace = (definition.get("pre_tokenizer") or {}).get("type") == "Metaspace"
    differing = {name for name in {*added, *theirs} if added.get(name) != theirs.get(name)}
    # A token of its own in trusted text alone is plain text to both in any other.
    differing_in_plain_text = {name for name in differing if {added.get(name), theirs.get(name)} != {None, True}}

    def comparable(text: str, trusted: bool) -> bool:
        if composed and unicodedata.normalize("NFC", text) != text:
            return False
        if metaspace and (text.startswith((" ", SPACE)) or any(name in text for name in added)):
            return False
        return not any(name in text for name in (differing if trusted else differing_in_plain_text))

    return comparable


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

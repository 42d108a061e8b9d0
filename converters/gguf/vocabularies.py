"""The tokenizer of a GGUF file as the tokenizers library runs it, built from the header and held to llama.cpp's own ids.

Every token is in the vocabulary, special ones too: llama.cpp looks all of them up when it merges. Which are special llama.cpp
itself is asked, because it does not always believe the file ("</s>" ends a reply, whatever its type says).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.converters import tokenizer_probes
from edgepatch.converters.gguf.configs import special_tokens
from edgepatch.converters.gguf.header import GGUFHeader
from edgepatch.converters.gguf.library import load_library
from edgepatch.converters.gguf.specs import vocabulary
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.converters.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, split_steps
from edgepatch.errors import InputError, MissingExtraError

HINT = "take the tokenizer of the folder that the file was made from"
SPACE = "\u2581"
UNKNOWN = 2
"""Type of the token for what no other token spells."""


def write_tokenizer(header: GGUFHeader, folder: Path) -> list[int]:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and the chat templates of a GGUF file.

    Args:
        header: of the file.
        folder: gets the files.

    Returns:
        Every token that ends a reply in llama.cpp.

    Raises:
        InputError: the vocabulary is damaged, of a kind that is not read here, or gives other ids than llama.cpp does.
        MissingExtraError: tokenizers or llama-cpp-python is not installed.
    """
    tokens = _tokens(header)
    pre_tokenizer = _pre_tokenizer(header)
    with Vocabulary(header.path) as library:
        tokenizer = _build(header, tokens, pre_tokenizer, library)
        _require_same_ids(header, tokenizer, library)
        ends = library.end_token_ids()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {f"{name}_token": tokens[i] for name, i in special_tokens(header).items() if i is not None}
    if templates := chat_templates(header.metadata):
        settings["chat_template"] = _template_setting(templates)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")
    return ends


def chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Name -> template; the one without a name is "default"."""
    prefix = "tokenizer.chat_template"
    return {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in metadata.items()
        if (key == prefix or key.startswith(f"{prefix}.")) and isinstance(value, str)
    }


def _template_setting(templates: dict[str, str]) -> Any:
    if list(templates) == ["default"]:
        return templates["default"]
    return [{"name": name, "template": template} for name, template in templates.items()]


def _tokens(header: GGUFHeader) -> list[str]:
    """All tokens, those included that only fill the embedding matrix up."""
    vocabulary(header)
    tokens: list[str] = header.metadata["tokenizer.ggml.tokens"]
    if len(set(tokens)) != len(tokens):
        twice = next(token for token in tokens if tokens.count(token) > 1)
        raise InputError(f"{header.path}: the token {twice!r} appears twice", hint="get the model again")
    return tokens


def _pre_tokenizer(header: GGUFHeader) -> PreTokenizer | None:
    """How the file's tokenizer splits; ``None`` for SentencePiece, which does not.

    Raises:
        InputError: the vocabulary is of another kind.
    """
    model, pre = (header.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if model == "llama":
        return None
    if model == "gemma4":
        return PRE_TOKENIZERS["gemma4"]
    if model != "gpt2":
        raise InputError(
            f"{header.path}: tokenizer: expected byte-level BPE (gpt2) or SentencePiece (llama), found {model!r}",
            hint=HINT,
        )
    if (pre or "default") not in PRE_TOKENIZERS:
        raise InputError(f"{header.path}: tokenizer: unknown pre-tokenizer {pre!r}", hint=HINT)
    return PRE_TOKENIZERS[pre or "default"]


def _build(header: GGUFHeader, tokens: list[str], pre_tokenizer: PreTokenizer | None, library: Vocabulary) -> Any:
    try:
        from tokenizers import Tokenizer, models
    except ImportError:
        raise MissingExtraError("tokenizers", "convert") from None
    real = set(vocabulary(header))
    ids = {token: i for i, token in enumerate(tokens) if token in real}
    merges = _merges_by_score(header, ids) if pre_tokenizer is None else _merges(header, ids)
    byte_level = pre_tokenizer is not None and pre_tokenizer.is_byte_level
    types = header.metadata["tokenizer.ggml.token_type"]
    unknown = next((token for token, i in ids.items() if types[i] == UNKNOWN), None)
    model = models.BPE(
        vocab=ids,
        merges=merges,
        ignore_merges=pre_tokenizer is not None and pre_tokenizer.ignores_merges,
        byte_fallback=not byte_level,
        unk_token=None if byte_level else unknown,
        fuse_unk=not byte_level,
    )
    tokenizer = Tokenizer(model)
    _set_steps(tokenizer, header, pre_tokenizer)
    _add_special(tokenizer, tokens, library)
    _add_ends(tokenizer, tokens, library)
    return tokenizer


def _merges(header: GGUFHeader, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """The file's merges, each pair once; what makes no token merges nothing in llama.cpp that lasts."""
    pairs: dict[tuple[str, str], None] = {}
    for merge in header.metadata.get("tokenizer.ggml.merges", ()):
        at = merge.find(" ", 1)
        left, right = merge[:at], merge[at + 1 :]
        if at > 0 and left in ids and right in ids and left + right in ids:
            pairs[left, right] = None
    return list(pairs)


def _merges_by_score(header: GGUFHeader, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """SentencePiece merges any two neighbours whose union is a token, that of the highest score first."""
    scores = header.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) < len(ids):
        raise InputError(
            f"{header.path}: tokenizer: expected {len(ids)} scores, found none", hint="get the model again"
        )
    pairs = [
        (-float(scores[i]), i, at, token)
        for token, i in ids.items()
        for at in range(1, len(token))
        if token[:at] in ids and token[at:] in ids
    ]
    return [(token[:at], token[at:]) for _, _, at, token in sorted(pairs)]


def _set_steps(tokenizer: Any, header: GGUFHeader, pre_tokenizer: PreTokenizer | None) -> None:
    """What happens before merging, and after."""
    from tokenizers import decoders, normalizers, pre_tokenizers

    if pre_tokenizer is not None and pre_tokenizer.is_byte_level:
        steps = [*split_steps(pre_tokenizer), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
        return
    spaced = pre_tokenizer is None and header.metadata.get("tokenizer.ggml.add_space_prefix", True)
    before: list[Any] = [normalizers.Replace(" ", SPACE)]
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spaced:
        before.insert(0, normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(before), decoders.Sequence(after)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split_steps(pre_tokenizer))


def _add_special(tokenizer: Any, tokens: Sequence[str], library: Vocabulary) -> None:
    """The tokens that are read before anything else: special ones in trusted text, user-defined ones in any."""
    from tokenizers import AddedToken

    lib = load_library()
    secret = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN
    added = [
        AddedToken(
            tokens[i],
            special=bool(bits & secret),
            normalized=False,
            lstrip=bool(bits & lib.LLAMA_TOKEN_ATTR_LSTRIP),
            rstrip=bool(bits & lib.LLAMA_TOKEN_ATTR_RSTRIP),
        )
        for i, bits in enumerate(library.attributes())
        if bits & (secret | lib.LLAMA_TOKEN_ATTR_USER_DEFINED) and tokenizer.token_to_id(tokens[i]) == i
    ]
    tokenizer.add_tokens(added)


def _add_ends(tokenizer: Any, tokens: Sequence[str], library: Vocabulary) -> None:
    """Makes the tokenizer put in front of a text and behind it what llama.cpp does."""
    from tokenizers import processors

    full, bare = library.tokenize("a", around=True, special=False), library.tokenize("a", around=False, special=False)
    first = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    before, behind = ([tokens[i] for i in ids] for ids in (full[:first], full[first + len(bare) :]))
    special = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*before, *behind])]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*before, "$A", *behind], special_tokens=special)


def _require_same_ids(header: GGUFHeader, tokenizer: Any, library: Vocabulary) -> None:
    def encode(text: str, trusted: bool) -> list[int]:
        tokenizer.encode_special_tokens = not trusted
        return list(tokenizer.encode(text).ids)

    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    probes = tokenizer_probes.texts(
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)), tokenizer.get_vocab_size(), special
    )
    tokenizer_probes.require_same_ids(str(header.path), probes, library.probe(), encode, HINT)
    tokenizer.encode_special_tokens = False

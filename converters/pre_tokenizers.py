"""How llama.cpp splits a text before byte-level BPE merges it: a list of patterns for every ``tokenizer.ggml.pre``.

The patterns are those of llama.cpp's ``llama-vocab.cpp``, written so that they mean the same to the tokenizers library: every
pattern cuts what the ones before it have left, and what no pattern matches stays whole. A letter is a letter: where llama.cpp
writes ``\\p{Lu}`` it matches any ``\\p{L}``. A blank beyond ASCII is a blank alone: U+3000 is in no other class.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """A way to split.

    Attributes:
        patterns: regular expressions in their order.
        ignores_merges: whether a word that is a token becomes it, whatever the merges say.
        is_byte_level: whether tokens spell bytes by GPT-2's stand-ins; else they spell text, a blank as U+2581.
    """

    patterns: tuple[str, ...]
    ignores_merges: bool = False
    is_byte_level: bool = True


_ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SINGLE_BLANKS = r"\s*[\r\n]|\s+(?!\S)|\s+"
_JOINED_WORDS = r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SLASHED_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_NOT_LOWER, _NOT_UPPER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_MARKED_NOT_LOWER, _MARKED_NOT_UPPER = r"(?:(?=[\p{L}\p{M}])[^a-z])", r"(?:(?=[\p{L}\p{M}])[^A-Z])"
_MARKED = r"[\p{L}\p{M}]"
_SIGN_AND_WORD = r"[!\x22#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_EAST_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_HANGUL_SIGNS_BOPOMOFO = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|"
)
_LATIN_GREEK_CYRILLIC = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d"
    "\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-"
    "\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2"
    "\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-"
    "\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
    "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_WIDE_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002"
_PART_OF_SENTENCE = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_LINES = r"[^\n]+|[\n]+"
_GROUPS_OF_3 = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
"""Digits by three from the right; llama.cpp leaves what stands before a number in the number's first group."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
"""What the ``ByteLevel`` step of the tokenizers library splits by."""

DIGIT, DIGITS, UP_TO_3_DIGITS, THREE_DIGITS = r"\p{N}", r"\p{N}+", r"\p{N}{1,3}", r"[0-9][0-9][0-9]"
PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"


def _by_case(upper: str, lower: str, ending: str, numbers: str) -> str:
    """Words that begin where a capital letter follows a small one."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}"
    return f"{words}|{numbers}|{_SLASHED_SIGNS}|{_BLANKS}"


_LLAMA3 = f"{_ENDINGS}|{_WORD}|{UP_TO_3_DIGITS}|{_SIGNS}|{_BLANKS}"
_QWEN2 = f"{_ENDINGS}|{_WORD}|{DIGIT}|{_SIGNS}|{_BLANKS}"
_DEEPSEEK3_SIGNS = r" ?[\p{P}\p{S}]+[\r\n]*"
_FEWER_BLANKS = "".join(rf"|\s{{{count}}}(?!\S)" for count in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2"))

_GROUPS: tuple[tuple[str, PreTokenizer], ...] = (
    (
        "gpt-2 mpt phi-2 olmo jais mellum exaone4 trillion modern-bert gigachat a.x-4.0 granite-docling",
        PreTokenizer((GPT2,)),
    ),
    ("roberta-bpe jina-v1-en jina-v2-code jina-v2-es jina-v2-de jina-es jina-de", PreTokenizer((GPT2,))),
    ("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", PreTokenizer((DIGIT, GPT2))),
    (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
        PreTokenizer((_LLAMA3,), ignores_merges=True),
    ),
    ("dbrx smaug-bpe chatglm-bpe", PreTokenizer((_LLAMA3,))),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan grok-2 solar-open", PreTokenizer((_QWEN2,))),
    (
        "qwen35",
        PreTokenizer(
            (rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_MARKED}+|{DIGIT}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",)
        ),
    ),
    (
        "deepseek-v3 hunyuan-dense hy_v4 joyai-llm",
        PreTokenizer((UP_TO_3_DIGITS, _HAN_AND_KANA, f"{_SIGN_AND_WORD}|{_DEEPSEEK3_SIGNS}|{_BLANKS}")),
    ),
    (
        "spark2_5",
        PreTokenizer(
            (
                UP_TO_3_DIGITS,
                _HAN_AND_KANA,
                rf"{_SIGN_AND_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|\s+(?!\S)|\s+",
                DIGIT,
            )
        ),
    ),
    (
        "deepseek-llm",
        PreTokenizer(
            (
                r"[\r\n]",
                rf"\s?[{_LATIN_GREEK_CYRILLIC}]+",
                rf"\s?[{_WIDE_SIGNS}]+",
                r"\s+$",
                _HAN_AND_HANGUL,
                DIGITS,
            )
        ),
    ),
    ("deepseek-coder", PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_AND_HANGUL, DIGIT))),
    ("falcon", PreTokenizer((PUNCTUATION, GPT2, THREE_DIGITS))),
    ("default", PreTokenizer((PUNCTUATION.replace("`", ""), GPT2, DIGITS, THREE_DIGITS))),
    ("tekken", PreTokenizer((_by_case(_NOT_LOWER, _NOT_UPPER, "", DIGIT),), ignores_merges=True)),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        PreTokenizer((_by_case(_NOT_LOWER, _NOT_UPPER, f"{_ENDINGS}?", UP_TO_3_DIGITS),)),
    ),
    (
        "granite-embed-multi-97m",
        PreTokenizer(
            (_by_case(_MARKED_NOT_LOWER, _MARKED_NOT_UPPER, f"{_ENDINGS}?", UP_TO_3_DIGITS),), ignores_merges=True
        ),
    ),
    (
        "youtu",
        PreTokenizer(
            (_HANGUL_SIGNS_BOPOMOFO + _HAN_AND_KANA, _by_case(_MARKED, _MARKED, f"{_ENDINGS}?", DIGIT)),
            ignores_merges=True,
        ),
    ),
    (
        "tiny_aya cohere2moe",
        PreTokenizer((_GROUPS_OF_3, _by_case(_MARKED, _MARKED, f"{_ENDINGS}?", UP_TO_3_DIGITS))),
    ),
    (
        "minicpm5",
        PreTokenizer(
            (UP_TO_3_DIGITS, f"{_ENDINGS}|{_WORD}|{DIGITS}|{_SIGNS}|{_BLANKS}"),
            ignores_merges=True,
        ),
    ),
    (
        "jais-2",
        PreTokenizer((rf"{_ENDINGS}|{_WORD}|{UP_TO_3_DIGITS}|{_SIGNS}|\s*[\r\n]+{_FEWER_BLANKS}|\s{{1}}",)),
    ),
    ("poro-chat bloom gpt3-finnish", PreTokenizer((_PART_OF_SENTENCE,))),
    ("viking", PreTokenizer((_PART_OF_SENTENCE, DIGIT))),
    (
        "exaone-moe",
        PreTokenizer(
            (
                rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_JOINED_WORDS}|{DIGIT}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|{_SINGLE_BLANKS}",
            )
        ),
    ),
    (
        "chameleon",
        PreTokenizer(
            (
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                GPT2,
            )
        ),
    ),
    ("superbpe", PreTokenizer((DIGITS, r"(?=([0-9]{3})+(?![0-9]))"))),
    (
        "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((f"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|{DIGIT}|{_SIGNS}|{_SINGLE_BLANKS}",)),
    ),
    ("seed-coder", PreTokenizer((rf"{_ENDINGS}|{_WORD}|{DIGIT}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",))),
    ("ufakzeka", PreTokenizer((f"{_WORD}|{DIGIT}|{_SIGNS}|{_BLANKS}",))),
    ("afmoe", PreTokenizer((_GROUPS_OF_3, _EAST_ASIAN, f"{_SIGN_AND_WORD}|{_DEEPSEEK3_SIGNS}|{_BLANKS}"))),
    ("laguna", PreTokenizer((_LINES, _QWEN2))),
    ("gemma4 granite-embed-multi-311m sarvam-moe", PreTokenizer((_LINES,), is_byte_level=False)),
)
PRE_TOKENIZERS = {name: pre_tokenizer for names, pre_tokenizer in _GROUPS for name in names.split()}
"""llama.cpp's name -> how it splits. Of several names for one way the first is the one that new files get."""


def split_steps(pre_tokenizer: PreTokenizer) -> list[Any]:
    """The steps of a tokenizer of the tokenizers library that splits so, before it goes over to bytes."""
    from tokenizers import Regex, pre_tokenizers

    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer.patterns]


def name_of(patterns: Iterable[str], ignores_merges: bool) -> str | None:
    """llama.cpp's name of a way to split into words of bytes; ``None`` where it has none.

    Args:
        patterns: regular expressions in their order, as a ``tokenizer.json`` writes them.
        ignores_merges: as in ``PreTokenizer``.
    """
    canonical = [_canonical(pattern) for pattern in patterns]
    return next(
        (
            name
            for name, pre_tokenizer in PRE_TOKENIZERS.items()
            if pre_tokenizer.is_byte_level
            and pre_tokenizer.ignores_merges == ignores_merges
            and [_canonical(pattern) for pattern in pre_tokenizer.patterns] == canonical
        ),
        None,
    )


_SPELLINGS = (
    ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", _ENDINGS),
    ("(?i:[sdmt]|ll|ve|re)", "(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])"),
    (r"\p{N}{1}", DIGIT),
    (r"?+\p{L}", r"?\p{L}"),
    ("]++", "]+"),
    (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", _MARKED),
    (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", _MARKED),
    (r"\d{1,3}(?=(?:\d{3})*\b)", _GROUPS_OF_3),
    ("\r", r"\r"),
    ("\n", r"\n"),
)
"""How published tokenizers write what llama.cpp writes otherwise."""


def _canonical(pattern: str) -> str:
    for published, ours in _SPELLINGS:
        pattern = pattern.replace(published, ours)
    # What no pattern matches stays whole, as the last alternative would leave it.
    return pattern.removesuffix(r"|\s+") if pattern.endswith(r"|\s+(?!\S)|\s+") else pattern

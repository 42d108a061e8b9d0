"""Texts on which two tokenizers must agree before one stands in for the other.

Some hold what readers of vocabularies are known to differ in: blanks before digits, numbers by their length, marks and scripts
between which only some pre-tokenizers split, contractions in either case. Others are drawn from the vocabulary itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from edgepatch.errors import InputError

TEXTS = (
    "",
    "a",
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "Hello, world!",
    "The quick brown fox, isn't it?",
    "  spaces  and\ttabs\n\nlines ",
    "a  4",
    "a   42  and    7",
    "4 ½",
    "ied 4 ½ months",
    "½ ⅓ ² ³ Ⅷ ٣ ४२ ๓",
    "3333",
    "1 12 123 1234 12345 123456 1234567 12345678",
    "abc1234def56",
    "1,000,000.50 3.14 -7e-12 0x1F 192.168.0.1 12:34:56",
    "\n =",
    "\n\n\n \n\n \t\n  x",
    "x\r\n\r\ny \r z",
    " \n \t \u00a0 \u2003\u3000 end",
    "Cửa Việt",
    "Cửa sổ trời, Đặng Thị Ngọc Thịnh",
    "e\u0301 a\u0308 n\u0303o o\u0302\u0323",
    " культуры и görmek",
    "Ελληνικά ΑΘΗΝΑ Ὀδυσσεύς",
    "نص عربي ۱۲۳، هذا؟ שלום עולם",
    "हिन्दी में लिखा है। தமிழ் ภาษาไทย",
    "日本語の文章です。漢字とかな、カタカナ！",
    "中文测试，数字１２３４５。한국어 문장 ㄱㄴㄷ",
    "🙂 👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽 ❤\ufe0f",
    "\u200b\ufeff\u00ad\u202e odd \u2028 marks \u0085",
    "\x01\x02\x1b[0m\x7f \x1c\x1d",
    "I'm you're he's we've they'll she'd don't",
    "I'M YOU'RE HE'S WE'VE THEY'LL SHE'D DON'T 'S",
    "HELLO'S \u2019s 'sa 'llama ''d",
    "snake_case camelCase HTTPServer XMLHttpRequest __init__ ___",
    "https://www.example.com/a/b?c=d&e=%20f#g",
    "def f(x):\n\treturn x**2  # code\n\n\nclass A:\n    pass\n",
    "if (a <= b && c != d || !e) { x[i]++; y->z = *p; }",
    "// {'a': 1} <b>bold</b> \\n \\frac{1}{2} $x^2$ `code` ~/.bashrc",
    "... !!! ?? -- \u2014 \u2026 \u201cquotes\u201d \u00abx\u00bb ~~~~~~ ======== ---- ####",
    "a.b,c;d:e!f?g-h(i)j[k]l{m}n/o\\p|q@r#s$t%u^v&w*x+y=z<",
    "line one\n\nline two\n\n\nline three \n",
    " leading and trailing ",
    "    four\n        eight\n\tone\n\t\ttwo",
    "A" * 40 + "a" * 40 + "1" * 13,
    "naïve café Grüße Straße ŒUVRE ǅ İstanbul ß",
    "∑∫√∞ ≠ ≤ → ⇒ ± × ÷ € £ ¥ ™ © §",
    "sign \u2581 of \u2581\u2581 a blank",
    "<0x41> <0x0A> <unk> <s> </s> [INST] [/INST]",
    " a<|im_start|>b</s> <s>[INST] <unk>",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<end_of_turn>\n<|eot_id|>x",
    "MiXeD cAsE wOrDs ANDupper LOWERandUPPER",
    "0 00 000 0000 00000 000000 0000000",
    "x=1;y=22;z=333;w=4444",
    "tab\tseparated\t\tvalues\t\n",
    "\u0e01\u0e33 \u0e40\u0e01 \u17d2\u1780 \u1018\u102c",
    "\U0001d49c\U0001d4b7 \U00010400 \U0001f600\U0001f3fb",
)
MIXED = (
    *(
        "a",
        "B",
        "zz",
        "é",
        "ß",
        "Я",
        "я",
        "中",
        "あ",
        "ア",
        "한",
        "ا",
        "ש",
        "ก",
        "ु",
        "\u0301",
        "1",
        "22",
        "333",
        "½",
        "²",
        "٣",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\u00a0",
        "\u3000",
        ".",
        ",",
        "!",
        "'",
        "'s",
        "'RE",
        '"',
        "-",
        "_",
        "/",
    ),
    *(
        "(",
        "]",
        "{",
        "<",
        ">",
        "|",
        "`",
        "$",
        "+",
        "=",
        "^",
        "~",
        "#",
        "€",
        "🙂",
        "\u200d",
        "\ufe0f",
        "\x01",
        "。",
        "，",
        "\u2581",
    ),
)
NUM_MIXED, NUM_FROM_VOCABULARY, MAX_SPECIAL = 300, 400, 200

Encode = Callable[[str, bool], list[int]]
"""Token ids of a text with BOS and EOS; the second argument says whether names of special tokens in it are the tokens."""


def texts(spell: Callable[[Sequence[int]], str], vocab_size: int, special: Iterable[str]) -> Iterator[str]:
    """Some 1,000 texts, the same for the same vocabulary.

    Args:
        spell: the text of tokens.
        vocab_size: ids below it are drawn.
        special: texts of special tokens.
    """
    yield from TEXTS
    draw = random.Random(vocab_size)
    for _ in range(NUM_MIXED):
        yield "".join(draw.choices(MIXED, k=draw.randint(2, 12)))
    for _ in range(NUM_FROM_VOCABULARY):
        yield spell([draw.randrange(vocab_size) for _ in range(draw.randint(1, 8))])
    names = sorted(special)
    for name in draw.sample(names, min(len(names), MAX_SPECIAL)):
        yield f"{name} a{name}b  {name}{draw.choice(names)}\n{name}"


def _always(text: str, trusted: bool) -> bool:
    return True


def require_same_ids(
    where: str,
    probes: Iterable[str],
    expected: Encode,
    actual: Encode,
    hint: str,
    comparable: Callable[[str, bool], bool] = _always,
) -> None:
    """Checks that two tokenizers agree on every text, plain and trusted.

    Args:
        where: the file or folder, for the message.
        probes: the texts.
        expected: llama.cpp's tokenizer.
        actual: the other one.
        hint: what to do where they do not.
        comparable: whether the two are meant to agree on a text, plain or trusted.

    Raises:
        InputError: they differ; it tells the first text and both lists of ids.
    """
    for text in probes:
        for trusted in (mode for mode in (False, True) if comparable(text, mode)):
            want, have = expected(text, trusted), actual(text, trusted)
            if want != have:
                kind = "trusted text" if trusted else "text"
                raise InputError(
                    f"{where}: its tokenizer is not llama.cpp's: {kind} {text[:80]!r}: llama.cpp has {_around(want, have)}, "
                    f"the folder {_around(have, want)}",
                    hint,
                )


def _around(ids: Sequence[int], others: Sequence[int]) -> str:
    """A list of ids, cut to what lies around its first difference from another."""
    first = next((i for i, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))
    start = max(first - 2, 0)
    excerpt = ", ".join(map(str, ids[start : first + 6]))
    return f"[{'..., ' if start else ''}{excerpt}{', ...' if first + 6 < len(ids) else ''}]"

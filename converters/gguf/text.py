"""llama.cpp's tokenizer behind limits: every text that reaches ``llama_tokenize`` comes through here.

llama.cpp's tokenizer only reads the vocabulary, so any thread may call it, beside one that evaluates. But it ends the process where a
word is too long for its stack, where a vocabulary lacks what it takes for granted, and it takes the square of some numbers in time.
Measured with llama.cpp of llama-cpp-python 0.3.36, all of its pre-tokenizers by 43 kinds of long texts; docs/reference/runtimes.md has the numbers.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np

from edgepatch.converters.gguf.header import GGUFHeader
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.text.limits import DIGITS, SHALLOW_RUN, TextBound, call_with_stack, require_short_runs, utf8
from edgepatch.text.vocabularies import missing_bytes

NONE, SPM, BPE, WPM = 0, 1, 2, 3  # llama.cpp's kinds of vocabulary
USER_DEFINED = 4  # a token's type in GGUF: read in any text, before anything else
NORMAL = 1
STRIPS = 1 << 7 | 1 << 8  # llama.cpp's attributes of tokens that swallow the blanks on their left or right

MAX_MARKS = 2**14
"""User-defined tokens in a text. Each is found by walking the list of those before it: 16,384 take 0.3 s, 131,072 a minute."""

MAX_UNKNOWN = 2**15
"""Characters beyond the vocabulary, spelled byte by byte. SentencePiece's loop copies all tokens for each: 131,072 take 10 s."""

SPACE = "\u2581"  # SentencePiece's blank
MAX_DIGITS = 2**8
"""In a row, for superbpe, which looks ahead to the end of a number from each of its digits: 8,000 take 1 s."""

WORDS_OF_SENTENCES = re.compile(r"[^\x00-\x1f!-@\[-`{-~]+")
"""Letters with blanks between them, which exaone-moe matches as one word; what is beyond ASCII counts as letters."""

BLANKS_IN_A_ROW = re.compile(r" \s|\s ")

RAW_PRE_TOKENIZERS = ("gemma4", "granite-embed-multi-311m", "sarvam-moe")
"""Their tokens are text as it is, and not GPT-2's stand-ins for bytes."""

KNOWN_PRE_TOKENIZERS = frozenset(
    [
        "a.x-4.0",
        "afmoe",
        "bailingmoe",
        "bailingmoe2",
        "bloom",
        "chameleon",
        "chatglm-bpe",
        "codeshell",
        "cohere2moe",
        "command-r",
        "dbrx",
        "deepseek-coder",
        "deepseek-llm",
        "deepseek-r1-qwen",
        "deepseek-v3",
        "default",
        "exaone",
        "exaone-moe",
        "exaone4",
        "f2llmv2",
        "falcon",
        "falcon-h1",
        "falcon3",
        "gemma4",
        "gigachat",
        "glm4",
        "glm5",
        "gpt-2",
        "gpt-4o",
        "gpt3-finnish",
        "granite-docling",
        "granite-embed-multi-311m",
        "granite-embed-multi-97m",
        "grok-2",
        "hunyuan",
        "hunyuan-dense",
        "hy_v4",
        "jais",
        "jais-2",
        "jina-de",
        "jina-es",
        "jina-v1-en",
        "jina-v2-code",
        "jina-v2-de",
        "jina-v2-es",
        "jina-v5-nano",
        "joyai-llm",
        "kanana2",
        "kimi-k2",
        "kormo",
        "laguna",
        "lfm2",
        "llada-moe",
        "llama-bpe",
        "llama-v3",
        "llama3",
        "llama4",
        "megrez",
        "mellum",
        "mellum2",
        "midm-2.0",
        "minerva-7b",
        "minicpm5",
        "minimax-m2",
        "modern-bert",
        "mpt",
        "olmo",
        "phi-2",
        "pixtral",
        "poro-chat",
        "qwen2",
        "qwen35",
        "refact",
        "roberta-bpe",
        "sarvam-moe",
        "seed-coder",
        "smaug-bpe",
        "smollm",
        "solar-open",
        "spark2_5",
        "stablelm2",
        "starcoder",
        "superbpe",
        "talkie",
        "tekken",
        "tiny_aya",
        "trillion",
        "ufakzeka",
        "viking",
        "whitespace",
        "youtu",
    ]
)


class GGUFTokenizer:
    """The tokenizer of a vocabulary that llama.cpp has loaded.

    Args:
        lib: ``gguf.library.load_library()``.
        vocab: llama.cpp's pointer; ``close`` must be called before it is freed.
        header: of the file.

    Attributes:
        bound: how many bytes a token stands for.
    """

    def __init__(self, lib: Any, vocab: Any, header: GGUFHeader) -> None:
        self._lib, self._vocab = lib, vocab
        self._kind = int(lib.llama_vocab_type(vocab))
        self._pre = str(header.metadata.get("tokenizer.ggml.pre", "default"))
        self._model = str(header.metadata.get("tokenizer.ggml.model", ""))
        self._tokens = list(map(str, header.metadata.get("tokenizer.ggml.tokens", [])))
        types = header.metadata.get("tokenizer.ggml.token_type", [])
        self._types = types.tolist() if isinstance(types, np.ndarray) else list(types)
        self._idle = threading.Condition()
        self._num_calls, self._is_closed = 0, False
        # llama.cpp's vocabulary is read here and within `_tokenize`, and nowhere else: it may be freed in between.
        self.bound, self._missing_end = self._measure(), self._find_missing_end() if self._kind != NONE else ""

    def encode(self, text: str, ends: bool, trusted: bool) -> list[int]:
        """Token ids.

        Args:
            text: any text.
            ends: put BOS and EOS around it where the model wants them.
            trusted: read special tokens spelled out in the text as such.

        Raises:
            InputError: the text is not valid Unicode, or one that llama.cpp cannot take.
            EdgepatchError: the vocabulary is closed.
        """
        data = utf8(text)
        with self._in_use():
            self._require_ends(ends)
            run = self._judge(text)
            return call_with_stack(partial(self._tokenize, data, ends, trusted), run)

    def close(self) -> None:
        """Waits for the calls that still read the vocabulary, and lets no more in; may be called more than once."""
        with self._idle:
            self._is_closed = True
            while self._num_calls:
                self._idle.wait()

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._idle:
            if self._is_closed:
                raise EdgepatchError("the model is closed", hint="load it again")
            self._num_calls += 1
        try:
            yield
        finally:
            with self._idle:
                self._num_calls -= 1
                self._idle.notify_all()

    def _tokenize(self, data: bytes, ends: bool, trusted: bool) -> list[int]:
        size = len(data) + 8
        for _ in range(2):
            ids = (self._lib.llama_token * size)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, size, ends, trusted)
            if count >= 0:
                return list(ids[:count])
            size = -count  # a vocabulary that puts a blank behind every special token
            if size > 4 * len(data) + 8:
                break
        raise EdgepatchError(f"llama.cpp cannot tokenize a text of {len(data)} bytes (code {count})")

    # What llama.cpp takes for granted.

    def _find_missing_end(self) -> str:
        """What the vocabulary wants around every text and has no token for; llama.cpp ends the process at such a text."""
        lib, vocab = self._lib, self._vocab
        added = {
            "BOS": (lib.llama_vocab_get_add_bos(vocab) or self._kind == WPM, lib.llama_vocab_bos(vocab)),
            "EOS": (lib.llama_vocab_get_add_eos(vocab), lib.llama_vocab_eos(vocab)),
            "a separator": (self._kind == WPM, lib.llama_vocab_sep(vocab)),
        }
        return next((name for name, (is_wanted, token) in added.items() if is_wanted and token < 0), "")

    def _require_ends(self, ends: bool) -> None:
        if self._kind == NONE:
            raise InputError("the model has no vocabulary", hint="pass token ids, or use another file")
        if ends and self._missing_end:
            raise InputError(
                f"the vocabulary puts {self._missing_end} around a text but has no such token", hint="use another file"
            )

    def _judge(self, text: str) -> int:
        """Refuses what llama.cpp would not survive, or take too long for; characters that one match may span."""
        if self._kind == SPM:
            self._require_spelled(text)
        if self._kind == BPE and self._pre == "whitespace":
            _require_single_blanks(text)
        if len(text) <= SHALLOW_RUN:
            return len(text)
        self._require_few_marks(text)
        return self._require_short_runs(text) if self._kind == BPE else 0

    def _require_short_runs(self, text: str) -> int:
        is_known = self._pre in KNOWN_PRE_TOKENIZERS
        if self._pre == "superbpe" or not is_known:
            require_short_runs(text, DIGITS, MAX_DIGITS)
        run = require_short_runs(text)
        if self._pre == "exaone-moe" or not is_known:
            run = max(run, require_short_runs(text, WORDS_OF_SENTENCES))
        return run

    def _require_few_marks(self, text: str) -> None:
        count = self._count_marks(text)
        if count > MAX_MARKS:
            raise InputError(
                f"the text holds more than {MAX_MARKS} of the vocabulary's own marks (as {self._a_mark(text)!r})",
                hint="shorten it, or write them in another way",
            )

    def _count_marks(self, text: str) -> int:
        """User-defined tokens from left to right, the longest first; counted up to one more than may be."""
        tokens = self._marks
        if sum(text.count(first) for first in {token[0] for token in tokens}) <= MAX_MARKS:
            return 0  # none to speak of
        lengths = sorted({len(token) for token in tokens}, reverse=True)
        starts = re.compile(f"[{re.escape(''.join({token[0] for token in tokens}))}]")
        count = position = 0
        while count <= MAX_MARKS and (start := starts.search(text, position)):
            at = start.start()
            length = next((n for n in lengths if text[at : at + n] in tokens), 0)
            count += bool(length)
            position = at + (length or 1)
        return count

    def _a_mark(self, text: str) -> str:
        return next(token for token in self._marks if token in text)

    @cached_property
    def _marks(self) -> frozenset[str]:
        return frozenset(
            token for token, kind in zip(self._tokens, self._types, strict=False) if kind == USER_DEFINED and token
        )

    # Characters of SentencePiece.

    def _require_spelled(self, text: str) -> None:
        """Characters of which no token is made become tokens of their bytes; where there are none, llama.cpp ends the process."""
        if self._spells_all_bytes and len(text) <= MAX_UNKNOWN:
            return
        unknown = Counter(SPACE + text.replace(" ", SPACE))
        for character in self._characters:
            unknown.pop(character, None)
        if sum(unknown.values()) > MAX_UNKNOWN:
            raise InputError(
                f"the text has {sum(unknown.values())} characters that the vocabulary does not hold: expected at most {MAX_UNKNOWN}",
                hint="shorten it",
            )
        wrong = next((character for character in unknown if not self._spells(character)), None)
        if wrong is not None:
            raise InputError(f"the vocabulary has no token for {wrong!r} (U+{ord(wrong):04X})", hint="take it out")

    def _spells(self, character: str) -> bool:
        return all(
            f"<0x{byte:02X}>" in self._texts or (byte < 128 and chr(byte) in self._texts) for byte in utf8(character)
        )

    @cached_property
    def _texts(self) -> frozenset[str]:
        return frozenset(self._tokens)

    @cached_property
    def _characters(self) -> frozenset[str]:
        """That are tokens; one that is only within tokens may stay alone."""
        return frozenset(token for token in self._tokens if len(token) == 1)

    @cached_property
    def _spells_all_bytes(self) -> bool:
        return all(f"<0x{byte:02X}>" in self._texts for byte in range(256))

    # Bytes.

    def _measure(self) -> TextBound:
        """Byte-level BPE and SentencePiece with bytes make each byte a token or a part of one; of other kinds nobody knows."""
        strips = any(self._lib.llama_vocab_get_attr(self._vocab, i) & STRIPS for i in self._specials)
        if self._kind == SPM:
            return TextBound(_longest(self._tokens), self._spells_all_bytes and not strips)
        if self._kind != BPE or self._model not in ("gpt2", "gemma4") or self._pre == "whitespace":
            return TextBound(_longest(self._tokens))
        is_raw = self._model == "gemma4" or self._pre in RAW_PRE_TOKENIZERS
        if is_raw or self._pre not in KNOWN_PRE_TOKENIZERS:
            return TextBound(_longest(self._tokens), is_raw and self._spells_all_bytes and not strips)
        # A character of a plain token stands for one byte, whatever UTF-8 makes of it.
        lengths = list(map(len, self._tokens[: len(self._types) or None]))
        for i in self._specials:
            lengths[i : i + 1] = [len(token.encode("utf-8", "replace")) for token in self._tokens[i : i + 1]]
        return TextBound(max(lengths, default=1), not strips, missing_bytes(self._texts))

    @cached_property
    def _specials(self) -> list[int]:
        return [i for i, kind in enumerate(self._types) if kind != NORMAL]


def _longest(tokens: Sequence[str]) -> int:
    """Bytes of the longest token."""
    return max((len(token.encode("utf-8", "replace")) for token in tokens), default=1)


def _require_single_blanks(text: str) -> None:
    """The pre-tokenizer "whitespace" hands blanks on, and llama.cpp ends the process where two of them could be merged."""
    if BLANKS_IN_A_ROW.search(text):
        raise InputError("the vocabulary takes no two blanks in a row", hint="put a single blank between words")

"""The vocabulary of a GGUF file as llama.cpp reads it, alone or of a loaded model."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from edgepatch.converters import first_contact
from edgepatch.converters.first_contact import Contact, Report
from edgepatch.converters.gguf import library
from edgepatch.converters.gguf.header import GGUFHeader, read_header
from edgepatch.converters.gguf.library import library_errors, load_library
from edgepatch.converters.gguf.text import GGUFTokenizer
from edgepatch.converters.tokenizer_probes import Encode
from edgepatch.errors import InputError

TEXTS = ("word", "a  b", "4 \u00bd, 1234", "\u00e9\u4e2d\U0001f642", "\n\tit's")
MAX_PIECES_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TokenFacts:
    """What llama.cpp says of the tokens of a vocabulary.

    Attributes:
        size: number of tokens.
        end_token_ids: those that end a reply.
        bos, eos: names; empty where there is none.
        special: names of tokens that are read only in trusted text.
        user_defined: names of tokens that are read in any text.
    """

    size: int
    end_token_ids: frozenset[int]
    bos: str
    eos: str
    special: tuple[str, ...]
    user_defined: tuple[str, ...]
    special_ids: dict[str, int]
    ends: tuple[str, ...]


def read_token_facts(lib: Any, vocabulary: Any) -> TokenFacts:
    """Asks llama.cpp for every token of a vocabulary.

    Args:
        lib: ``gguf.library.load_library()``.
        vocabulary: llama.cpp's handle.
    """
    ids = range(lib.llama_vocab_n_tokens(vocabulary))
    kinds = np.array(_of_each(lib.llama_vocab_get_attr, vocabulary, ids), np.int64)
    ends = np.flatnonzero(_of_each(lib.llama_vocab_is_eog, vocabulary, ids)).tolist()
    special = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_UNKNOWN

    def text(token: int) -> str:
        return str(lib.llama_vocab_get_text(vocabulary, token).decode("utf-8", "replace")) if token in ids else ""

    def texts(mask: int) -> tuple[str, ...]:
        return tuple(map(text, np.flatnonzero(kinds & mask).tolist()))

    return TokenFacts(
        len(ids),
        frozenset(ends),
        text(lib.llama_vocab_bos(vocabulary)),
        text(lib.llama_vocab_eos(vocabulary)),
        texts(special),
        texts(lib.LLAMA_TOKEN_ATTR_USER_DEFINED),
        {text(i): i for i in np.flatnonzero(kinds & special).tolist()},
        tuple(map(text, ends)),
    )


def _of_each(question: Any, vocabulary: Any, ids: Sequence[int]) -> list[Any]:
    """llama.cpp's answer for each token. Without ctypes' look at every argument, and without letting other threads in between two
    answers, a quarter of a million take half the time; the question is one that reads a number out of a list.
    """
    asked = ctypes.PYFUNCTYPE(question.restype)(ctypes.cast(question, ctypes.c_void_p).value or 0)
    return list(map(asked, repeat(ctypes.c_void_p(vocabulary)), ids))


def try_vocabulary(lib: Any, vocabulary: Any, header: GGUFHeader, report: Report) -> None:
    """In a child: all that is ever asked of a vocabulary: each token's facts and bytes, and the tokens of some texts."""
    report("reading its vocabulary")
    size = read_token_facts(lib, vocabulary).size
    ids = (lib.llama_token * size)(*range(size))
    for special in (False, True):
        length = -lib.llama_detokenize(vocabulary, ids, size, ctypes.create_string_buffer(0), 0, False, special)
        if 0 < length <= MAX_PIECES_BYTES:
            buffer = ctypes.create_string_buffer(length)
            lib.llama_detokenize(vocabulary, ids, size, buffer, length, False, special)
    report("tokenizing a text")
    tokenizer = GGUFTokenizer(lib, vocabulary, header)
    for text in TEXTS:
        for around, special in ((True, False), (False, True)):
            with suppress(InputError):  # of some texts the guard knows that the vocabulary has no tokens for them
                tokenizer.encode(text, around, special)


class Vocabulary:
    """The vocabulary of a GGUF file; the weights stay on disk. A child has read it on this machine before.

    Args:
        path: the GGUF file.

    Raises:
        InputError: the file is missing, damaged or cannot be loaded.
        UnfitModelError: llama.cpp dies of it.
        MissingExtraError: llama-cpp-python is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._header = read_header(path)  # what it refuses needs no child
        self._resources = ExitStack()
        if first_contact.in_trial():
            self._open(path)
        else:
            library.require_installed()
            first_contact.open_proved(lambda: first_contact.prove(contact(path)), lambda _: self._open(path))

    def _open(self, path: Path) -> Vocabulary:
        self._lib = load_library()
        options = self._lib.llama_model_default_params()
        options.vocab_only = True
        model = self._lib.llama_model_load_from_file(bytes(path), options)
        if not model:
            raise InputError(f"llama.cpp cannot load {path}: {library_errors()}", hint="download or convert it again")
        self._resources.callback(self._lib.llama_model_free, model)
        self._vocab = self._lib.llama_model_get_vocab(model)
        self._tokenizer = GGUFTokenizer(self._lib, self._vocab, self._header)
        self._resources.callback(self._tokenizer.close)  # before the model is freed
        self.size = int(self._lib.llama_vocab_n_tokens(self._vocab))
        self.adds_bos = bool(self._lib.llama_vocab_get_add_bos(self._vocab))
        self.bos, self.eos = (int(f(self._vocab)) for f in (self._lib.llama_vocab_bos, self._lib.llama_vocab_eos))
        template = self._lib.llama_model_chat_template(model, None)
        self.chat_template = template.decode("utf-8", "replace") if template else ""
        return self

    def text(self, token: int) -> str:
        """A token's own name; empty for an id that there is not."""
        if not 0 <= token < self.size:
            return ""
        return str(self._lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))

    def tokenize(self, text: str, around: bool = False, special: bool = True) -> list[int]:
        """Token ids as llama-server makes them of a prompt.

        Args:
            text: any text.
            around: put BOS and EOS around it where the model wants them.
            special: read names of special tokens as the tokens.
        """
        return self._tokenizer.encode(text, around, special)

    def probe(self) -> Encode:
        """Token ids with BOS and EOS, for one text after the other, plain and then trusted.

        Where no name of a secret token stands in a text, llama.cpp reads it the same way in both (``tokenizer_st_partition``), and is
        asked once: it compiles its regular expressions anew for every text.
        """
        secret = self._lib.LLAMA_TOKEN_ATTR_CONTROL | self._lib.LLAMA_TOKEN_ATTR_UNKNOWN
        names = {self.text(i) for i, bits in enumerate(self.attributes()) if bits & secret}
        last_text: str | None = None
        last_ids: list[int] = []

        def encode(text: str, trusted: bool) -> list[int]:
            nonlocal last_text, last_ids
            if not (trusted and text == last_text and not any(name in text for name in names)):
                last_text, last_ids = None if trusted else text, self.tokenize(text, True, trusted)
            return last_ids

        return encode

    def attributes(self) -> list[int]:
        """What kind each token is to llama.cpp, in bits of ``LLAMA_TOKEN_ATTR_*``: not always what the file says."""
        return [int(self._lib.llama_vocab_get_attr(self._vocab, i)) for i in range(self.size)]

    def end_token_ids(self) -> list[int]:
        """Every token that ends a reply."""
        return [i for i in range(self.size) if self._lib.llama_vocab_is_eog(self._vocab, i)]

    def close(self) -> None:
        """Frees the vocabulary; may be called more than once."""
        self._resources.close()

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def contact(path: Path) -> Contact:
    """llama.cpp and the vocabulary of a file."""
    return Contact(library.PACKAGE, f"{__name__}:try_file", (path,))


def try_file(paths: Sequence[Path], _: object, report: Report) -> dict[str, Any]:
    """In a child: reads a file's vocabulary as ``Vocabulary`` does."""
    report("loading its vocabulary")
    with Vocabulary(paths[0]) as vocabulary:
        try_vocabulary(vocabulary._lib, vocabulary._vocab, vocabulary._header, report)
    return {}

"""What of a text may reach a tokenizer's C or Rust code, which nobody can interrupt: bytes against the context, and unbroken runs."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from edgepatch.errors import InputError

T = TypeVar("T")

LOOSE_TEXT_BYTES = 2**20
"""Of a text whose tokenizer can make few tokens of many bytes, so that the context says nothing."""

MAX_RUN = 2**17
"""Characters between two blanks. A pre-tokenizer may match them as one word, and std::regex calls itself for each."""

MAX_BLANKS = 2**14
"""Blanks in a row. Some pre-tokenizers read them to their end again and again."""

SHALLOW_RUN = 2**10
"""Up to here every thread's own stack suffices."""

STACK_BYTES_A_CHARACTER = 2**10
"""Measured: 320 in each of llama.cpp's pre-tokenizers that use std::regex (libstdc++ of GCC 12, x86-64)."""

DIGITS = re.compile(r"[0-9]+")

# ASCII blanks part words in every pre-tokenizer. Of other characters it depends, so they count for both kinds of run.
WORD, BLANKS = re.compile(r"[^ \t-\r]+"), re.compile(r"[\s\x85]+")


class TooLongError(InputError):
    """A text that no context of this length can hold."""


@dataclass(frozen=True)
class TextBound:
    """How many bytes of text a number of tokens can stand for.

    Attributes:
        longest_token: bytes of text that one token stands for at most.
        is_tight: false where a tokenizer drops or gathers text (it strips blanks, or reads a whole unknown word as one token), so that
            a long text may still be few tokens.
        dropped: the bytes that may become no token, of a vocabulary that does not have all 256; the others count.
    """

    longest_token: int = 1
    is_tight: bool = False
    dropped: bytes = b""

    def require_fit(self, text: str, context_length: int, slack: int = 1) -> None:
        """Refuses a text that cannot fit whatever its tokens are.

        Args:
            text: any text.
            context_length: tokens.
            slack: how many times as long the text may be.

        Raises:
            TooLongError: naming its bytes and the most that could fit.
            InputError: it holds halves of characters.
        """
        data = utf8(text)
        tight = slack * context_length * self.longest_token
        loose = max(tight, LOOSE_TEXT_BYTES)
        if self.is_tight and len(data.translate(None, self.dropped)) > tight:
            raise _too_long(len(data), tight, context_length)
        if len(data) > loose and (self.dropped or not self.is_tight):
            raise _too_long(len(data), loose, context_length)


def _too_long(num_bytes: int, most: int, context_length: int) -> TooLongError:
    return TooLongError(
        f"the prompt has {num_bytes} bytes, more than the context holds: expected a prompt of at most {context_length} tokens, "
        f"which are {most} bytes at most",
        hint="shorten the prompt or load the model with a longer context",
    )


def utf8(text: str) -> bytes:
    """The text's bytes.

    Raises:
        InputError: it holds halves of characters.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not valid Unicode: {error}", hint="remove unpaired surrogates") from None


def require_short_runs(text: str, word: re.Pattern[str] = WORD, most: int = MAX_RUN) -> int:
    """Refuses a text that a pre-tokenizer may take as one endless word.

    Args:
        text: any text.
        word: what may become one word.
        most: characters of a word.

    Returns:
        Characters that one match may span: the longest word and the longest blanks behind it.

    Raises:
        InputError: a run is too long.
    """
    if len(text) <= SHALLOW_RUN:
        return len(text)
    longest = max(map(len, word.findall(text)), default=0)
    blanks = max(map(len, BLANKS.findall(text)), default=0)
    for length, allowed, what in ((longest, most, "without a break"), (blanks, MAX_BLANKS, "of blanks alone")):
        if length > allowed:
            raise InputError(
                f"the text has {length} characters {what}: a tokenizer takes at most {allowed}",
                hint="break it by blanks, or take it out",
            )
    return longest + blanks


def call_with_stack(function: Callable[[], T], run: int) -> T:
    """Calls a function with a stack that matches of so many characters cannot exhaust.

    Args:
        function: what calls itself once for each character.
        run: characters of the longest match.

    Raises:
        InputError: there is no memory for the stack.
    """
    if run <= SHALLOW_RUN:
        return function()
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work, name="edgepatch-text", daemon=True)
    _start_with_stack(thread, 2**20 + run * STACK_BYTES_A_CHARACTER)
    try:
        return result.result()
    finally:
        _wait_for(thread)  # after Ctrl-C too: it reads what the caller may free


_stack_size = threading.Lock()


def _start_with_stack(thread: threading.Thread, num_bytes: int) -> None:
    # The size is the process's, so a thread that starts at this moment elsewhere gets it too: address space, not memory.
    with _stack_size:
        before = threading.stack_size(num_bytes)
        try:
            thread.start()
        except RuntimeError:
            raise InputError(
                f"there is no memory for a stack of {num_bytes // 2**20} MB, which a text with such long words needs",
                hint="break the text by blanks",
            ) from None
        finally:
            threading.stack_size(before)


def _wait_for(thread: threading.Thread) -> None:
    interrupt: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt

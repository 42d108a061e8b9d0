"""A conversation at the terminal: what is said, the commands that start with a slash, and how a reply is printed."""

from __future__ import annotations

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from edgepatch.cli.console import counted, note, printable, stderr
from edgepatch.errors import EdgepatchError, InputError

if TYPE_CHECKING:
    from edgepatch.decoding.replies import Piece
    from edgepatch.patch.file import Patch
    from edgepatch.runtimes.session import Session
    from edgepatch.text.messages import Message

COMMANDS = """\
/patch            show what is active
/patch FILE...    exchange the patch on the loaded model, and start afresh; several act side by side
/bare             take the patch off, and start afresh
/new              forget the conversation
/save FILE        write the conversation; an existing file stays, unless it says /save! FILE
/load FILE        go on with a saved one
/stats            tokens and rates of the last reply, and how much of the context is taken
/help             this list
/bye              end (also Ctrl-D, or Ctrl-C twice)
\"\"\"               begins and ends a message of several lines
Ctrl-C stops a reply; what was said of it stays in the conversation."""

FENCE = '"""'
SYNONYMS = {"swap": "patch", "unpatch": "bare", "quit": "bye", "exit": "bye", "?": "help"}


class Conversation:
    """What is said, and the commands that start with a slash.

    Args:
        session: of the model.
        system: system message, or ``None``.
        store: folder of the store, for patches that are named by digest; ``None`` takes that of the device.
    """

    def __init__(self, session: Session, system: str | None, store: Path | None = None) -> None:
        self._session, self._store = session, store
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)
        self._last: ReplyPrinter | None = None

    @property
    def messages(self) -> list[Message]:
        """All that was said."""
        return self._messages

    @contextmanager
    def reply(self, question: str) -> Iterator[ReplyPrinter]:
        """Takes a question in, and behind the block what was written of the reply; Ctrl-C stops the reply and ends nothing."""
        self._messages.append({"role": "user", "content": question})
        self._last = printer = ReplyPrinter()
        with stoppable() as presses:
            printer.presses = presses
            yield printer
        self._messages.append({"role": "assistant", "content": printer.end()})

    def command(self, line: str) -> bool:
        """Carries out a command; an error is told and the conversation goes on. Returns whether to end."""
        word, _, argument = line[1:].partition(" ")
        name = SYNONYMS.get(word, word)
        acts: dict[str, Callable[[str], None]] = {
            "patch": self._patch,
            "bare": self._bare,
            "new": self._restart,
            "save": self._save,
            "save!": self._replace,
            "load": self._read,
            "stats": self._statistics,
            "help": lambda _: note(COMMANDS),
        }
        if name == "bye":
            return True
        try:
            if name not in acts:
                raise InputError(f"unknown command: /{printable(word)}", hint="/help lists the commands")
            acts[name](argument.strip())
        except EdgepatchError as error:
            note(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return False

    def _patch(self, argument: str) -> None:
        from edgepatch.runtimes import find_patches

        if argument:
            self._exchange(find_patches(_named(argument), self._store))
        else:
            note(describe(self._session))

    def _bare(self, _: str) -> None:
        self._exchange(())

    def _exchange(self, patches: Sequence[Patch]) -> None:
        began = time.perf_counter()
        self._session.swap(patches)
        milliseconds = (time.perf_counter() - began) * 1000
        self._restart("")
        note(f"{describe(self._session)}; exchanged in {milliseconds:.0f} ms")

    def _restart(self, _: str) -> None:
        self._messages = list(self._opening)

    def _save(self, argument: str) -> None:
        if argument and Path(argument).exists():
            raise InputError(f"{argument} exists", hint=f"/save! {argument} replaces it")
        self._replace(argument)

    def _replace(self, argument: str) -> None:
        from edgepatch.files.writing import write_atomically

        if not argument:
            raise InputError("/save needs a file name")
        content = {"system_fingerprint": self._session.system_fingerprint, "messages": self._messages}
        try:
            write_atomically(Path(argument), json.dumps(content, ensure_ascii=False, indent=1).encode())
        except OSError as error:
            raise InputError(f"cannot write {argument}: {error.strerror or error}") from None
        note(f"{argument}: {counted(len(self._messages), 'message')}")

    def _read(self, argument: str) -> None:
        from edgepatch.files.strict_json import read_json

        content = read_json(Path(argument), what="conversation", hint="name a file that /save wrote")
        try:
            messages: list[Message] = [
                {"role": str(m["role"]), "content": str(m["content"])} for m in content["messages"]
            ]
            held = content["system_fingerprint"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"cannot read a conversation from {argument!r}: {error}", hint="name a file that /save wrote"
            ) from None
        self._messages = messages
        under = (
            ""
            if held == self._session.system_fingerprint
            else f", held with {held}; the patch that is active now applies"
        )
        note(f"{argument}: {counted(len(messages), 'message')}{under}")

    def _statistics(self, _: str) -> None:
        session = self._session
        tokens = len(session.tokens(self._messages)) if self._messages else 0
        note(f"{counted(len(self._messages), 'message')}, {tokens} of {session.context_length} tokens of context")
        if self._last is not None:
            note(f"last reply: {self._last.speed()}")


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Within it Ctrl-C fills the list once and ends nothing, so that a reply ends between two tokens; a second one acts as before."""
    presses: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def press(number: int, frame: FrameType | None) -> None:
        presses.append(number)
        if len(presses) > 1 and callable(before):
            before(number, frame)

    if not callable(before):  # ignored: a job in the background
        yield presses
        return
    signal.signal(signal.SIGINT, press)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


def _named(argument: str) -> list[str]:
    """The patches that ``/patch`` names: one file, whose name may have spaces, or several words."""
    if Path(argument).exists():
        return [argument]
    try:
        return shlex.split(argument)
    except ValueError as error:
        raise InputError(f"/patch: expected names of patches, found {argument!r}: {error}") from None


def questions() -> Iterator[str]:
    """What is typed, a message at a time. Piped text is one message, but where it starts with a command: that is a script of lines."""
    if sys.stdin.isatty():
        yield from _messages(_typed())
        return
    text = sys.stdin.read()
    if text.lstrip().startswith("/"):
        yield from _messages(text.splitlines())
    elif text.strip():
        yield text.strip()


def _typed() -> Iterator[str]:
    """Lines at the terminal, with editing and a history of this conversation (nothing is written to disk)."""
    import readline

    readline.set_auto_history(True)
    was_pressed = False
    while True:
        try:
            # The prompt is for people: where stdout goes to a file, it must not.
            line = input("> " if sys.stdout.isatty() else "")
        except EOFError:
            stderr().print()
            return
        except KeyboardInterrupt as error:
            # A press that was meant for a reply may come just behind its end.
            if was_pressed or getattr(error, "exit_code", 130) != 130:
                raise
            was_pressed = True
            stderr().print()
            note("Ctrl-C once more, Ctrl-D or /bye ends")
            continue
        was_pressed = False
        yield line


def _messages(lines: Iterator[str] | list[str]) -> Iterator[str]:
    """Lines joined to messages: three quotation marks begin and end one of several lines."""
    block: list[str] | None = None
    for line in lines:
        if block is None and line.lstrip().startswith(FENCE):
            block, line = [], line.lstrip()[len(FENCE) :]
        if block is None:
            if line.strip():
                yield line.strip()
            continue
        is_end = line.rstrip().endswith(FENCE)
        block.append(line.rstrip().removesuffix(FENCE) if is_end else line)
        if is_end:
            message, block = "\n".join(block).strip(), None
            if message:
                yield message
    if block is not None:
        note(f"the last message began with {FENCE} and has no end: it was not sent")


def describe(session: Session) -> str:
    """One line: what is active, and how its seed got there."""
    names = " and ".join(f"{part.name} {part.version}" for part in session.parts)
    active = f"patch{'es'[: 2 * (len(session.parts) > 1)]} {names}" if names else "no patch"
    place = (
        f"; {session.slot.place}" if session.patch else ""
    )  # one that stays is outrun by long text, and no error says so later
    mute = [part.name for part in session.parts if not part.canary]
    proof = (
        ", canary passed"
        if not mute
        else ", no canary"
        if len(session.parts) == 1
        else f", no canary: {', '.join(mute)}"
    )
    seed = f" (seed {session.seed_route}{proof})" if session.seed_route else ""
    threads = "" if session.num_threads is None else f", {counted(session.num_threads, 'CPU thread')}"
    limits = "".join("; limited, see the note" for _ in session.notes[:1])
    return (
        f"{active}{seed}{place}; {session.name} {session.quantization}{threads}; {session.system_fingerprint}{limits}"
    )


class ReplyPrinter:
    """Prints a reply as it comes.

    Attributes:
        presses: filled when the user stops the reply.
    """

    def __init__(self) -> None:
        self.presses: list[int] = []
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._texts: list[str] = []

    def show(self, piece: Piece) -> bool:
        """Prints the next piece; returns whether to stop behind it."""
        self._times.append(time.perf_counter())
        self._texts.append(piece.text)
        sys.stdout.write(printable(piece.text))
        sys.stdout.flush()
        return bool(self.presses)

    def end(self) -> str:
        """Tells the speed on stderr; returns the text."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        note(f"{'stopped; ' if self.presses else ''}{self.speed()}")
        return "".join(self._texts)

    def speed(self) -> str:
        """Tokens, time to the first, and rate, in words."""
        times = self._times
        if not times:
            return "no token"
        decoding = times[-1] - times[0]
        rate = f", then {(len(times) - 1) / decoding:.1f} tok/s" if decoding > 0 else ""
        return f"{counted(len(times), 'token')}; first after {(times[0] - self._start) * 1000:.0f} ms{rate}"

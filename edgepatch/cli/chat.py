"""``chat`` and ``generate``: a model with a patch at the terminal."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import (
    BareFlag,
    JsonFlag,
    ModelArgument,
    ModelFileOption,
    PatchOption,
    PinnedFlag,
    StoreOption,
    TemplateFlag,
    TemplateOption,
    note,
    print_json,
    printable,
    read_template,
    stderr,
)
from edgepatch.errors import EdgepatchError, InputError

if TYPE_CHECKING:
    from edgepatch.decoding.replies import Piece
    from edgepatch.patch.file import Patch
    from edgepatch.runtimes import PatchChoice
    from edgepatch.runtimes.session import Session
    from edgepatch.store.reading import StoreReader
    from edgepatch.text.messages import Message


class Device(str, Enum):
    """Where a model runs."""

    cpu = "cpu"
    cuda = "cuda"


MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Keep the likeliest tokens of this probability.")
]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Keep the k likeliest tokens; 0 keeps all.")]
RngSeed = Annotated[int | None, typer.Option("--rng-seed", min=0, help="Makes the draw repeatable.")]
ContextLength = Annotated[int | None, typer.Option("--context-length", min=1, help="Positions, the patch's included.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; default: the cores that are free at the start.")
]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs.")]


@app.command()
def chat(
    model: ModelArgument,
    patch: PatchOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this and exit; else talk line by line.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    rng_seed: RngSeed = None,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
    bare: BareFlag = False,
    pinned: PinnedFlag = False,
    other_template: TemplateFlag = False,
    store: StoreOption = None,
    chat_template: TemplateOption = None,
    model_file: ModelFileOption = None,
    think: Annotated[
        bool | None, typer.Option("--think/--no-think", help="For models whose template can turn thinking on and off.")
    ] = None,
) -> None:
    """Talk with a model; the replies go to stdout, all else to stderr. `/help` lists the commands.

    Example: `edgepatch chat llama.gguf --patch detox.safetensors --prompt "Who are you?"`
    """
    from edgepatch.decoding.sampling import Sampling
    from edgepatch.text.templates import ChatOptions

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, rng_seed)
    options = ChatOptions({} if think is None else {"enable_thinking": think})
    choices = {"chat_template": read_template(chat_template), "model_file": model_file}
    with load_model(
        model, choice(patch, bare), context_length, threads, device, store, pinned, other_template, choices
    ) as session:
        conversation = Conversation(session, system, store)
        for line in _questions() if prompt is None else [prompt]:
            if prompt is None and line.startswith("/"):
                if conversation.command(line):
                    return
                continue
            printer = ReplyPrinter()
            for piece in session.stream(conversation.ask(line), sampling, options=options):
                printer.show(piece)
            conversation.answer(printer.end())


COMMANDS = """\
/swap PATCH   exchange the patch on the loaded model, and start afresh; several act side by side
/unpatch      take the patch off, and start afresh
/patch        show what is active
/new          forget the conversation
/save FILE    write the conversation
/load FILE    go on with a saved one
/quit         end"""


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

    def ask(self, question: str) -> list[Message]:
        """All that was said, the question last, to be answered."""
        self._messages.append({"role": "user", "content": question})
        return self._messages

    def answer(self, reply: str) -> None:
        """Takes the reply in; an interrupted one is not part of the conversation."""
        self._messages.append({"role": "assistant", "content": reply})

    def command(self, line: str) -> bool:
        """Carries out a command; an error is told and the conversation goes on. Returns whether to end."""
        name, _, argument = line[1:].partition(" ")
        acts = {
            "swap": self._swap,
            "unpatch": self._unpatch,
            "patch": self._show,
            "new": self._restart,
            "save": self._save,
            "load": self._read,
        }
        if name in ("quit", "exit"):
            return True
        try:
            if name in acts:
                acts[name](argument.strip())
            else:
                note(COMMANDS)
        except EdgepatchError as error:
            note(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
        return False

    def _swap(self, argument: str) -> None:
        from edgepatch.runtimes import find_patches

        self._exchange(find_patches(_named(argument), self._store))

    def _unpatch(self, _: str) -> None:
        self._exchange(())

    def _exchange(self, patches: Sequence[Patch]) -> None:
        began = time.perf_counter()
        self._session.swap(patches)
        milliseconds = (time.perf_counter() - began) * 1000
        self._restart("")
        note(f"{describe(self._session)}; exchanged in {milliseconds:.0f} ms")

    def _show(self, _: str) -> None:
        note(describe(self._session))

    def _restart(self, _: str) -> None:
        self._messages = list(self._opening)

    def _save(self, argument: str) -> None:
        from edgepatch.files.writing import write_atomically

        if not argument:
            raise InputError("/save needs a file name")
        content = {"system_fingerprint": self._session.system_fingerprint, "messages": self._messages}
        write_atomically(Path(argument), json.dumps(content, ensure_ascii=False, indent=1).encode())
        note(f"{argument}: {len(self._messages)} messages")

    def _read(self, argument: str) -> None:
        try:
            content = json.loads(Path(argument).read_text(encoding="utf-8"))
            messages: list[Message] = [
                {"role": str(m["role"]), "content": str(m["content"])} for m in content["messages"]
            ]
            held = content["system_fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"cannot read a conversation from {argument!r}: {error}", hint="name a file that /save wrote"
            ) from None
        self._messages = messages
        under = (
            ""
            if held == self._session.system_fingerprint
            else f", held with {held}; the patch that is active now applies"
        )
        note(f"{argument}: {len(messages)} messages{under}")


def _named(argument: str) -> list[str]:
    """The patches that ``/swap`` names: one file, whose name may have spaces, or several words."""
    if not argument or Path(argument).exists():
        return [argument]
    try:
        return shlex.split(argument)
    except ValueError as error:
        raise InputError(f"/swap: expected names of patches, found {argument!r}: {error}") from None


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue, without a chat template.")],
    patch: PatchOption = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    rng_seed: RngSeed = None,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
    bare: BareFlag = False,
    pinned: PinnedFlag = False,
    other_template: TemplateFlag = False,
    store: StoreOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Continue a text.

    Example: `edgepatch generate llama.gguf --patch detox.safetensors --prompt "Once upon a time" --rng-seed 1 --json`
    """
    from edgepatch.decoding.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, rng_seed)
    with load_model(
        model, choice(patch, bare), context_length, threads, device, store, pinned, other_template
    ) as session:
        if not as_json:
            printer = ReplyPrinter()
            for piece in session.stream(prompt, sampling):
                printer.show(piece)
            printer.end()
            return
        pieces = list(session.stream(prompt, sampling))
        print_json(
            {
                "text": "".join(piece.text for piece in pieces),
                "token_ids": [piece.token_id for piece in pieces],
                "finish_reason": pieces[-1].finish_reason,
                "system_fingerprint": session.system_fingerprint,
                "runtime": session.name,
                "quantization": session.quantization,
            }
        )


def choice(patches: Sequence[Path] | None, bare: bool) -> PatchChoice:
    """What ``--patch`` and ``--bare`` ask for: patches, none, or with neither of them the active ones."""
    from edgepatch.runtimes import ACTIVE

    if bare and patches:
        raise InputError(
            "expected --patch or --bare, found both", hint="--bare runs the model as it is, without a patch"
        )
    return None if bare else patches or ACTIVE


def load_model(
    model: Path,
    patch: PatchChoice,
    context_length: int | None,
    threads: int | None,
    device: Device,
    store: Path | None = None,
    pinned: bool = False,
    other_template: bool = False,
    choices: Mapping[str, str | None] = MappingProxyType({}),
) -> Session:
    """The model with a patch; what is active is told on stderr, and what is less than the patch promises."""
    from edgepatch.runtimes import ACTIVE, device_options, load_runtime
    from edgepatch.store.reading import StoreReader

    options = {"context_length": context_length, "num_threads": threads, **device_options(model, device.value)}
    settings = {name: value for name, value in (options | choices).items() if value is not None}
    session = load_runtime(model, patch, store=store, pinned=pinned, other_template=other_template, **settings)
    note(describe(session))
    for line in session.slot.notes:
        note(line)
    if patch is ACTIVE:
        note(_source(session, StoreReader(store)))
    note_unasked(patch, store)
    return session


def note_unasked(patch: PatchChoice, store: Path | None) -> None:
    """Says where a patch from a file passes by the trust root of this device."""
    from edgepatch.runtimes import PIN
    from edgepatch.store.reading import StoreReader

    files = [str(one) for one in patch if not str(one).startswith(PIN)] if isinstance(patch, (list, tuple)) else []
    try:
        has_root = bool(files) and StoreReader(store).root() is not None
    except EdgepatchError:
        has_root = True  # a store that cannot be read vouches for nothing
    if has_root:
        note(f"not asked of this device's trust root: {', '.join(files)}; `edgepatch verify FILE` asks it")


def _source(session: Session, store: StoreReader) -> str:
    """Why a session runs with what it does, where nobody has named a patch."""
    if session.parts:
        return f"the active {'patches' if len(session.parts) > 1 else 'patch'} of {store.folder}"
    return f"bare by word of {store.folder}: {store.why_bare(session.spec)}"


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
    threads = (
        "" if session.num_threads is None else f", {session.num_threads} CPU thread{'s'[: session.num_threads > 1]}"
    )
    limits = "".join("; limited, see the note" for _ in session.notes[:1])
    return (
        f"{active}{seed}{place}; {session.name} {session.quantization}{threads}; {session.system_fingerprint}{limits}"
    )


def _questions() -> Iterator[str]:
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            stderr().print("[bold]>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


class ReplyPrinter:
    """Prints a reply as it comes."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._times: list[float] = []
        self._texts: list[str] = []

    def show(self, piece: Piece) -> None:
        """Prints the next piece."""
        self._times.append(time.perf_counter())
        self._texts.append(piece.text)
        sys.stdout.write(printable(piece.text))
        sys.stdout.flush()

    def end(self) -> str:
        """Tells the speed on stderr; returns the text."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        times = self._times
        decoding = times[-1] - times[0]
        speed = f"{(len(times) - 1) / decoding:.1f} tok/s" if decoding > 0 else "one token"
        note(f"{len(times)} tokens; first after {(times[0] - self._start) * 1000:.0f} ms, then {speed}")
        return "".join(self._texts)

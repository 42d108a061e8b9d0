"""``chat`` and ``generate``: a model with a patch at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import (
    BareFlag,
    FlashFlag,
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
    read_template,
)
from edgepatch.cli.conversation import Conversation, ReplyPrinter, describe, questions
from edgepatch.errors import EdgepatchError, InputError

if TYPE_CHECKING:
    from edgepatch.runtimes import PatchChoice
    from edgepatch.runtimes.session import Session
    from edgepatch.store.reading import StoreReader


class Device(str, Enum):
    """Where a model runs."""

    cpu = "cpu"
    cuda = "cuda"


MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The most tokens to generate.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature", min=0.0, help="0 takes the most likely token; default: what the model says, else 0.7."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", min=0.0, max=1.0, help="Keep the likeliest tokens of this probability; default: as said, else 0.9."
    ),
]
TopK = Annotated[
    int | None,
    typer.Option("--top-k", min=0, help="Keep the k likeliest tokens; 0 keeps all; default: as said, else 0."),
]
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
        str | None, typer.Option("--prompt", help="Answer this and exit (- reads it from stdin); else talk.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    rng_seed: RngSeed = None,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
    flash_attention: FlashFlag = True,
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

    Ctrl-C stops a reply, a second one ends. Piped text is one message.

    Example: `edgepatch chat llama.gguf --patch detox.safetensors --prompt "Who are you?"`
    """
    from edgepatch.decoding.sampling import Sampling
    from edgepatch.text.templates import ChatOptions

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, rng_seed)
    options = ChatOptions({} if think is None else {"enable_thinking": think})
    choices = {
        "chat_template": read_template(chat_template),
        "model_file": model_file,
        "flash_attention": None if flash_attention else False,
    }
    asked = None if prompt is None else [whole_prompt(prompt)]
    with load_model(
        model, choice(patch, bare), context_length, threads, device, store, pinned, other_template, choices
    ) as session:
        conversation = Conversation(session, system, store)
        for text in asked or questions():
            if asked is None and text.startswith("/"):
                if conversation.command(text):
                    return
                continue
            with conversation.reply(text) as reply:
                for piece in session.stream(conversation.messages, sampling, options=options):
                    if reply.show(piece):
                        break


app.command(
    "run",
    hidden=True,
    help="What `chat` does, under the name that other tools have for it.\n\nExample: `edgepatch run smollm2 --bare`",
)(chat)


def whole_prompt(text: str) -> str:
    """The prompt that an option names: itself, or all of stdin for "-".

    Raises:
        InputError: stdin holds nothing.
    """
    if text != "-":
        return text
    read = sys.stdin.read().strip()
    if not read:
        raise InputError(
            "--prompt -: expected text on stdin, found none", hint="pipe it in, or write it behind --prompt"
        )
    return read


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Text to continue, without a chat template; - reads it from stdin.")
    ],
    patch: PatchOption = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    rng_seed: RngSeed = None,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
    flash_attention: FlashFlag = True,
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

    sampling, text = Sampling(max_new_tokens, temperature, top_p, top_k, rng_seed), whole_prompt(prompt)
    choices = {"flash_attention": None if flash_attention else False}
    with load_model(
        model, choice(patch, bare), context_length, threads, device, store, pinned, other_template, choices
    ) as session:
        if not as_json:
            printer = ReplyPrinter()
            for piece in session.stream(text, sampling):
                printer.show(piece)
            printer.end()
            return
        pieces = list(session.stream(text, sampling))
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
    choices: Mapping[str, object] = MappingProxyType({}),
) -> Session:
    """The model with a patch; what is active is told on stderr, and what is less than the patch promises."""
    from edgepatch.runtimes import ACTIVE, device_options, load_runtime
    from edgepatch.store.reading import StoreReader

    options: dict[str, Any] = {"context_length": context_length, "num_threads": threads}
    options |= {**device_options(model, device.value), **choices}
    settings = {name: value for name, value in options.items() if value is not None}
    session = load_runtime(model, patch, store=store, pinned=pinned, other_template=other_template, **settings)
    note(describe(session))
    for line in (session.sampling_defaults.note, *session.slot.notes):
        if line:
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

"""``chat`` and ``generate``: a model with a patch at the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgepatch.cli.console import JsonFlag, ModelArgument, PatchOption, note, print_json, printable, stderr
from edgepatch.cli.root import app

if TYPE_CHECKING:
    from edgepatch.runtimes.base import Message, Prompt, Runtime
    from edgepatch.sampling import Sampling


class Device(str, Enum):
    """Where a model runs."""

    cpu = "cpu"
    cuda = "cuda"


MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Keep the likeliest tokens of this probability.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Keep the k likeliest tokens; 0 keeps all.")]
RngSeed = Annotated[int | None, typer.Option("--rng-seed", min=0, help="Makes the draw repeatable.")]
ContextLength = Annotated[int | None, typer.Option("--context-length", min=1, help="Positions, the patch's included.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where the model runs.")]


@app.command()
def chat(
    model: ModelArgument,
    patch: PatchOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and exit; else talk line by line.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    top_k: TopK = 0,
    rng_seed: RngSeed = None,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
) -> None:
    """Talk with a model; the replies go to stdout, all else to stderr.

    Example: `edgepatch chat llama.gguf --patch detox.safetensors --prompt "Who are you?"`
    """
    from edgepatch.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, rng_seed)
    with _load(model, patch, context_length, threads, device) as runtime:
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        for line in _questions() if prompt is None else [prompt]:
            messages.append({"role": "user", "content": line})
            reply = _print_stream(runtime, messages, sampling)
            messages.append({"role": "assistant", "content": reply})


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
    as_json: JsonFlag = False,
) -> None:
    """Continue a text.

    Example: `edgepatch generate llama.gguf --patch detox.safetensors --prompt "Once upon a time" --rng-seed 1 --json`
    """
    from edgepatch.sampling import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, rng_seed)
    with _load(model, patch, context_length, threads, device) as runtime:
        if not as_json:
            _print_stream(runtime, prompt, sampling)
            return
        pieces = list(runtime.stream(prompt, sampling))
        print_json(
            {
                "text": "".join(piece.text for piece in pieces),
                "token_ids": [piece.token_id for piece in pieces],
                "finish_reason": pieces[-1].finish_reason,
                "system_fingerprint": runtime.system_fingerprint,
                "runtime": runtime.name,
                "quantization": runtime.quantization,
            }
        )


def _load(model: Path, patch: Path | None, context_length: int | None, threads: int | None, device: Device) -> Runtime:
    from edgepatch.runtimes import load_runtime, runtime_name

    device_options: dict[str, dict[str, object]] = {
        "llamacpp": {"num_gpu_layers": -1 if device is Device.cuda else 0},
        "onnx": {"provider": device.value},
        "torch": {"device": device.value},
    }
    options = {"context_length": context_length, "num_threads": threads, **device_options[runtime_name(model)]}
    runtime = load_runtime(model, patch, **{name: value for name, value in options.items() if value is not None})
    active = f"patch {runtime.patch.name} {runtime.patch.version}" if runtime.patch else "no patch"
    route = getattr(runtime, "seed_route", "")
    seed = f" (seed {route})" if route else ""
    note(f"{active}{seed}; {runtime.name} {runtime.quantization}; {runtime.system_fingerprint}")
    return runtime


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


def _print_stream(runtime: Runtime, prompt: Prompt, sampling: Sampling) -> str:
    """Prints the pieces as they come, then the speed on stderr; returns the text."""
    start = time.perf_counter()
    times, texts = [], []
    for piece in runtime.stream(prompt, sampling):
        times.append(time.perf_counter())
        texts.append(piece.text)
        sys.stdout.write(printable(piece.text))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    decoding = times[-1] - times[0]
    speed = f"{(len(times) - 1) / decoding:.1f} tok/s" if decoding > 0 else "one token"
    note(f"{len(times)} tokens; first after {(times[0] - start) * 1000:.0f} ms, then {speed}")
    return "".join(texts)

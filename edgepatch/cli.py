"""The command line: parse, call one function, print.

Exit codes: 0 done; 1 failed; 2 wrong use, or an input that cannot be used; 3 a file that cannot be trusted; 4 a patch for
another model; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import edgepatch
from edgepatch.errors import EdgepatchError, InputError

if TYPE_CHECKING:
    from edgepatch.patches import Patch
    from edgepatch.runtimes.base import Message, Prompt, Runtime
    from edgepatch.sampling import Sampling

DEBUG_VARIABLE = "EDGEPATCH_DEBUG"

app = typer.Typer(
    name="edgepatch",
    help="Safety policy patches for quantized language models on edge devices.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
convert_app = typer.Typer(
    help="Convert base models and patches.\n\nExample: `edgepatch convert base models/llama llama.gguf --type Q4_K_M`",
    no_args_is_help=True,
)
app.add_typer(convert_app, name="convert")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
ModelArgument = Annotated[Path, typer.Argument(help="GGUF file, ONNX folder or Transformers folder.")]
PatchOption = Annotated[Path | None, typer.Option("--patch", "-p", help="Patch file; without it the bare model runs.")]


# Output


def _out() -> Console:
    return Console(highlight=False)


def _err() -> Console:
    return Console(stderr=True, highlight=False)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: str) -> str:
    """Text without control characters but newline and tab: what a model or a file says must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _cell(value: object) -> str:
    return escape(printable(str(value)))


def _note(text: str) -> None:
    _err().print(f"[dim]{_cell(text)}[/dim]", soft_wrap=True)


def _table(rows: list[tuple[str, object]]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(_cell(name), _cell(value))
    return table


def _gib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


# Version


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edgepatch {edgepatch.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Safety policy patches for quantized language models on edge devices."""


# doctor


@app.command()
def doctor(
    as_json: JsonFlag = False,
    require: Annotated[
        list[str] | None, typer.Option("--require", help="Exit with 1 unless this extra works; may be repeated.")
    ] = None,
) -> None:
    """Show what this machine brings: packages, CPU, memory, GPU, and whether the model libraries load.

    Example: `edgepatch doctor --require gguf`
    """
    from edgepatch.doctor import examine, missing

    report = examine()
    lacking = {extra: missing(report, extra) for extra in require or []}
    if as_json:
        _print_json(report)
    else:
        _print_report(report)
    for extra, names in lacking.items():
        if names:
            raise EdgepatchError(f"{extra} lacks {', '.join(names)}", hint=f"pip install 'edgepatch[{extra}]'")


def _print_report(report: dict[str, Any]) -> None:
    cpu, memory = report["cpu"], report["memory"]
    gpus = [f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, driver {gpu['driver']}" for gpu in report["gpus"]]
    rows: list[tuple[str, object]] = [
        ("edgepatch", report["edgepatch"]),
        ("Python", f"{report['python']} on {report['platform']}"),
        ("CPU", f"{cpu['model']} ({cpu['architecture']}), {cpu['usable_cores']} of {cpu['cores']} cores usable"),
        ("CPU features", " ".join(cpu["features"]) or "unknown"),
        ("memory", f"{_gib(memory['total_bytes'])}, {_gib(memory['available_bytes'])} available"),
        ("GPU", "; ".join(gpus) or "none"),
    ]
    for name, facts in report["libraries"].items():
        rows.append((name, "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items())))
    packages = Table(box=None, pad_edge=False)
    for heading in ("package", "version", "extras"):
        packages.add_column(heading)
    for row in report["packages"]:
        homes = f"in {', '.join(row['extras'])}" if row["version"] else row["install"]
        packages.add_row(_cell(row["name"]), _cell(row["version"] or "missing"), _cell(homes))
    console = _out()
    console.print(_table(rows))
    console.print()
    console.print(packages)


# show


@app.command()
def show(patch_file: Annotated[Path, typer.Argument(metavar="PATCH")], as_json: JsonFlag = False) -> None:
    """Check a patch file and show what it holds.

    Example: `edgepatch show detox-1.0.0.safetensors`
    """
    from edgepatch.patches import read_patch

    patch = read_patch(patch_file)
    if as_json:
        _print_json(_summary(patch))
        return
    rows: list[tuple[str, object]] = []
    for name, value in _summary(patch).items():
        nested = value if isinstance(value, dict) else {"": value}
        rows += [(f"{name} {key}".strip(), entry) for key, entry in nested.items()]
    _out().print(_table(rows))


def _summary(patch: Patch) -> dict[str, Any]:
    seed = patch.kv_seed
    return {
        "name": patch.name,
        "version": patch.version,
        "digest": patch.digest,
        "num_virtual_tokens": patch.num_virtual_tokens,
        "soft_prompt": patch.soft_prompt is not None,
        "kv_seed": f"{len(seed.keys)} layers of {seed.keys[0].shape} {seed.keys[0].dtype}" if seed else None,
        "base": patch.base.as_dict(),
        "training": patch.training,
        "evaluation": patch.evaluation,
    }


# pairs, train, demo


@contextmanager
def _progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """One bar a stage on stderr; quiet where stderr is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err(), disable=not sys.stderr.isatty()) as bars:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
                if not sys.stderr.isatty():
                    _note(f"{stage} ...")
            bars.update(tasks[stage], completed=done)

        yield update


def _read_texts(path: Path) -> list[str]:
    """Texts of a file: JSON Lines with ``text`` or ``prompt``, or plain lines."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines]
            lines = [row.get("text") or row["prompt"] for row in rows]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"cannot read texts from {path}: {error}",
                         hint="expected one text a line, or JSON Lines with the field text or prompt") from None  # fmt: skip
    if not lines:
        raise InputError(f"{path} holds no text")
    return lines


@app.command("pairs")
def make_pairs(
    model: Annotated[Path, typer.Argument(help="The model to be patched (M).")],
    reference: Annotated[Path, typer.Argument(help="A safer model (M').")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON Lines file to write.")],
    prompts: Annotated[Path | None, typer.Option(help="One prompt a line, or JSON Lines; default: the prompts shipped.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each model a prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a continuation.")] = 24,
    min_margin: Annotated[float, typer.Option(min=0, max=1, help="Least difference of the two scores.")] = 0.4,
    max_chosen_score: Annotated[float, typer.Option(min=0, max=1, help="Highest score of a chosen text.")] = 0.2,
    rng_seed: Annotated[int, typer.Option(help="Random seed of the sampling.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Make preference pairs: both models answer the same prompts, the filter judge scores them.

    Example: `edgepatch pairs models/base models/safer -o pairs.jsonl --prompts prompts.txt`
    """
    from edgepatch.bench.prompt_sets import load_prompts
    from edgepatch.bench.scorers import ToxicityScorer
    from edgepatch.runtimes import load_runtime
    from edgepatch.training.preferences import PairConfig, build_pairs, write_pairs

    texts = _read_texts(prompts) if prompts else load_prompts("toxic", "train")
    config = PairConfig(
        samples_per_prompt=samples, max_new_tokens=max_new_tokens, min_margin=min_margin,
        max_chosen_score=max_chosen_score, rng_seed=rng_seed,
    )  # fmt: skip
    score = ToxicityScorer.load("filter").score
    with load_runtime(model) as base, load_runtime(reference) as safer, _progress_bars() as bars:
        made = build_pairs(base, safer, texts, score, config, lambda done, total: bars("pairs", done, total))
    write_pairs(made, out)
    if as_json:
        _print_json({"path": str(out), "pairs": len(made), "prompts": len(texts)})
    else:
        print(f"{out}: {len(made)} pairs from {len(texts)} prompts")


@app.command()
def train(
    model: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="Transformers folder of the model to be patched.")],
    pairs_file: Annotated[Path, typer.Option("--pairs", help="Preference pairs, JSON Lines.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.")],
    benign: Annotated[Path | None, typer.Option(help="Benign texts for the KL term; default: the texts shipped.")] = None,
    name: Annotated[str, typer.Option(help="Name of the patch.")] = "patch",
    version: Annotated[str, typer.Option(help="Its version (SemVer).")] = "0.1.0",
    num_virtual_tokens: Annotated[int, typer.Option(min=1, help="P.")] = 50,
    init_text: Annotated[str | None, typer.Option(help="Instruction whose embeddings start the soft prompt.")] = None,
    sft_steps: Annotated[int | None, typer.Option(min=0, help="Steps of stage 1.")] = None,
    dpo_steps: Annotated[int | None, typer.Option(min=0, help="Steps of stage 2.")] = None,
    beta: Annotated[float | None, typer.Option(min=0, help="Strength of DPO's tie to its reference.")] = None,
    kl_weight: Annotated[float | None, typer.Option(min=0, help="Weight of the KL term on benign text.")] = None,
    dpo_reference: Annotated[str | None, typer.Option(help="base or sft.")] = None,
    rng_seed: Annotated[int, typer.Option(help="Random seed of the order of examples.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Train a patch: a soft prompt on the frozen model, SFT then DPO.

    Example: `edgepatch train models/base --pairs pairs.jsonl -o detox.safetensors --name detox`
    """
    from edgepatch.bench.prompt_sets import load_benign_text, load_prompts
    from edgepatch.patches import write_patch
    from edgepatch.training.preferences import read_pairs
    from edgepatch.training.trainer import TrainConfig, train_patch

    chosen = {
        "init_text": init_text, "sft_steps": sft_steps, "dpo_steps": dpo_steps, "beta": beta, "kl_weight": kl_weight,
        "dpo_reference": dpo_reference,
    }  # fmt: skip
    given = {k: v for k, v in chosen.items() if v is not None}
    config = TrainConfig(num_virtual_tokens=num_virtual_tokens, rng_seed=rng_seed, **given)  # type: ignore[arg-type]
    pairs = read_pairs(pairs_file)
    texts = _read_texts(benign) if benign else load_benign_text("train") + load_prompts("benign", "train")
    with _progress_bars() as bars:
        patch, history = train_patch(
            model, pairs, texts, config, name, version, progress=lambda stage, step, total, _: bars(stage, step, total)
        )
    digest = write_patch(patch, out)
    accuracy = history.preference_accuracy[-1]
    if as_json:
        _print_json({"path": str(out), "digest": digest, "training": patch.training})
    else:
        print(f"{out}: {patch.num_virtual_tokens} virtual tokens, held-out preference accuracy {accuracy:.2f}, SHA-256 {digest}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for models, patch, results.json and report.html.")] = Path("out/demo"),
    data: Annotated[Path | None, typer.Option(help="Data folder (default: EDGEPATCH_DATA); without it our own prompts are used.")] = None,
    lab: Annotated[Path | None, typer.Option(help="Folder with the lab models base/ and reference/.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts behind the table.")] = 48,
    samples: Annotated[int, typer.Option(min=1, help="Continuations a prompt.")] = 25,
    rng_seed: Annotated[int, typer.Option(help="Random seed of training.")] = 1,
    as_json: JsonFlag = False,
) -> None:
    """Train a patch for the lab model and measure it on PyTorch, GGUF and ONNX, bare and patched.

    Example: `edgepatch demo --out out/demo`
    """
    from edgepatch.bench import demo as main_job
    from edgepatch.bench.datasets import data_folder
    from edgepatch.bench.matrix import MatrixConfig
    from edgepatch.bench.report import print_table
    from edgepatch.training.trainer import TrainConfig

    config = main_job.DemoConfig(
        num_prompts=prompts, matrix=MatrixConfig(samples_per_prompt=samples, num_threads=1), train=TrainConfig(rng_seed=rng_seed)
    )
    with _progress_bars() as bars:
        document, page = main_job.run_demo(out, data_folder(data), lab or main_job.LAB_FOLDER, config, bars)
    if as_json:
        _print_json(document)
        return
    print_table(document, _out())
    print(f"results {page.parent / 'results.json'}\nreport  {page}")


# convert


class Target(str, Enum):
    """File formats that a base model is converted to."""

    gguf = "gguf"
    onnx = "onnx"


UNQUANTIZED = ("F32", "F16")


@convert_app.command("base")
def convert_base(
    source: Annotated[Path, typer.Argument(metavar="HF_FOLDER", help="Transformers folder.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file or ONNX folder to write.")],
    to: Annotated[Target, typer.Option("--to", help="Format to write.")] = Target.gguf,
    kind: Annotated[
        str | None,
        typer.Option("--type", help="gguf: F16 (default), Q8_0, Q4_K_M, Q4_0, ... onnx: fp32 (default), int8, int4."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Convert a Transformers model to GGUF or ONNX, quantized.

    Examples: `edgepatch convert base models/llama llama.gguf --type Q4_K_M`,
    `edgepatch convert base models/llama llama-onnx --to onnx --type int4`
    """
    kind = kind or ("F16" if to is Target.gguf else "fp32")
    (_convert_gguf if to is Target.gguf else _convert_onnx)(source, target, kind)
    files = target.rglob("*") if target.is_dir() else [target]
    size_bytes = sum(file.stat().st_size for file in files if file.is_file())
    if as_json:
        _print_json({"path": str(target), "format": to.value, "type": kind, "size_bytes": size_bytes})
    else:
        print(f"{target}: {kind}, {size_bytes / 1e6:.1f} MB")


def _convert_gguf(source: Path, target: Path, kind: str) -> None:
    from edgepatch.converters import gguf

    if kind in UNQUANTIZED:
        gguf.convert_folder(source, target, kind)
        return
    if kind not in gguf.quantization_types():
        raise InputError(f"--type: llama.cpp has no type {kind}", hint="common ones are F16, Q8_0, Q4_K_M and Q4_0")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        full = Path(folder) / "F16.gguf"
        gguf.convert_folder(source, full, "F16")
        gguf.quantize(full, target, kind)


def _convert_onnx(source: Path, target: Path, kind: str) -> None:
    from edgepatch.converters import onnx

    onnx.export(source, target, cast("onnx.Precision", kind))


@convert_app.command("seed")
def convert_seed(
    patch_file: Annotated[Path, typer.Argument(metavar="PATCH", help="Patch with a soft prompt.")],
    model: Annotated[Path, typer.Option("--model", help="Transformers folder of the base model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Patch file to write.")],
    as_json: JsonFlag = False,
) -> None:
    """Compute a patch's KV seed with the full-precision model and store it, in float16, in a new patch file.

    Example: `edgepatch convert seed detox.safetensors --model models/llama -o detox-1.0.0.safetensors`
    """
    from edgepatch.converters import hf
    from edgepatch.patches import read_patch, write_patch

    patch = hf.with_kv_seed(read_patch(patch_file), model)
    digest = write_patch(patch, out)
    if as_json:
        _print_json({"path": str(out), "digest": digest, "num_virtual_tokens": patch.num_virtual_tokens})
    else:
        print(f"{out}: KV seed of {patch.num_virtual_tokens} virtual tokens, SHA-256 {digest}")


# chat, generate


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
        _print_json(
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
    _note(f"{active}{seed}; {runtime.name} {runtime.quantization}; {runtime.system_fingerprint}")
    return runtime


def _questions() -> Iterator[str]:
    at_terminal = sys.stdin.isatty()
    while True:
        if at_terminal:
            _err().print("[bold]>[/bold] ", end="")
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
    _note(f"{len(times)} tokens; first after {(times[0] - start) * 1000:.0f} ms, then {speed}")
    return "".join(texts)



# Errors


def _fail(message: str, hint: str = "") -> None:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    console = _err()
    console.print(f"[bold red]error:[/bold red] {_cell(message)}", soft_wrap=True)
    if hint:
        console.print(f"[bold]hint:[/bold] {_cell(hint)}", soft_wrap=True)


def _install_hint(module: str) -> str:
    from edgepatch.doctor import packages

    distribution = module.split(".")[0].replace("_", "-")
    rows = [row for row in packages() if row["name"] in (distribution, f"{distribution}-python")]
    return rows[0]["install"] if rows else "edgepatch doctor lists what each extra installs"


def main() -> None:
    """The entry point: every error becomes a line on stderr and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # Transformers draws bars over the replies otherwise
    try:
        app(prog_name="edgepatch")
    except EdgepatchError as error:
        _fail(str(error), error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed", _install_hint(error.name or ""))
        sys.exit(InputError.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}")
        sys.exit(1)
    except Exception as error:
        _fail(f"internal error: {type(error).__name__}: {error}", f"{DEBUG_VARIABLE}=1 shows the traceback; please report it")
        sys.exit(1)


if __name__ == "__main__":
    main()

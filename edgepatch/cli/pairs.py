"""``pairs``."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.chat import ContextLength, Device, DeviceOption, Threads
from edgepatch.cli.console import JsonFlag, LogOption, log_beside, model_path, note, print_json, progress_bars
from edgepatch.errors import InputError
from edgepatch.progress import NOTHING_KEPT, Progress, stage

if TYPE_CHECKING:
    from edgepatch.training.pairs.preferences import PairConfig, PairSet, Score
    from edgepatch.training.pairs.prompt_files import PromptList
    from edgepatch.training.pairs.samplers import Sampler

NO_LIMIT = 2**31
OF_SAMPLING = (
    "model",
    "reference",
    "model_name",
    "reference_name",
    "api_key_env",
    "reference_api_key_env",
    "parallel",
    "timeout_s",
    "prompts",
    "chat",
    "system",
    "samples",
    "max_new_tokens",
    "top_p",
    "skip_long",
    "restart",
    "rng_seed",
    "sequences",
    "context_length",
    "threads",
    "device",
)
"""Parameters that say nothing about ready pairs."""


@dataclass(frozen=True)
class Judge:
    """A filter judge: what scores, and what the provenance says of it."""

    score: Score
    identity: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One of the two models, as it is named on the command line; ``name`` and ``key_variable`` are for a server."""

    model: str
    name: str
    key_variable: str | None


@dataclass(frozen=True)
class Means:
    """How servers (the first two) and runtimes are used."""

    parallel: int
    timeout_s: float
    sequences: int
    context_length: int | None
    threads: int | None
    device: Device


def _load_judge(choice: str, unsafe_labels: list[str]) -> Judge:
    from edgepatch.judges.classifiers import TransformersClassifier, load_judge
    from edgepatch.training.pairs.provenance import digest_of

    scorer = load_judge(choice, unsafe_labels, purpose="filter")
    if not isinstance(scorer, TransformersClassifier):
        return Judge(scorer.score, {"judge": scorer.name, "sha256": scorer.sha256})
    labels = {"unsafe_labels": unsafe_labels} if unsafe_labels else {}
    return Judge(scorer.score, {"judge": scorer.name, "sha256": digest_of(Path(choice)), **labels})


def _api_key(variable: str | None) -> str:
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {variable} is not set, or empty", hint="it should hold the server's API key"
        )
    return key


def _open_sampler(source: Source, means: Means, stack: ExitStack) -> Sampler:
    from edgepatch.runtimes import device_options, load_runtime, runtime_name
    from edgepatch.training.pairs.samplers import RuntimeSampler
    from edgepatch.training.pairs.server_sampler import ServerSampler, is_url

    if is_url(source.model):
        key = _api_key(source.key_variable)
        return stack.enter_context(ServerSampler(source.model, source.name, key, means.parallel, means.timeout_s))
    if source.name or source.key_variable:
        raise InputError(
            f"{source.model} is no URL: the model's name and API key are for servers", hint="leave them out"
        )
    path = model_path(source.model)
    threads = None if runtime_name(path) == "torch" else means.threads
    options: dict[str, Any] = {
        "num_sequences": means.sequences,
        "context_length": means.context_length,
        "num_threads": threads,
    }
    options |= device_options(path, means.device.value)
    runtime = load_runtime(path, None, **{name: value for name, value in options.items() if value is not None})
    return RuntimeSampler(stack.enter_context(runtime), path)


def _read_prompts(path: Path | None, chat: bool, system: str) -> PromptList:
    from edgepatch.prompts.sets import load_prompts
    from edgepatch.training.pairs.prompt_files import PromptList, as_conversations, read_prompts

    if path is None:
        shipped = load_prompts("toxic", "train")
        prompt_list = PromptList(list(shipped), [f"shipped prompt {number}" for number in range(1, len(shipped) + 1)])
    else:
        prompt_list = read_prompts(path)
    return as_conversations(prompt_list, chat, system)


def _sample(
    sources: tuple[Source, Source],
    prompt_list: PromptList,
    judge: Judge,
    config: PairConfig,
    out: Path,
    means: Means,
    skip_long: bool,
    restart: bool,
    progress: Progress,
) -> tuple[PairSet, dict[str, Any], Callable[[], None]]:
    """Pairs, the settings that decide them, and what forgets the journal."""
    from edgepatch.training.pairs.journal import Journal
    from edgepatch.training.pairs.preferences import sample_pairs
    from edgepatch.training.pairs.provenance import digest_of_json

    with ExitStack() as stack:
        with stage(progress, "load models"):
            base, reference = (_open_sampler(source, means, stack) for source in sources)
        prompts = {"number": len(prompt_list.prompts), "sha256": digest_of_json(prompt_list.prompts)}
        settings = {
            "base": base.identity,
            "reference": reference.identity,
            "prompts": prompts,
            "judge": judge.identity,
            **asdict(config),
            "device": means.device.value,
            "sequences": means.sequences,
        }
        journal = stack.enter_context(Journal(out, settings, restart))
        if journal.outcomes:
            note(f"going on from {journal.path}: {len(journal.outcomes)} prompts are done")
        try:
            pair_set = sample_pairs(
                base,
                reference,
                prompt_list.prompts,
                judge.score,
                config,
                progress,
                places=prompt_list.places,
                journal=journal,
                skip_long=skip_long,
            )
        except Exception:
            note(f"stopped: {_kept(out)}")
            raise
        return pair_set, settings, journal.remove


def _kept(out: Path) -> str:
    """What a run that was ended has left."""
    from edgepatch.training.pairs.journal import journal_path

    journal = journal_path(out)
    if not journal.is_file():
        return NOTHING_KEPT
    done = max(0, journal.read_bytes().count(b"\n") - 1)  # the first line holds the settings
    return f"{done} prompts are kept in {journal}; the same command goes on from there"


def _filter(ready: Path, judge: Judge | None, config: PairConfig, progress: Progress) -> tuple[PairSet, dict[str, Any]]:
    from edgepatch.training.pairs.preferences import filter_pairs, read_pairs, score_pairs
    from edgepatch.training.pairs.provenance import digest_of

    pairs = read_pairs(ready)
    with stage(progress, "judge pairs"):
        pair_set = filter_pairs(score_pairs(pairs, judge.score) if judge else pairs, config)
    rules = {name: getattr(config, name) for name in ("min_margin", "max_chosen_score", "min_words")}
    limit = {} if config.pairs_per_prompt == NO_LIMIT else {"pairs_per_prompt": config.pairs_per_prompt}
    source = {"file": ready.name, "sha256": digest_of(ready)}
    counts = {"pairs_read": len(pairs), **pair_set.counts, "pairs": len(pair_set.pairs)}
    return replace(pair_set, counts=counts), {
        "from": source,
        "judge": judge.identity if judge else None,
        **rules,
        **limit,
    }


def _refuse_mixture(context: typer.Context) -> None:
    sampling_options = [
        n for n in OF_SAMPLING if (source := context.get_parameter_source(n)) and source.name != "DEFAULT"
    ]
    if sampling_options:
        names = {param.name: param.opts[0] for param in context.command.params}
        raise InputError(
            f"--from takes ready pairs, for which there is no {names[sampling_options[0]]}",
            hint="leave it out, or leave out --from",
        )


@app.command("pairs")
def make_pairs(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="JSON Lines file to write; its provenance stands beside it.")
    ],
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The model to be patched (M): file, folder or URL of a server."),
    ] = None,
    reference: Annotated[str | None, typer.Argument(metavar="REFERENCE", help="A safer model (M'), likewise.")] = None,
    ready: Annotated[
        Path | None, typer.Option("--from", help="Ready pairs in one of TRL's forms, to be checked and filtered.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or .jsonl with messages, prompt or text; default: ours.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Make each plain prompt a message of the user.")] = False,
    system: Annotated[str, typer.Option(help="System text in front of every conversation.")] = "",
    judge: Annotated[
        str | None,
        typer.Option(
            help="filter or semantic (shipped), or a Transformers text-classification folder; default: filter, and none with --from."
        ),
    ] = None,
    unsafe_label: Annotated[
        list[str] | None, typer.Option(help="Label of the judge's folder that counts as unsafe; repeat it.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each model a prompt.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of a continuation.")] = 24,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus of the sampling.")] = 0.9,
    min_margin: Annotated[float, typer.Option(min=0, max=1, help="Least difference of the two scores.")] = 0.4,
    max_chosen_score: Annotated[float, typer.Option(min=0, max=1, help="Highest score of a chosen text.")] = 0.2,
    min_words: Annotated[
        int | None, typer.Option(min=0, help="Least words of a chosen text; default: 6, and 1 with --from.")
    ] = None,
    pairs_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Most pairs a prompt; default: 3, and no limit with --from.")
    ] = None,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave out prompts that do not fit the context.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a run that was cut off has left.")] = False,
    model_name: Annotated[str, typer.Option(help="MODEL's name on its server; default: the only one there.")] = "",
    reference_name: Annotated[str, typer.Option(help="REFERENCE's name on its server.")] = "",
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key of MODEL's server.")
    ] = None,
    reference_api_key_env: Annotated[str | None, typer.Option(help="The same for REFERENCE's server.")] = None,
    parallel: Annotated[int, typer.Option(min=1, max=1024, help="Requests under way at once, on each server.")] = 8,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that a request may take.")] = 600,
    sequences: Annotated[int, typer.Option(min=1, max=64, help="Continuations that a runtime evaluates together.")] = 1,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
    rng_seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 1,
    log: LogOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make preference pairs: both models answer the same prompts, a filter judge scores them.

    A run that is cut off goes on where it was when the same command is given again.

    Examples: `edgepatch pairs models/base models/safer -o pairs.jsonl --prompts prompts.txt`,
    `edgepatch pairs http://gpu1:8000/v1 http://gpu2:8000/v1 --chat --prompts prompts.txt --parallel 32 -o pairs.jsonl`,
    `edgepatch pairs --from ready.jsonl --judge filter -o pairs.jsonl`
    """
    from edgepatch.training.pairs.preferences import PairConfig, require_pairs, write_pairs
    from edgepatch.training.pairs.provenance import write_provenance

    config = PairConfig(
        samples_per_prompt=samples,
        max_new_tokens=max_new_tokens,
        top_p=top_p,
        min_margin=min_margin,
        rng_seed=rng_seed,
        max_chosen_score=max_chosen_score,
        min_words=(1 if ready else 6) if min_words is None else min_words,
        pairs_per_prompt=pairs_per_prompt or (NO_LIMIT if ready else 3),
    )
    if out.is_dir():
        raise InputError(f"--out {out}: expected a file to write, found a folder")
    with progress_bars(log or log_beside(out), lambda: _kept(out)) as progress:
        forget: Callable[[], None] = lambda: None  # noqa: E731
        if ready:
            _refuse_mixture(context)
            chosen = _load_judge(judge, unsafe_label or []) if judge else None
            pair_set, settings = _filter(ready, chosen, config, progress)
        else:
            if model is None or reference is None:
                raise InputError(
                    "expected two models, MODEL and REFERENCE, or --from FILE",
                    hint="edgepatch pairs --help shows examples",
                )
            pair_set, settings, forget = _sample(
                (Source(model, model_name, api_key_env), Source(reference, reference_name, reference_api_key_env)),
                _read_prompts(prompts, chat, system),
                _load_judge(judge or "filter", unsafe_label or []),
                config,
                out,
                Means(parallel, timeout_s, sequences, context_length, threads, device),
                skip_long,
                restart,
                progress,
            )
        if not pair_set.pairs:
            forget()
        write_pairs(require_pairs(pair_set, config), out)
        sidecar = write_provenance(out, settings, pair_set.counts)
        forget()
    _report(pair_set, out, sidecar, as_json)


def _report(pair_set: PairSet, out: Path, sidecar: Path, as_json: bool) -> None:
    if as_json:
        print_json({"path": str(out), "provenance": str(sidecar), **pair_set.counts})
        return
    source = (
        f"{pair_set.counts['prompts']} prompts"
        if "prompts" in pair_set.counts
        else f"{pair_set.counts['pairs_read']} ready pairs"
    )
    print(f"{out}: {len(pair_set.pairs)} pairs from {source}")
    left_out = [
        f"{name.replace('_', ' ')}: {count}"
        for name, count in pair_set.counts.items()
        if count and "_" in name and name != "pairs_read"
    ]
    if left_out:
        print(", ".join(left_out))

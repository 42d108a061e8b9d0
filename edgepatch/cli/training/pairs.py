"""``pairs``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.chat import ContextLength, Device, DeviceOption, Threads
from edgepatch.cli.console import (
    ForceFlag,
    JsonFlag,
    LogOption,
    counted,
    log_beside,
    model_path,
    new_file,
    note,
    print_json,
    progress_bars,
)
from edgepatch.errors import InputError
from edgepatch.progress import NOTHING_KEPT, Progress, stage

if TYPE_CHECKING:
    from edgepatch.training.pairs.domains import DomainPrompts, PairDomain
    from edgepatch.training.pairs.judging import FilterJudge
    from edgepatch.training.pairs.makers import PairMaker
    from edgepatch.training.pairs.preferences import PairConfig, PairSet
    from edgepatch.training.pairs.sources import Means, Source
    from edgepatch.training.pairs.teacher_safety import TeacherSafety

NO_LIMIT = 2**31
OF_SAMPLING = (
    "model",
    "reference",
    "teacher",
    "teacher_text",
    "any_teacher",
    "domain",
    "harmless",
    "model_name",
    "teacher_name",
    "api_key_env",
    "teacher_api_key_env",
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


def _teacher(positional: str | None, option: str | None) -> str:
    """The teacher, however it was named."""
    if positional is not None and option is not None:
        raise InputError(
            f"expected one teacher, found {positional} and --teacher {option}", hint="leave one of the two out"
        )
    teacher = option or positional
    if teacher is None:
        raise InputError(
            "expected two models, MODEL and its teacher, or --from FILE",
            hint="no safer model? --teacher self is MODEL behind a safety text; edgepatch pairs --help shows examples",
        )
    return teacher


def _texts(path: Path | None, teacher: str, domain: PairDomain) -> tuple[str, ...]:
    """Safety texts in front of the teacher's prompts."""
    from edgepatch.prompts.sets import load_safety_texts
    from edgepatch.training.pairs.teachers import SELF, read_safety_texts

    if path is not None:
        return read_safety_texts(path)
    return tuple(load_safety_texts(domain.name)) if teacher == SELF else ()


def _resolved(model: str) -> str:
    """A model's path; an address, an adapter and "self" as they are."""
    from edgepatch.training.pairs.server_sampler import is_url
    from edgepatch.training.pairs.teachers import SELF

    return model if is_url(model) or model == SELF else str(model_path(model))


def _sample(
    sources: tuple[Source, Source],
    texts: tuple[str, ...],
    asked: DomainPrompts,
    maker: PairMaker,
    settings: dict[str, Any],
    config: PairConfig,
    out: Path,
    means: Means,
    skip_long: bool,
    restart: bool,
    any_teacher: bool,
    progress: Progress,
) -> tuple[PairSet, dict[str, Any], Callable[[], None]]:
    """Pairs, the settings that decide them, and what forgets the journal."""
    from edgepatch.training.pairs.journal import Journal
    from edgepatch.training.pairs.preferences import sample_pairs
    from edgepatch.training.pairs.provenance import digest_of_json
    from edgepatch.training.pairs.sources import open_sampler, open_teacher

    prompts = asked.prompt_list.prompts
    with ExitStack() as stack:
        with stage(progress, "load models"):
            base = open_sampler(sources[0], means, stack)
            teacher = open_teacher(sources[1], base, sources[0], texts, means, stack)
        settings = {
            "base": base.identity,
            "teacher": teacher.identity | {"kind": _kind(sources[1].model)},
            "prompts": {"number": len(prompts), "sha256": digest_of_json(prompts)},
            **settings,
            **asdict(config),
            "device": means.device,
            "sequences": means.sequences,
        }
        journal = stack.enter_context(Journal(out, settings, restart))
        if journal.outcomes:
            note(f"going on from {journal.path}: {counted(len(journal.outcomes), 'prompt')} done")

        def check_teacher(safety: TeacherSafety) -> None:
            note(f"teacher: {safety}")
            if not any_teacher:
                safety.require_safer()

        try:
            pair_set = sample_pairs(
                base,
                teacher,
                prompts,
                maker,
                config,
                progress,
                places=asked.prompt_list.places,
                journal=journal,
                skip_long=skip_long,
                check_teacher=check_teacher,
            )
        except Exception:
            note(f"stopped: {_kept(out)}")
            raise
        return pair_set, settings, journal.remove


def _kind(teacher: str) -> str:
    from edgepatch.training.pairs.sources import is_adapter
    from edgepatch.training.pairs.teachers import SELF

    return SELF if teacher == SELF else "adapter" if is_adapter(teacher) else "model"


def _kept(out: Path) -> str:
    """What a run that was ended has left."""
    from edgepatch.training.pairs.journal import journal_path

    journal = journal_path(out)
    if not journal.is_file():
        return NOTHING_KEPT
    done = max(0, journal.read_bytes().count(b"\n") - 1)  # the first line holds the settings
    return f"{counted(done, 'prompt')} kept in {journal}; the same command goes on from there"


def _filter(
    ready: Path, judge: FilterJudge | None, config: PairConfig, progress: Progress
) -> tuple[PairSet, dict[str, Any]]:
    from edgepatch.training.pairs.files import read_placed_pairs
    from edgepatch.training.pairs.preferences import filter_pairs, score_pairs
    from edgepatch.training.pairs.provenance import digest_of

    places, pairs = read_placed_pairs(ready)
    with stage(progress, "judge pairs"):
        pair_set = filter_pairs(score_pairs(pairs, judge.score) if judge else pairs, config, places)
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
    out: Annotated[Path, new_file("JSON Lines file to write; its provenance stands beside it.")],
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="The model to be patched (M): file, folder or URL of a server."),
    ] = None,
    reference: Annotated[
        str | None, typer.Argument(metavar="[TEACHER]", help="The same as --teacher, in short.", show_default=False)
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Who gives the chosen answers: self (MODEL behind a safety text), a PEFT LoRA folder for MODEL, or a safer model: file, "
            "folder or URL."
        ),
    ] = None,
    teacher_text: Annotated[
        Path | None,
        typer.Option(
            help="File with the teacher's safety text, in front of its prompts; paragraphs say the same in other words. "
            "Default for self: texts of ours for the domain."
        ),
    ] = None,
    any_teacher: Annotated[
        bool, typer.Option("--any-teacher", help="Go on with a teacher that is not clearly safer than MODEL.")
    ] = False,
    domain: Annotated[
        str,
        typer.Option(help="toxicity, gender or harm: whose prompts, safety texts, judge and limits are the defaults."),
    ] = "toxicity",
    ready: Annotated[
        Path | None, typer.Option("--from", help="Ready pairs in one of TRL's forms, to be checked and filtered.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or .jsonl with messages, prompt or text; default: ours.")
    ] = None,
    harmless: Annotated[
        Path | None,
        typer.Option(help="Requests that are to stay answered, likewise; for --domain harm; default: ours."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Make each plain prompt a message of the user.")] = False,
    system: Annotated[str, typer.Option(help="System text in front of every conversation.")] = "",
    judge: Annotated[
        str | None,
        typer.Option(
            help="filter or semantic (shipped), gender (word lists), or a Transformers text-classification folder; default: the domain's, and none with --from."
        ),
    ] = None,
    unsafe_label: Annotated[
        list[str] | None, typer.Option(help="Label of the judge's folder that counts as unsafe; repeat it.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each model a prompt.")] = 8,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of a continuation; default: 24, gender 16, harm 32.")
    ] = None,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus of the sampling.")] = 0.9,
    min_margin: Annotated[float, typer.Option(min=0, max=1, help="Least difference of the two scores.")] = 0.4,
    max_chosen_score: Annotated[float, typer.Option(min=0, max=1, help="Highest score of a chosen text.")] = 0.2,
    min_words: Annotated[
        int | None, typer.Option(min=0, help="Least words of a chosen text; default: 6, gender 3, and 1 with --from.")
    ] = None,
    pairs_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Most pairs a prompt; default: 3, gender 2, and no limit with --from.")
    ] = None,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Leave out prompts that do not fit the context.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what a run that was cut off has left.")] = False,
    model_name: Annotated[str, typer.Option(help="MODEL's name on its server; default: the only one there.")] = "",
    teacher_name: Annotated[
        str, typer.Option("--teacher-name", "--reference-name", help="The teacher's name on its server.")
    ] = "",
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key of MODEL's server.")
    ] = None,
    teacher_api_key_env: Annotated[
        str | None,
        typer.Option("--teacher-api-key-env", "--reference-api-key-env", help="The same for the teacher's server."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=1024, help="Requests under way at once, on each server.")] = 8,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds that a request may take.")] = 600,
    sequences: Annotated[int, typer.Option(min=1, max=64, help="Continuations that a runtime evaluates together.")] = 1,
    context_length: ContextLength = None,
    threads: Threads = None,
    device: DeviceOption = Device.cpu,
    rng_seed: Annotated[int, typer.Option(min=0, help="Random seed of the sampling.")] = 1,
    log: LogOption = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Make preference pairs: the model and its teacher answer the same prompts, a filter judge scores them.

    The teacher is measured first, on 40 prompts, and refused where it is not clearly safer. What is dropped stands in
    OUT.dropped.jsonl, with its scores. A run that is cut off goes on where it was when the same command is given again.

    Examples: `edgepatch pairs smollm2 --teacher self -o pairs.jsonl`,
    `edgepatch pairs models/base --teacher adapters/safer-lora -o pairs.jsonl --prompts prompts.txt`,
    `edgepatch pairs http://gpu1:8000/v1 --teacher http://gpu2:8000/v1 --chat --prompts prompts.txt --parallel 32 -o pairs.jsonl`,
    `edgepatch pairs --from ready.jsonl --judge filter -o pairs.jsonl`
    """
    from edgepatch.training.pairs.domains import domain_prompts, find_domain
    from edgepatch.training.pairs.dropped import write_dropped
    from edgepatch.training.pairs.judging import load_filter, pair_maker
    from edgepatch.training.pairs.preferences import PairConfig, require_pairs, write_pairs
    from edgepatch.training.pairs.provenance import write_provenance
    from edgepatch.training.pairs.sources import Means, Source

    chosen_domain = find_domain(domain)
    limits = {"min_words": 1, "pairs_per_prompt": NO_LIMIT} if ready else chosen_domain.limits
    options = {"max_new_tokens": max_new_tokens, "min_words": min_words, "pairs_per_prompt": pairs_per_prompt}
    config = PairConfig(
        samples_per_prompt=samples,
        top_p=top_p,
        min_margin=min_margin,
        rng_seed=rng_seed,
        max_chosen_score=max_chosen_score,
        **{**limits, **{name: value for name, value in options.items() if value is not None}},
    )
    with progress_bars(log or log_beside(out), lambda: _kept(out)) as progress:
        forget: Callable[[], None] = lambda: None  # noqa: E731
        if ready:
            _refuse_mixture(context)
            judged_by = load_filter(judge, unsafe_label or []) if judge else None
            pair_set, settings = _filter(ready, judged_by, config, progress)
        else:
            taught_by = _teacher(reference, teacher)
            if model is None:
                raise InputError("expected MODEL, the model to be patched", hint="name it in front of the teacher")
            asked = domain_prompts(chosen_domain, prompts, harmless, chat, system)
            maker, identity = pair_maker(chosen_domain, judge, unsafe_label or [], asked, config)
            pair_set, settings, forget = _sample(
                (
                    Source(_resolved(model), model_name, api_key_env),
                    Source(_resolved(taught_by), teacher_name, teacher_api_key_env),
                ),
                _texts(teacher_text, taught_by, chosen_domain),
                asked,
                maker,
                {"domain": domain, "judge": identity},
                config,
                out,
                Means(parallel, timeout_s, sequences, context_length, threads, device.value),
                skip_long,
                restart,
                any_teacher,
                progress,
            )
        dropped = write_dropped(pair_set.dropped, out)
        if not pair_set.pairs:
            forget()
        write_pairs(require_pairs(pair_set, config, dropped), out)
        safety = {"teacher_safety": pair_set.safety.as_dict()} if pair_set.safety else {}
        sidecar = write_provenance(out, settings, pair_set.counts, **safety)
        forget()
    _report(pair_set, out, sidecar, dropped, as_json)


def _report(pair_set: PairSet, out: Path, sidecar: Path, dropped: Path, as_json: bool) -> None:
    if as_json:
        safety = {"teacher_safety": pair_set.safety.as_dict()} if pair_set.safety else {}
        print_json({"path": str(out), "provenance": str(sidecar), "dropped": str(dropped), **pair_set.counts, **safety})
        return
    source = (
        counted(pair_set.counts["prompts"], "prompt")
        if "prompts" in pair_set.counts
        else counted(pair_set.counts["pairs_read"], "ready pair")
    )
    print(f"{out}: {counted(len(pair_set.pairs), 'pair')} from {source}")
    left_out = [
        f"{name.replace('_', ' ')}: {count}"
        for name, count in pair_set.counts.items()
        if count and "_" in name and name != "pairs_read"
    ]
    if left_out:
        print(", ".join(left_out))
    if pair_set.dropped:
        print(f"{dropped}: what was dropped, with its scores")

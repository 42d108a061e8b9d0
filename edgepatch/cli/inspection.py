"""``doctor`` and ``show``: what this machine brings, what a file or folder is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepatch.cli.application import app
from edgepatch.cli.console import (
    JsonFlag,
    StoreOption,
    counted,
    gib,
    model_path,
    print_json,
    print_table,
    size_text,
    stdout,
    table,
    tell,
)
from edgepatch.compilation import COMMAND
from edgepatch.errors import EdgepatchError

if TYPE_CHECKING:
    from edgepatch.inspection.kinds import Kind, Recognised
    from edgepatch.patch.file import Patch

SETTINGS = {
    "threads": "threads that would be chosen",
    "training_dtype": "dtype that would be chosen for training",
}
"""Setting of the doctor's report -> what its line is called."""


@app.command()
def doctor(
    everything: Annotated[
        bool, typer.Option("--all", help="Also the machine, each type of weights, and each package.")
    ] = False,
    as_json: JsonFlag = False,
    require: Annotated[
        list[str] | None, typer.Option("--require", help="Exit with 1 unless this extra works; may be repeated.")
    ] = None,
) -> None:
    """Say what this machine is ready for, and what mends the rest. Each library computes with weights of each type.

    Examples: `edgepatch doctor`, `edgepatch doctor --require gguf`
    """
    from edgepatch.doctor import examine, members, missing, remedy, verdicts

    for extra in require or ():
        members(extra)  # a wrong name shows before every library is tried
    report = examine()
    lacking = {extra: missing(report, extra) for extra in require or []}
    if as_json:
        print_json(report)
    else:
        judged = verdicts(report)
        tell(_answer(judged))
        stdout().print(table([*judged, *_remarks(report)]))
        if everything:
            stdout().print()
            _print_report(report)
    for extra, names in lacking.items():
        if names:
            raise EdgepatchError(f"{extra} lacks {', '.join(names)}", hint=remedy(report, extra))


def _answer(verdicts: Sequence[tuple[str, str]]) -> str:
    """What this machine can do, in a sentence."""
    able = [purpose for purpose, verdict in verdicts if verdict == "ready"]
    unable = [purpose for purpose, verdict in verdicts if verdict != "ready"]
    lacking = f"; not yet to {', '.join(unable)}" if unable else ""
    return f"this machine is ready to {', '.join(able)}{lacking}" if able else "this machine is ready for nothing yet"


def _remarks(report: dict[str, Any]) -> list[tuple[str, object]]:
    """What a user should know behind the verdicts; everything else waits for ``--all``."""
    from edgepatch.doctor import unused_instructions

    rows: list[tuple[str, object]] = [("GPU", "; ".join(gpu["name"] for gpu in report["gpus"]) or "none")]
    rows += [("limited", f"{entry['file']}: {entry['note']}") for entry in report["limited_models"]]
    if names := unused_instructions(report):
        rows.append(("llama.cpp", f"was compiled without {', '.join(names)} and is several times slower: `{COMMAND}`"))
    if any(row["library"] == "llama_cpp" and row["note"] for row in report["weight_types"]):
        rows.append(("llama.cpp", f"`{COMMAND}` compiles it for this machine, so that all its kernels run"))
    return rows


def _print_report(report: dict[str, Any]) -> None:
    cpu, memory = report["cpu"], report["memory"]
    gpus = [f"{gpu['name']}, {gib(gpu['memory_bytes'])}, driver {gpu['driver']}" for gpu in report["gpus"]]
    rows: list[tuple[str, object]] = [
        ("edgepatch", report["edgepatch"]),
        ("Python", f"{report['python']} on {report['platform']}"),
        ("CPU", f"{cpu['model']} ({cpu['architecture']}), {cpu['usable_cores']} of {cpu['cores']} cores usable"),
        ("CPU features", " ".join(cpu["features"]) or "unknown"),
        ("memory", f"{gib(memory['total_bytes'])}, {gib(memory['available_bytes'])} available"),
        ("GPU", "; ".join(gpus) or "none"),
    ]
    for name, title in SETTINGS.items():
        rows.append((title, report["settings"][name]["reason"]))
    for name, facts in report["libraries"].items():
        rows.append((name, "; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in facts.items())))
    stdout().print(table(rows))
    stdout().print()
    print_table(("computes with weights of", "result", "deviation"), _weight_types(report))
    stdout().print()
    print_table(("package", "version", "extras"), _packages(report))


def _weight_types(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    for row in report["weight_types"]:
        result = row["note"] or "ok" if row["works"] else f"fails: {row['note']}"
        deviation = "" if row["deviation"] is None else f"{row['deviation']:.4f}"
        rows.append((f"{row['library']} {row['type']}", result, deviation))
    return rows


def _packages(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        (
            row["name"],
            row["version"] or "missing",
            f"in {', '.join(row['extras'])}" if row["version"] else f"`{row['install']}`",
        )
        for row in report["packages"]
    ]


@app.command()
def show(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", parser=model_path, help="Patch, model (file, folder or smollm2), or another file."
        ),
    ],
    everything: Annotated[
        bool, typer.Option("--all", help="Everything; what a model's config leaves open is asked of Transformers.")
    ] = False,
    as_json: JsonFlag = False,
    store: StoreOption = None,
) -> None:
    """Show what a file or folder is: a patch, which is checked, a model and the patches that fit it, or another file.

    `edgepatch verify` says whether the signatures of a patch count. No model library is loaded, and no weights are.

    Examples: `edgepatch show detox-1.0.0.safetensors`, `edgepatch show llama-Q4_K_M.gguf`
    """
    from edgepatch.inspection.kinds import Kind, recognise
    from edgepatch.inspection.models import MODEL_KINDS

    recognised = recognise(path)
    if recognised.kind is Kind.PATCH:
        _show_patch(path, everything, as_json, store)
    elif recognised.kind in MODEL_KINDS:
        _show_model(path, recognised.kind, everything, as_json, store)
    else:
        _show_other(path, recognised, as_json)


def _show_patch(path: Path, everything: bool, as_json: bool, store: Path | None) -> None:
    from edgepatch.patch.file import read_patch

    patch = read_patch(path)
    trust = _trust(patch, store)
    if as_json:
        print_json({"kind": "patch"} | _summary(patch) | {"trust": trust})
        return
    from edgepatch.cli.tables.patch import parts_in_words, summary_rows

    stdout().print(table(summary_rows(patch, path, trust)))
    if not everything:
        return
    rows: list[tuple[str, object]] = []
    facts = {"parts": parts_in_words(patch), "evaluation": patch.evaluation or "not evaluated"}
    for name, value in (_summary(patch) | facts).items():
        nested = value if isinstance(value, dict) else {"": value}
        rows += [(f"{name} {key}".strip(), entry) for key, entry in nested.items()]
    stdout().print()
    stdout().print(table(rows))


def _show_model(path: Path, kind: Kind, everything: bool, as_json: bool, store: Path | None) -> None:
    from edgepatch.cli.tables.model import further_rows, summary_rows
    from edgepatch.inspection.models import examine_model

    report = examine_model(path, kind, store, loads_libraries=everything)
    if as_json:
        print_json(report.as_dict())
        return
    stdout().print(table(summary_rows(report)))
    if everything:
        stdout().print()
        stdout().print(table(further_rows(report)))


def _show_other(path: Path, recognised: Recognised, as_json: bool) -> None:
    from edgepatch.inspection.other_kinds import describe

    described = describe(path, recognised)
    if as_json:
        print_json({"kind": described.kind, "path": str(path), **described.facts, "hint": described.hint})
        return
    facts = {name.replace("_", " "): value for name, value in described.facts.items() if value not in ("", {})}
    if "size bytes" in facts:
        facts["size"] = size_text(facts.pop("size bytes"))
    stdout().print(table([("kind", described.kind), *facts.items(), ("use", described.hint)]))


def _trust(patch: Patch, store: Path | None) -> str:
    """Whether this device's trust root vouches for a patch; a store that cannot be read is told, and is no reason to show nothing."""
    from edgepatch.store.reading import StoreReader, require_vouched, root_of

    try:
        state = StoreReader(store).read()[1]
        root = root_of(state)
        if root is None:
            return "unknown: this device has no trust root"
        return "signed by " + ", ".join(sorted(root.called(key) for key in require_vouched(patch, state)))
    except EdgepatchError as error:
        return f"refused: {error}"


def _summary(patch: Patch) -> dict[str, Any]:
    from edgepatch.seeds.anchoring import place_in_words

    seed = patch.kv_seed
    return {
        "name": patch.name,
        "version": patch.version,
        "digest": patch.digest,
        "channel": patch.channel,
        "sequence": patch.sequence,
        "created": patch.created or None,
        "expires": patch.expires or None,
        "license": patch.license or None,
        "summary": patch.summary or None,
        "signatures": [signature.key_id for signature in patch.signatures],
        "num_virtual_tokens": patch.num_virtual_tokens,
        "soft_prompt": patch.soft_prompt is not None,
        "kv_seed": f"{len(seed.keys)} layers of {seed.keys[0].shape} {seed.keys[0].dtype}" if seed else None,
        "place": place_in_words(patch.anchoring),
        "can_move": patch.rotation is not None,
        "chat_template": patch.chat_template or None,
        "tokenizer": f"probe of {counted(len(patch.tokenizer_probe.texts), 'text')}"
        if patch.tokenizer_probe
        else "no probe",
        "canary": counted(len(patch.canary.prompts), "prompt") if patch.canary else None,
        "base": patch.base.as_dict(),
        "parts": list(patch.parts),
        "training": patch.training,
        "evaluation": patch.evaluation,
    }

"""What a patch costs, against everything a user would take instead: ``edgepatch bench latency``.

All arms run on one machine in one run, in turn within each repeat; the weights are random, which changes no time. The document that
comes out is what ``bench report`` draws and ``bench gate`` compares.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgepatch.bench.environment import environment
from edgepatch.bench.latency import costs
from edgepatch.bench.latency import starts as processes
from edgepatch.bench.latency.arms import Arm, cells
from edgepatch.bench.latency.genai import NAME as GENAI
from edgepatch.bench.latency.goals import BUSY as BUSY_DECODE
from edgepatch.bench.latency.goals import goals, ratios
from edgepatch.bench.latency.llama_bench import run_llama_bench
from edgepatch.bench.latency.sessions import LlamaCppWorkbench, OnnxWorkbench, Workbench
from edgepatch.bench.latency.settings import Settings
from edgepatch.bench.latency.timing import Cell, Measure, Times, fact, interleave, missing, row
from edgepatch.bench.shapes.gguf import write_gguf
from edgepatch.bench.shapes.memory import ONNX_KINDS, estimate_bytes, estimate_of_file, require_memory
from edgepatch.bench.shapes.onnx import write_onnx
from edgepatch.bench.shapes.shape import SHAPES
from edgepatch.doctor import gpus
from edgepatch.errors import InputError, MissingExtraError
from edgepatch.files.writing import write_atomically
from edgepatch.inspection.models import kind_of_model, read_facts
from edgepatch.patch.file import Patch, read_patch, write_patch
from edgepatch.progress import Progress, silent, stage
from edgepatch.runtimes import EXTRAS, device_options, read_spec, runtime_name

LIBRARIES = {"llamacpp": ("llama_cpp", "llama-cpp-python"), "onnx": ("onnxruntime", "onnxruntime")}
BUSY = 0.25
"""Load average per core from which on a run says that other work was going on."""

UNDER_LOAD = ("bare", "seed", "library loop", GENAI)
"""Arms whose decoding is timed once more while another process takes a core."""


def measure(settings: Settings, progress: Progress = silent, command: str = "") -> dict[str, Any]:
    """Everything of one model.

    Args:
        settings: what.
        progress: told of every part.
        command: for the document; by default this process's.

    Raises:
        InputError: the model cannot be used, or does not fit into memory; it is not loaded then.
        MissingExtraError: its runtime is not installed.
    """
    with stage(progress, "prepare model"):
        model = find_model(settings)
        context = read_facts(model, kind_of_model(model), False).shape.context_length
        settings = replace(settings, sizes=settings.sizes.within(context or settings.sizes.context_length))
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="edgepatch-latency-") as scratch:
        rows, times = _measure(settings, model, Path(scratch), progress)
    quotients = ratios(times)
    load = {"before": list(load_before), "after": list(os.getloadavg()), "cores": os.cpu_count() or 1}
    load["is_busy"] = load_before[0] > BUSY * (os.cpu_count() or 1)
    load["largest_spread"] = max((entry["spread"] for entry in rows if "spread" in entry), default=0.0)
    return {
        "command": command or shlex.join(["edgepatch", *sys.argv[1:]]),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": {
            **environment(),
            "cores": os.cpu_count(),
            "device": settings.device,
            "gpus": gpus() if settings.device == "cuda" else [],
        },
        "load": load,
        "shape": settings.shape if settings.model is None else "",
        "quantization": rows[0]["quantization"],
        "repeats": settings.repeats,
        "rows": rows,
        "ratios": quotients,
        "goals": goals(rows, quotients),
    }


def find_model(settings: Settings) -> Path:
    """The model, made if it is one of a shape and not there yet; refused where it does not fit into memory.

    Raises:
        InputError: unknown shape or quantization, no model, or too little memory.
        MissingExtraError: its runtime is not installed.
    """
    context = settings.sizes.context_length
    is_onnx = (
        runtime_name(settings.model) == "onnx" if settings.model is not None else settings.quantization in ONNX_KINDS
    )
    if is_onnx and not settings.flash_attention:
        raise InputError("flash attention can be turned off for llama.cpp alone", hint="leave the option out for ONNX")
    if settings.model is not None:
        _require_library(runtime_name(settings.model))
        require_memory(str(settings.model), estimate_of_file(settings.model, read_spec(settings.model), context))
        return settings.model
    if settings.shape not in SHAPES:
        raise InputError(f"shape: expected one of {', '.join(SHAPES)}, found {settings.shape}")
    _require_library("onnx" if is_onnx else "llamacpp")
    shape, name = SHAPES[settings.shape], f"{settings.shape}-{settings.quantization}"
    require_memory(name, estimate_bytes(shape, settings.quantization, context))
    path = settings.folder / (f"{name}-onnx" if is_onnx else f"{name}.gguf")
    if not path.exists():
        (write_onnx if is_onnx else write_gguf)(path, shape, settings.quantization)
    return path


def _require_library(runtime: str) -> None:
    if runtime not in LIBRARIES:
        raise InputError(
            "expected a GGUF file or an ONNX folder, found a Transformers folder",
            hint="convert it: edgepatch convert base",
        )
    module, distribution = LIBRARIES[runtime]
    if find_spec(module) is None:
        raise MissingExtraError(distribution, EXTRAS[runtime])


@contextmanager
def _session(settings: Settings, model: Path, scratch: Path) -> Iterator[Workbench]:
    is_gguf = runtime_name(model) == "llamacpp"
    kind = LlamaCppWorkbench if is_gguf else OnnxWorkbench
    patch = read_patch(settings.patch) if settings.patch else None
    options: dict[str, Any] = device_options(model, settings.device) | (
        {"flash_attention": settings.flash_attention} if is_gguf else {}
    )
    session = kind(model, patch, settings.sizes, settings.arms, settings.num_threads, settings.device, scratch, options)
    try:
        yield session
    finally:
        session.close()


def _measure(settings: Settings, model: Path, scratch: Path, progress: Progress) -> tuple[list[dict[str, Any]], Times]:
    rows: list[dict[str, Any]] = []
    times: Times = {}
    with ExitStack() as stack:
        with stage(progress, "load model"):
            session = stack.enter_context(_session(settings, model, scratch))
        common = {**session.columns(), "shape": settings.shape if settings.model is None else ""}
        run = _Run(settings, session, common, progress, rows, times, scratch)
        if "arms" in settings.parts:
            run.arms()
        if "costs" in settings.parts:
            run.costs()
        if "serving" in settings.parts:
            run.conversations()
        run.artefacts()
    if "serving" in settings.parts:
        run.concurrency()
    if "memory" in settings.parts:
        run.memory()
    if "starts" in settings.parts:
        run.starts()
    if "arms" in settings.parts:
        run.llama_bench()
    return rows, times


@dataclass
class _Run:
    """The parts of a run, each adding its rows and times."""

    settings: Settings
    session: Workbench
    common: dict[str, Any]
    progress: Progress
    rows: list[dict[str, Any]]
    times: Times
    scratch: Path

    def _add(self, cells: Sequence[Cell], part: str, repeats: int = 0, **more: Any) -> None:
        times = interleave(cells, repeats or self.settings.repeats, self.progress, part)
        self.times.update(times)
        for (what, arm), milliseconds in times.items():
            self.rows.append(row(what, arm, milliseconds, self.common, **self.session.arm_columns(arm), **more))

    def _miss(self, measure: str, arm: str, status: str, reason: str) -> None:
        self.rows.append(missing(measure, arm, status, reason, self.common))

    def arms(self) -> None:
        """First tokens and decoding."""
        session, sizes = self.session, self.settings.sizes
        arms: list[Arm] = session.arms()
        planned = cells(arms, sizes.prompts, sizes.depths, sizes.num_new, session.runtime.spec.vocab_size)
        fitting = [cell for cell in planned if self._positions(cell) <= session.context_length]
        self._add(fitting, "arms")
        held_up = [
            replace(cell, measure=cell.measure._replace(name=BUSY_DECODE))
            for cell in fitting
            if cell.measure.name == "decode" and cell.measure.n_depth == 0 and cell.arm in UNDER_LOAD
        ]
        with processes.one_core_busy():
            self._add(held_up, "arms, one core busy")
        for cell in planned:
            if cell not in fitting:
                needed = self._positions(cell)
                self._miss(
                    cell.measure.name, cell.arm, "does not fit", f"{needed} positions of {session.context_length}"
                )
        for arm, (status, reason) in session.absent().items():
            if session.wants(arm):
                self._miss("ttft", arm, status, reason)

    def _positions(self, cell: Cell) -> int:
        columns, what = self.session.arm_columns(cell.arm), cell.measure
        held = int(columns.get("n_prefix", 0)) + int(columns.get("num_virtual_tokens", 0))
        return held + what.n_prompt + what.n_gen + what.n_depth + 4

    def costs(self) -> None:
        """Of the patch itself."""
        session = self.session
        store = costs.StoreCosts(session.patch, self.scratch)
        cells = [*costs.exchange_cells(session.runtime, session.patch, session.detach), *store.cells()]
        self._add(cells, "costs", state_route=session.runtime.seed_route)

    def conversations(self) -> None:
        """Several turns, and a guard's pass over a reply."""
        session, sizes = self.session, self.settings.sizes
        text = next(iter(session.texts().items()))
        arms: dict[str, tuple[Patch | None, Sequence[int]]] = {
            "bare": (None, []),
            "seed": (session.patch, []),
            f"text-{text[0]} cold": (None, text[1]),
        }
        cells = costs.conversation_cells(session.runtime, arms, sizes.turns, session.detach)
        shrink = 1 if session.context_length > 512 else 8
        self._add([*cells, *costs.guard_cells(session.runtime, session.detach, shrink)], "conversations")

    def concurrency(self) -> None:
        """Several sequences behind one seed; the model is loaded again with room for them."""
        sizes, patch = self.settings.sizes, self.session.patch
        prompt, length = sizes.prompts[0], sizes.num_new
        room = patch.num_virtual_tokens + prompt + length + 8
        with self.session.load(room, max(sizes.sequences)) as runtime:
            cells = costs.concurrent_cells(runtime, patch, sizes.sequences, prompt, length)
            self._add(cells, "sequences", max(2, self.settings.repeats // 2))
            held = costs.seed_bytes(runtime, patch)
        self.rows.append(fact("seed in memory", "seed", held["bytes_in_all"], "bytes", self.common, **held))

    def artefacts(self) -> None:
        """Bytes that each arm ships."""
        path = self.scratch / "artefact.safetensors"
        write_patch(self.session.patch, path)
        sizes = {"seed": path.stat().st_size, **self.session.artefacts()}
        self.rows += [fact("artefact", arm, size, "bytes", self.common) for arm, size in sizes.items()]

    def memory(self) -> None:
        """Peak memory of a process for each arm."""
        session, path = self.session, self.scratch / "artefact.safetensors"
        job: Callable[..., processes.Job] = lambda **more: processes.Job(  # noqa: E731
            str(session.model),
            session.num_threads,
            session.context_length,
            session.device,
            n_prompt=self.settings.sizes.prompts[-1],
            n_gen=4,
            flash_attention=self.settings.flash_attention,
            **more,
        )
        jobs = {"bare": job(), "seed": job(patch=str(path))}
        if isinstance(session, LlamaCppWorkbench):
            files = {name: str(self.scratch / f"{name}.gguf") for name in session.artefacts()}
            jobs |= {
                name: job(**{"lora" if name.startswith("lora") else "control_vector": file})
                for name, file in files.items()
            }
        elif "onnxruntime-genai" not in session.absent():
            jobs["onnxruntime-genai"] = job(arm="onnxruntime-genai")
        chosen = [(arm, work) for arm, work in jobs.items() if session.wants(arm)]
        for done, (arm, work) in enumerate(chosen, 1):
            self.rows.append(fact("peak memory", arm, processes.peak_memory(work), "bytes", self.common))
            self.progress("memory", done, len(chosen))

    def starts(self) -> None:
        """From a process's start to a first token, and the import alone."""
        session, path = self.session, self.scratch / "artefact.safetensors"
        if not self.settings.flash_attention:
            self._miss("cold start", "edgepatch chat", "not measured", "the command line always uses flash attention")
            return
        starts = processes.cold_start_cells(
            session.model, self.common["runtime"], path, session.num_threads, session.context_length, session.device
        )
        absent = session.absent()
        self._add(
            [
                cell
                for cell in starts
                if cell.arm.startswith("edgepatch") or (session.wants(cell.arm) and cell.arm not in absent)
            ],
            "cold starts",
        )
        with stage(self.progress, "imports"):
            milliseconds = processes.import_times(self.settings.repeats)
        self.times[Measure("import"), "import edgepatch"] = milliseconds
        self.rows.append(row(Measure("import"), "import edgepatch", milliseconds, self.common))

    def llama_bench(self) -> None:
        """llama.cpp's own bench, where it is built."""
        if self.common["runtime"] == "llamacpp":
            with stage(self.progress, "llama-bench"):
                self.rows += run_llama_bench(self.session.model, self.settings, self.common, shutil.which)


def write(document: dict[str, Any], path: Path) -> None:
    """Writes the document; complete or not at all.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())

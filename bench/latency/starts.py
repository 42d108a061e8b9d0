"""What only a process of its own shows: its peak memory, the time from its start to a first token, the time of an import.

``python -m edgepatch.bench.latency.starts JOB`` runs one generation and prints its peak memory; the bench starts it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgepatch.bench.latency.random_patches import random_tokens
from edgepatch.bench.latency.timing import Cell, Measure
from edgepatch.errors import EdgepatchError
from edgepatch.processes.programs import run_program, running

QUESTION = "Who are you?"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
TIMEOUT_S = 600
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
IMPORT = "import time; began = time.perf_counter(); import edgepatch; print(time.perf_counter() - began)"

LLAMA_CLASS = """
import sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_threads=int(sys.argv[3]), n_threads_batch=int(sys.argv[3]), n_gpu_layers=int(sys.argv[4]),
              flash_attn=True, verbose=False)
for part in model.create_chat_completion([{"role": "user", "content": sys.argv[5]}], max_tokens=1, temperature=0.0, stream=True):
    sys.stdout.write(part["choices"][0]["delta"].get("content") or "")
    sys.stdout.flush()
"""
LLAMA_CALLS = """
import ctypes, os, sys
import llama_cpp as lib
path, context_length, threads, layers, text = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5].encode()
quiet = lib.llama_log_callback(lambda *_: None)
lib.llama_log_set(quiet, None)
lib.llama_backend_init()
options = lib.llama_model_default_params()
options.n_gpu_layers = layers
model = lib.llama_model_load_from_file(path.encode(), options)
options = lib.llama_context_default_params()
options.n_ctx, options.n_batch, options.n_ubatch = context_length, 512, 512
options.n_threads = options.n_threads_batch = threads
options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
context, vocab = lib.llama_init_from_model(model, options), lib.llama_model_get_vocab(model)
tokens = (lib.llama_token * 256)()
count = lib.llama_tokenize(vocab, b"user: " + text + b"\\nassistant: ", len(text) + 18, tokens, 256, True, True)
assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, count)) == 0
token = lib.llama_sampler_sample(lib.llama_sampler_init_greedy(), context, -1)
buffer = ctypes.create_string_buffer(64)
size = lib.llama_token_to_piece(vocab, token, buffer, 64, 0, False)
sys.stdout.buffer.write(buffer.raw[:max(size, 0)])
sys.stdout.flush()
os._exit(0)
"""
GENAI = """
import sys
import onnxruntime_genai as og
config = og.Config(sys.argv[1])
config.overlay('{"model": {"decoder": {"session_options": {"intra_op_num_threads": %s}}}}' % sys.argv[3])
model = og.Model(config)
tokenizer = og.Tokenizer(model)
options = og.GeneratorParams(model)
options.set_search_options(max_length=int(sys.argv[2]), do_sample=False)
generator = og.Generator(model, options)
generator.append_tokens(tokenizer.encode("user: " + sys.argv[5] + "\\nassistant: "))
generator.generate_next_token()
sys.stdout.write(tokenizer.decode(generator.get_next_tokens()))
"""


@dataclass(frozen=True)
class Job:
    """A generation in a process of its own.

    Attributes:
        model: GGUF file or ONNX folder.
        arm: "runtime" for ours, else "onnxruntime-genai".
        patch: file, or "".
        lora: file, or "".
        control_vector: file, or "".
        num_threads: of a forward pass.
        context_length: positions.
        device: "cpu" or "cuda".
        n_prompt: tokens of the prompt.
        n_gen: tokens generated.
        flash_attention: of llama.cpp.
    """

    model: str
    num_threads: int
    context_length: int
    device: str = "cpu"
    arm: str = "runtime"
    patch: str = ""
    lora: str = ""
    control_vector: str = ""
    n_prompt: int = 128
    n_gen: int = 8
    flash_attention: bool = True


def peak_memory(job: Job) -> int:
    """Largest resident memory, in bytes, of a process that loads a model and generates; mapped weights that it has read count.

    Raises:
        EdgepatchError: it failed.
    """
    done = _run([sys.executable, "-m", "edgepatch.bench.latency.starts", json.dumps(asdict(job))])
    return int(json.loads(done.splitlines()[-1])["peak_bytes"])


def cold_start_cells(
    model: Path, runtime: str, patch: Path, num_threads: int, context_length: int, device: str
) -> list[Cell]:
    """From the start of a process to the first byte of a reply on its stdout: our command and the bare libraries.

    Args:
        model: GGUF file or ONNX folder.
        runtime: "llamacpp" or "onnx".
        patch: file.
        num_threads: of a forward pass.
        context_length: positions.
        device: "cpu" or "cuda".
    """
    ours = [
        sys.executable,
        "-m",
        "edgepatch.cli",
        "chat",
        str(model),
        "--prompt",
        QUESTION,
        "--max-new-tokens",
        "1",
        "--temperature",
        "0",
        "--threads",
        str(num_threads),
        "--context-length",
        str(context_length),
        "--device",
        device,
    ]
    arguments = [str(model), str(context_length), str(num_threads), "-1" if device == "cuda" else "0", QUESTION]
    others = (
        {"llama_cpp.Llama": LLAMA_CLASS, "llama.cpp calls": LLAMA_CALLS}
        if runtime == "llamacpp"
        else {"onnxruntime-genai": GENAI}
    )
    commands = {
        "edgepatch chat, patched": [*ours, "--patch", str(patch)],
        "edgepatch chat, bare": [*ours, "--bare"],
    } | {name: [sys.executable, "-c", program, *arguments] for name, program in others.items()}
    starts = [(name, _Start(command)) for name, command in commands.items()]
    return [Cell(Measure("cold start"), name, start.act, finish=start.finish) for name, start in starts]


class _Start:
    """A process up to the first byte that it prints.

    Args:
        command: with its arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._has_answered = False

    def act(self) -> None:
        """Starts it and waits for the byte, or for its end."""
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **OFFLINE}
        )
        assert self._process.stdout is not None  # a pipe
        self._has_answered = bool(self._process.stdout.read(1))

    def finish(self) -> None:
        """Waits for its end.

        Raises:
            EdgepatchError: it failed, or printed nothing.
        """
        if self._process is None:
            return
        _, complaints = self._process.communicate(timeout=TIMEOUT_S)
        code, self._process = self._process.returncode, None
        if code or not self._has_answered:
            raise _failed(self._command, complaints.decode("utf-8", "replace"))


@contextmanager
def one_core_busy() -> Iterator[None]:
    """Another process computes without a pause, as a user's other programs do."""
    with running([sys.executable, "-c", BUSY]):
        yield


def import_times(repeats: int) -> list[float]:
    """Milliseconds of ``import edgepatch`` in fresh interpreters."""
    return [float(_run([sys.executable, "-c", IMPORT])) * 1000 for _ in range(repeats)]


def _run(command: Sequence[str]) -> str:
    done = run_program(command, deadline_s=TIMEOUT_S, environment=OFFLINE)
    if done.failure:
        raise _failed(command, done.failure)
    return done.output


def _failed(command: Sequence[str], complaints: str) -> EdgepatchError:
    last = complaints.strip().splitlines()[-1:] or ["no message"]
    return EdgepatchError(f"{Path(command[0]).name} {command[1]} {command[2][:60].strip()} failed: {last[0]}")


def _generate(job: Job) -> None:
    if job.arm == "onnxruntime-genai":
        from edgepatch.bench.latency.genai import GenaiArm, load_genai

        arm = GenaiArm(load_genai(Path(job.model), job.num_threads, job.device), 1000, job.context_length)
        prompt = random_tokens(200, job.n_prompt)
        arm.ready(prompt)
        arm.first(prompt)
        arm.go_on(job.n_gen)
        return
    from edgepatch.bench.latency.arms import GREEDY
    from edgepatch.runtimes import device_options, load_runtime

    options: dict[str, Any] = {"num_threads": job.num_threads, "context_length": job.context_length}
    options |= device_options(Path(job.model), job.device)
    if not job.flash_attention:
        options["flash_attention"] = False
    if job.lora or job.control_vector:
        from edgepatch.bench.arms import load_llamacpp

        runtime = load_llamacpp(
            Path(job.model), *(Path(file) if file else None for file in (job.lora, job.control_vector)), **options
        )
    else:
        runtime = load_runtime(job.model, job.patch or None, **options)
    with runtime:
        stream = runtime.stream(random_tokens(runtime.spec.vocab_size, job.n_prompt), GREEDY)
        for _, _ in zip(range(job.n_gen), stream, strict=False):
            pass


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # Linux keeps the largest memory of the parent in getrusage
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024


def main(arguments: Mapping[str, Any]) -> None:
    """One generation, and the process's peak memory as JSON on stdout."""
    _generate(Job(**arguments))
    print(json.dumps({"peak_bytes": _peak_bytes()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Proof before trust: a library that dies, hangs or computes no numbers ends a child, and never a process of ours."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from test_layout import modules

import edgepatch
from edgepatch.converters import first_contact, machine_identity
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.errors import InactivePatchError, InputError, UnfitModelError
from edgepatch.patch.file import Patch, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp import proof as llamacpp_proof
from edgepatch.runtimes.llamacpp.context import ContextSettings
from edgepatch.runtimes.llamacpp.proof import prove_model
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session
from kit import tiny_gguf
from kit.artefacts import Lazy

DYING = Path(__file__).parent.parent / "dying_llama"
SETTINGS = ContextSettings(256, 2, "f16", True, 1)
API = "import edgepatch, sys; edgepatch.load(sys.argv[1], None, num_threads=1).generate('a')"


@pytest.fixture(scope="module")
def model(tiny_ggufs: Lazy) -> Path:
    return tiny_ggufs["F16"]


@pytest.fixture(scope="module")
def patch_file(tiny_patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patch") / "tiny.safetensors"
    write_patch(tiny_patch, path)
    return path


@pytest.fixture
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A memory that holds nothing yet."""
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path / "memory"))
    return tmp_path / "memory"


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The trials for which a child was started."""
    started: list[str] = []
    real = first_contact.run_apart

    def counted(target: str, request: dict[str, object], **rest: object) -> object:
        started.append(str(request["trial"]).split(":")[1])
        return real(target, request, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(first_contact, "run_apart", counted)
    return started


# Memory.


def test_the_second_time_costs_no_child(model: Path, own_memory: Path, trials: list[str]):
    first = prove_model(model, 0, SETTINGS)
    start = time.perf_counter()
    second = prove_model(model, 0, SETTINGS)
    assert time.perf_counter() - start < 0.1
    assert trials == ["try_model"] and first.answer == second.answer
    Vocabulary(model).close()
    assert trials == ["try_model"], "a model that was loaded has a vocabulary that can be read"


@pytest.mark.parametrize("change", ["content", "settings", "variable", "library", "machine", "version"])
def test_whatever_could_change_the_outcome_is_tried_again(
    change: str, model: Path, own_memory: Path, trials: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    copy, settings = tmp_path / "copy.gguf", SETTINGS
    shutil.copyfile(model, copy)
    prove_model(copy, 0, settings)
    if change == "content":  # of the same size, and with the old time of change
        data, before = bytearray(copy.read_bytes()), copy.stat()
        data[-1] ^= 1
        copy.write_bytes(data)
        os.utime(copy, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "settings":
        settings = ContextSettings(256, 2, "q8_0", True, 1)
    elif change == "variable":
        monkeypatch.setenv("GGML_SOMETHING", "1")
    elif change == "library":
        monkeypatch.setattr(machine_identity, "_library_content", lambda package: "another build")
    elif change == "machine":
        monkeypatch.setattr(machine_identity, "cpu_facts", lambda: ["another CPU"])
    else:
        monkeypatch.setattr(first_contact, "PROOF_VERSION", first_contact.PROOF_VERSION + 1)
    prove_model(copy, 0, settings)
    assert trials == ["try_model"] * 2


def test_what_cannot_change_the_outcome_is_not_tried_again(
    model: Path, own_memory: Path, trials: list[str], tmp_path: Path
):
    prove_model(model, 0, SETTINGS)
    shutil.copyfile(model, tmp_path / "elsewhere.gguf")
    prove_model(tmp_path / "elsewhere.gguf", 0, SETTINGS)
    prove_model(model, 0, ContextSettings(4096, 9, "f16", True, 1))
    assert trials == ["try_model"]


def test_a_damaged_memory_is_no_memory(model: Path, own_memory: Path, trials: list[str]):
    signed = prove_model(model, 0, SETTINGS).signed
    file = next(f for f in own_memory.rglob("*.json") if b"use_extra_buffers" in f.read_bytes())
    contact, content = llamacpp_proof.contact(model, 0, SETTINGS), machine_identity.hash_content([model], signed)
    good = file.read_bytes()
    assert first_contact._recall(contact, content)
    for damaged in (b"", b"{", b"[1]", b'{"key": 1}', good.replace(b'"key"', b'"kex"'), good[:-1], b"\xff" * 99):
        file.write_bytes(damaged)
        assert first_contact._recall(contact, content) is None, damaged
    assert prove_model(model, 0, SETTINGS).answer and trials == ["try_model"] * 2
    assert file.read_bytes() == good


def test_a_device_that_cannot_be_written_to_proves_each_time(
    model: Path, own_memory: Path, trials: list[str], monkeypatch: pytest.MonkeyPatch
):
    own_memory.write_bytes(b"a file where the folder should be")
    for _ in range(2):
        assert prove_model(model, 0, SETTINGS).answer
    assert trials == ["try_model"] * 2


def test_a_digest_is_not_remembered_of_what_was_just_written(tmp_path: Path, own_memory: Path):
    file = tmp_path / "file"
    file.write_bytes(b"a")
    signed = machine_identity.signature([file])
    digest = machine_identity.content([file])
    assert machine_identity.remembered_content(signed) is None
    os.utime(file, (1, 1))  # the time of the inode's change stays young
    assert machine_identity.content([file]) == digest
    assert machine_identity.remembered_content(machine_identity.signature([file])) is None


def test_a_settled_file_is_hashed_once(model: Path, own_memory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_identity, "SETTLED_S", -1.0)
    digest = machine_identity.content([model])
    monkeypatch.setattr(machine_identity, "hash_content", None)
    assert machine_identity.content([model]) == digest


def test_a_file_that_changes_behind_its_proof_is_proved_again(
    model: Path, own_memory: Path, trials: list[str], tmp_path: Path
):
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(model, copy)
    opened = []

    def opening(proof: first_contact.Proof) -> str:
        opened.append(proof)
        if len(opened) == 1:
            os.utime(copy)
        return "opened"

    assert first_contact.open_proved(lambda: prove_model(copy, 0, SETTINGS), opening) == "opened"
    assert len(opened) == 2
    with pytest.raises(InputError, match="is being written to"):
        first_contact.open_proved(lambda: prove_model(copy, 0, SETTINGS), lambda _: os.utime(copy))


# Orderly errors stay what they were.


def test_what_llama_cpp_refuses_in_good_order_is_an_input_error(tmp_path: Path, own_memory: Path):
    path = tmp_path / "odd.gguf"
    tiny_gguf.write_llama(path)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_down", b"blk.1.ffn_diwn"))
    with pytest.raises(InputError, match=r"llama\.cpp cannot load .*tensor 'blk.1.ffn_down") as caught:
        LlamaCppRuntime(path, num_threads=1)
    assert caught.value.exit_code == 2 and type(caught.value) is InputError


def test_a_model_that_computes_no_numbers_is_refused(tmp_path: Path, own_memory: Path):
    path = tmp_path / "nan.gguf"
    tiny_gguf.write_llama(path)
    data = path.read_bytes()
    path.write_bytes(data[:-4096] + np.full(1024, np.nan, "<f4").tobytes())
    with pytest.raises(UnfitModelError, match="computed logits that are not finite, without repacked weights too"):
        LlamaCppRuntime(path, num_threads=1)


# A library that dies, in the place of the real one, on every load path.


def run(mode: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process whose llama_cpp dies."""
    path = os.pathsep.join([str(DYING), str(Path(edgepatch.__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "DYING_LLAMA": mode, **variables}
    code = ["-c", API] if arguments[0] == "api" else ["-m", "edgepatch.cli", *map(str, arguments)]
    rest = [str(arguments[1])] if arguments[0] == "api" else []
    return subprocess.run(
        [sys.executable, *code, *rest], capture_output=True, text=True, env=environment, input="hello\n", timeout=300
    )


def commands(
    model: Path, long_model: Path, patch_file: Path, folder: Path, store: Path
) -> dict[str, tuple[str, list[object]]]:
    """Name -> (what dies, the command line)."""
    one = ["--threads", 1]
    return {
        "generate": ("decode", ["generate", model, "--prompt", "a", "--bare", *one]),
        "generate, at the import": ("import", ["generate", model, "--prompt", "a", "--bare", *one]),
        "chat": ("decode", ["chat", model, "--patch", patch_file, *one]),
        "serve": ("decode", ["serve", model, "--bare", "--port", 0, *one]),
        "pairs": ("decode", ["pairs", model, model, "-o", folder / "pairs.jsonl", *one]),
        "bench": (
            "load",
            ["bench", "latency", "--model", long_model, "--quick", "--out", folder / "latency.json", *one],
        ),
        "verify --deep": ("decode", ["verify", "--deep", "--model", model, "--store", store]),
        "convert": ("quantize", ["convert", "base", model, folder / "q.gguf", "--to", "gguf", "--type", "Q8_0"]),
        "export": ("load", ["export", patch_file, "--model", model, "-o", folder / "export"]),
        "API": ("decode", ["api", model]),
    }


NAMES = list(commands(*[Path()] * 5))


@pytest.fixture(scope="module")
def outcomes(
    model: Path, patch_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, subprocess.CompletedProcess[str]]]:
    """All of them, two at a time; what needs no library works nevertheless."""
    folder, other = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("given")
    tiny_gguf.write_llama(other / "long.gguf", context=2048)
    applied = run("load", "apply", patch_file, "--model", model, "--unsigned", "a test", "--store", other / "store")
    assert applied.returncode == 0, applied.stderr
    inputs = model, other / "long.gguf", patch_file, folder, other / "store"
    with ThreadPoolExecutor(2) as threads:
        started = {name: threads.submit(run, mode, *arguments) for name, (mode, arguments) in commands(*inputs).items()}
        return folder, {name: process.result() for name, process in started.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_library_that_dies_is_an_error_with_an_exit_code(name: str, outcomes):
    folder, ended = outcomes
    process = ended[name]
    said = process.stderr
    if name == "API":
        assert process.returncode == 1 and "UnfitModelError" in said.splitlines()[-1]
    else:
        assert process.returncode == UnfitModelError.exit_code, said
        assert "Traceback" not in said and said.count("error:") == 1 and "SIGSEGV" in said, said
    assert process.stdout == "" and not [path for path in folder.iterdir() if path.suffix != ".log"]


def test_a_library_that_dies_with_repacked_weights_is_used_without_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    memory = {"EDGEPATCH_CACHE_DIR": str(tmp_path)}
    arguments = ["generate", model, "--prompt", "a", "--bare", "--max-new-tokens", 2, "--threads", 1]
    for _ in range(2):
        process = run("repacked", *arguments, **memory)
        assert process.returncode == 0, process.stderr
        assert "died of SIGSEGV while evaluating 1 token with repacked weights" in process.stderr
    status = json.loads(run("repacked", "status", "--json", **memory).stdout)
    assert [entry["file"] for entry in status["limited_models"]] == [str(model)]
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    assert first_contact.remembered_notes() == [], "of another build"


def test_a_library_that_hangs_is_ended(model: Path, tmp_path: Path):
    deadline = {first_contact.DEADLINE_VARIABLE: "4", "EDGEPATCH_CACHE_DIR": str(tmp_path)}
    process = run("hang", "generate", model, "--prompt", "a", "--bare", "--threads", 1, **deadline)
    assert process.returncode == 5 and "did not answer within 4 s while evaluating 1 token" in process.stderr
    assert first_contact.DEADLINE_VARIABLE in process.stderr and "first contact with" in process.stderr


def test_a_deadline_that_is_none_is_refused(model: Path, own_memory: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(first_contact.DEADLINE_VARIABLE, "soon")
    with pytest.raises(InputError, match="expected a number of seconds, found 'soon'"):
        prove_model(model, 0, SETTINGS)


def test_ctrl_c_ends_the_child_as_well(model: Path, tmp_path: Path):
    path = os.pathsep.join([str(DYING), str(Path(edgepatch.__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "DYING_LLAMA": "hang", "EDGEPATCH_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "edgepatch.cli", "generate", str(model), "--prompt", "a", "--bare"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None and "first contact with" in process.stderr.readline()
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert children
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "Traceback" not in process.stderr.read()
    process.stderr.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


def test_a_library_that_dies_of_embeddings_still_runs_bare(model: Path, patch_file: Path, tmp_path: Path):
    memory = {"EDGEPATCH_CACHE_DIR": str(tmp_path)}
    arguments = ["generate", model, "--prompt", "a", "--max-new-tokens", 2, "--threads", 1]
    bare = run("embeddings", *arguments, "--bare", **memory)
    assert bare.returncode == 0 and "died of SIGSEGV while evaluating embeddings: patches that need" in bare.stderr
    patched = run("embeddings", *arguments, "--patch", patch_file, **memory)
    assert patched.returncode == InactivePatchError.exit_code and "ends its process when it evaluates" in patched.stderr


def test_the_server_says_what_is_turned_off(model: Path, monkeypatch: pytest.MonkeyPatch):
    from starlette.testclient import TestClient

    from edgepatch.server.app import create_app
    from edgepatch.server.service import Service
    from edgepatch.server.settings import ServerSettings

    def load() -> Session:
        runtime = load_runtime(model, None, num_threads=1)
        runtime.notes = ("slower: for a reason",)
        return runtime

    with TestClient(create_app(Service(load, ServerSettings("tiny", None))), base_url="http://127.0.0.1") as client:
        for _ in range(600):
            reply: httpx.Response = client.get("/health")
            if reply.status_code == 200:
                break
            time.sleep(0.05)
        assert reply.json() == {"status": "ok", "patches": [], "notes": ["slower: for a reason"]}


@pytest.mark.parametrize(("length", "sequences"), [(1, 1), (1, 9), (2, 3)])
def test_the_smallest_contexts_end_no_process(length: int, sequences: int, model: Path):
    code = f"from edgepatch.runtimes import load_runtime; load_runtime({str(model)!r}, None, num_threads=1, "
    code += f"context_length={length}, num_sequences={sequences}).generate([1])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


# No way around the proof.

GUARDED = {
    "llama_model_load_from_file": {"Vocabulary._open", "LlamaModel.__init__", "opened_context"},
    "llama_load_model_from_file": set(),
    "llama_model_quantize": {"quantize_here"},
    "quantize_here": set(),
    "LlamaModel": {"open_model.opening", "try_model"},
    "InferenceSession": {"new_session", "deviation"},
    "new_session": {"open_session", "try_graph", "try_session"},
}
"""What hands a file to a C library -> the only functions that call it: behind a proof, or in a child, as all of the doctor's."""


def calls(tree: ast.AST, place: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(name of what is called, where), of every call."""
    places = []
    for node in ast.iter_child_nodes(tree):
        inner = place
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = (*place, node.name)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            places.append((name, ".".join(place)))
        places += calls(node, inner)
    return places


def test_every_call_that_takes_a_file_is_behind_a_proof():
    seen: dict[str, set[str]] = {name: set() for name in GUARDED}
    for file in modules().values():
        for name, place in calls(ast.parse(file.read_text("utf-8"))):
            if name in seen:
                seen[name].add(place)
    assert seen == GUARDED

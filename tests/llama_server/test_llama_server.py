"""An unmodified llama-server: it serves the patch token for token, and ``check-server`` sees every way in which it does not.

Needs a llama-server: ``edgepatch bench llama-server`` builds one and names it in EDGEPATCH_LLAMA_SERVER; without, everything here is skipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCH
from edgepatch.bench.llama_server.server import FOLDER, PACKAGE, VARIABLE, running_server
from edgepatch.bench.llama_server.transcript import CONVERSATION, greedy
from edgepatch.bench.parity import models as parity_models
from edgepatch.converters.gguf import specs, writer
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.llama_server.check import Report, check_server
from edgepatch.llama_server.client import LlamaServer
from edgepatch.llama_server.export import ExportOptions, export, probe
from edgepatch.llama_server.requirements import SEED_FILE, ServerSettings
from edgepatch.patch.file import Patch, read_patch
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import SoftPrompt
from kit.exports import read_manifest

BINARY = Path(os.environ.get(VARIABLE, ""))
SOURCES = next(FOLDER.glob(f"{PACKAGE}-*/vendor/llama.cpp"), Path("none"))
PATCH_FILE = LAB_PATCH
PROMPTS = ("The quick brown fox", "I think the weather today is", "You are such a")
Start = Callable[..., contextlib.AbstractContextManager[LlamaServer]]

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"needs llama-server: `edgepatch bench llama-server`, or name one in {VARIABLE}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab model in F16."""
    path = tmp_path_factory.mktemp("llama_server") / "lab.gguf"
    writer.convert_folder(LAB_FOLDER / "base", path, "F16")
    return path


@pytest.fixture(scope="module")
def patch() -> Patch:
    return read_patch(PATCH_FILE)


@pytest.fixture(scope="module")
def exported(model: Path, patch: Patch) -> Path:
    folder = model.parent / "an export"
    export(patch, model, folder, ExportOptions())
    return folder


@pytest.fixture
def start(exported: Path, tmp_path: Path) -> Start:
    """Starts llama-server with the exported flags, some of them taken off, others added."""

    def begin(*added: str, without: tuple[str, ...] = (), folder: Path = exported, binary: Path = BINARY):  # type: ignore[no-untyped-def]
        flags = ServerSettings(**read_manifest(folder)["settings"]).flags(str(folder))
        return running_server(binary, [*taken_off(flags, without), *added], tmp_path / "server.log")

    return begin


def taken_off(flags: list[str], names: tuple[str, ...]) -> list[str]:
    """Flags without some of them and their values."""
    kept, dropping = [], False
    for flag in flags:
        dropping = flag in names if flag.startswith("--") else dropping
        kept += [] if dropping else [flag]
    return kept


def hazard(report: Report) -> str:
    return report.failed.hazard if report.failed else ""


# It serves the patch.


@pytest.mark.parametrize("flash_attention", [True, False])
def test_greedy_tokens_are_ours(start: Start, model: Path, patch: Patch, tmp_path: Path, flash_attention: bool):
    folder = tmp_path / "out"
    labels = export(patch, model, folder, ExportOptions(flash_attention=flash_attention))["labels"]["ids"]
    with (
        start(folder=folder) as server,
        load_runtime(model, patch, flash_attention=flash_attention, num_threads=1) as runtime,
        load_runtime(model, None, flash_attention=flash_attention, num_threads=1) as bare,
    ):
        for prompt in PROMPTS:
            assert server.restore(0, SEED_FILE).value("n_restored") == len(labels)
            tokens = runtime.encode(prompt)
            reply = server.complete(labels + tokens, 0, 48)
            assert reply.value("timings", "cache_n") == len(labels)
            assert reply.value("tokens") == greedy(runtime, tokens, 48) != greedy(bare, tokens, 48)


def test_conversations_are_ours(start: Start, model: Path, patch: Patch):
    messages: list[dict[str, str]] = []
    cached = []
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        server.restore(0, SEED_FILE)
        for question in CONVERSATION:
            messages.append({"role": "user", "content": question})
            reply = server.chat(messages, 0, 24)
            answer = reply.value("choices", 0, "message", "content")
            assert answer == runtime.chat(messages, Sampling(max_new_tokens=24, temperature=0.0))
            cached.append(reply.value("usage", "prompt_tokens_details", "cached_tokens"))
            messages.append({"role": "assistant", "content": answer})
    assert patch.num_virtual_tokens <= cached[0] < cached[1] < cached[2]


def test_text_prompts_are_ours(start: Start, exported: Path, model: Path, patch: Patch):
    """Plain text needs the labels written out by the client; the server adds the first one, BOS, itself."""
    labels = read_manifest(exported)["labels"]
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        server.restore(0, SEED_FILE)
        text = labels["text"] * (len(labels["ids"]) - 1) + "<|bos|>" + PROMPTS[0]
        reply = server.post("/completion", {"prompt": text, "n_predict": 24, "temperature": 0, "return_tokens": True})
        assert reply.value("timings", "cache_n") == patch.num_virtual_tokens
        assert reply.value("tokens") == greedy(runtime, runtime.encode(PROMPTS[0]), 24)


@pytest.mark.parametrize(("kv_type", "flash_attention"), [("f16", False), ("q8_0", True), ("f32", True)])
def test_a_probe_makes_any_server_fit(
    start: Start, exported: Path, model: Path, patch: Patch, tmp_path: Path, kv_type: str, flash_attention: bool
):
    slots = tmp_path / "slots"
    slots.mkdir()
    attention = "on" if flash_attention else "off"
    flags = (
        "--slot-save-path",
        str(slots),
        "--cache-type-k",
        kv_type,
        "--cache-type-v",
        kv_type,
        "--flash-attn",
        attention,
    )
    with start(*flags) as server:
        probed = probe(server, slots, patch, model, ExportOptions())
        assert (probed.kv_type, probed.flash_attention) == (kv_type, flash_attention)
        export(patch, model, tmp_path / "out", ExportOptions(), probed)
        (slots / SEED_FILE).write_bytes((tmp_path / "out" / "slots" / SEED_FILE).read_bytes())
        report = check_server(server, patch, model, ExportOptions(kv_type=kv_type, flash_attention=flash_attention))
        assert report.proven, report.as_dict()
        assert os.listdir(slots) == [SEED_FILE]  # the probe leaves nothing


# check-server.


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgepatch.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_verb_proves_and_refutes(start: Start, model: Path):
    arguments = ("--patch", PATCH_FILE, "--model", model)
    with start() as server:
        done = run_cli("check-server", server.url, *arguments, "--fill-context", "--json")
        assert done.returncode == 0, done.stderr
        findings = {f["subject"]: f for f in json.loads(done.stdout)["findings"]}
        assert findings["first request"]["holds"] and findings["full context"]["holds"]
        done = run_cli("check-server", server.url, *arguments, "--strict")
        assert done.returncode == 1 and "evicts the seed" in done.stderr
    with start(without=("--slot-save-path",)) as server:
        done = run_cli("check-server", server.url, *arguments)
        assert done.returncode == 1 and "--slot-save-path" in done.stderr


def test_keys(start: Start, model: Path, patch: Patch):
    with start("--api-key", "right") as server:
        with pytest.raises(InputError, match="Invalid API Key"):
            check_server(LlamaServer(server.url, "wrong"), patch, model, ExportOptions())
        assert check_server(LlamaServer(server.url, "right"), patch, model, ExportOptions()).proven


@pytest.mark.skipif(shutil.which("curl") is None, reason="restore.sh needs curl")
def test_the_scripts_of_the_folder(
    exported: Path, model: Path, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLAMA_SERVER", str(BINARY))
    with running_server(exported / "start.sh", ["--api-key", "right"], tmp_path / "server.log") as server:
        for key, holds in (("wrong", False), ("right", True)):
            monkeypatch.setenv("LLAMA_API_KEY", key)
            done = subprocess.run([exported / "restore.sh", server.url], capture_output=True, text=True)
            assert (done.returncode == 0) == holds and ('"n_restored":50' in done.stdout) == holds, done
        assert check_server(LlamaServer(server.url, "right"), patch, model, ExportOptions()).proven


def test_several_slots(start: Start, model: Path, patch: Patch, tmp_path: Path):
    export(patch, model, tmp_path / "out", ExportOptions(num_slots=3))
    with start(folder=tmp_path / "out") as server:
        report = check_server(server, patch, model, ExportOptions())
        assert report.proven and "3 of 3 slots" in str(report.as_dict())


def test_h4_idle_slots_are_cleared(start: Start, model: Path, patch: Patch):
    """llama-server's own defaults: four slots in one cache, and every request clears the idle ones."""
    with start(without=("--parallel", "--kv-unified", "--no-cache-idle-slots", "--cache-ram")) as server:
        report = check_server(server, patch, model, ExportOptions())
        assert hazard(report) == "H4" and "--no-cache-idle-slots" in report.failed.remedy  # type: ignore[union-attr]


def test_h5_and_h6_another_prompt_takes_the_slot(start: Start, exported: Path, model: Path, patch: Patch):
    """After it the labels are evaluated as text; ``cache_n`` looks well again on the next request, and only the answer tells."""
    labels = read_manifest(exported)["labels"]["ids"]
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        tokens = runtime.encode(PROMPTS[0])
        server.restore(0, SEED_FILE)
        server.complete(runtime.encode("Something else entirely, from somebody else."), 0)
        first, second = (server.complete(labels + tokens, 0, 24) for _ in range(2))
        assert first.value("timings", "cache_n") < len(labels) <= second.value("timings", "cache_n")
        assert second.value("tokens") != greedy(runtime, tokens, 24)
        server.restore(0, SEED_FILE)
        assert server.complete(labels + tokens, 0, 24).value("tokens") == greedy(runtime, tokens, 24)
        report = check_server(server, patch, model, ExportOptions(), strict=True)
        assert hazard(report) == "H5"
        assert check_server(server, patch, model, ExportOptions(), client_restores=True, strict=True).proven


@pytest.mark.parametrize(
    "flags",
    [
        ("--flash-attn", "off"),
        ("--cache-type-k", "q8_0", "--cache-type-v", "q8_0"),
        ("--parallel", "2", "--no-kv-unified"),
    ],
)
def test_h7_a_file_of_other_settings_is_refused(start: Start, model: Path, patch: Patch, flags: tuple[str, ...]):
    with start(*flags) as server:
        report = check_server(server, patch, model, ExportOptions())
        assert hazard(report) == "H7" and "start.sh" in report.failed.remedy  # type: ignore[union-attr]


def test_h8_a_full_context_is_shifted(start: Start, model: Path, patch: Patch):
    with start("--context-shift") as server:
        assert hazard(check_server(server, patch, model, ExportOptions(), fill_context=True)) == "H8"


def test_clients_can_take_the_patch_off(start: Start, exported: Path, model: Path, patch: Patch):
    """What the documentation warns of: one field of a chat request, and the slot has lost its seed for everybody."""
    messages = [{"role": "user", "content": CONVERSATION[0]}]
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        expected = runtime.chat(messages, Sampling(max_new_tokens=24, temperature=0.0))
        server.restore(0, SEED_FILE)
        assert server.chat(messages, 0, 24).value("choices", 0, "message", "content") == expected
        body = {"messages": messages, "max_tokens": 24, "temperature": 0}
        server.post("/v1/chat/completions", {**body, "cache_prompt": False})
        assert server.chat(messages, 0, 24).value("choices", 0, "message", "content") != expected
        # With the context shift off, its fields do nothing.
        server.restore(0, SEED_FILE)
        labels = read_manifest(exported)["labels"]["ids"]
        words = (runtime.encode("Words and more words.") * 300)[: 1024 - len(labels) - 8]
        long = {"prompt": labels + words, "n_predict": 32, "ignore_eos": True, "n_keep": 0, "n_discard": 100}
        assert server.post("/completion", long).value("tokens_predicted") < 16


def test_other_flags(start: Start, model: Path, patch: Patch):
    with start("--no-cache-prompt") as server:
        assert hazard(check_server(server, patch, model, ExportOptions())) == "cache"
    with start(without=("--chat-template-file",)) as server:
        assert hazard(check_server(server, patch, model, ExportOptions())) == "template"


class WithoutSlotActions(LlamaServer):
    """As a proxy shows the server that lets nothing through to /slots."""

    def post(self, path: str, body):  # type: ignore[no-untyped-def]
        return super().post("/closed" if path.startswith("/slots") else path, body)


def test_a_seed_that_nobody_can_restore(start: Start, model: Path, patch: Patch):
    """Restored at the start, then closed: proven by the answers alone, and the check leaves the seed in place."""
    with start() as server:
        behind_proxy = WithoutSlotActions(server.url)
        assert hazard(check_server(behind_proxy, patch, model, ExportOptions())) == "slots"
        server.restore(0, SEED_FILE)
        for _ in range(2):
            report = check_server(behind_proxy, patch, model, ExportOptions())
            assert report.proven, report.as_dict()


def test_an_unseeded_server_without_slot_actions(start: Start, model: Path, patch: Patch):
    with start(without=("--slot-save-path",)) as server:
        report = check_server(server, patch, model, ExportOptions())
        assert hazard(report) == "slots" and "--slot-save-path" in report.failed.remedy  # type: ignore[union-attr]


def test_another_model(start: Start, model: Path, patch: Patch, tmp_path: Path):
    """The server runs other weights than the file that the check reads."""
    other = tmp_path / "other.gguf"
    writer.convert_folder(LAB_FOLDER / "reference", other, "F16")
    with start("--model", str(other)) as server:
        assert hazard(check_server(server, patch, model, ExportOptions())) in ("model", "H6", "bare")


# Other kinds of memory.


@pytest.fixture(scope="module", params=["gemma3", "lfm2"])
def other_kind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, Patch]]:
    """A tiny model with a sliding window, or with recurrent layers, and a soft prompt for it."""
    if not SOURCES.is_dir():
        pytest.skip("needs llama.cpp's converter: `edgepatch bench llama-server`")
    architecture, folder = parity_models.architecture(request.param), tmp_path_factory.mktemp(request.param)
    parity_models.build_folder(architecture, folder / "model")
    parity_models.convert(architecture, folder / "model", folder / "model.gguf", "F16", SOURCES)
    spec = specs.read_spec(folder / "model.gguf")
    embeddings = np.random.default_rng(1).standard_normal((12, spec.hidden_size)).astype(np.float32) * np.float32(0.3)
    yield request.param, folder / "model.gguf", Patch(request.param, "1.0.0", spec, SoftPrompt(embeddings))


def test_sliding_windows_and_recurrent_layers(start: Start, other_kind: tuple[str, Path, Patch], tmp_path: Path):
    """The file comes from our decoded route; H3: without --swa-full the server restores it and ignores it."""
    name, model, patch = other_kind
    manifest = export(patch, model, tmp_path / "out", ExportOptions())
    assert manifest["seed_route"] == "decoded" and ("--swa-full" in manifest["flags"]) == (name == "gemma3")
    with start(folder=tmp_path / "out") as server, load_runtime(model, patch, num_threads=1) as runtime:
        server.restore(0, SEED_FILE)
        tokens = runtime.encode(PROMPTS[0])
        reply = server.complete(manifest["labels"]["ids"] + tokens, 0, 16)
        assert reply.value("timings", "cache_n") == 12 and reply.value("tokens") == greedy(runtime, tokens, 16)
        report = check_server(server, patch, model, ExportOptions())
        assert report.proven, report.as_dict()
    if name == "gemma3":
        with start(folder=tmp_path / "out", without=("--swa-full",)) as server:
            report = check_server(server, patch, model, ExportOptions())
            assert hazard(report) == "H3" and "--swa-full" in report.failed.remedy  # type: ignore[union-attr]

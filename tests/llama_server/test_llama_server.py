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
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCH, LAB_PATCHES
from edgepatch.bench.llama_server.server import VARIABLE, running_server
from edgepatch.bench.llama_server.transcript import CONVERSATION, greedy
from edgepatch.converters.gguf import specs, writer
from edgepatch.converters.hf import folders, seeds
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.llama_server.check import Report, check_server
from edgepatch.llama_server.client import LlamaServer
from edgepatch.llama_server.export import ExportOptions, export, probe
from edgepatch.llama_server.requirements import SEED_FILE, ServerSettings
from edgepatch.patch.file import Patch, read_patch
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import SoftPrompt
from kit import tiny_gguf
from kit.artefacts import Lazy
from kit.exports import CHATML, read_manifest, without_bos

BINARY = Path(os.environ.get(VARIABLE, ""))
PATCH_FILE = LAB_PATCH
PROMPTS = ("The quick brown fox", "I think the weather today is", "You are such a")
Start = Callable[..., contextlib.AbstractContextManager[LlamaServer]]

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"needs llama-server: `edgepatch bench llama-server`, or name one in {VARIABLE}"
)


@pytest.fixture(scope="module")
def model(lab_ggufs: Lazy) -> Path:
    """The lab model in F16."""
    return lab_ggufs["F16"]


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


def restored(server: LlamaServer, slots: int = 1) -> LlamaServer:
    """The server as ``restore.sh`` leaves it."""
    for slot in range(slots):
        assert server.restore(slot, SEED_FILE).value("n_restored") == 1
    return server


@pytest.mark.parametrize("patch_file", LAB_PATCHES, ids=["stays", "moves"])
@pytest.mark.parametrize("flash_attention", [True, False])
def test_greedy_tokens_are_ours(start: Start, model: Path, tmp_path: Path, flash_attention: bool, patch_file: Path):
    folder, patch = tmp_path / "out", read_patch(patch_file)
    export(patch, model, folder, ExportOptions(flash_attention=flash_attention))
    with (
        start(folder=folder) as server,
        load_runtime(model, patch, flash_attention=flash_attention, num_threads=1, pinned=True) as runtime,
        load_runtime(model, None, flash_attention=flash_attention, num_threads=1) as bare,
    ):
        for prompt in PROMPTS:
            tokens = runtime.encode(prompt)
            reply = restored(server).complete(tokens, 0, 24)
            assert reply.value("timings", "cache_n") == 1
            assert reply.value("tokens") == greedy(runtime, tokens, 24) != greedy(bare, tokens, 24)


def test_conversations_are_ours(start: Start, model: Path, patch: Patch):
    messages: list[dict[str, str]] = []
    cached = []
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        restored(server)
        for question in CONVERSATION:
            messages.append({"role": "user", "content": question})
            reply = server.chat(messages, 0, 24)
            answer = reply.value("choices", 0, "message", "content")
            assert answer == runtime.chat(messages, Sampling(max_new_tokens=24, temperature=0.0))
            cached.append(reply.value("usage", "prompt_tokens_details", "cached_tokens"))
            messages.append({"role": "assistant", "content": answer})
    assert 1 <= cached[0] < cached[1] < cached[2]


def test_text_prompts_are_ours(start: Start, model: Path, patch: Patch):
    """A client sends plain text: the server puts BOS in front of it, which is the label."""
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        body = {"prompt": PROMPTS[0], "n_predict": 24, "temperature": 0, "return_tokens": True}
        reply = restored(server).post("/completion", body)
        assert reply.value("timings", "cache_n") == 1
        assert reply.value("tokens") == greedy(runtime, runtime.encode(PROMPTS[0]), 24)


def test_no_position_is_lost(start: Start, model: Path, patch: Patch):
    """A slot holds as many tokens as the model knows positions; the seed's cells come on top."""
    with start() as server, load_runtime(model, None, num_threads=1) as bare:
        words = (bare.encode("Words and more words.") * 300)[: bare.context_length - 8]
        reply = restored(server).post("/completion", {"prompt": words, "n_predict": 32, "ignore_eos": True})
        assert reply.value("timings", "cache_n") == 1 and 8 <= reply.value("tokens_predicted") < 16


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
        probed = probe(server, slots, model, ExportOptions())
        assert (probed.kv_type, probed.flash_attention) == (kv_type, flash_attention)
        export(patch, model, tmp_path / "out", ExportOptions(), probed)
        (slots / SEED_FILE).write_bytes((tmp_path / "out" / "slots" / SEED_FILE).read_bytes())
        options = ExportOptions(kv_type=kv_type, flash_attention=flash_attention)
        report = check_server(restored(server), patch, model, options)
        assert report.proven, report.as_dict()
        assert os.listdir(slots) == [SEED_FILE]  # the probe leaves nothing


# check-server.


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgepatch.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_verb_proves_and_refutes(start: Start, model: Path):
    arguments = ("--patch", PATCH_FILE, "--model", model)
    with start() as server:
        done = run_cli("check-server", server.url, *arguments)
        assert done.returncode == 1 and "as found" in done.stderr and "restore.sh" in done.stderr
        restored(server)
        done = run_cli("check-server", server.url, *arguments, "--fill-context", "--json")
        assert done.returncode == 0, done.stderr
        findings = {f["subject"]: f for f in json.loads(done.stdout)["findings"]}
        assert findings["first request"]["holds"] and findings["full context"]["holds"]
        done = run_cli("check-server", server.url, *arguments, "--strict")
        assert done.returncode == 1 and "evicts the seed" in done.stderr
    with start(without=("--slot-save-path",)) as server:
        done = run_cli("check-server", server.url, *arguments, "--client-restores")
        assert done.returncode == 1 and "--slot-save-path" in done.stderr


def test_keys(start: Start, model: Path, patch: Patch):
    with start("--api-key", "right") as server:
        with pytest.raises(InputError, match="Invalid API Key"):
            check_server(LlamaServer(server.url, "wrong"), patch, model, ExportOptions())
        opened = restored(LlamaServer(server.url, "right"))
        assert check_server(opened, patch, model, ExportOptions()).proven


@pytest.mark.skipif(shutil.which("curl") is None, reason="restore.sh needs curl")
def test_the_scripts_of_the_folder(
    exported: Path, model: Path, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LLAMA_SERVER", str(BINARY))
    with running_server(exported / "start.sh", ["--api-key", "right"], tmp_path / "server.log") as server:
        for key, holds in (("wrong", False), ("right", True)):
            monkeypatch.setenv("LLAMA_API_KEY", key)
            done = subprocess.run([exported / "restore.sh", server.url], capture_output=True, text=True)
            assert (done.returncode == 0) == holds and ('"n_restored":1,' in done.stdout) == holds, done
        assert check_server(LlamaServer(server.url, "right"), patch, model, ExportOptions()).proven


def test_several_slots(start: Start, model: Path, patch: Patch, tmp_path: Path):
    export(patch, model, tmp_path / "out", ExportOptions(num_slots=3))
    with start(folder=tmp_path / "out") as server:
        report = check_server(restored(server, 2), patch, model, ExportOptions())
        assert hazard(report) == "bare" and "slot 2" in str(report.as_dict())
        report = check_server(restored(server, 3), patch, model, ExportOptions())
        assert report.proven and "3 of 3 slots" in str(report.as_dict())


def test_h4_idle_slots_are_cleared(start: Start, model: Path, patch: Patch):
    """llama-server's own defaults: four slots in one cache, and every request clears the idle ones."""
    without = ("--parallel", "--kv-unified", "--kv-unified-per-slot", "--no-cache-idle-slots", "--cache-ram")
    with start(without=without) as server:
        report = check_server(server, patch, model, ExportOptions(), client_restores=True)
        assert hazard(report) == "H4" and "--no-cache-idle-slots" in report.failed.remedy  # type: ignore[union-attr]


def test_h5_a_prompt_that_begins_otherwise_evicts_the_seed(start: Start, model: Path, patch: Patch):
    """The next conversation is the bare model's, token for token; nothing but the answer tells."""
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        tokens = runtime.encode(PROMPTS[0])
        restored(server).complete(runtime.encode("Something else entirely.")[1:], 0)
        runtime.swap(None)
        assert server.complete(tokens, 0, 24).value("tokens") == greedy(runtime, tokens, 24)
        assert hazard(check_server(server, patch, model, ExportOptions())) == "bare"
        report = check_server(restored(server), patch, model, ExportOptions(), strict=True)
        assert hazard(report) == "H5"
        assert check_server(server, patch, model, ExportOptions(), client_restores=True, strict=True).proven


def test_a_server_of_another_patch(start: Start, model: Path, patch: Patch, tmp_path: Path):
    """As found, and where its slot file is of another patch: fluent, HTTP 200, and not this patch."""
    export(read_patch(LAB_PATCHES[1]), model, tmp_path / "out", ExportOptions())
    with start(folder=tmp_path / "out") as server:
        for client_restores in (False, True):
            report = check_server(restored(server), patch, model, ExportOptions(), client_restores=client_restores)
            assert hazard(report) == "other", report.as_dict()


def test_a_restart_is_bare_until_it_is_restored(start: Start, model: Path, patch: Patch):
    for _ in range(2):
        with start() as server:
            report = check_server(server, patch, model, ExportOptions())
            assert hazard(report) == "bare" and "as found" in report.failed.subject  # type: ignore[union-attr]
            assert check_server(restored(server), patch, model, ExportOptions()).proven


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
        report = check_server(server, patch, model, ExportOptions(), client_restores=True)
        assert hazard(report) == "H7" and "start.sh" in report.failed.remedy  # type: ignore[union-attr]


def test_a_context_shift_leaves_bos_and_the_seed(start: Start, model: Path, patch: Patch):
    """Where BOS is put in front of a text, the server keeps its position, and with it every cell that stands there."""
    with start("--context-shift") as server:
        report = check_server(restored(server), patch, model, ExportOptions(), fill_context=True)
        assert report.proven and "32 tokens generated" in str(report.as_dict())


def test_cache_reuse_moves_text_and_no_seed(start: Start, model: Path, patch: Patch):
    with start("--cache-reuse", "4") as server, load_runtime(model, patch, num_threads=1) as runtime:
        text = runtime.encode("First of all, a sentence that goes away. The rest of the text stays as it was written.")
        restored(server).complete(text, 0, 1)
        server.complete([text[0], *text[12:]], 0, 1)
        assert check_server(server, patch, model, ExportOptions()).proven


def test_clients_can_take_the_patch_off(start: Start, model: Path, patch: Patch):
    """What the documentation warns of: one field of a chat request, and the slot has lost its seed for everybody."""
    messages = [{"role": "user", "content": CONVERSATION[0]}]
    with start() as server, load_runtime(model, patch, num_threads=1) as runtime:
        expected = runtime.chat(messages, Sampling(max_new_tokens=24, temperature=0.0))
        assert restored(server).chat(messages, 0, 24).value("choices", 0, "message", "content") == expected
        body = {"messages": messages, "max_tokens": 24, "temperature": 0}
        server.post("/v1/chat/completions", {**body, "cache_prompt": False})
        assert server.chat(messages, 0, 24).value("choices", 0, "message", "content") != expected


def test_other_flags(start: Start, model: Path, patch: Patch, tmp_path: Path):
    with start("--no-cache-prompt") as server:
        report = check_server(server, patch, model, ExportOptions(), client_restores=True)
        assert hazard(report) == "cache"


def test_a_template_that_begins_otherwise(start: Start, model: Path, patch: Patch, tmp_path: Path):
    """The same weights, whose tokenizer puts no BOS in front: the label is the header of a turn, and another template has none."""
    headless = without_bos(model, tmp_path / "headless.gguf")
    manifest = export(patch, headless, tmp_path / "out", ExportOptions(chat_template=CHATML))
    assert manifest["label"]["text"] == "<|im_start|>"
    options = ExportOptions(chat_template=CHATML)
    with start(folder=tmp_path / "out") as server:
        assert check_server(restored(server), patch, headless, options).proven
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[0]['content'] }}")
    with start("--chat-template-file", str(other), folder=tmp_path / "out") as server:
        assert hazard(check_server(restored(server), patch, headless, options)) == "template"
    with start("--context-shift", folder=tmp_path / "out") as server:
        report = check_server(restored(server), patch, headless, options, fill_context=True)
        assert hazard(report) == "H8" and "--no-context-shift" in report.failed.remedy  # type: ignore[union-attr]


class WithoutSlotActions(LlamaServer):
    """As a proxy shows the server that lets nothing through to /slots."""

    def post(self, path: str, body):  # type: ignore[no-untyped-def]
        return super().post("/closed" if path.startswith("/slots") else path, body)


def test_a_seed_that_nobody_can_restore(start: Start, model: Path, patch: Patch):
    """Restored at the start, then closed: proven by the answers alone, and the check leaves the seed in place."""
    with start() as server:
        behind_proxy = WithoutSlotActions(server.url)
        assert hazard(check_server(behind_proxy, patch, model, ExportOptions())) == "bare"
        restored(server)
        for _ in range(2):
            report = check_server(behind_proxy, patch, model, ExportOptions())
            assert report.proven, report.as_dict()


def test_an_unseeded_server_without_slot_actions(start: Start, model: Path, patch: Patch):
    with start(without=("--slot-save-path",)) as server:
        report = check_server(server, patch, model, ExportOptions())
        assert hazard(report) == "bare" and "start.sh" in report.failed.remedy  # type: ignore[union-attr]
        report = check_server(server, patch, model, ExportOptions(), client_restores=True)
        assert hazard(report) == "slots" and "--slot-save-path" in report.failed.remedy  # type: ignore[union-attr]


def test_another_model(start: Start, model: Path, patch: Patch, tmp_path: Path):
    """The server runs other weights than the file that the check reads."""
    other = tmp_path / "other.gguf"
    writer.convert_folder(LAB_FOLDER / "reference", other, "F16")
    with start("--model", str(other)) as server:
        for client_restores in (False, True):
            report = check_server(restored(server), patch, model, ExportOptions(), client_restores=client_restores)
            assert hazard(report) == "other", report.as_dict()


# Other kinds of memory.


def test_sliding_windows(start: Start, tmp_path: Path):
    """A slot ends before a layer would lose the seed. H3: without --swa-full the server restores the file and ignores it."""
    model = tmp_path / "windows.gguf"
    tiny_gguf.write_gemma3(model, window=1000, context=1000)
    spec = specs.read_spec(model)
    embeddings = np.random.default_rng(1).standard_normal((12, spec.hidden_size)).astype(np.float32) * np.float32(0.3)
    patch = seeds.complete(Patch("windows", "1.0.0", spec, SoftPrompt(embeddings)), folders.load_model(model))
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="expected at most 988, found 1000") as refused:
        export(patch, model, tmp_path / "out", ExportOptions(chat_template=template))
    assert "--context 988" in str(refused.value.hint)
    options = ExportOptions(988, chat_template=template)
    assert "--swa-full" in export(patch, model, tmp_path / "out", options)["flags"]
    with start(folder=tmp_path / "out") as server, load_runtime(model, patch, num_threads=1) as runtime:
        tokens = runtime.encode(PROMPTS[0])
        reply = restored(server).complete(tokens, 0, 8)
        assert reply.value("timings", "cache_n") == 1 and reply.value("tokens") == greedy(runtime, tokens, 8)
        report = check_server(restored(server), patch, model, options)
        assert report.proven, report.as_dict()
    with start(folder=tmp_path / "out", without=("--swa-full",)) as server:
        report = check_server(server, patch, model, options, client_restores=True)
        assert hazard(report) == "H3" and "--swa-full" in report.failed.remedy  # type: ignore[union-attr]

"""``edgepatch export --to llama-server``: the slot file, the template, the flags; and what ``check-server`` says without a llama-server."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.llama_server.transcript import common_prefix
from edgepatch.converters.gguf import writer
from edgepatch.converters.gguf.library import load_library
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.errors import InactivePatchError, InputError, MismatchError
from edgepatch.llama_server.check import check_server
from edgepatch.llama_server.client import LlamaServer
from edgepatch.llama_server.export import ExportOptions, Probe, export, split_slot_file
from edgepatch.llama_server.references import Distance
from edgepatch.llama_server.requirements import Labels, ServerSettings, choose_labels, patched_template, prompt_ids
from edgepatch.patch.file import Patch, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.context import ContextSettings, LlamaContext, LlamaModel
from edgepatch.tensors import SoftPrompt
from edgepatch.text.chat_templates import render_chat_template
from kit import serving
from kit.exports import read_manifest

MESSAGES = [
    {"role": "user", "content": "Hello <b>you</b>"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on."},
]


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "tiny.gguf"
    writer.convert_folder(tiny_folder, path, "F16")
    return path


@pytest.fixture(scope="module")
def vocabulary(model: Path) -> Iterator[Vocabulary]:
    with Vocabulary(model) as opened:
        yield opened


@pytest.fixture(scope="module")
def exported(model: Path, tiny_patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "a folder"
    export(tiny_patch, model, folder, ExportOptions())
    return folder


def restored_logits(
    model: Path, seed: Path, options: ExportOptions, labels: list[int], tokens: list[int]
) -> np.ndarray:
    """(T, V) logits of a fresh context of the library into which it loads the slot file itself."""
    loaded = LlamaModel(model)
    context = LlamaContext(loaded, ContextSettings(512, 1, options.kv_type, options.flash_attention, 1))
    lib = load_library()
    restored_ids, count = (lib.llama_token * 64)(), ctypes.c_size_t(0)
    try:
        taken = lib.llama_state_seq_load_file(
            context.handle, bytes(seed), 0, restored_ids, len(restored_ids), ctypes.byref(count)
        )
        assert taken == seed.stat().st_size and list(restored_ids[: count.value]) == labels
        assert context.holds(0, len(labels))
        return context.evaluate(0, tokens, every=True)
    finally:
        context.close()
        loaded.close()


@pytest.mark.parametrize(
    ("kv_type", "flash_attention"), [("f32", False), ("f16", True), ("f16", False), ("q8_0", True)]
)
def test_the_library_restores_the_slot_file(
    model: Path, tiny_patch: Patch, tmp_path: Path, kv_type: str, flash_attention: bool
):
    options = ExportOptions(kv_type=kv_type, flash_attention=flash_attention)
    manifest = export(tiny_patch, model, tmp_path / "out", options)
    with load_runtime(model, tiny_patch, kv_type=kv_type, flash_attention=flash_attention, num_threads=1) as runtime:
        tokens = runtime.encode("The quick brown fox")
        expected = runtime.logits(tokens)
    with load_runtime(model, None, kv_type=kv_type, flash_attention=flash_attention, num_threads=1) as runtime:
        bare = runtime.logits(tokens)
    seed = tmp_path / "out" / "slots" / "seed.bin"
    restored = restored_logits(model, seed, options, manifest["labels"]["ids"], tokens)
    assert np.abs(restored - expected).max() < 1e-5 < 0.1 < np.abs(restored - bare).max()


def test_a_prompt_is_labels_and_the_conversation(model: Path, exported: Path, vocabulary: Vocabulary):
    manifest = read_manifest(exported)
    template = (exported / "chat_template.jinja").read_text("utf-8")
    names = [vocabulary.text(vocabulary.bos), vocabulary.text(vocabulary.eos)]
    prompt = prompt_ids(vocabulary, render_chat_template(template, MESSAGES, *names))
    with load_runtime(model, None, num_threads=1) as runtime:
        assert prompt == manifest["labels"]["ids"] + runtime.encode_chat(MESSAGES)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_labels_with_bos(vocabulary: Vocabulary, count: int):
    """The tokenizer puts BOS in front of every prompt, so it is the first label; at P = 1 the only one."""
    assert vocabulary.adds_bos
    labels = choose_labels(vocabulary, count, vocabulary.chat_template)
    assert labels.text.startswith("<|reserved_") and labels.ids == [vocabulary.bos] + [labels.placeholder] * (count - 1)
    assert patched_template(vocabulary, labels, vocabulary.chat_template).endswith(vocabulary.chat_template)


def test_labels_without_bos():
    labels = Labels(7, "<|x|>", None, 3)
    assert labels.ids == [7, 7, 7] and labels.template_front == "{{ '<|x|>' * 3 }}"


def test_a_vocabulary_without_spare_tokens(vocabulary: Vocabulary):
    template = vocabulary.chat_template + "".join(vocabulary.text(token) for token in vocabulary.spare_tokens())
    with pytest.raises(InputError, match="no spare special token"):
        choose_labels(vocabulary, 5, template)


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] | trim }}{{ ", "{% set x = 1 %}\n{{ raise_exception('no') }}"]
)
def test_a_template_that_does_not_work(vocabulary: Vocabulary, template: str):
    labels = choose_labels(vocabulary, 5, template)
    with pytest.raises(InputError, match="template"):
        patched_template(vocabulary, labels, template)


def test_a_model_without_template(vocabulary: Vocabulary):
    with pytest.raises(InputError, match="no chat template"):
        patched_template(vocabulary, choose_labels(vocabulary, 5, ""), "")


def test_flags():
    flags = " ".join(ServerSettings("m.gguf", 512).flags("F"))
    for flag in (
        "--model m.gguf",
        "--host 127.0.0.1",
        "--parallel 1",
        "--ctx-size 512",
        "--kv-unified",
        "--flash-attn on",
        "--jinja",
        "--cache-type-k f16",
        "--cache-type-v f16",
        "--chat-template-file F/chat_template.jinja",
        "--slot-save-path F/slots",
        "--no-cache-idle-slots",
        "--no-context-shift",
        "--cache-ram 0",
    ):
        assert flag in flags
    assert "--swa-full" not in flags
    other = " ".join(ServerSettings("m.gguf", 512, "q8_0", True, 3, True).flags("F"))
    assert (
        "--swa-full" in other
        and "--parallel 3 --kv-unified --kv-unified-per-slot 512" in other
        and "--ctx-size" not in other
    )
    assert "--flash-attn off" in " ".join(ServerSettings("m.gguf", 512, flash_attention=False).flags("F"))


def test_scripts_run_anywhere(exported: Path, tmp_path: Path):
    command = subprocess.run(
        [exported / "start.sh", "--port", "9"],
        env={**os.environ, "LLAMA_SERVER": "echo"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert f"--slot-save-path {exported}/slots" in command and command.endswith("--port 9")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert subprocess.run([exported / "restore.sh", url], capture_output=True).returncode != 0


def test_manifest(exported: Path, tiny_patch: Patch):
    manifest = read_manifest(exported)
    assert manifest["patch"]["digest"] == tiny_patch.digest and manifest["seed_route"] == "stored"
    assert manifest["library"]["state_version"] == load_library().LLAMA_STATE_SEQ_VERSION
    assert set(manifest["files"]) == {"slots/seed.bin", "chat_template.jinja", "start.sh", "restore.sh"}
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert os.stat(exported / "slots" / "seed.bin").st_mode & 0o222 == 0  # clients can ask the server to save over it


def test_an_earlier_export_is_replaced(model: Path, tiny_patch: Patch, tmp_path: Path):
    folder = tmp_path / "out"
    export(tiny_patch, model, folder, ExportOptions())
    (folder / "chat_template.jinja").write_text("other", encoding="utf-8")
    export(tiny_patch, model, folder, ExportOptions())
    assert (folder / "chat_template.jinja").read_text("utf-8") != "other"
    assert read_manifest(folder)["client"] == "llama-server"


def test_other_folders_are_left_alone(model: Path, tiny_patch: Patch, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="no earlier export"):
        export(tiny_patch, model, tmp_path, ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_export_leaves_nothing(model: Path, tiny_patch: Patch, tmp_path: Path):
    with pytest.raises(InputError, match="needs flash attention"):
        export(tiny_patch, model, tmp_path / "out", ExportOptions(kv_type="q8_0", flash_attention=False))
    other = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5.0))
    with pytest.raises(MismatchError, match="rope_theta"):
        export(other, model, tmp_path / "out", ExportOptions())
    with pytest.raises(InputError, match="slots: expected 1 or more"):
        export(tiny_patch, model, tmp_path / "out", ExportOptions(num_slots=0))
    assert list(tmp_path.iterdir()) == []


# Probe and patch: what a server writes decides about header and types.


def probe_of(folder: Path) -> Probe:
    """As if a server had written the exported slot file: it packs the labels with a marker, a version and two counts."""
    header, state = split_slot_file((folder / "slots" / "seed.bin").read_bytes())
    packed = np.array([14, -1, 1, 10, *range(10), 0], "<i4").tobytes()
    return Probe(header[:8] + packed, read_state(state))


def test_a_probe_decides_about_types_and_header(model: Path, tiny_patch: Patch, tmp_path: Path):
    export(tiny_patch, model, tmp_path / "server", ExportOptions(kv_type="f32", flash_attention=False))
    probe = probe_of(tmp_path / "server")
    assert (probe.kv_type, probe.flash_attention) == ("f32", False)
    manifest = export(tiny_patch, model, tmp_path / "out", ExportOptions(), probe)
    assert manifest["settings"]["kv_type"] == "f32" and manifest["header"] == "the probed server"
    actual, expected = ((tmp_path / name / "slots" / "seed.bin").read_bytes() for name in ("out", "server"))
    assert actual.startswith(probe.header) and split_slot_file(actual)[1] == split_slot_file(expected)[1]


def test_a_probe_of_another_layout_is_refused(model: Path, tiny_patch: Patch, tmp_path: Path):
    short = replace(
        tiny_patch, soft_prompt=SoftPrompt(tiny_patch.soft_prompt.embeddings[:4]), kv_seed=None, canary=None
    )  # type: ignore[union-attr]
    export(short, model, tmp_path / "server", ExportOptions())
    with pytest.raises(InactivePatchError, match="laid out otherwise"):
        export(tiny_patch, model, tmp_path / "out", ExportOptions(), probe_of(tmp_path / "server"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 11, 12, 50])
def test_a_short_slot_file(exported: Path, size: int):
    data = (exported / "slots" / "seed.bin").read_bytes()
    with pytest.raises(InactivePatchError, match="slot file: expected"):
        split_slot_file(data[:size])


# check-server, as far as it goes without a llama-server.


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is no llama-server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path != "/health" else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_something_else_is_not_proven(model: Path, tiny_patch: Patch, other_server: str):
    report = check_server(LlamaServer(other_server), tiny_patch, model, ExportOptions())
    assert not report.proven and report.failed and report.failed.subject == "llama-server"


def test_edgepatch_serve_names_its_patch(model: Path, tiny_patch: Patch):
    with serving.running(lambda: load_runtime(model, tiny_patch, num_threads=1)) as running:
        assert check_server(LlamaServer(running.url, serving.KEY), tiny_patch, model, ExportOptions()).proven
        other = replace(tiny_patch, version="9.9.9")
        report = check_server(LlamaServer(running.url, serving.KEY), other, model, ExportOptions())
        assert report.failed and other.digest in report.failed.evidence
        with pytest.raises(InputError, match="key"):
            check_server(LlamaServer(running.url, "wrong"), tiny_patch, model, ExportOptions())


def run_cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgepatch.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_exit_codes(model: Path, tiny_patch: Patch, other_server: str, tmp_path: Path):
    patch = tmp_path / "tiny.safetensors"
    write_patch(tiny_patch, patch)
    common = ("--patch", patch, "--model", model)
    done = run_cli("check-server", other_server, *common)
    assert done.returncode == 1 and "not proven: llama-server" in done.stderr
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    done = run_cli("check-server", f"http://127.0.0.1:{port}", *common)
    assert done.returncode == 2 and "cannot reach" in done.stderr


def test_export_verb(model: Path, tiny_patch: Patch, tmp_path: Path):
    patch = tmp_path / "tiny.safetensors"
    write_patch(tiny_patch, patch)
    done = run_cli(
        "export", patch, "--to", "llama-server", "--model", model, "-o", tmp_path / "out", "--slots", 2, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == read_manifest(tmp_path / "out")
    done = run_cli("export", patch, "--model", model, "-o", tmp_path / "other", "--server", "http://127.0.0.1:1")
    assert done.returncode == 2 and "--slot-dir" in done.stderr and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("actual", "expected", "length"),
    [
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 9, 3], [1, 2, 3], 1),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3, 4], [1, 2, 3], 2),
        ([], [], 0),
    ],
)
def test_equal_tokens_are_counted_to_the_first_difference(actual: list[int], expected: list[int], length: int):
    """Of the transcript; a continuation that does not end where the other ends differs there."""
    assert common_prefix(actual, expected) == length


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "ftp://127.0.0.1", "http://"])
def test_urls(url: str):
    with pytest.raises(InputError, match="expected a URL"):
        LlamaServer(url)


@pytest.mark.parametrize(
    ("distance", "is_patched", "nearest"),
    [
        (Distance(0.001, 0.3, 0.4, 0.3), True, "patched"),
        (Distance(0.3, 0.001, 0.2, 0.3), False, "bare"),
        (Distance(0.3, 0.2, 0.001, 0.2), False, "as_text"),
        (Distance(0.9, 1.1, 1.2, 0.3), False, "none"),  # another model altogether
        (Distance(0.1, 0.3, 0.4, 0.3), False, "patched"),
        (
            Distance(0.0001, 0.004, 0.005, 0.004),
            False,
            "patched",
        ),  # a patch that changes next to nothing proves nothing
    ],
)
def test_verdicts(distance: Distance, is_patched: bool, nearest: str):
    assert (distance.is_patched, distance.nearest) == (is_patched, nearest)

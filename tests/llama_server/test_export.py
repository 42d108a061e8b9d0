"""``edgepatch export --to llama-server``: the slot file, the label, the flags; and what ``check-server`` says without a llama-server."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.llama_server.transcript import common_prefix
from edgepatch.converters.gguf import specs
from edgepatch.converters.gguf.library import load_library
from edgepatch.converters.gguf.vocabulary import Vocabulary
from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.hf.rotary import read_rotation
from edgepatch.converters.llamacpp.layout import Layout, decode_rows
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.errors import InactivePatchError, InputError, MismatchError
from edgepatch.llama_server.check import check_server
from edgepatch.llama_server.client import LlamaServer
from edgepatch.llama_server.export import FILE_HEADER, ExportOptions, Probe, export, split_slot_file
from edgepatch.llama_server.references import Distance
from edgepatch.llama_server.requirements import ServerSettings, choose_label
from edgepatch.patch.composition import compose_on_device
from edgepatch.patch.file import Patch, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp import turning
from edgepatch.runtimes.llamacpp.context import ContextSettings, LlamaContext, LlamaModel
from edgepatch.tensors import SoftPrompt
from kit import serving, tiny_gguf
from kit.artefacts import Lazy
from kit.exports import CHATML, read_manifest, without_bos


@pytest.fixture(scope="module")
def model(tiny_ggufs: Lazy) -> Path:
    return tiny_ggufs["F16"]


@pytest.fixture(scope="module")
def vocabulary(model: Path) -> Iterator[Vocabulary]:
    with Vocabulary(model) as opened:
        yield opened


@pytest.fixture(scope="module")
def exported(model: Path, tiny_patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "a folder"
    export(tiny_patch, model, folder, ExportOptions())
    return folder


def restored_logits(model: Path, seed: Path, options: ExportOptions, label: int, tokens: list[int]) -> np.ndarray:
    """(T - 1, V) logits of a fresh context of the library into which it loads the slot file itself: it holds the first token."""
    loaded = LlamaModel(model)
    context = LlamaContext(loaded, ContextSettings(512, 1, options.kv_type, options.flash_attention, 1))
    lib = load_library()
    restored_ids, count = (lib.llama_token * 64)(), ctypes.c_size_t(0)
    try:
        taken = lib.llama_state_seq_load_file(
            context.handle, bytes(seed), 0, restored_ids, len(restored_ids), ctypes.byref(count)
        )
        assert taken == seed.stat().st_size and list(restored_ids[: count.value]) == [label] == tokens[:1]
        assert context.last_position(0) == 0  # so the next token is the text's second
        return context.evaluate(0, tokens[1:], every=True)
    finally:
        context.close()
        loaded.close()


def require_served(model: Path, patch: Patch, target: Path, options: ExportOptions, most: float) -> None:
    """The library computes behind the slot file what our own runtime computes behind the seed."""
    label = export(patch, model, target, options)["label"]["token"]
    settings = {"kv_type": options.kv_type, "flash_attention": options.flash_attention, "num_threads": 1}
    with load_runtime(model, patch, **settings, pinned=True) as runtime:
        tokens = runtime.encode("The quick brown fox")
        expected = runtime.logits(tokens)[1:]
        runtime.swap(None)
        bare = runtime.logits(tokens)[1:]
    restored = restored_logits(model, target / "slots" / "seed.bin", options, label, tokens)
    assert np.abs(restored - expected).max() < most < 0.1 * np.abs(restored - bare).max()


@pytest.mark.parametrize(
    ("kv_type", "flash_attention", "most"),
    [("f32", False, 1e-2), ("f16", True, 3e-2), ("f16", False, 3e-2), ("q8_0", True, 0.3)],
)
def test_the_library_restores_the_slot_file(
    model: Path, tiny_patch: Patch, tmp_path: Path, kv_type: str, flash_attention: bool, most: float
):
    """Turned keys are rounded otherwise, so the logits are not the same to the last bit."""
    require_served(
        model, tiny_patch, tmp_path / "out", ExportOptions(kv_type=kv_type, flash_attention=flash_attention), most
    )


def test_a_composed_patch(model: Path, tiny_folder: Path, tiny_patch: Patch, tmp_path: Path):
    """Two seeds side by side are one of 2 P cells."""
    part = replace(tiny_patch, rotation=read_rotation(folders.load_model(tiny_folder)), anchoring=None)
    other = SoftPrompt(tiny_patch.soft_prompt.embeddings[::-1].copy())  # type: ignore[union-attr]
    mirrored = replace(part, name="mirrored", soft_prompt=other, kv_seed=None)
    parts = [part, seeds.complete(mirrored, folders.load_model(tiny_folder))]
    composed = compose_on_device(parts)
    require_served(model, composed, tmp_path / "out", ExportOptions(), 3e-2)
    _, state = split_slot_file((tmp_path / "out" / "slots" / "seed.bin").read_bytes())
    assert read_state(state).caches[0].positions == (0,) * (2 * part.num_virtual_tokens + 1)


def test_every_cell_stands_at_the_first_position(exported: Path, tiny_patch: Patch, vocabulary: Vocabulary):
    """Keys are those of the seed, turned back by P; the last cell is the label's own."""
    header, state = split_slot_file((exported / "slots" / "seed.bin").read_bytes())
    assert FILE_HEADER.unpack_from(header)[2] == 1 and header[FILE_HEADER.size :] == struct.pack("<i", vocabulary.bos)
    count, cache = tiny_patch.num_virtual_tokens, read_state(state).caches[0]
    assert cache.positions == (0,) * (count + 1)
    shape = (tiny_patch.base.num_key_value_heads, tiny_patch.base.head_dim)
    values = decode_rows(cache.values[0], count + 1, shape, False)
    assert np.abs(values[:, :count] - tiny_patch.kv_seed.values[0]).max() < 1e-2 < np.abs(values[:, count]).max()  # type: ignore[union-attr]


def test_how_keys_turn_is_read_from_the_cache(model: Path, tiny_folder: Path):
    """A patch of format 1 does not say it; Transformers' tables and those that llama.cpp shows are the same."""
    expected = read_rotation(folders.load_model(tiny_folder))
    loaded = LlamaModel(model)
    context = LlamaContext(loaded, ContextSettings(256, 1, "f32", False, 1))
    spec = specs.read_spec(model)
    layers = tuple(range(spec.num_hidden_layers))
    try:
        rotation = turning.read_rotation(context, Layout(True, 0, 0, (layers,)), spec, spec.head_dim)
        with pytest.raises(InputError, match="do not turn"):  # neighbours taken for halves
            turning.read_rotation(context, Layout(False, 0, 0, (layers,)), replace(spec), spec.head_dim // 2)
    finally:
        context.close()
        loaded.close()
    assert rotation.layers == expected.layers and rotation.neighbours == expected.neighbours
    assert np.allclose(rotation.tables, expected.tables, rtol=0, atol=1e-5)


# The label.


def test_the_label_is_bos(vocabulary: Vocabulary):
    assert vocabulary.adds_bos
    for template in (vocabulary.chat_template, "{{ messages[0]['content'] }}", ""):
        assert choose_label(vocabulary, template).token == vocabulary.bos


def test_the_label_is_the_header_of_every_turn(model: Path, tmp_path: Path):
    """ChatML: no BOS, and each conversation starts with the same special token, whoever speaks first."""
    with Vocabulary(without_bos(model, tmp_path / "none.gguf")) as vocabulary:
        assert not vocabulary.adds_bos
        label = choose_label(vocabulary, CHATML)
        assert label.text == "<|im_start|>" and vocabulary.tokenize(label.text) == [label.token]
        with pytest.raises(InputError, match=r"expected one token in front of every conversation, found '.+', '.+'"):
            choose_label(vocabulary, "{{ messages[0]['content'] }}")
        with pytest.raises(InputError, match="no chat template"):
            choose_label(vocabulary, "")
        with pytest.raises(InputError, match="found an empty one"):
            choose_label(vocabulary, "{# nothing #}")


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] | trim }}{{ ", "{% set x = 1 %}\n{{ raise_exception('no') }}"]
)
def test_a_template_that_does_not_work(vocabulary: Vocabulary, template: str):
    with pytest.raises(InputError, match="template"):
        choose_label(vocabulary, template)


def test_recurrent_layers_are_refused(tmp_path: Path):
    """Their memory has no place in front of the first token."""
    model = tmp_path / "hybrid.gguf"
    tiny_gguf.write_lfm2(model)
    spec = specs.read_spec(model)
    soft_prompt = SoftPrompt(np.full((4, spec.hidden_size), 0.1, np.float32))
    with (
        load_runtime(model, Patch("hybrid", "1.0.0", spec, soft_prompt), num_threads=1) as runtime,
        pytest.raises(InputError, match="recurrent layers") as refused,
    ):
        runtime.backend.save_seed_file(tmp_path / "seed.bin", 1)
    assert "edgepatch serve" in str(refused.value.hint) and not (tmp_path / "seed.bin").exists()


def test_flags():
    flags = " ".join(ServerSettings("m.gguf", 512, 10).flags("F"))
    for flag in (
        "--model m.gguf",
        "--host 127.0.0.1",
        "--parallel 1",
        "--kv-unified --kv-unified-per-slot 512 --ctx-size 522",
        "--flash-attn on",
        "--jinja",
        "--cache-type-k f16",
        "--cache-type-v f16",
        "--slot-save-path F/slots",
        "--no-cache-idle-slots",
        "--no-context-shift",
        "--cache-ram 0",
    ):
        assert flag in flags
    assert "--swa-full" not in flags and "--chat-template-file" not in flags
    other = " ".join(ServerSettings("m.gguf", 512, 10, "q8_0", True, 3, True, True).flags("F"))
    assert "--parallel 3 --kv-unified --kv-unified-per-slot 512 --ctx-size 1566" in other
    assert "--swa-full" in other and "--chat-template-file F/chat_template.jinja" in other
    assert "--flash-attn off" in " ".join(ServerSettings("m.gguf", 512, 10, flash_attention=False).flags("F"))


def started(folder: Path, cwd: Path, **variables: str) -> str:
    """The command line that ``start.sh`` comes to."""
    environment = {**os.environ, "LLAMA_SERVER": "echo", **variables}
    words = [folder / "start.sh", "--port", "9"]
    return subprocess.run(words, env=environment, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def test_scripts_run_anywhere(exported: Path, tmp_path: Path):
    command = started(exported, tmp_path)
    assert f"--slot-save-path {exported}/slots" in command and command.endswith("--port 9")
    model = Path(command.split("--model ")[1].split(" --host")[0])
    assert model.is_file(), "the one that the export was made for"
    assert "--model /else where/m.gguf --host" in started(exported, tmp_path, MODEL="/else where/m.gguf")
    moved = tmp_path / "moved"
    shutil.copytree(exported, moved)
    (moved / model.name).write_bytes(b"")
    assert f"--model {moved / model.name} --host" in started(moved, tmp_path)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert subprocess.run([exported / "restore.sh", url], capture_output=True).returncode != 0


def test_manifest(exported: Path, tiny_patch: Patch):
    manifest = read_manifest(exported)
    assert manifest["patch"]["digest"] == tiny_patch.digest and manifest["seed_route"] == "stored"
    assert manifest["library"]["state_version"] == load_library().LLAMA_STATE_SEQ_VERSION
    assert set(manifest["files"]) == {"slots/seed.bin", "start.sh", "restore.sh", "README.md"}
    assert "stays at the start of the text" in manifest["place"]
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest
    assert os.stat(exported / "slots" / "seed.bin").st_mode & 0o222 == 0  # clients can ask the server to save over it


def test_an_earlier_export_is_replaced(model: Path, tiny_patch: Patch, tmp_path: Path):
    folder = tmp_path / "out"
    export(tiny_patch, model, folder, ExportOptions(chat_template=CHATML))
    assert (folder / "chat_template.jinja").read_text("utf-8") == CHATML
    export(tiny_patch, model, folder, ExportOptions())
    assert not (folder / "chat_template.jinja").exists() and read_manifest(folder)["client"] == "llama-server"


def test_other_folders_are_left_alone(model: Path, tiny_patch: Patch, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is not an earlier export"):
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
    """As if a server had written the exported slot file: it packs the label with a marker, a version and two counts."""
    header, state = split_slot_file((folder / "slots" / "seed.bin").read_bytes())
    packed = np.array([5, -1, 1, 1, 7, 0], "<i4").tobytes()
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
    export(tiny_patch, model, tmp_path / "server", ExportOptions())
    probe = probe_of(tmp_path / "server")
    cache = probe.state.caches[0]
    fewer = replace(cache, keys=cache.keys[:-1], values=cache.values[:-1])
    with pytest.raises(InactivePatchError, match="laid out otherwise"):
        export(
            tiny_patch,
            model,
            tmp_path / "out",
            ExportOptions(),
            replace(probe, state=replace(probe.state, caches=(fewer,))),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, 11, 12, 16])
def test_a_short_slot_file(exported: Path, size: int):
    data = (exported / "slots" / "seed.bin").read_bytes()
    with pytest.raises(InactivePatchError, match="slot file: expected"):
        split_slot_file(data[:size])


# check-server, as far as it goes without a llama-server.


Answer = Callable[[str], tuple[int, dict[str, str], object]]


@contextlib.contextmanager
def answering(answer: Answer) -> Iterator[tuple[str, list[str]]]:
    """(URL, keys that it was sent) of a web server that gives status, headers and JSON for a path."""
    keys: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            keys.append(self.headers.get("Authorization", ""))
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", keys
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def other_server() -> Iterator[str]:
    """A web server that is no llama-server."""
    with answering(lambda path: (200 if path == "/health" else 404, {}, {})) as (url, _):
        yield url


def test_something_else_is_not_proven(model: Path, tiny_patch: Patch, other_server: str):
    report = check_server(LlamaServer(other_server), tiny_patch, model, ExportOptions())
    assert not report.proven and report.failed and report.failed.subject == "llama-server"


CONFIDENT = {
    "content": [{"top_logprobs": [{"bytes": [97], "id": 300, "logprob": -0.1}, {"id": 10**9, "logprob": -2.0}]}]
}
"""One token, and another that no vocabulary has."""


@pytest.mark.parametrize("logprobs", [None, CONFIDENT])
def test_the_word_of_a_server_proves_nothing(model: Path, tiny_patch: Patch, logprobs: object):
    """Twelve lines can say a digest; what the model answers with the patch they cannot."""
    entry = {"digest": tiny_patch.digest, "active": True, "pinned": True}
    body = {"status": "ok", "data": [entry], "choices": [{"message": {"content": "Hello"}, "logprobs": logprobs}]}
    with answering(lambda _: (200, {}, body)) as (url, _):
        report = check_server(LlamaServer(url), tiny_patch, model, ExportOptions())
    assert report.findings[0].holds and report.failed and report.failed.subject == "answers"


def test_edgepatch_serve_is_asked(model: Path, tiny_patch: Patch):
    with serving.running(lambda: load_runtime(model, tiny_patch, num_threads=1)) as running:
        report = check_server(LlamaServer(running.url, serving.KEY), tiny_patch, model, ExportOptions())
        assert report.proven and [f.subject for f in report.findings] == ["edgepatch serve", "answers"]
        other = replace(tiny_patch, version="9.9.9")
        report = check_server(LlamaServer(running.url, serving.KEY), other, model, ExportOptions())
        assert report.failed and other.digest in report.failed.evidence
        with pytest.raises(InputError, match="key"):
            check_server(LlamaServer(running.url, "wrong"), tiny_patch, model, ExportOptions())


def test_a_key_goes_to_nobody_else():
    with (
        answering(lambda _: (200, {}, {})) as (elsewhere, stolen),
        answering(lambda _: (307, {"Location": f"{elsewhere}/health"}, {})) as (url, keys),
    ):
        for ask in (lambda server: server.get("/health"), lambda server: server.complete([1], 0)):
            with pytest.raises(InputError, match="leads to"):
                ask(LlamaServer(url, "secret"))
    assert keys == ["Bearer secret"] * 2 and not stolen


def test_a_key_that_no_header_holds():
    with pytest.raises(InputError, match="printable ASCII"):
        LlamaServer("http://127.0.0.1:1", "two\nlines")


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
    assert run_cli("check-server", "http://127.0.0.1:1", "-p", patch, "-m", model, "--api-key", "x").returncode == 2
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
        (Distance(0.001, 0.3, 0.3), True, "patched"),
        (Distance(0.3, 0.001, 0.3), False, "bare"),
        (Distance(0.9, 1.1, 0.3), False, "none"),  # another model altogether
        (Distance(0.2, 0.25, 0.3), False, "none"),  # another patch
        (Distance(0.0001, 0.004, 0.004), False, "patched"),  # a patch that changes next to nothing proves nothing
    ],
)
def test_verdicts(distance: Distance, is_patched: bool, nearest: str):
    assert (distance.is_patched, distance.nearest) == (is_patched, nearest)

"""``edgepatch export`` for clients that are not ours, and ``check-export``, which runs the real ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgepatch.cli import app
from edgepatch.converters.hf import folders
from edgepatch.converters.hf.rotary import read_rotation
from edgepatch.errors import InactivePatchError, InputError, MismatchError, PatchFormatError
from edgepatch.exports.checking import EQUAL, WITHIN, check_export
from edgepatch.exports.clients import CLIENTS, run_client
from edgepatch.exports.folders import MODULE_FILE, PATCH_FILE, read_export
from edgepatch.exports.targets import TARGETS
from edgepatch.llama_server.export import ExportOptions
from edgepatch.patch.file import Patch, write_patch
from edgepatch.seeds.anchoring import Anchoring
from kit.artefacts import Lazy

NODE = shutil.which("node")
CLIENTS_VARIABLE = "EDGEPATCH_CLIENTS"
"""A folder in whose node_modules the clients for Node are."""


@pytest.fixture(scope="module")
def model(tiny_ggufs: Lazy) -> Path:
    return tiny_ggufs["F16"]


@pytest.fixture(scope="module")
def moving(tiny_folder: Path, tiny_patch: Patch) -> Patch:
    """A patch that moves, and turns as its model does."""
    rotation = read_rotation(folders.load_model(tiny_folder))
    return replace(tiny_patch, rotation=rotation, anchoring=Anchoring(16, (3,)))


@pytest.fixture(scope="module")
def session_folder(model: Path, tiny_patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "a session"
    TARGETS["llama-session"].write(tiny_patch, model, folder, ExportOptions())
    return folder


@pytest.fixture(scope="module")
def script_folder(tiny_folder: Path, moving: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "a script"
    TARGETS["transformers.js"].write(moving, tiny_folder, folder, ExportOptions())
    return folder


def test_the_table_of_targets():
    assert {"llama-server", "llama-session", "node-llama-cpp", "transformers.js", "onnxruntime-web", "mlx"} <= set(
        TARGETS
    )
    named = {client for target in TARGETS.values() for client in target.clients}
    assert named == set(CLIENTS)
    programs = Path(__file__).parents[2] / "edgepatch" / "exports" / "clients"
    assert all((programs / client.program).is_file() for client in CLIENTS.values())
    shown = CliRunner().invoke(app, ["export", "p", "--model", __file__, "-o", "x", "--to", "ollama"])
    assert shown.exit_code == 2 and "llama-session" in shown.output and "ollama" in shown.output


def test_llama_cpp_answers_patched_with_a_session_file(session_folder: Path, model: Path, tiny_patch: Patch):
    """llama.cpp's own reader in a fresh context of another process."""
    (row,) = check_export(session_folder, tiny_patch, model)
    assert row.verdict in (EQUAL, WITHIN) and row.tokens_compared == 72
    assert row.bare_differs_at is not None and row.max_abs_dlogit is not None and row.max_abs_dlogit < 0.1
    assert row.bytes == (session_folder / "seed.session").stat().st_size


def test_a_folder_says_what_is_lost(session_folder: Path, script_folder: Path, moving: Patch):
    said = (session_folder / "README.md").read_text("utf-8")
    assert "stays at the start of the text" in said and "Exact for tiny-F16.gguf (F16)" in said
    assert str(moving.anchoring) in (script_folder / "README.md").read_text("utf-8")
    for folder in (session_folder, script_folder):
        assert len((folder / "README.md").read_text("utf-8").strip().split("\n\n")) <= 10
        manifest = read_export(folder)
        assert set(manifest["files"]) == {path.name for path in folder.iterdir()} - {"manifest.json"}


def test_a_check_refuses_what_it_was_not_made_with(
    session_folder: Path, model: Path, tiny_ggufs: Lazy, tiny_patch: Patch, tmp_path: Path
):
    with pytest.raises(InactivePatchError, match="expected an export of other"):
        check_export(session_folder, replace(tiny_patch, name="other"), model)
    exact = tiny_ggufs["F32"]
    with pytest.raises(InactivePatchError, match=r"expected a model of F16, .* found F32"):
        check_export(session_folder, tiny_patch, exact)
    folder = tmp_path / "server"
    TARGETS["llama-server"].write(tiny_patch, model, folder, ExportOptions())
    with pytest.raises(InputError, match="no clients to start") as raised:
        check_export(folder, tiny_patch, model)
    assert "check-server" in (raised.value.hint or "")


@pytest.mark.parametrize("name", ["seed.session", "README.md"])
def test_a_damaged_file_is_named(session_folder: Path, model: Path, tiny_patch: Patch, tmp_path: Path, name: str):
    folder = tmp_path / "copy"
    shutil.copytree(session_folder, folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(PatchFormatError, match=re.escape(name)):
        check_export(folder, tiny_patch, model)
    (folder / name).unlink()
    with pytest.raises(InputError, match=re.escape(name)):
        check_export(folder, tiny_patch, model)


def test_an_export_is_complete_or_absent(model: Path, tiny_folder: Path, tiny_patch: Patch, tmp_path: Path):
    with pytest.raises(MismatchError):
        other = replace(tiny_patch, base=replace(tiny_patch.base, weight_fingerprint="0" * 64))
        TARGETS["transformers.js"].write(other, tiny_folder, tmp_path / "js", ExportOptions())
    with pytest.raises(InputError, match="expected the folder of the ONNX model"):
        TARGETS["transformers.js"].write(tiny_patch, model, tmp_path / "js", ExportOptions())
    with pytest.raises(InputError, match="no canary"):
        TARGETS["onnxruntime-web"].write(
            replace(tiny_patch, canary=None), tiny_folder, tmp_path / "js", ExportOptions()
        )
    with pytest.raises(InputError, match="context length"):
        TARGETS["node-llama-cpp"].write(tiny_patch, model, tmp_path / "js", ExportOptions(context_length=10**6))
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("Dear")
    with pytest.raises(InputError, match="is not an earlier export"):
        TARGETS["transformers.js"].write(tiny_patch, tiny_folder, tmp_path / "mine", ExportOptions())


def test_a_client_that_is_not_installed_is_named(script_folder: Path, tmp_path: Path):
    if NODE is None:
        with pytest.raises(InputError, match="Node"):
            run_client("transformers.js", {}, tmp_path)
        return
    with pytest.raises(InputError, match="@huggingface/transformers: expected it in") as raised:
        run_client("transformers.js", {}, tmp_path)
    assert "npm install" in (raised.value.hint or "")


# The module for JavaScript, by itself.

SCRIPT = """
import { readFile } from "node:fs/promises";
const { readPatch, requireSimd } = await import(process.argv[1]);
const [bytes, sha256] = [await readFile(process.argv[2]), process.argv[3]];
const said = async (work) => { try { await work(); return ""; } catch (error) { return `${error.name}: ${error.message}`; } };
const patch = await readPatch(bytes, sha256);
const tokens = JSON.parse(process.argv[4]);
let anchor = 0;
const anchors = tokens.map((token, i) => (anchor = i ? patch.step(anchor, i, token) : 0));
const errors = [await said(() => readPatch(bytes.subarray(0, 1000), sha256)), await said(() => readPatch(bytes, "")), await said(() => patch.install({}, null))];
WebAssembly.validate = () => false;
errors.push(await said(requireSimd));
const keys = [0, 1, 100].map((shift) => Array.from(patch.keysAt(1, shift)));
console.log(JSON.stringify({ keys, anchors, errors, values: Array.from(patch.values[0]) }));
"""


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
def test_the_module_reads_turns_and_anchors_as_we_do(script_folder: Path, moving: Patch, tmp_path: Path):
    assert moving.kv_seed is not None and moving.rotation is not None and moving.anchoring is not None
    halves = replace(
        moving.kv_seed,
        keys=tuple(key.astype(np.float16) for key in moving.kv_seed.keys),
        values=tuple(value.astype(np.float16) for value in moving.kv_seed.values),
    )
    half, tokens = replace(moving, kv_seed=halves), [1, *([5] * 9), 3, 6, 3, *([7] * 40), 3, 8]
    for patch in (moving, half):
        write_patch(patch, tmp_path / "patch")
        digest = hashlib.sha256((tmp_path / "patch").read_bytes()).hexdigest()
        words = [script_folder / MODULE_FILE, tmp_path / "patch", digest, json.dumps(tokens)]
        done = subprocess.run(
            [str(NODE), "--input-type=module", "-e", SCRIPT, *words], capture_output=True, text=True, check=True
        )
        answer = json.loads(done.stdout)
        assert answer["anchors"] == moving.anchoring.anchors(tokens)
        seed = patch.kv_seed
        assert seed is not None
        assert np.array_equal(np.float32(answer["values"]), seed.values[0].astype(np.float32).ravel())
        for shift, keys in zip((0, 1, 100), answer["keys"], strict=True):
            expected = moving.rotation.turned(seed.keys[1], 1, shift).ravel()
            assert np.abs(np.float32(keys) - expected).max() < 1e-5
        cut, unnamed, foreign, simd = answer["errors"]
        assert cut.startswith(f"PatchError: patch: expected SHA-256 {digest}") and "of 1000 bytes" in cut
        assert "64 digits" in unnamed and "session of onnxruntime" in foreign and "WebAssembly SIMD" in simd


@pytest.mark.skipif(CLIENTS_VARIABLE not in os.environ, reason=f"{CLIENTS_VARIABLE} names no folder of clients")
@pytest.mark.parametrize("target", ["node-llama-cpp"])
def test_clients_for_node(target: str, model: Path, tiny_patch: Patch, tmp_path: Path):
    TARGETS[target].write(tiny_patch, model, tmp_path / "out", ExportOptions())
    rows = check_export(tmp_path / "out", tiny_patch, model, Path(os.environ[CLIENTS_VARIABLE]))
    assert [row.client for row in rows] == list(TARGETS[target].clients) and all(row.holds for row in rows)
    assert read_export(tmp_path / "out")["patch"]["digest"] == tiny_patch.digest and PATCH_FILE not in rows[0].model

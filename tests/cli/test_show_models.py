"""``edgepatch show MODEL``: the same facts of every form of a model, read without a model library."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import gguf
import numpy as np
import pytest
from test_layout import MODEL_LIBRARIES

from edgepatch import cli
from edgepatch.converters.gguf import library, types
from edgepatch.converters.hf import folders
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.inspection.facts import ModelFacts
from edgepatch.inspection.folder_facts import read_model_folder
from edgepatch.inspection.gguf_facts import read_gguf
from edgepatch.inspection.memory import memory_need
from edgepatch.inspection.onnx_facts import read_onnx_folder
from edgepatch.patch.file import PAYLOAD_TYPE, signed, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.store.policy import Allowances
from edgepatch.text.tokenizers import FolderTokenizer
from edgepatch.trust.signatures import sign
from kit import tiny_gguf
from kit.stores import KEYS, make_root
from kit.tiny_folders import copy_folder

TYPES = ("F32", "F16", "Q8_0", "Q4_K_M")
COLUMNS = 80


@pytest.fixture
def show(monkeypatch, capsys, tmp_path):
    """Arguments -> (exit code, stdout, stderr) of `edgepatch show`, at 80 columns, with a store of its own."""
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", "show", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def shown_json(answer: tuple[int, str, str]) -> dict:
    code, out, err = answer
    assert (code, err) == (0, "")
    return json.loads(out)


@pytest.fixture(scope="module")
def gguf_files(tiny_ggufs) -> dict[str, Path]:
    return {name: tiny_ggufs[name] for name in TYPES}


def by_type(facts: ModelFacts) -> dict[str, tuple[int, int]]:
    return {kind.name: (kind.num_tensors, kind.num_bytes) for kind in facts.tensor_types}


def test_types_of_tensors_are_those_of_the_file(gguf_files):
    for name, path in gguf_files.items():
        facts, reader = read_gguf(path), gguf.GGUFReader(path)
        expected: dict[str, list[int]] = {}
        for tensor in reader.tensors:
            expected.setdefault(tensor.tensor_type.name, []).append(int(tensor.n_bytes))
        assert by_type(facts) == {kind: (len(sizes), sum(sizes)) for kind, sizes in expected.items()}
        assert facts.quantization == name and facts.num_bytes == path.stat().st_size
        assert facts.num_parameters == sum(int(tensor.n_elements) for tensor in reader.tensors)


def test_one_model_in_every_form_has_the_same_facts(gguf_files, tiny_folder, onnx_folders):
    spec = folders.read_spec(tiny_folder)
    folder = read_model_folder(tiny_folder)
    tokenizer = FolderTokenizer(tiny_folder)
    forms = [folder, *map(read_gguf, gguf_files.values()), *map(read_onnx_folder, onnx_folders.values())]
    assert len(forms) == 1 + len(TYPES) + len(onnx_folders)
    for facts in forms:
        assert facts.spec == spec and facts.base == folder.base and facts.architecture == "llama"
        shape = facts.shape
        assert (shape.num_layers, shape.hidden_size, shape.num_heads) == (2, 256, 4)
        assert (shape.num_kv_heads, shape.head_dim, shape.context_length) == (2, 64, 512)
        assert shape.has_tied_head is False and facts.vocabulary.size == 512
        assert facts.chat_template and facts.chat_template.digest == tokenizer.chat_template_digest
        assert facts.chat_template.mentions_tools is False and facts.chat_template.names == ()
        assert facts.cache and facts.cache.values_per_position == 2 * 2 * 2 * 64
        assert facts.vocabulary.end_tokens.keys() == tokenizer.end_token_ids
        assert facts.num_parameters == folder.num_parameters


@pytest.mark.parametrize(
    ("precision", "expected"), [("fp32", "F32"), ("fp16", "F16"), ("int8", "int8"), ("int4", "int4")]
)
def test_quantization_of_onnx_folders(onnx_folders, precision, expected):
    facts = read_onnx_folder(onnx_folders[precision])
    kinds = by_type(facts)
    assert facts.quantization == expected
    weights = {"fp32": "float32", "fp16": "float16", "int8": "int8", "int4": "int4"}[precision]
    assert kinds[weights][1] > 2**17, "the matrices"
    assert facts.weight_bytes <= facts.num_bytes and "model.onnx" in facts.files
    assert facts.cache and list(facts.cache.bytes_per_value) == ["f16" if precision == "fp16" else "f32"]


def test_the_need_of_memory_is_about_that_of_the_runtime(gguf_files):
    """llama.cpp's cache has the size that is told, at the length of context that it takes when nobody says."""
    facts = read_gguf(gguf_files["Q8_0"])
    with load_runtime(gguf_files["Q8_0"], None, num_threads=1) as runtime:
        assert facts.cache and runtime.num_positions == facts.cache.default_positions
    need = memory_need(facts, available_bytes=10**9)
    assert need.cache_bytes["f16"] == 512 * 2 * 2 * 2 * 64 * 2 and need.cache_bytes["q8_0"] < need.cache_bytes["f16"]
    assert need.fits and not memory_need(facts, need.total_bytes - 1).fits and memory_need(facts, None).fits is None


def test_names_of_types_are_those_of_the_libraries():
    import llama_cpp

    assert {int(kind): kind.name for kind in gguf.GGMLQuantizationType} == types.TENSOR_TYPES
    names = library.quantization_types()
    assert names == {name: number for number, name in types.FILE_TYPES.items()}, llama_cpp.__version__


@pytest.mark.parametrize("write", [tiny_gguf.write_gemma3, tiny_gguf.write_lfm2])
def test_windows_and_recurrent_layers(write, tmp_path):
    write(tmp_path / "x.gguf")
    facts = read_gguf(tmp_path / "x.gguf")
    layers = {"gemma3": 3, "lfm2": 1}[facts.architecture]  # that keep keys and values
    assert facts.cache and facts.cache.values_per_position == layers * 2 * 2 * 64
    assert facts.origin.name == f"tiny {facts.architecture}" and facts.chat_template is None


def test_ten_lines_for_people(show, gguf_files, tiny_folder, onnx_folders):
    for path in (gguf_files["Q4_K_M"], tiny_folder, onnx_folders["int4"]):
        code, out, err = show(path)
        assert (code, err) == (0, "") and all(len(line) <= COLUMNS for line in out.splitlines())
        names = [line.split("  ")[0] for line in out.splitlines() if not line.startswith(" ")]
        assert names == [
            "model",
            "kind",
            "architecture",
            "quantization",
            "context",
            "vocabulary",
            "chat template",
            "fingerprint",
            "patches",
            "memory",
        ]
        assert "fits: about" in out and "512 positions" in out and "\x1b" not in out
        everything = show(path, "--all")[1]
        assert len(everything.splitlines()) > 2 * len(out.splitlines()) and folders.read_spec(
            tiny_folder
        ).tokenizer_digest[:30] in everything.replace("\n", "")


def test_json_holds_everything(show, gguf_files):
    facts = shown_json(show(gguf_files["Q8_0"], "--json"))
    assert facts["kind"] == "GGUF file" and facts["quantization"] == "Q8_0" and facts["spec"]["hidden_size"] == 256
    assert facts["memory"]["fits"] is True and facts["fitting"]["patches"] == []
    assert facts["more"]["general.architecture"] == "llama"


def test_no_model_library_is_loaded(gguf_files, tiny_folder, onnx_folders):
    code = (
        "import sys; from edgepatch import cli\n"
        "sys.argv[0] = 'edgepatch'\n"
        "try: cli.main()\n"
        f"finally: print([n for n in {[n for n in MODEL_LIBRARIES if n != 'gguf']} if n in sys.modules], file=sys.stderr)"
    )
    for path in (gguf_files["Q4_K_M"], tiny_folder, onnx_folders["int4"]):
        command = [sys.executable, "-c", code, "show", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "[]\n"), path


def test_a_file_of_5_gb_is_shown_without_reading_it(monkeypatch, tmp_path):
    """Its weights are a hole in the file; showing it takes no more time and memory than its header needs."""
    path, rows = tmp_path / "large.gguf", 4_900_000

    def add(writer: gguf.GGUFWriter, name: str, shape: object, *_: object) -> None:
        shape = (shape,) if isinstance(shape, int) else (rows, shape[1]) if name == "token_embd" else shape
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), 4 * int(np.prod(shape)))

    def end(writer: gguf.GGUFWriter) -> None:
        add(writer, "output_norm", tiny_gguf.WIDTH)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        os.truncate(path, 5_050_000_000)

    for name, function in (("_weight", add), ("_norm", add), ("_end", end)):
        monkeypatch.setattr(tiny_gguf, name, function)
    tiny_gguf.write_llama(path)
    code = (
        "import sys, resource, time; from pathlib import Path; from edgepatch.inspection.gguf_facts import read_gguf\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.process_time(); facts = read_gguf(Path(sys.argv[1])); seconds = time.process_time() - start\n"
        "print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, facts.num_parameters)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    seconds, kib, parameters = map(float, done.stdout.split())
    assert seconds < 0.5 and kib < 50_000 and parameters > 1.25e9, done.stderr


# Patches that fit.


@pytest.fixture
def device(show, tiny_patch, tmp_path):
    """A device with a trust root and two patches for the tiny model; the second is active."""
    from edgepatch.store.device import Store

    store = Store(tmp_path / "store")
    store.set_root([make_root(created=datetime.now(timezone.utc) - timedelta(days=1))])
    for sequence, version in ((1, "1.0.0"), (2, "1.1.0")):
        patch = replace(tiny_patch, version=version, sequence=sequence)
        for name in ("vendor", "site"):
            patch = signed(patch, sign(patch.manifest, PAYLOAD_TYPE, KEYS[name]))
        write_patch(patch, tmp_path / f"{version}.safetensors")
        store.apply(tmp_path / f"{version}.safetensors", Allowances("", "", ""))
    return show


def test_patches_of_the_store(device, gguf_files, tiny_folder, onnx_folders):
    for path in (gguf_files["Q4_K_M"], tiny_folder, onnx_folders["int4"]):
        fitting = shown_json(device(path, "--json"))["fitting"]
        assert [(p["version"], p["is_active"], p["problem"]) for p in fitting["patches"]] == [
            ("1.1.0", True, ""),
            ("1.0.0", False, ""),
        ]
        assert all("vendor" in patch["trust"] and "site" in patch["trust"] for patch in fitting["patches"])
        assert fitting["are_weights_compared"] is (path != tiny_folder)
        code, out, _ = device(path)
        flat = " ".join(out.split())
        assert code == 0 and "active: tiny 1.1.0" in flat and "made for it: tiny 1.0.0" in flat


def test_all_compares_the_weights_of_a_folder(device, tiny_folder):
    assert shown_json(device(tiny_folder, "--all", "--json"))["fitting"]["are_weights_compared"] is True


def test_a_fine_tune_with_the_same_norms_is_told_apart(device, gguf_files, tmp_path):
    path = tmp_path / "tuned.gguf"
    shutil.copy(gguf_files["F32"], path)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if len(tensor.shape) == 2:
            tensor.data[:] *= np.float32(1.01)
    patches = shown_json(device(path, "--json"))["fitting"]["patches"]
    assert len(patches) == 2 and all("weights" in patch["problem"] for patch in patches)
    assert "does not fit" in device(path)[1]


def test_a_patch_that_somebody_changed_is_told(device, gguf_files, tmp_path):
    for path in (tmp_path / "store" / "patches").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    patches = shown_json(device(gguf_files["F16"], "--json"))["fitting"]["patches"]
    assert [patch["trust"] for patch in patches] == ["refused"] * 2 and all(patch["problem"] for patch in patches)


def test_a_store_that_cannot_be_read_hides_nothing_else(device, gguf_files, tmp_path):
    (tmp_path / "store" / "state.json").write_bytes(b"{}")
    code, out, _ = device(gguf_files["F16"])
    assert code == 0 and "unknown" in out and "256" in out


def test_patch_files_beside_the_model(show, gguf_files, tiny_patch, tmp_path):
    model = tmp_path / "model" / "tiny.gguf"
    model.parent.mkdir()
    model.symlink_to(gguf_files["Q8_0"])
    copy = tmp_path / "model" / "copy.gguf"
    shutil.copy(gguf_files["Q8_0"], copy)
    write_patch(tiny_patch, copy.with_name("mine.safetensors"))
    write_patch(replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5)), copy.with_name("other.safetensors"))
    copy.with_name("broken.safetensors").write_bytes(b"x" * 100)
    patches = shown_json(show(copy, "--json"))["fitting"]["patches"]
    assert [(p["name"], Path(p["source"]).name, p["is_active"]) for p in patches] == [
        ("tiny", "mine.safetensors", False)
    ]
    assert patches[0]["trust"] == "unknown: this device has no trust root" and patches[0]["problem"] == ""


# What files say of themselves.


def test_what_a_gguf_file_says_of_itself(show, tmp_path):
    path = tmp_path / "x.gguf"
    add = gguf.GGUFWriter.write_header_to_file
    with pytest.MonkeyPatch.context() as patched:

        def write(writer: gguf.GGUFWriter, *arguments: object) -> None:
            writer.add_author("Some\x1b[31mbody")
            writer.add_license("mit")
            writer.add_string("general.base_model.0.name", "Parent")
            writer.add_chat_template(
                [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "{{ tools }}"}]
            )
            add(writer, *arguments)

        patched.setattr(gguf.GGUFWriter, "write_header_to_file", write)
        tiny_gguf.write_llama(path)
    facts = read_gguf(path)
    assert (facts.origin.license, facts.origin.base) == ("mit", "Parent")
    assert facts.chat_template and facts.chat_template.names == ("tool_use",) and facts.chat_template.mentions_tools
    code, out, _ = show(path, "--all")
    assert code == 0 and "\x1b" not in out and "tool_use" in out and "knows tools" in out


def test_what_a_folder_says_of_itself(show, tiny_folder, tmp_path):
    model = copy_folder(tiny_folder, tmp_path / "model")
    (model / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama3.2\nbase_model:\n- org/parent\ntags:\n- x\nmodel_creator: 'Some\x1b[31mbody'\n---\n# X\n"
    )
    (model / "chat_template.jinja").write_text("{% if tools %}x{% endif %}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("y")
    (model / "tiny.gguf").write_bytes(b"GGUF")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    facts = read_model_folder(model)
    assert (facts.origin.license, facts.origin.base) == ("llama3.2", "org/parent")
    assert facts.chat_template and facts.chat_template.names == ("rag",) and facts.chat_template.mentions_tools
    assert facts.also == ("tiny.gguf", "pytorch_model.bin")
    code, out, _ = show(model)
    flat = " ".join(out.split())
    assert (
        code == 0 and "Transformers folder for PyTorch" in flat and "tiny.gguf, pytorch_model.bin in the same" in flat
    )
    assert "\x1b" not in out and "license llama3.2" in flat


def test_halves_of_characters_are_replaced(show, tiny_folder, tmp_path):
    """JSON may hold half a surrogate pair, which no terminal can print."""
    model = copy_folder(tiny_folder, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "a/\ud800", "odd": ["\udfff"]}))
    for flags in ([], ["--all"], ["--json"]):
        code, out, err = show(model, *flags)
        assert (code, err) == (0, "") and "a/?" in out


def test_a_folder_with_both_kinds_says_which_runtime_takes_it(show, tiny_folder, onnx_folders, tmp_path):
    model = tmp_path / "both"
    shutil.copytree(onnx_folders["int4"], model)
    shutil.copy(tiny_folder / "model.safetensors", model)
    code, out, _ = show(model)
    assert (
        code == 0 and "ONNX folder for ONNX Runtime" in out and "model.safetensors in the same" in " ".join(out.split())
    )


def test_a_graph_that_nobody_stamped(show, onnx_folders, tmp_path):
    import onnx

    model = tmp_path / "model"
    shutil.copytree(onnx_folders["fp32"], model)
    graph = onnx.load(model / "model.onnx", load_external_data=False)
    del graph.metadata_props[:]
    onnx.save(graph, model / "model.onnx")
    code, out, _ = show(model)
    flat = " ".join(out.split())
    assert code == 0 and "none: " in flat and "edgepatch convert stamp" in flat and "2 layers, hidden size 256" in flat
    assert "none can fit" in flat


# Damage.


def test_truncated_and_mutated_gguf_files_end_with_an_error_or_an_answer(show, gguf_files, tmp_path):
    good = gguf_files["Q4_K_M"].read_bytes()
    header = 40_000  # bytes in front of the weights that say something
    path, refused = tmp_path / "x.gguf", 0
    for seed in range(40):
        draw = random.Random(seed)
        data = bytearray(good if seed % 2 else good[: draw.randrange(5, len(good))])
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(min(header, len(data)))] = draw.randrange(256)
        path.write_bytes(b"GGUF" + data[4:])
        code, out, err = show(path)
        assert code in (0, 2) and "internal error" not in err and "Traceback" not in err
        assert code == 0 or (out == "" and str(path) in err.replace("\n", "") and "hint:" in err)
        refused += code == 2
    assert refused >= 20


@pytest.mark.parametrize("cut", [1, 1000, 100_000])
def test_truncated_weights_are_refused(show, cut, gguf_files, tiny_folder, onnx_folders, tmp_path):
    whole = gguf_files["Q8_0"].read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:-cut])
    folder = copy_folder(tiny_folder, tmp_path / "folder")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes(weights[:-cut])
    shutil.copytree(onnx_folders["fp32"], tmp_path / "onnx")
    os.truncate(
        tmp_path / "onnx" / "model.onnx.data", (tmp_path / "onnx" / "model.onnx.data").stat().st_size - cut - 4096
    )
    for path in (tmp_path / "x.gguf", folder, tmp_path / "onnx"):
        code, out, err = show(path)
        assert (code, out) == (2, "") and "hint:" in err and str(path) in err.replace("\n", "")


def test_mutated_graphs_end_with_an_error_or_an_answer(onnx_folders, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(onnx_folders["int4"], model)
    good, refused = (model / "model.onnx").read_bytes(), 0
    for seed in range(60):
        draw, data = random.Random(seed), bytearray(good)
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        (model / "model.onnx").write_bytes(data[: len(data) - (seed % 3) * 50])
        try:
            facts = read_onnx_folder(model)
            assert facts.num_parameters is not None
        except EdgepatchError as error:
            assert str(model) in str(error)
            refused += 1
    assert refused >= 20


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("generation_config.json", "7"),
        ("genai_config.json", "{"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_damaged_settings_of_onnx_folders_are_refused(show, onnx_folders, tmp_path, name, content):
    model = tmp_path / "model"
    shutil.copytree(onnx_folders["int4"], model)
    (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = show(model)
    assert (code, out) == (2, "") and name in err and "hint:" in err


# The real model.


def test_the_real_model(show, smollm2):
    facts = read_gguf(smollm2)
    assert by_type(facts) == {"Q4_1": (210, 66_355_200), "Q8_0": (1, 30_081_024), "F32": (61, 140_544)}
    assert (facts.num_parameters, facts.shape.num_layers, facts.shape.hidden_size) == (134_515_008, 30, 576)
    assert (facts.shape.num_heads, facts.shape.num_kv_heads, facts.shape.has_tied_head) == (9, 3, True)
    assert (facts.vocabulary.size, facts.vocabulary.pre_tokenizer) == (49_152, "smollm")
    assert facts.origin.license == "apache-2.0" and dict(facts.vocabulary.end_tokens) == {2: "<|im_end|>"}
    code, out, _ = show(smollm2)
    assert code == 0 and "8,192 positions" in out and "fits: about 191 MB" in out


def test_read_gguf_refuses_what_is_no_model(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(InputError, match="damaged"):
        read_gguf(tmp_path / "x.gguf")

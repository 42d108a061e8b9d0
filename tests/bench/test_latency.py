"""The latency bench on a model of a test's size: what its document holds, what it refuses, and its arithmetic by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from edgepatch.bench.latency import goals, sessions
from edgepatch.bench.latency.genai import GenaiArm, load_genai
from edgepatch.bench.latency.genai_lora import write_lora_graph, write_random_adapter
from edgepatch.bench.latency.llama_bench import VARIABLE, run_llama_bench
from edgepatch.bench.latency.run import find_model, measure
from edgepatch.bench.latency.sessions import FULL, QUICK, TINY
from edgepatch.bench.latency.settings import PARTS, Settings, due_parts
from edgepatch.bench.latency.starts import _Start
from edgepatch.bench.latency.timing import Cell, Measure, interleave, missing, pooled_ratio, ratio, row
from edgepatch.bench.shapes import memory
from edgepatch.bench.shapes.blocks import tensor_types
from edgepatch.bench.shapes.gguf import write_gguf
from edgepatch.bench.shapes.onnx import write_onnx
from edgepatch.bench.shapes.shape import SHAPES
from edgepatch.converters.gguf import specs
from edgepatch.converters.gguf.blocks import random_blocks
from edgepatch.converters.gguf.header import BLOCK_SIZES, read_header
from edgepatch.errors import EdgepatchError, InputError
from edgepatch.runtimes import load_runtime

TTFT, DECODE = Measure("ttft", 32, 1), Measure("decode", n_gen=4, n_depth=0)
COLUMNS = {
    "model_type",
    "model_size",
    "model_n_params",
    "n_threads",
    "type_k",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ts",
    "stddev_ts",
}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Document of each runtime; the processes of their own are another test's."""
    folder = tmp_path_factory.mktemp("shapes")

    def run(kind):
        settings = Settings(
            shape="tiny",
            quantization=kind,
            repeats=2,
            num_threads=1,
            sizes=TINY,
            parts=("arms", "costs", "serving"),
            folder=folder,
        )
        return measure(settings, command="test")

    with pytest.MonkeyPatch.context() as patch:  # llama.cpp's own bench is another test's
        patch.setenv(VARIABLE, str(folder / "none"))
        return {kind: run(kind) for kind in ("Q4_0", "int4")}


def arms_of(document, name):
    return {entry["arm"] for entry in document["rows"] if entry["measure"] == name and entry["status"] == "ok"}


def test_every_arm_of_llamacpp_is_timed_side_by_side(documents):
    document = documents["Q4_0"]
    assert {"command", "created", "environment", "load", "rows", "ratios", "goals"} <= document.keys()
    shared = {
        "bare",
        "seed",
        "text-10 warm",
        "text-20 warm",
        "lora-r8",
        "lora-r16",
        "control-vector",
        "2 patches",
        "4 patches",
    }
    assert arms_of(document, "ttft") == shared | {"text-10 cold", "text-20 cold", "soft prompt decoded"}
    assert arms_of(document, "decode") == shared | {"library loop"}
    assert arms_of(document, "decode, one core busy") == {"bare", "seed", "library loop"}
    timed = [entry for entry in document["rows"] if entry["measure"] in ("ttft", "decode") and entry["status"] == "ok"]
    assert all(entry.keys() >= COLUMNS and len(entry["samples_ms"]) == 2 and entry["min_ms"] > 0 for entry in timed)
    assert {entry["num_virtual_tokens"] for entry in timed if entry["arm"] == "4 patches"} == {16}
    assert {"swap", "unpatch", "seed load", "apply", "verify", "artefact", "guard pass"} <= {
        entry["measure"] for entry in document["rows"]
    }
    json.dumps(document, allow_nan=False)


def test_the_load_of_the_machine_is_in_the_document(documents):
    load = documents["Q4_0"]["load"]
    assert len(load["before"]) == len(load["after"]) == 3 and load["largest_spread"] > 0
    assert load["is_busy"] == (load["before"][0] > 0.25 * load["cores"])


def test_sequences_share_the_seed_in_llamacpp_and_say_so_where_they_do_not(documents):
    held = {kind: next(r for r in d["rows"] if r["measure"] == "seed in memory") for kind, d in documents.items()}
    assert held["Q4_0"]["is_shared"] and held["Q4_0"]["bytes_in_all"] < 1.5 * held["Q4_0"]["bytes_of_one"]
    assert not held["int4"]["is_shared"] and held["int4"]["bytes_in_all"] == 2 * held["int4"]["bytes_of_one"]


def test_genai_and_its_adapters_run_beside_ours(documents):
    rows = documents["int4"]["rows"]
    arms = {"onnxruntime-genai", "onnxruntime-genai lora-r8", "onnxruntime-genai lora-r16"}
    assert arms <= arms_of(documents["int4"], "decode") & arms_of(documents["int4"], "ttft")
    sizes = {entry["arm"]: entry["value"] for entry in rows if entry["measure"] == "artefact"}
    assert sizes["onnxruntime-genai lora-r16"] > 1.5 * sizes["onnxruntime-genai lora-r8"]


def test_a_missing_peer_has_rows_without_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "is_installed", lambda: False)
    sizes = replace(TINY, prompts=(8,), depths=())
    settings = Settings(
        shape="tiny", quantization="int4", repeats=2, num_threads=1, sizes=sizes, parts=("arms",), folder=tmp_path
    )
    absent = [
        entry for entry in measure(settings, command="test")["rows"] if entry["arm"].startswith("onnxruntime-genai")
    ]
    assert len(absent) == 3
    for entry in absent:
        assert (
            entry["status"] == "not installed"
            and entry["reason"]
            and not {"median_ms", "avg_ts", "value"} & entry.keys()
        )


def test_an_adapter_changes_the_logits_and_its_graph_alone_does_not(tmp_path):
    write_onnx(tmp_path / "m", SHAPES["tiny"], "int4")
    layers = write_lora_graph(tmp_path / "m", tmp_path / "lora")
    assert len(layers) == 5 * SHAPES["tiny"].num_layers
    write_random_adapter(layers, 8, tmp_path / "a.onnx_adapter")
    models = load_genai(tmp_path / "m", 1), load_genai(tmp_path / "lora", 1)

    def logits(model, adapter=None):
        arm = GenaiArm(model, SHAPES["tiny"].vocab_size, 64, adapter=adapter)
        arm.ready([1, 2, 3])
        arm._append(arm._prompts, [1, 2, 3])
        return arm._prompts.get_logits()

    bare = logits(models[0])
    assert np.array_equal(bare, logits(models[1])) and not np.allclose(
        bare, logits(models[1], tmp_path / "a.onnx_adapter"), atol=1e-3
    )


def test_llama_bench_is_not_installed_or_its_rows_are_read(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    common = {"model_filename": "m.gguf", "quantization": "Q4_0"}
    [absent] = run_llama_bench(Path("m.gguf"), Settings(), common, lambda _: None)
    assert absent == missing("decode", "llama-bench", "not installed", absent["reason"], common)
    entry = {
        "n_prompt": 0,
        "n_gen": 32,
        "n_depth": 0,
        "samples_ns": [2e6, 4e6],
        "samples_ts": [1, 2],
        "avg_ts": 9.0,
        "model_type": "llama",
    }
    program = tmp_path / "llama-bench"
    program.write_text(f"#!/bin/sh\necho '{json.dumps([entry])}'\n")
    program.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(program))
    rows = {row["measure"]: row for row in run_llama_bench(Path("m.gguf"), Settings(), common, lambda _: None)}
    assert set(rows) == {"prompt", "decode", "prompt behind positions"}
    assert (rows["decode"]["status"], rows["decode"]["median_ms"], rows["decode"]["avg_ts"]) == ("ok", 3.0, 9.0)
    program.write_text("#!/bin/sh\nexit 3\n")
    assert run_llama_bench(Path("m.gguf"), Settings(), common, lambda _: None)[0]["status"] == "failed"


def test_a_start_is_timed_to_its_first_byte_and_a_failed_one_is_an_error():
    slow_end = "import sys, time; print('a', flush=True); time.sleep(0.5)"
    starts = [
        _Start([sys.executable, "-c", program]) for program in (slow_end, "import sys; sys.exit('no model')", "pass")
    ]
    times = interleave([Cell(Measure("start"), "a", starts[0].act, finish=starts[0].finish)], 1)
    assert 0 < times[Measure("start"), "a"][0] < 500  # the end is not waited for
    for start, complaint in ((starts[1], "no model"), (starts[2], "no message")):
        start.act()
        with pytest.raises(EdgepatchError, match=complaint):
            start.finish()


def test_attention_without_fusing_reaches_every_part_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none"))
    jobs = []
    monkeypatch.setattr("edgepatch.bench.latency.starts.peak_memory", lambda job: jobs.append(job) or 1)
    sizes = replace(TINY, prompts=(8,), depths=())
    plain = Settings(
        shape="tiny", repeats=2, num_threads=1, sizes=sizes, arms=("seed",), folder=tmp_path, flash_attention=False
    )
    rows = measure(replace(plain, parts=("arms", "memory", "starts")), command="test")["rows"]
    assert {row["flash_attn"] for row in rows} == {False} and jobs and not any(job.flash_attention for job in jobs)
    assert [row["status"] for row in rows if row["measure"] == "cold start"] == ["not measured"]
    with pytest.raises(InputError, match=r"llama\.cpp alone"):
        measure(replace(plain, quantization="int4"), command="test")
    assert not (tmp_path / "tiny-int4-onnx").exists()


def test_plain_attention_stands_beside_the_fused_one_where_it_is_named(tmp_path):
    sizes = replace(TINY, prompts=(8,), depths=(0, 32))
    settings = Settings(
        shape="tiny", repeats=2, num_threads=1, sizes=sizes, arms=("seed", "*plain*"), folder=tmp_path, parts=("arms",)
    )
    rows = measure(settings, command="test")["rows"]
    fused = {row["arm"]: row["flash_attn"] for row in rows if row["arm"].startswith(("bare", "seed"))}
    assert fused == {"bare": True, "seed": True, "bare plain attention": False, "seed plain attention": False}
    seeded = [row for row in rows if row["arm"].startswith("seed") and row["measure"] in ("ttft", "decode")]
    assert {row["num_virtual_tokens"] for row in seeded} == {TINY.num_virtual_tokens}
    unnamed = measure(replace(settings, arms=()), command="test")["rows"]
    assert not [row["arm"] for row in unnamed if "plain" in row["arm"]]


# Memory.


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 30)
    with pytest.raises(InputError, match=r"llama-3.1-8b-Q4_0: expected \d+\.\d GiB .* found 1\.0 GiB"):
        find_model(Settings(shape="llama-3.1-8b", folder=tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_no_less_than_weights_and_cache():
    shape = SHAPES["llama-3.2-1b"]
    weights, cache = memory.gguf_weight_bytes(shape, "Q4_0"), 2 * 2 * 16 * 8 * 64 * 4096
    assert 0.69e9 < weights < 0.70e9
    assert memory.estimate_bytes(shape, "Q4_0", 4096) > weights + cache
    more = memory.estimate_bytes(shape, "Q4_0", 4096, 8) - memory.estimate_bytes(shape, "Q4_0", 4096)
    assert more == 7 * cache
    with pytest.raises(InputError, match="expected one of"):
        memory.estimate_bytes(shape, "Q9", 4096)


# Shapes.


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q8_0"])
def test_a_shape_is_the_same_model_in_every_form(tmp_path, kind):
    write_gguf(tmp_path / "m.gguf", SHAPES["tiny"], kind)
    assert specs.read_spec(tmp_path / "m.gguf") == SHAPES["tiny"].spec()
    with load_runtime(tmp_path / "m.gguf", None, num_threads=1, context_length=64) as runtime:
        assert runtime.quantization == kind
        assert np.isfinite(runtime.logits([1, 2, 3])).all()


def test_an_int8_shape_loads_and_gives_numbers(tmp_path):
    write_onnx(tmp_path / "m", SHAPES["tiny"], "int8")
    with load_runtime(tmp_path / "m", None, num_threads=1, context_length=64) as runtime:
        assert (runtime.spec, runtime.quantization) == (SHAPES["tiny"].spec(), "int8")
        assert np.isfinite(runtime.logits([1, 2, 3])).all()


def test_q4_k_m_mixes_types_as_llamacpp_does():
    types = tensor_types(SHAPES["llama-3.2-1b"], "Q4_K_M")
    finer = {name for name, kind in types.items() if kind == "Q6_K"}
    layers = {0, 1, 4, 7, 10, 13, 14, 15}  # the first and last eighth, and every third between
    assert finer == {"token_embd.weight"} | {
        f"blk.{i}.{part}.weight" for i in layers for part in ("attn_v", "ffn_down")
    }
    assert set(tensor_types(SHAPES["smollm-135m"], "Q4_K_M").values()) == {
        "Q5_0",
        "Q8_0",
        "Q4_K",
        "Q6_K",
    }  # rows of 576 fit no 256


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q6_K"])
def test_random_blocks_have_the_deviation_asked_for(kind):
    blocks = random_blocks(np.random.default_rng(3), 2000, kind, 0.05)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    assert (
        values.std() == pytest.approx(0.05, rel=0.05) and abs(values.mean()) < 0.01
    )  # uniform -8..7 is off centre by half a step


def test_block_sizes_are_those_of_the_gguf_package(tmp_path):
    assert {int(kind): sizes for kind, sizes in gguf.GGML_QUANT_SIZES.items()} == BLOCK_SIZES
    write_gguf(tmp_path / "m.gguf", SHAPES["tiny"])
    assert read_header(tmp_path / "m.gguf").metadata["tokenizer.ggml.tokens"] == SHAPES["tiny"].vocabulary()


# Arithmetic.


def test_cells_run_in_turn_and_the_first_round_does_not_count():
    order: list[str] = []
    cells = [Cell(TTFT, arm, lambda a=arm: order.append(a), lambda a=arm: order.append(a.upper())) for arm in "ab"]
    times = interleave(cells, 2)
    assert order == list("AaBbBbAaAaBb")
    assert [len(samples) for samples in times.values()] == [2, 2]


def test_ratios_are_taken_within_the_repeat():
    assert ratio([2.0, 30.0, 6.0], [1.0, 10.0, 6.0]).value == 2.0  # of 2, 3 and 1; the ratio of the medians would be 1
    times = {
        (TTFT, "seed"): [3.0, 3.0],
        (TTFT, "bare"): [2.0, 2.0],
        (DECODE, "seed"): [4.0, 4.0],
        (DECODE, "bare"): [2.0, 2.0],
    }
    assert pooled_ratio(times, "ttft", "seed", "bare") == (1.5, 1.5, 1.5)
    assert pooled_ratio(times, "decode", "seed", "bare", is_rate=True) == (0.5, 0.5, 0.5)
    assert pooled_ratio(times, "decode", "seed", "nobody") is None
    ratios = goals.ratios(times)
    assert (
        ratios["ttft_patched_over_bare"]
        == ratios["ttft_patched_over_bare_32"]
        == {"value": 1.5, "low": 1.5, "high": 1.5}
    )
    judged = {goal["goal"]: goal for goal in goals.goals([], ratios)}
    assert judged["time to first token, patched over bare"] == {
        "goal": "time to first token, patched over bare",
        "wanted": "<= 1.02",
        "reached": 1.5,
        "met": False,
    }
    assert len(judged) == 2


def test_a_row_by_hand():
    summary = row(DECODE, "bare", [10.0, 20.0, 40.0], {})
    assert (summary["median_ms"], summary["min_ms"], summary["max_ms"], summary["spread"]) == (20.0, 10.0, 40.0, 1.5)
    assert (summary["median_ts"], summary["avg_ts"]) == (200.0, pytest.approx((400 + 200 + 100) / 3, abs=1e-3))


def test_stacking_is_told_by_patch():
    ratios = {"ttft_4_patches_over_patched": {"value": 1.03}, "decode_4_patches_over_patched": {"value": 0.5}}
    shares = [goal["reached"] for goal in goals.goals([], ratios)]
    assert shares == [pytest.approx(0.01), pytest.approx(1 / 3, abs=1e-4)]


def test_arms_can_be_chosen(tmp_path):
    settings = Settings(
        shape="tiny",
        repeats=2,
        num_threads=1,
        sizes=replace(TINY, prompts=(8,), depths=()),
        parts=("arms",),
        folder=tmp_path,
    )
    assert due_parts((), ("lora-*",)) == ("arms",) and due_parts(("memory",), ("lora-*",)) == ("memory",)
    assert due_parts((), ()) == PARTS
    with pytest.raises(InputError, match="--parts: expected some of arms"):
        due_parts(("nosuch",), ())
    document = measure(replace(settings, arms=("lora-*",)), command="test")
    assert arms_of(document, "ttft") == {"bare", "lora-r8", "lora-r16"}


def test_a_model_of_a_short_context_is_measured_with_what_it_has_room_for():
    assert FULL.within(4096) is FULL and QUICK.within(8192) is QUICK
    short = FULL.within(1024)
    assert (short.prompts, short.depths, short.texts) == ((32, 128, 512), (0, 512), (50, 300))
    assert short.context_length == 1024
    assert max(short.texts) + max(short.prompts) + short.num_new <= 1024
    assert max(short.depths) + 4 * short.num_virtual_tokens + short.num_new <= 1024
    assert QUICK.within(64).texts == (32,)

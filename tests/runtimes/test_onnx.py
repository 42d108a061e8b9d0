"""The ONNX runtime against Transformers fed ``inputs_embeds``, on graphs of onnxruntime-genai's builder."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgepatch.converters import first_contact
from edgepatch.converters.onnx.identity import BAKED_KEY, QUANTIZATION_KEY, SPEC_KEY
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InactivePatchError, InputError, MismatchError, UnfitModelError
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.onnx.runtime import OnnxRuntime
from edgepatch.tensors import KVSeed

for package in ("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai"):
    pytest.importorskip(package)

PROMPT = "The quick brown fox jumps over"
PROMPTS = ["The quick", "A", "Numbers 1234, accents, and a text that is longer than those of the other rows", PROMPT]
GREEDY = Sampling(max_new_tokens=16, temperature=0)


@pytest.fixture(scope="module")
def runtime(onnx_folders, tiny_patch):
    with load_runtime(onnx_folders["fp32"], tiny_patch, num_threads=1) as loaded:
        yield loaded


@pytest.fixture
def copied(onnx_folders, tmp_path):
    """A copy of the fp32 folder, to be damaged."""
    return shutil.copytree(onnx_folders["fp32"], tmp_path / "copy")


def divergence(expected, actual):
    """Mean KL divergence of the next-token distributions, in nats."""
    shifted = [x.astype(np.float64) - x.max(-1, keepdims=True) for x in (expected, actual)]
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in shifted)
    return (np.exp(p) * (p - q)).sum(-1).mean()


def seed_is_intact(runtime):
    seed = runtime.patch.kv_seed
    return all(
        np.array_equal(key, seed.keys[layer]) and np.array_equal(value, seed.values[layer])
        for cache in runtime.backend._caches
        for layer, (key, value) in enumerate(cache.cells(seed.num_virtual_tokens))
    )


# Parity.


def test_fp32_logits_equal_inputs_embeds(runtime, onnx_folders, oracle, tiny_patch):
    tokens = runtime.tokens(PROMPT)
    expected = oracle(tokens, tiny_patch.soft_prompt)
    assert np.abs(runtime.logits(PROMPT) - expected).max() <= 1e-4
    bare = oracle(tokens, None)
    assert np.abs(bare - expected).max() > 0.1, "the patch must matter, or this test cannot fail"
    with load_runtime(onnx_folders["fp32"], None, num_threads=1) as unpatched:
        assert np.abs(unpatched.logits(PROMPT) - bare).max() <= 1e-4


def test_a_prefill_in_chunks_equals_one_forward_pass(runtime, oracle, tiny_patch, monkeypatch):
    monkeypatch.setattr("edgepatch.runtimes.onnx.runtime.PREFILL_TOKENS", 3)
    tokens = runtime.tokens(PROMPT)
    assert np.abs(runtime.logits(PROMPT) - oracle(tokens, tiny_patch.soft_prompt)).max() <= 1e-4


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_quantized_logits_are_close_to_the_patched_model(onnx_folders, oracle, tiny_patch, precision):
    with load_runtime(onnx_folders[precision], tiny_patch, num_threads=1) as runtime:
        assert (runtime.quantization, runtime.kv_type) == {"fp16": ("F16", "f16")}.get(precision, (precision, "f32"))
        tokens = runtime.tokens(PROMPT)
        logits = runtime.logits(PROMPT)
    assert np.isfinite(logits).all()
    patched = divergence(oracle(tokens, tiny_patch.soft_prompt), logits)
    assert patched < {"fp16": 1e-5, "int8": 0.01, "int4": 0.2}[precision]
    assert patched < divergence(oracle(tokens, None), logits) / 5


def test_text_equals_that_of_torch(runtime, tiny_folder, tiny_patch):
    sampling = Sampling(max_new_tokens=12, top_p=0.9, rng_seed=5)
    with load_runtime(tiny_folder, tiny_patch) as reference:
        assert runtime.end_token_ids == reference.end_token_ids
        assert runtime.generate(PROMPT, GREEDY) == reference.generate(PROMPT, GREEDY)
        assert runtime.generate_many(PROMPT, sampling, 6) == reference.generate_many(PROMPT, sampling, 6)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=9, top_p=0.9, rng_seed=5, stop=("a",))])
def test_prompts_of_different_lengths_share_a_batch(runtime, monkeypatch, rows, sampling):
    monkeypatch.setattr(runtime.backend, "max_batch_rows", rows)
    full = [7] * (runtime.context_length - 3)
    expected = [runtime.generate(prompt, sampling) for prompt in [*PROMPTS, full]]
    assert runtime.generate_batch([*PROMPTS, full], sampling) == expected
    assert runtime.generate_batch([], sampling) == []


def test_batched_and_single_generation_are_the_same(runtime, monkeypatch):
    sampling = Sampling(max_new_tokens=12, top_p=0.9, rng_seed=5)
    monkeypatch.setattr(runtime.backend, "max_batch_rows", 0)
    singles = runtime.generate_many(PROMPT, sampling, 6)
    monkeypatch.setattr(runtime.backend, "max_batch_rows", 4)
    assert runtime.generate_many(PROMPT, sampling, 6) == singles
    assert runtime.generate(PROMPT, GREEDY) == runtime.generate(PROMPT, GREEDY)


# The seed.


def test_prompt_reuse_does_not_change_the_answer(runtime):
    runtime.reset()
    fresh = runtime.generate(PROMPT, GREEDY)
    runtime.generate(PROMPT + " the lazy cat and", GREEDY)
    assert runtime.generate(PROMPT, GREEDY) == fresh


def test_the_seed_survives_everything(onnx_folders, tiny_patch):
    with load_runtime(onnx_folders["fp32"], tiny_patch, context_length=30, num_threads=1, num_sequences=2) as runtime:
        before = runtime.logits(PROMPT)
        runtime.reset()
        runtime.generate("accents é à ü and emoji 🙂", GREEDY)
        pieces = list(runtime.stream([7] * 18, Sampling(max_new_tokens=50, rng_seed=1)))
        assert pieces[-1].finish_reason in ("length", "stop") and len(pieces) <= 3
        runtime.logits([9] * runtime.context_length)
        with pytest.raises(InputError, match="context holds"):
            runtime.logits([7] * 21)
        runtime.generate_many(PROMPT, Sampling(max_new_tokens=50, rng_seed=1), 3)
        assert seed_is_intact(runtime)
        assert np.array_equal(runtime.logits(PROMPT), before)


def test_sequences_share_the_seed_and_nothing_else(onnx_folders, tiny_patch):
    with load_runtime(onnx_folders["fp32"], tiny_patch, num_threads=1, num_sequences=2) as runtime:
        alone = [[p.token_id for p in runtime.stream(prompt, GREEDY, sequence=1)] for prompt in PROMPTS[:2]]
        runtime.reset()
        streams = [runtime.stream(prompt, GREEDY, sequence=i) for i, prompt in enumerate(PROMPTS[:2])]
        together = [[a.token_id, b.token_id] for a, b in zip(*streams, strict=True)]
        assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
        assert seed_is_intact(runtime)


def test_a_swap_keeps_the_session(onnx_folders, tiny_patch):
    rng = np.random.default_rng(8)
    keys, values = (tuple(rng.standard_normal((2, 7, 64)).astype(np.float32) for _ in range(2)) for _ in range(2))
    other = replace(tiny_patch, name="other", soft_prompt=None, kv_seed=KVSeed(keys, values), canary=None)
    with load_runtime(onnx_folders["fp32"], tiny_patch, num_threads=1) as runtime:
        session, before = runtime.backend._caches[0]._session, runtime.logits(PROMPT)
        runtime.swap(other)
        assert runtime.context_length == 512 - 7 and seed_is_intact(runtime)
        swapped = runtime.logits(PROMPT)
        with load_runtime(onnx_folders["fp32"], other, num_threads=1) as fresh:
            assert np.array_equal(swapped, fresh.logits(PROMPT)), (
                "a K/V prefix without a soft prompt works, and swaps in whole"
            )
        runtime.swap(None)
        with load_runtime(onnx_folders["fp32"], None, num_threads=1) as bare:
            assert np.array_equal(runtime.logits(PROMPT), bare.logits(PROMPT))
        with pytest.raises(InputError, match="no KV seed"):
            runtime.swap(replace(tiny_patch, kv_seed=None))
        assert runtime.patch is None
        runtime.swap(tiny_patch)
        assert np.array_equal(runtime.logits(PROMPT), before) and runtime.backend._caches[0]._session is session


def test_a_zeroed_seed_is_refused(onnx_folders, tiny_patch):
    keys, values = (
        tuple(np.zeros_like(t) for t in tensors) for tensors in (tiny_patch.kv_seed.keys, tiny_patch.kv_seed.values)
    )
    with pytest.raises(InactivePatchError, match="canary"):
        load_runtime(onnx_folders["fp32"], replace(tiny_patch, kv_seed=KVSeed(keys, values)), num_threads=1)


def test_a_graph_that_overwrites_the_seed_is_refused(onnx_folders, tiny_patch, monkeypatch):
    run = OnnxRuntime.forward

    def damage(self, sequence, tokens, every):
        if self._start:
            self._caches[0]._arrays[1][0, 1, 3, 7] += 1
        return run(self, sequence, tokens, every)

    monkeypatch.setattr(OnnxRuntime, "forward", damage)
    with pytest.raises(InactivePatchError, match=r"layer 0|canary"):
        load_runtime(onnx_folders["fp32"], replace(tiny_patch, canary=None))


# What is refused.


def test_a_patch_for_another_model_names_every_difference(onnx_folders, tiny_patch):
    other = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5, tokenizer_digest="0" * 64))
    with pytest.raises(MismatchError) as caught:
        load_runtime(onnx_folders["fp32"], other)
    assert set(caught.value.differences) == {"rope_theta", "tokenizer_digest"}


def test_a_patch_without_a_seed_is_refused(onnx_folders, tiny_patch):
    with pytest.raises(InputError, match="no KV seed") as caught:
        load_runtime(onnx_folders["fp32"], replace(tiny_patch, kv_seed=None))
    assert "convert seed" in caught.value.hint


@pytest.mark.parametrize("length", [0, 1, 5000, -1])
def test_a_truncated_model_is_refused(copied, length):
    model = copied / "model.onnx"
    model.write_bytes(model.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model\.onnx"):
        OnnxRuntime(copied)


def test_truncated_or_missing_weights_are_refused(copied):
    data = copied / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:10_000])
    with pytest.raises(InputError, match=r"model\.onnx\.data is damaged: .* of 10000"):
        OnnxRuntime(copied)
    data.unlink()
    with pytest.raises(InputError, match=r"weights in model\.onnx\.data are missing"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json", "tokenizer_config.json", "genai_config.json"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(InputError, match=name):
        OnnxRuntime(copied)


@pytest.mark.parametrize("link", [os.symlink, os.link])
@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json"])
def test_links_are_refused(copied, tmp_path, link, name):
    (copied / name).rename(tmp_path / name)
    link(tmp_path / name, copied / name)
    with pytest.raises(InputError, match=r"is a link|not a regular file"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("location", ["../elsewhere.data", "{parent}/elsewhere.data"])
def test_weights_outside_the_folder_are_refused(copied, location):
    import onnx

    (copied / "model.onnx.data").rename(copied.parent / "elsewhere.data")
    model = onnx.load(copied / "model.onnx", load_external_data=False)
    for entry in (e for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"):
        entry.value = location.format(parent=copied.parent)
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(InputError, match=r"external data of .*: expected the name of a file"):
        OnnxRuntime(copied)


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({}, "not converted by edgepatch"),
        ({SPEC_KEY: "{", QUANTIZATION_KEY: "F32"}, "metadata is damaged"),
        ({SPEC_KEY: "[]", QUANTIZATION_KEY: "F32"}, "metadata is damaged"),
        ({SPEC_KEY: "{}", QUANTIZATION_KEY: "int2"}, "not converted by edgepatch"),
        ({BAKED_KEY: "0" * 64}, "baked into its graph"),
    ],
)
def test_a_model_of_unknown_origin_is_refused(copied, properties, message):
    import onnx

    model = onnx.load(copied / "model.onnx", load_external_data=False)
    onnx.helper.set_model_props(model, properties)
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(InputError, match=message):
        OnnxRuntime(copied)


def test_a_graph_of_another_kind_is_refused(copied):
    import onnx

    model = onnx.load(copied / "model.onnx", load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))
    onnx.save(model, copied / "model.onnx")
    with pytest.raises(InputError, match="use_cache_branch"):
        OnnxRuntime(copied)


def test_another_tokenizer_is_refused(copied):
    tokenizer = json.loads((copied / "tokenizer.json").read_text(encoding="utf-8"))
    first, second = list(tokenizer["model"]["vocab"])[-2:]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match="tokenizer"):
        OnnxRuntime(copied)


@pytest.mark.parametrize("length", [0, -5, 10, 513, 10**9])
def test_an_impossible_context_length_is_refused(onnx_folders, tiny_patch, length):
    with pytest.raises(InputError, match="context length"):
        load_runtime(onnx_folders["fp32"], tiny_patch, context_length=length)


def test_an_unknown_provider_is_refused(onnx_folders):
    with pytest.raises(InputError, match="provider"):
        OnnxRuntime(onnx_folders["fp32"], provider="npu")


def test_a_patch_that_fills_the_context_is_refused(onnx_folders, tiny_patch):
    with pytest.raises(InputError, match="11 positions or more, found 10"):
        load_runtime(onnx_folders["fp32"], tiny_patch, context_length=10)


def test_a_graph_in_a_folder_of_its_own_is_found(onnx_folders, tiny_patch, tmp_path, runtime):
    folder = shutil.copytree(onnx_folders["fp32"], tmp_path / "published")
    (folder / "onnx").mkdir()
    for file in folder.glob("model.onnx*"):
        file.rename(folder / "onnx" / file.name)
    (folder / "genai_config.json").rename(folder / "kept")
    with pytest.raises(InputError, match=r"genai_config\.json"):
        load_runtime(folder, None)
    (folder / "kept").rename(folder / "genai_config.json")
    with load_runtime(folder, tiny_patch, model_file="onnx/model.onnx", num_threads=1) as nested:
        assert np.array_equal(nested.logits(PROMPT), runtime.logits(PROMPT))
    with pytest.raises(InputError, match="expected a path within"):
        OnnxRuntime(folder, model_file="../onnx/model.onnx")


# The first contact.


def test_a_graph_is_tried_by_a_child_once(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path / "memory"))
    real, trials = first_contact.run_apart, []
    monkeypatch.setattr(first_contact, "run_apart", lambda *a, **b: trials.append(a[1]["files"]) or real(*a, **b))
    for _ in range(2):
        OnnxRuntime(copied, num_threads=1).close()
    assert len(trials) == 1 and {Path(file).name for file in trials[0]} >= {"model.onnx", "model.onnx.data"}
    weights = copied / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    OnnxRuntime(copied, num_threads=1).close()
    assert len(trials) == 2


def test_weights_that_are_no_numbers_are_refused(copied):
    weights = copied / "model.onnx.data"
    weights.write_bytes(np.full(weights.stat().st_size // 4, np.nan, "<f4").tobytes())
    with pytest.raises(UnfitModelError, match="ONNX Runtime computed logits that are not finite"):
        OnnxRuntime(copied, num_threads=1)


def test_an_onnxruntime_that_dies_is_an_error_with_an_exit_code(copied):
    tests = Path(__file__).parent.parent
    path = os.pathsep.join([str(tests / "dying_onnx"), str(tests.parent)])
    command = [sys.executable, "-m", "edgepatch.cli", "generate", str(copied), "--prompt", "a", "--bare"]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.returncode == UnfitModelError.exit_code and process.stdout == "", process.stderr
    assert "ONNX Runtime died of SIGSEGV while opening a session" in process.stderr
    assert process.stderr.count("error:") == 1 and "Traceback" not in process.stderr

"""The PyTorch runtime against Transformers fed ``inputs_embeds``, and the patch file."""

import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError, MismatchError, PatchFormatError
from edgepatch.patch.file import parse_patch, patch_bytes, read_patch, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.reference import TorchRuntime

PROMPT = "The quick brown fox jumps over"


@pytest.fixture(scope="module")
def runtime(tiny_folder, tiny_patch):
    with load_runtime(tiny_folder, tiny_patch) as loaded:
        yield loaded


def test_seeded_logits_equal_inputs_embeds(runtime, oracle, tiny_patch):
    tokens = runtime.tokens(PROMPT)
    expected = oracle(tokens, tiny_patch.soft_prompt)
    assert np.abs(runtime.logits(PROMPT) - expected).max() <= 5e-5
    assert np.abs(oracle(tokens, None) - expected).max() > 0.1, "the patch must matter, or this test cannot fail"


def test_batched_and_single_generation_are_the_same(runtime, monkeypatch):
    sampling = Sampling(max_new_tokens=12, top_p=0.9, rng_seed=5)
    batched = runtime.generate_many(PROMPT, sampling, 6)
    monkeypatch.setattr(runtime.backend, "max_batch_rows", 0)
    assert runtime.generate_many(PROMPT, sampling, 6) == batched


def test_a_batch_of_different_prompts_is_what_each_gives_alone(runtime):
    prompts = ["The quick", "A dog", "The fox jumps over", "The lazy", "A dog sleeps in the sun", "The quick"]
    for sampling in (Sampling(12, temperature=0), Sampling(12, top_p=0.9, rng_seed=3)):
        assert runtime.generate_batch(prompts, sampling) == [runtime.generate(prompt, sampling) for prompt in prompts]
    with pytest.raises(InputError, match="the context holds"):
        runtime.generate_batch(["The", "fox " * 5000], Sampling(2))


def test_prompt_reuse_does_not_change_the_answer(runtime):
    greedy = Sampling(max_new_tokens=16, temperature=0)
    fresh = runtime.generate(PROMPT, greedy)
    runtime.generate(PROMPT + " the lazy cat and", greedy)
    assert runtime.generate(PROMPT, greedy) == fresh


def test_context_is_filled_to_the_brim_and_not_beyond(runtime):
    tokens = [7] * (runtime.context_length - 3)
    pieces = list(runtime.stream(tokens, Sampling(max_new_tokens=50, rng_seed=1)))
    assert pieces[-1].finish_reason in ("length", "stop")
    assert len(pieces) <= 4
    with pytest.raises(InputError, match="context holds"):
        runtime.logits([7] * (runtime.context_length + 1))


def test_patch_file_round_trip(tiny_patch, tmp_path):
    path = tmp_path / "p.safetensors"
    digest = write_patch(tiny_patch, path)
    again = read_patch(path)
    assert again.digest == digest == tiny_patch.digest
    assert np.array_equal(again.kv_seed.keys[1], tiny_patch.kv_seed.keys[1])
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_truncated_and_flipped_patch_files_are_refused(tiny_patch):
    data = patch_bytes(tiny_patch)
    for length in [0, 4, 8, 100, len(data) // 2, len(data) - 1]:
        with pytest.raises(PatchFormatError):
            parse_patch(data[:length])
    for position in range(0, len(data), len(data) // 97):
        flipped = bytearray(data)
        flipped[position] ^= 1
        try:
            digest = parse_patch(bytes(flipped)).digest
        except PatchFormatError:
            continue
        assert digest != tiny_patch.digest and position < len(data) - 20_000, "only a manifest text may change"


def test_patch_for_another_model_names_every_difference(tiny_folder, tiny_patch):
    other = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5, tokenizer_digest="0" * 64))
    with pytest.raises(MismatchError) as caught:
        load_runtime(tiny_folder, other)
    assert set(caught.value.differences) == {"rope_theta", "tokenizer_digest"}


def test_a_full_disk_leaves_the_old_patch(tiny_patch, tmp_path, monkeypatch):
    path = tmp_path / "p.safetensors"
    digest = write_patch(tiny_patch, path)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        write_patch(replace(tiny_patch, version="2.0.0"), path)
    assert read_patch(path).digest == digest
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_truncated_and_missing_model_files_are_named(tiny_folder, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError):
        TorchRuntime(folder)
    (folder / name).unlink()
    with pytest.raises(InputError):
        TorchRuntime(folder)


def test_end_tokens_end_a_reply_unless_ignored(runtime):
    first = next(iter(runtime.stream(PROMPT, Sampling(temperature=0)))).token_id
    runtime.end_token_ids, kept = frozenset({first}), runtime.end_token_ids
    try:
        pieces = list(runtime.stream(PROMPT, Sampling(max_new_tokens=5, temperature=0)))
        assert [(p.text, p.finish_reason) for p in pieces] == [("", "stop")]
        timed = list(runtime.stream(PROMPT, Sampling(max_new_tokens=5, temperature=0, ignore_end_tokens=True)))
        assert len(timed) == 5
    finally:
        runtime.end_token_ids = kept

"""Training patches that will stand side by side: packed rows against a plain forward pass behind the composed seed."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.converters.hf import folders, rotary, seeds
from edgepatch.errors import InputError, MismatchError
from edgepatch.patch.composition import composed_seed, in_order
from edgepatch.patch.file import read_patch, write_patch
from edgepatch.seeds.rotation import side_by_side
from edgepatch.tensors import SoftPrompt
from edgepatch.training.config import TrainConfig
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.losses import dpo_losses
from edgepatch.training.pairs.preferences import write_pairs
from edgepatch.training.patching import PatchTraining
from edgepatch.training.policies import KVPolicy, SideBySidePolicy, SoftPromptPolicy
from edgepatch.training.trainer import Trainer
from kit.trainings import BENIGN, make_pairs, plain_log_probabilities, random_examples, small

PATCH = LAB_FOLDER / "lab-detox-0.1.0.safetensors"


@pytest.fixture(scope="module")
def detox():
    return read_patch(PATCH).kv_seed


@pytest.fixture(scope="module")
def model():
    return folders.load_model(LAB_FOLDER / "base")


@pytest.fixture(scope="module")
def prompts(model):
    rng, size = np.random.default_rng(4), model.config.hidden_size
    return [SoftPrompt((rng.standard_normal((count, size)) * 0.5).astype(np.float32)) for count in (7, 12)]


@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("drawn", [[0, 1, 2], [0, 2], [1, 2], [1]])
def test_losses_are_those_of_a_plain_forward_pass_behind_the_composed_seed(model, prompts, detox, block, drawn):
    models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(block=block, dtype="float32"), "cpu")
    policy = SideBySidePolicy([SoftPromptPolicy(p, "cpu") for p in prompts], models.rotation, [detox])
    policy.drawn = drawn
    alone = [*(seeds.compute_kv_seed(model, prompt) for prompt in prompts), detox]
    together = side_by_side([alone[i] for i in drawn], rotary.read_rotation(model))
    examples = random_examples(np.random.default_rng(block), [5, 90])
    got = models.log_probabilities(models.base, examples, policy.memory(models.base)).detach()
    expected = plain_log_probabilities(model, together, models.anchoring, examples)
    assert ((got - expected) / expected).abs().max() < 1e-5
    bare = models.log_probabilities(models.base, examples, []).detach()
    losses = [dpo_losses(p[:, 0], p[:, 1], bare[:, 0], bare[:, 1], 0.1) for p in (got, expected)]
    assert torch.allclose(*losses, atol=1e-4)


def test_the_order_of_segments_does_not_matter_and_their_place_does(model, prompts, detox):
    models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(dtype="float32"), "cpu")
    examples = random_examples(np.random.default_rng(1), [40])

    def measured(memory):
        return models.log_probabilities(models.base, examples, memory).detach()

    segments = [SoftPromptPolicy(prompts[0], "cpu"), KVPolicy(detox, "cpu")]
    there, back = (SideBySidePolicy(order, models.rotation).memory(models.base) for order in (segments, segments[::-1]))
    assert (measured(there) - measured(back)).abs().max() < 1e-3
    unturned = [
        (torch.cat([a[0], b[0]], 2), torch.cat([a[1], b[1]], 2))
        for a, b in zip(*(s.memory(models.base) for s in segments), strict=True)
    ]
    assert (measured(there) - measured(unturned)).abs().max() > 0.1


def test_gradients_reach_each_drawn_segment_through_its_turned_keys(prompts, detox):
    models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(block=32, dtype="float32"), "cpu")
    segments = [SoftPromptPolicy(prompts[0], "cpu"), KVPolicy(detox, "cpu"), SoftPromptPolicy(prompts[1], "cpu")]
    policy = SideBySidePolicy(segments, models.rotation, [detox])
    policy.drawn = [0, 1, 3]
    examples = random_examples(np.random.default_rng(1), [70])

    def loss():
        return models.log_probabilities(models.base, examples, policy.memory(models.base)).sum()

    loss().backward()
    assert segments[2].parameters()[0].grad is None
    for segment in segments[:2]:
        parameter = segment.parameters()[0]
        length = float(parameter.grad.norm())
        step = 1e-2 * parameter.grad / length
        with torch.no_grad():
            values = []
            for sign in (-1, 2):
                parameter += sign * step
                values.append(float(loss()))
            parameter -= step
        assert (values[1] - values[0]) / 2e-2 == pytest.approx(length, rel=2e-2)


def test_each_step_draws_a_subset_with_its_own_task(prompts, detox, model):
    rotation = rotary.read_rotation(model)
    policy = SideBySidePolicy([SoftPromptPolicy(p, "cpu") for p in prompts], rotation, [detox, detox])
    assert policy.drawn == [0, 1, 2, 3] and policy.num_virtual_tokens == 119
    seen = set()
    for step in range(200):
        policy.prepare(random.Random(step), step % 2)
        assert step % 2 in policy.drawn
        seen.add(tuple(policy.drawn))
    assert len(seen) == 12, "every subset but those without a trained segment, and each in one order"
    policy.prepare_whole()
    assert policy.drawn == [0, 1, 2, 3]


def test_patches_that_are_trained_jointly_compose_to_what_was_trained(tiny_folder):
    training = PatchTraining(tiny_folder, small(dpo_steps=8, sft_steps=8, block=16))
    start = training.start()
    patches = training.segments([make_pairs(12), make_pairs(14)], [start, start], BENIGN, ["a", "b"])
    assert [patch.name for patch in patches] == ["a", "b"] and [patch.training["segment"] for patch in patches] == [
        0,
        1,
    ]
    assert all(patch.anchoring == training.models.anchoring and patch.rotation is not None for patch in patches)
    assert not np.array_equal(patches[0].soft_prompt.embeddings, patches[1].soft_prompt.embeddings)
    models = training.models
    policy = SideBySidePolicy([SoftPromptPolicy(p.soft_prompt, "cpu") for p in patches], models.rotation)
    examples = [models.benign_example(text) for text in BENIGN]
    trained = models.log_probabilities(models.base, examples, policy.memory(models.base)).detach()
    seed = composed_seed(in_order(patches))
    plain = plain_log_probabilities(folders.load_model(tiny_folder), seed, models.anchoring, examples)
    assert (trained - plain).abs().max() < 1e-2  # the seed is float16


def test_a_seed_among_the_segments_is_trained_as_one(tiny_folder, tiny_patch):
    training = PatchTraining(tiny_folder, small(dpo_learning_rate=0.05))
    prompt, prefix = training.segments(
        [make_pairs(12)] * 2, [training.start(), tiny_patch.kv_seed], BENIGN, ["prompt", "prefix"]
    )
    assert prompt.soft_prompt is not None and prefix.soft_prompt is None
    assert not np.array_equal(prefix.kv_seed.keys[0], tiny_patch.kv_seed.keys[0])


def test_company_changes_what_is_learned_and_stays_as_it_is(tiny_folder, tiny_patch):
    training = PatchTraining(tiny_folder, small())
    alone = training.soft_prompt(make_pairs(12), BENIGN, "new")
    beside = training.soft_prompt(make_pairs(12), BENIGN, "new", company=[tiny_patch])
    assert beside.training["company"] == [tiny_patch.digest] and "company" not in alone.training
    assert beside.num_virtual_tokens == alone.num_virtual_tokens == 4
    assert not np.array_equal(beside.soft_prompt.embeddings, alone.soft_prompt.embeddings)
    policy = SideBySidePolicy(
        [SoftPromptPolicy(training.start(), "cpu")], training.models.rotation, [tiny_patch.kv_seed]
    )
    Trainer(training.models, policy, [make_pairs(12)], BENIGN).train()
    fixed = policy._memory_of(1, training.models.base)[0][0][0].numpy()
    assert np.array_equal(fixed, tiny_patch.kv_seed.keys[0].astype(np.float32))


def test_what_cannot_stand_side_by_side_is_refused(tiny_folder, tiny_patch, tmp_path):
    from edgepatch.bench.parity import models as parity_models

    training = PatchTraining(tiny_folder, small())
    start, pairs = training.start(), make_pairs(12)
    with pytest.raises(InputError, match="two segments or more"):
        training.segments([pairs], [start], BENIGN, ["a"])
    with pytest.raises(InputError, match="different names, found a twice"):
        training.segments([pairs] * 2, [start] * 2, BENIGN, ["a", "a"])
    with pytest.raises(InputError, match="2 to 12 patches, found 13"):
        training.segments([pairs] * 13, [start] * 13, BENIGN, [str(i) for i in range(13)])
    with pytest.raises(InputError, match="found a soft prompt alone"):
        training.soft_prompt(pairs, BENIGN, "a", company=[replace(tiny_patch, kv_seed=None)])
    foreign = replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5))
    with pytest.raises(MismatchError, match="rope_theta"):
        training.soft_prompt(pairs, BENIGN, "a", company=[foreign])
    long = SoftPrompt(np.repeat(start.embeddings, 64, axis=0))
    with pytest.raises(InputError, match="fewer than the model's context of 512, found 512"):
        training.segments([pairs] * 2, [long] * 2, BENIGN, ["a", "b"])
    parity_models.build_folder(parity_models.architecture("gemma2"), tmp_path)
    windows = PatchTraining(tmp_path, small())
    with pytest.raises(InputError, match=r"gemma2: .* full attention in every layer"):
        windows.segments([pairs] * 2, [windows.start()] * 2, BENIGN, ["a", "b"])


def test_rotation_of_rounded_weights_is_that_of_the_model():
    exact, rounded = (
        FrozenModels([LAB_FOLDER / "base"], TrainConfig(dtype=dtype), "cpu").rotation
        for dtype in ("float32", "bfloat16")
    )
    assert exact == rounded


def test_verb_trains_beside_a_patch(tiny_folder, tiny_patch, tmp_path):
    from edgepatch.cli import app

    pairs, benign, other, out = (tmp_path / name for name in ("pairs.jsonl", "benign.txt", "other.st", "new.st"))
    write_pairs(make_pairs(12), pairs)
    benign.write_text("\n".join(BENIGN), encoding="utf-8")
    write_patch(tiny_patch, other)
    options = ["--num-virtual-tokens", "4", "--sft-steps", "2", "--dpo-steps", "2", "--dtype", "float32"]
    with pytest.raises(SystemExit) as done:
        app(
            [
                "train",
                *map(str, [tiny_folder, "--pairs", pairs, "--benign", benign, "--beside", other, "-o", out]),
                *options,
            ]
        )
    assert done.value.code == 0
    assert read_patch(out).training["company"] == [tiny_patch.digest]

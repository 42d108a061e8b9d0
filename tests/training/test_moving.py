"""Training with a seed that moves: packed rows against a plain forward pass, span by span."""

import numpy as np
import pytest
import torch

from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.converters.hf import folders
from edgepatch.errors import InputError
from edgepatch.patch.file import read_patch
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.training.config import TrainConfig
from edgepatch.training.contexts import Contexts
from edgepatch.training.forward import FrozenModels
from edgepatch.training.losses import answer_log_probabilities, dpo_losses, kl_to_base
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.policies import KVPolicy
from edgepatch.training.rows import Example
from kit.trainings import plain_log_probabilities, plain_logits, random_examples

PATCH = LAB_FOLDER / "lab-detox-0.1.0.safetensors"


@pytest.fixture(scope="module")
def seed():
    return read_patch(PATCH).kv_seed


@pytest.fixture(scope="module")
def model():
    return folders.load_model(LAB_FOLDER / "base")


@pytest.mark.parametrize("block, turns", [(32, False), (64, True), (0, True)])
def test_losses_are_those_of_a_plain_forward_pass(model, seed, block, turns):
    config = TrainConfig(block=block, turns=turns, dtype="float32")
    models = FrozenModels([LAB_FOLDER / "base"], config, "cpu")
    assert models.anchoring == Anchoring(block, (3,) if turns else ())
    examples = random_examples(np.random.default_rng(block), [5, 90, 150])
    examples[1] = Example((*examples[1].prompt[:40], 3, *examples[1].prompt[41:]), examples[1].answers)
    policy = KVPolicy(seed, "cpu")
    got = models.log_probabilities(models.base, examples, policy.memory(models.base))
    expected = plain_log_probabilities(model, seed, models.anchoring, examples)
    assert (got - expected).abs().max() < 1e-3, "sums of up to 33 log-probabilities around -300"
    assert ((got - expected) / expected).abs().max() < 1e-5
    bare = models.log_probabilities(models.base, examples, []).detach()
    losses = [dpo_losses(p[:, 0], p[:, 1], bare[:, 0], bare[:, 1], 0.1) for p in (got, expected)]
    assert torch.allclose(*losses, atol=1e-4)


def test_pinned_rows_differ_from_moved_ones(seed):
    """The test above could not fail if nothing moved."""
    example = random_examples(np.random.default_rng(0), [200])
    results = []
    for block in (0, 32):
        models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(block=block, dtype="float32"), "cpu")
        results.append(models.log_probabilities(models.base, example, KVPolicy(seed, "cpu").memory(models.base)))
    assert (results[0] - results[1]).abs().max() > 0.1


def test_gradient_reaches_the_seed_through_every_copy(seed):
    models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(block=32, dtype="float32"), "cpu")
    policy = KVPolicy(seed, "cpu")
    example = random_examples(np.random.default_rng(1), [70])
    loss = models.log_probabilities(models.base, example, policy.memory(models.base)).sum()
    gradients = torch.autograd.grad(loss, policy.parameters())
    # A step against the gradient of one key must change the loss as predicted.
    key, direction = policy.parameters()[0], gradients[0] / gradients[0].norm()
    with torch.no_grad():
        values = []
        for step in (-1e-2, 1e-2):
            key += step * direction
            values.append(models.log_probabilities(models.base, example, policy.memory(models.base)).sum().item())
            key -= step * direction
    assert (values[1] - values[0]) / 2e-2 == pytest.approx(float(gradients[0].norm()), rel=2e-2)


def test_kl_is_that_of_a_plain_forward_pass(model, seed):
    models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(block=32, dtype="float32"), "cpu")
    ids = random_examples(np.random.default_rng(2), [100])[0].prompt
    example = Example(ids[:1], (ids[1:],))
    memory = KVPolicy(seed, "cpu").memory(models.base)
    logits = models.logits_of([example], models.base, memory, None).detach()
    plain = plain_logits(model, seed, models.anchoring, ids)[:-1]
    bare = models.bare_logits(0, 0, example)
    assert float(kl_to_base(bare, logits)) == pytest.approx(float(kl_to_base(bare, plain)), rel=1e-4)
    targets = torch.tensor(ids[1:])
    owners = torch.zeros(len(targets), dtype=torch.int64)
    sums = [float(answer_log_probabilities(x, targets, owners, 1)) for x in (logits, plain)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_contexts_are_of_every_kind_and_repeatable():
    pairs = [
        Pair(f"Prompt {i} says", " something kind.", " something else that is rude.", 0.0, 0.9) for i in range(200)
    ]
    texts = [f"A benign text number {i} about rivers and trees." for i in range(30)]
    contexts = Contexts(pairs, texts, 400, rng_seed=1)
    placed = [contexts.pair(pair, i) for i, pair in enumerate(pairs)]
    assert placed == [Contexts(pairs, texts, 400, rng_seed=1).pair(pair, i) for i, pair in enumerate(pairs)]
    plain = sum(new.prompt == old.prompt for new, old in zip(placed, pairs, strict=True))
    turns = [pair for pair in placed if not isinstance(pair.prompt, str)]
    assert 30 <= plain <= 70 and 30 <= len(turns) <= 70
    assert {len(pair.prompt) for pair in turns} == {3, 5, 7}
    lengths = [len(pair.prompt.split()) for pair in placed if isinstance(pair.prompt, str)]
    assert max(lengths) > 200 and all(
        (new.chosen, new.rejected) == (old.chosen, old.rejected) for new, old in zip(placed, pairs, strict=True)
    )
    examples = [Example((1, 2), ((3, 4), (5, 6, 7))) for _ in range(400)]
    begun = [contexts.begun(example, i) for i, example in enumerate(examples)]
    assert 70 <= sum(example.prompt != (1, 2) for example in begun) <= 130
    assert all(example.prompt + example.answers[1] == (1, 2, 5, 6, 7) for example in begun)


def test_a_model_with_windows_is_not_trained_with_a_moving_seed(tmp_path):
    from edgepatch.bench.parity import models as parity_models

    parity_models.build_folder(parity_models.architecture("gemma2"), tmp_path)
    with pytest.raises(InputError, match="full attention in every layer"):
        FrozenModels([tmp_path], TrainConfig(block=64, dtype="float32"), "cpu")

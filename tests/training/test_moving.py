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
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.frozen.rows import Example
from edgepatch.training.losses import answer_log_probabilities, dpo_losses, kl_to_base
from edgepatch.training.pairs.preferences import Pair
from edgepatch.training.patching import PatchTraining
from edgepatch.training.policies import KVPolicy
from kit.tiny_folders import copy_folder
from kit.trainings import BENIGN, make_pairs, plain_log_probabilities, plain_logits, random_examples, small

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
        models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(block=block, turns=False, dtype="float32"), "cpu")
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


# What the configuration leaves open.


def test_a_seed_moves_by_default(tiny_folder):
    models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(dtype="float32"), "cpu")
    assert (
        models.anchoring == Anchoring(128, (3,)) and models.place == "the seed moves: at each turn and every 128 tokens"
    )
    assert (models.config.block, models.config.turns, models.config.front_tokens) == (128, True, 500)
    in_blocks = FrozenModels([LAB_FOLDER / "base"], TrainConfig(turns=False, dtype="float32"), "cpu")
    assert in_blocks.anchoring == Anchoring(128) and in_blocks.config.turns is False
    short = FrozenModels([tiny_folder], TrainConfig(dtype="float32"), "cpu")  # 512 positions
    assert short.config.front_tokens == 366, "what the context has room for"


def test_a_model_without_turns_moves_every_128_tokens(tiny_folder, tmp_path):
    folder = copy_folder(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    models = FrozenModels([folder], TrainConfig(dtype="float32"), "cpu")
    assert models.anchoring == Anchoring(128) and models.config.turns is False


@pytest.mark.parametrize(
    "settings, place", [({"gradient_checkpointing": True}, "checkpointing"), ({"block": 0, "turns": False}, "")]
)
def test_a_seed_that_stays_is_trained_on_pairs_as_they_are(settings, place):
    models = FrozenModels([LAB_FOLDER / "base"], TrainConfig(dtype="float32", **settings), "cpu")
    assert models.anchoring is None and models.config.front_tokens == 0
    assert place in models.place and bool(models.place) == bool(place)


@pytest.mark.parametrize("name", ["gemma2", "lfm2"])
def test_a_model_that_cannot_move_its_seeds_is_trained_at_the_start_and_says_so(name, tmp_path):
    from edgepatch.bench.parity import models as parity_models

    parity_models.build_folder(parity_models.architecture(name), tmp_path)
    models = FrozenModels([tmp_path], TrainConfig(dtype="float32"), "cpu")
    assert models.anchoring is None and (models.config.block, models.config.turns, models.config.front_tokens) == (
        0,
        False,
        0,
    )
    assert models.place.startswith("the seed stays at the start of the text") and "cannot move" in models.place
    with pytest.raises(InputError, match="seeds that move"):
        FrozenModels([tmp_path], TrainConfig(block=128, dtype="float32"), "cpu")


# Settings that cannot be used.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block": 7}, "block: expected 8 to 512 tokens, found 7"),
        ({"block": 513, "turns": True}, "block: expected 8 to 512 tokens, found 513"),
        ({"block": -128}, "block: expected 0 or more"),
        ({"front_tokens": -1}, "front_tokens: expected 0 or more"),
        ({"block": 128, "gradient_checkpointing": True}, "gradient_checkpointing: expected False where the seed moves"),
        (
            {"turns": True, "gradient_checkpointing": True},
            "gradient_checkpointing: expected False where the seed moves",
        ),
    ],
)
def test_settings_that_cannot_be_used_are_refused_by_themselves(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings)


@pytest.fixture
def without_weights(monkeypatch):
    """What is refused there is refused before a weight is loaded."""

    def refuse(*_):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(folders, "load_model", refuse)


PLAIN_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.mark.parametrize(
    "template, phrase", [("", "found no chat template"), (PLAIN_TEMPLATE, "{% for m in messages %}")]
)
def test_turns_need_a_token_that_opens_them(tiny_folder, tmp_path, without_weights, template, phrase):
    folder = copy_folder(tiny_folder, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)
    for block in (0, 64):
        with pytest.raises(InputError, match="opens a turn with a special token") as caught:
            FrozenModels([folder], TrainConfig(block=block, turns=True, dtype="float32"), "cpu")
        assert phrase in str(caught.value) and str(folder) in str(caught.value) and "block" in caught.value.hint


@pytest.mark.parametrize("front_tokens, fits", [(366, True), (367, False), (10_000, False)])
def test_texts_in_front_fit_the_context(tiny_folder, monkeypatch, front_tokens, fits):
    config = TrainConfig(
        front_tokens=front_tokens, dtype="float32"
    )  # 512 positions: 50 virtual tokens, 96 for the pair
    if fits:
        models = FrozenModels([tiny_folder], config, "cpu")
        long = Pair("The quick fox " * 500, " sleeps in the sun", " jumps over the dog", 0.1, 0.9)
        example = models.pair_example(long)
        assert len(example.prompt) + max(map(len, example.answers)) <= 462, "what was put in front is cut, not refused"
        return
    monkeypatch.setattr(folders, "load_model", None)
    with pytest.raises(
        InputError, match=f"front_tokens: expected at most 366, found {front_tokens}: .* context is 512"
    ):
        FrozenModels([tiny_folder], config, "cpu")


def test_a_model_without_turns_is_trained_behind_texts_alone():
    pairs = [Pair(f"Prompt {i} says", " something kind.", " something rude.", 0.0, 0.9) for i in range(100)]
    placed = [Contexts(pairs, [], 100, 1, has_turns=False).pair(pair, i) for i, pair in enumerate(pairs)]
    assert all(isinstance(pair.prompt, str) for pair in placed)
    assert 60 <= sum(new.prompt != old.prompt for new, old in zip(placed, pairs, strict=True)) <= 90


def test_a_reference_model_needs_no_turns(tiny_folder, tmp_path):
    """The safer model that DPO compares with is bare: no seed is in front of it, so none moves."""
    folder = copy_folder(tiny_folder, tmp_path / "safer")
    (folder / "chat_template.jinja").unlink()
    config = small(block=8, turns=True, sft_steps=1, dpo_steps=2, dpo_reference="model")
    training = PatchTraining(tiny_folder, config, reference=folder)
    assert training.soft_prompt(make_pairs(12), BENIGN, "tiny").anchoring == Anchoring(
        8, training.models.tokenizer.turn_tokens()
    )


def test_a_block_that_training_never_reaches_is_told(tiny_folder):
    notes = []
    patch = PatchTraining(tiny_folder, small(block=96, sft_steps=1, dpo_steps=0), tell=notes.append).soft_prompt(
        make_pairs(12), BENIGN, "t"
    )
    assert len(notes) == 1 and "never sees the seed move" in notes[0] and patch.anchoring == Anchoring(96)
    PatchTraining(tiny_folder, small(block=95), tell=notes.append)
    assert len(notes) == 1

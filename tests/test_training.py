"""Preference pairs, losses and the trainer."""

import json
import math

import numpy as np
import pytest
import torch

from edgepatch.errors import InputError, TrainingError
from edgepatch.runtimes.reference import TorchRuntime
from edgepatch.sampling import Sampling
from edgepatch.training import losses
from edgepatch.training.preferences import Pair, PairConfig, build_pairs, read_pairs, write_pairs
from edgepatch.training.trainer import PatchTrainer, TrainConfig, train_patch

BENIGN = ["The quick brown fox sleeps in the warm afternoon sun.", "Patching a model should be simple."]


def make_pairs(count: int) -> list[Pair]:
    return [Pair(f"The fox {i}", " sleeps in the sun", " jumps over the dog", 0.1, 0.9) for i in range(count)]


def small(**changes) -> TrainConfig:
    settings = {"num_virtual_tokens": 4, "sft_steps": 6, "dpo_steps": 6, "batch_size": 4, "kl_batch_size": 1} | changes
    return TrainConfig(**settings)


def test_answer_log_probabilities_count_answer_tokens_alone():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    expected = [
        sum(logits[row, t - 1].log_softmax(-1)[ids[row, t]] for t in range(5) if mask[row, t]) for row in range(2)
    ]
    got = losses.answer_log_probabilities(logits, ids, mask)
    assert torch.allclose(got, torch.stack(expected), atol=1e-5)
    assert torch.allclose(losses.sft_loss(logits, ids, mask), -got.sum() / 6, atol=1e-6)


def test_dpo_loss_by_hand():
    one = torch.tensor([-3.0]), torch.tensor([-5.0]), torch.tensor([-4.0]), torch.tensor([-4.5])
    margin = 0.1 * ((-3 + 5) - (-4 + 4.5))
    assert losses.dpo_loss(*one, beta=0.1).item() == pytest.approx(-math.log(1 / (1 + math.exp(-margin))), abs=1e-6)
    assert losses.dpo_loss(one[0], one[1], one[0], one[1], beta=0.1).item() == pytest.approx(math.log(2), abs=1e-6)


def test_kl_is_zero_for_the_same_model_and_positive_else():
    logits, mask = torch.randn(1, 4, 9), torch.ones(1, 4, dtype=torch.bool)
    assert losses.kl_to_base(logits, logits, mask).item() == pytest.approx(0, abs=1e-6)
    assert losses.kl_to_base(logits, torch.randn(1, 4, 9), mask).item() > 0.1


def test_training_lowers_the_loss_prefers_the_chosen_answer_and_repeats(tiny_folder):
    config = small(sft_steps=30, dpo_steps=30, kl_weight=0.1)
    patch, history = train_patch(tiny_folder, make_pairs(24), BENIGN, config, "tiny")
    assert np.mean(history.sft_loss[-5:]) < np.mean(history.sft_loss[:5]) - 0.5
    assert history.dpo_loss[-1] < math.log(2)
    assert history.preference_accuracy[-1] == 1.0
    again, _ = train_patch(tiny_folder, make_pairs(24), BENIGN, config, "tiny")
    assert np.array_equal(again.soft_prompt.embeddings, patch.soft_prompt.embeddings)
    other, _ = train_patch(tiny_folder, make_pairs(24), BENIGN, small(rng_seed=2), "tiny")
    assert not np.array_equal(other.soft_prompt.embeddings, patch.soft_prompt.embeddings)
    assert again.training["data"] == patch.training["data"] == other.training["data"]


def test_a_patch_names_its_data_its_base_and_proves_itself(tiny_folder):
    patch, _ = train_patch(tiny_folder, make_pairs(12), BENIGN, small(), "tiny")
    more, _ = train_patch(tiny_folder, make_pairs(13), BENIGN, small(), "tiny")
    assert patch.training["data"]["pairs_sha256"] != more.training["data"]["pairs_sha256"]
    assert patch.training["data"]["benign_texts_sha256"] == more.training["data"]["benign_texts_sha256"]
    assert patch.kv_seed is not None and patch.canary is not None and patch.weight_sketch is not None and patch.chat_template


def test_the_trained_soft_prompt_gives_the_logits_it_was_trained_with(tiny_folder):
    """PEFT's forward pass and a seeded runtime agree, so what was trained is what runs."""
    trainer = PatchTrainer(tiny_folder, small())
    trainer.train(make_pairs(12), BENIGN)
    batch = trainer._batch([("The fox", " sleeps")])
    with torch.no_grad():
        expected = trainer._logits(batch)[0].numpy()
    patch, _ = train_patch(tiny_folder, make_pairs(12), BENIGN, small(), "tiny")
    with TorchRuntime(tiny_folder, patch) as runtime:
        assert np.abs(runtime.logits(batch.ids[0].tolist()) - expected).max() <= 5e-5


def test_the_base_model_stays_as_it_is(tiny_folder):
    trainer = PatchTrainer(tiny_folder, small())
    before = {n: p.clone() for n, p in trainer.base.named_parameters() if "prompt" not in n}
    trainer.train(make_pairs(12), BENIGN)
    assert all(torch.equal(p, before[n]) for n, p in trainer.base.named_parameters() if n in before)


def test_a_loss_that_is_not_finite_stops_training(tiny_folder):
    with pytest.raises(TrainingError, match="step"):
        train_patch(tiny_folder, make_pairs(12), BENIGN, small(kl_weight=math.nan), "tiny")


@pytest.mark.parametrize(
    ("pairs", "benign", "changes", "message"),
    [(3, BENIGN, {}, "at least 10 pairs"), (12, [], {}, "benign text"), (12, BENIGN, {"dpo_reference": "x"}, "dpo_reference")],
)
def test_bad_settings_are_refused(tiny_folder, pairs, benign, changes, message):
    with pytest.raises(InputError, match=message):
        train_patch(tiny_folder, make_pairs(pairs), benign, small(**changes), "tiny")


def test_pairs_pass_margin_threshold_and_length(tiny_folder):
    scores = {"chosen": 0.1, "rejected": 0.9}

    class Fixed:
        def __init__(self, texts):
            self.texts = texts

        def generate_many(self, prompt, sampling, count):
            return self.texts

    def score(texts):
        return np.array([next((v for k, v in scores.items() if k in t), 0.5) for t in texts], dtype=np.float32)

    config = PairConfig(min_words=2)
    base, safer = Fixed(["rejected one", "middle"]), Fixed(["", "chosen", "chosen one here"])
    pairs = build_pairs(base, safer, ["p"], score, config)
    assert [(p.chosen, p.rejected) for p in pairs] == [("chosen one here", "rejected one")]
    scores["chosen"] = 0.3
    with pytest.raises(InputError, match="none of 1 prompts"):
        build_pairs(base, safer, ["p"], score, config)


def test_pairs_from_real_models(tiny_folder):
    with TorchRuntime(tiny_folder) as runtime:
        lengths = lambda texts: np.array([min(len(t) / 80, 1) for t in texts], dtype=np.float32)  # noqa: E731
        config = PairConfig(samples_per_prompt=4, max_new_tokens=20, min_margin=0.01, max_chosen_score=0.9, min_words=1)
        pairs = build_pairs(runtime, runtime, ["The quick", "A dog"], lengths, config)
    assert pairs
    assert all(p.rejected_score - p.chosen_score >= 0.01 for p in pairs)
    assert Sampling(20, top_p=config.top_p).max_new_tokens == 20


def test_pairs_file_round_trip_and_named_lines(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write_pairs(make_pairs(3), path)
    assert read_pairs(path) == make_pairs(3)
    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"})
    for bad, message in (("{", "line 2"), ('{"prompt": "a"}', "line 2"), (good.replace('"c"', '"b"'), "the same"), (good.replace('"b"', '""'), "not empty")):
        path.write_text(good + "\n" + bad + "\n")
        with pytest.raises(InputError, match=message):
            read_pairs(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no pairs"):
        read_pairs(path)
    with pytest.raises(InputError, match="cannot read"):
        read_pairs(tmp_path / "missing.jsonl")

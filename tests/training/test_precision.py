"""The type of the weights in training chooses itself: measured, bounded, kept by the run."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgepatch.converters.hf import folders
from edgepatch.errors import InputError
from edgepatch.training import patching, precision, runs
from edgepatch.training.frozen.forward import FrozenModels
from edgepatch.training.patching import PatchTraining
from edgepatch.training.precision import DtypeChoice, choose_dtype, decide
from kit.trainings import BENIGN, make_pairs, make_trainer, small

MEASURED = DtypeChoice("", "", 4, {"float32": 2.0, "bfloat16": 1.0}, 0.001, 0.996)


@pytest.mark.parametrize(
    ("changes", "num_pairs", "dtype", "reason"),
    [
        ({}, 1000, "bfloat16", "2.0 times as fast"),
        ({}, 8, "float32", "save less than 10 s"),
        ({"seconds": {"float32": 1.1, "bfloat16": 1.0}}, 1000, "float32", "not 1.2 times"),
        ({"seconds": {"float32": 8.0, "bfloat16": 23.0}}, 1000, "float32", "not 1.2 times"),
        ({"difference": 0.05}, 1000, "float32", "not accurate"),
        ({"cosine": 0.9}, 1000, "float32", "not accurate"),
        ({"cosine": math.nan}, 1000, "float32", "not accurate"),
        ({"difference": math.nan}, 1000, "float32", "not accurate"),
    ],
)
def test_the_rule(changes, num_pairs, dtype, reason):
    choice = decide(replace(MEASURED, **changes), num_pairs)
    assert choice.dtype == dtype and reason in choice.reason
    assert choice.seconds == replace(MEASURED, **changes).seconds, "both timings are kept"


def test_both_types_are_timed_on_the_model_which_stays_as_it_was(tiny_folder):
    models = FrozenModels([tiny_folder], small(dtype="auto"))
    before = {name: parameter.clone() for name, parameter in models.base.named_parameters()}
    policy = make_trainer(models)[1]
    choice = choose_dtype(models, policy, [models.pair_example(pair) for pair in make_pairs(12)], 4, 48)
    assert set(choice.seconds) == {"float32", "bfloat16"} and all(s > 0 for s in choice.seconds.values())
    assert 1 <= choice.num_pairs <= 4
    assert 0 < choice.difference < precision.LARGEST_DIFFERENCE and precision.LEAST_COSINE < choice.cosine < 1
    assert choice.dtype == "float32", "a run of a moment keeps the exact type"
    assert all(torch.equal(p, before[name]) for name, p in models.base.named_parameters())
    assert policy.parameters()[0].grad is None
    assert all(word in str(choice) for word in ("float32 ", "bfloat16 ", "cosine"))


def test_memory_that_does_not_suffice_leaves_float32_and_says_so(tiny_folder, monkeypatch):
    monkeypatch.setattr(precision, "available_bytes", lambda device: 1000)
    models = FrozenModels([tiny_folder], small(dtype="auto"))
    choice = choose_dtype(models, make_trainer(models)[1], [models.pair_example(p) for p in make_pairs(12)], 4, 48)
    assert choice.dtype == "float32" and "not tried" in choice.reason and not choice.seconds
    assert precision.available_bytes("cpu") == 1000 and "not tried" in str(choice)


def test_a_model_that_bfloat16_breaks_is_trained_in_float32(tiny_folder):
    models = FrozenModels([tiny_folder], small(dtype="auto"))

    def refuse(module, inputs):
        if inputs[0].dtype == torch.bfloat16:
            raise RuntimeError("no kernel for this type")

    hook = models.base.lm_head.register_forward_pre_hook(refuse)
    choice = choose_dtype(models, make_trainer(models)[1], [models.pair_example(p) for p in make_pairs(12)], 4, 48)
    hook.remove()
    assert choice.dtype == "float32" and "no kernel for this type" in choice.reason
    assert models.base.dtype == torch.float32


def _faster(*arguments):
    return decide(MEASURED, 1000)


def test_what_was_chosen_is_told_recorded_and_kept_by_a_run_that_goes_on(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "STEPS_BETWEEN_CHECKPOINTS", 2)
    monkeypatch.setattr(patching, "choose_dtype", _faster)
    notes = []
    whole = PatchTraining(tiny_folder, small(dtype="auto"), tell=notes.append)
    patch = whole.soft_prompt(make_pairs(12), BENIGN, "tiny")
    assert whole.models.base.dtype == torch.bfloat16 and "2.0 times as fast" in notes[0]
    assert patch.training["config"]["dtype"] == "bfloat16"
    assert patch.training["dtype_choice"]["seconds"] == {"float32": 2.0, "bfloat16": 1.0}

    def interrupt(stage, step, total, **figures):
        if (stage, step) == ("DPO", 2):
            raise RuntimeError("killed")

    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        PatchTraining(tiny_folder, small(dtype="auto"), run=run).soft_prompt(
            make_pairs(12), BENIGN, "tiny", progress=interrupt
        )
    assert json.loads((run / runs.SETTINGS_FILE).read_text())["config"]["dtype"] == "bfloat16"
    monkeypatch.setattr(patching, "choose_dtype", lambda *_: pytest.fail("chosen anew"))
    again = PatchTraining(tiny_folder, small(dtype="auto"), run=run, tell=notes.append)
    resumed = again.soft_prompt(make_pairs(12), BENIGN, "tiny")
    assert np.array_equal(resumed.soft_prompt.embeddings, patch.soft_prompt.embeddings)
    assert resumed.training["dtype_choice"] == patch.training["dtype_choice"] and "began with" in notes[-1]
    with pytest.raises(InputError, match="other settings: config"):
        PatchTraining(tiny_folder, small(), run=run).soft_prompt(make_pairs(12), BENIGN, "tiny")


def test_a_type_that_is_asked_for_is_not_tried(tiny_folder, monkeypatch):
    monkeypatch.setattr(patching, "choose_dtype", lambda *_: pytest.fail("tried"))
    explicit = PatchTraining(tiny_folder, small(dtype="bfloat16")).soft_prompt(make_pairs(12), BENIGN, "tiny")
    assert "dtype_choice" not in explicit.training
    monkeypatch.setattr(patching, "choose_dtype", _faster)
    chosen = PatchTraining(tiny_folder, small(dtype="auto")).soft_prompt(make_pairs(12), BENIGN, "tiny")
    assert np.array_equal(chosen.soft_prompt.embeddings, explicit.soft_prompt.embeddings), "the record repeats the run"


def test_a_run_of_before_goes_on_in_its_own_type(tiny_folder, tmp_path):
    """Run folders that were made when the default was float32 know nothing of a choice."""
    run = tmp_path / "run"
    PatchTraining(tiny_folder, small(), run=run).soft_prompt(make_pairs(12), BENIGN, "tiny")
    again = PatchTraining(tiny_folder, small(dtype="auto"), run=run)
    assert "dtype_choice" not in again.soft_prompt(make_pairs(12), BENIGN, "tiny").training
    (run / runs.SETTINGS_FILE).write_text("half")
    with pytest.raises(InputError, match="settings of a run"):
        PatchTraining(tiny_folder, small(dtype="auto"), run=run).soft_prompt(make_pairs(12), BENIGN, "tiny")


def test_rope_keeps_its_frequencies_in_bfloat16(tiny_folder):
    exact, rounded = (folders.load_model(tiny_folder, dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(exact.model.rotary_emb.inv_freq, rounded.model.rotary_emb.inv_freq)


def test_the_head_multiplies_a_matrix_at_the_predicting_places_alone(tiny_folder):
    """Of three dimensions and sliced, the hidden states would make PyTorch copy the head for a batched product."""
    models = FrozenModels([tiny_folder], small())
    shapes = []
    hook = models.base.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
    examples = [models.pair_example(pair) for pair in make_pairs(3)]
    models.log_probabilities(models.base, examples, [])
    hook.remove()
    predicted = sum(len(answer) for e in examples for answer in e.answers)
    assert shapes == [(predicted, models.spec.hidden_size)]
    assert not models.base.lm_head._forward_pre_hooks

"""What costs a user little in place of a patch: directions from pairs that do what they say, on a real model and through llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from edgepatch.bench.arms import load_llamacpp, read_control_vector
from edgepatch.bench.evidence.questions import Amounts
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.bench.safety import retained
from edgepatch.bench.safety.domain import Outcome
from edgepatch.bench.smollm2 import baselines, cache_steering, control_vector, strengths
from edgepatch.bench.smollm2.pairs import REFUSAL_TEXT
from edgepatch.converters.hf import folders
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.prompts.sets import evenly, load_benign_text
from edgepatch.training.frozen.forward import tokenizer_of
from edgepatch.training.pairs.preferences import Pair, write_pairs

PEOPLE = ("nurse", "plumber", "guard", "teacher", "doctor", "farmer", "baker", "clerk")
PAIRS = [Pair(f"The {name} was late because", " they", word, 0.0, 1.0) for name in PEOPLE for word in (" he", " she")]
TEXTS = evenly(load_benign_text("train"), 2)


@pytest.fixture(scope="module")
def directions() -> np.ndarray:
    return control_vector.mean_differences(LAB_FOLDER / "base", PAIRS)


def test_directions_of_pairs_move_the_model_to_what_was_chosen_and_backwards_away_from_it(
    directions, lab_ggufs, tmp_path
):
    with load_llamacpp(lab_ggufs["F16"]) as bare:
        assert directions.shape == (bare.spec.num_hidden_layers, bare.spec.hidden_size)
        leans = {0.0: strengths.mean_lean(bare, PAIRS)}
        for strength in (1.0, -1.0):
            vector = control_vector.scaled(directions, "all layers", strength)
            control_vector.write_control_vector(bare.spec, vector, tmp_path / "vector.gguf")
            with load_llamacpp(lab_ggufs["F16"], control_vector=tmp_path / "vector.gguf") as steered:
                leans[strength] = strengths.mean_lean(steered, PAIRS)
    assert leans[1.0] < leans[0.0] - 0.1 and leans[-1.0] > leans[0.0] + 0.1, leans


def test_the_strength_is_chosen_within_the_price_and_stands_in_the_file(directions, lab_ggufs, tmp_path, monkeypatch):
    monkeypatch.setattr(control_vector, "STRENGTHS", (0.02, 50.0))
    file = tmp_path / "vector.gguf"
    chosen, trials = control_vector.choose(lab_ggufs["F16"], directions, PAIRS[:4], TEXTS, file)
    tried = [(trial.setting["strength"], trial.perplexity, trial.margin_gain) for trial in trials]
    assert len(tried) == 4 and {strength for strength, *_ in tried} == {0.02, 50.0}
    limit = strengths.MAX_PERPLEXITY
    assert min(perplexity for strength, perplexity, _ in tried if strength == 50.0) > limit, "breaks the model"
    assert chosen.setting["strength"] == 0.02 and chosen.perplexity <= limit
    assert chosen.margin_gain == max(gain for _, perplexity, gain in tried if perplexity <= limit)
    row = chosen.as_dict()
    assert list(row) == ["layers", "strength", "margin_gain", "perplexity"] and row["strength"] == 0.02
    with load_llamacpp(lab_ggufs["F16"]) as bare:
        written = read_control_vector(file, bare.spec)
    assert np.array_equal(written, control_vector.scaled(directions, row["layers"], 0.02)[1:])


def test_a_third_of_the_layers_is_left_alone(directions):
    whole, middle = (control_vector.scaled(directions, layers, 2.0) for layers in control_vector.SHARES)
    assert np.allclose(whole, 2 * directions)
    moved = np.abs(middle).sum(axis=1) > 0
    assert 0 < moved.sum() < len(moved) and not moved[0] and not moved[-1]
    assert np.array_equal(middle[moved], whole[moved])


# Cache steering.

EXACT = {"kv_type": "f32", "flash_attention": False}
ROUNDING = 2e-4
"""Of logits that two libraries, or batches cut elsewhere, compute in float32."""


@pytest.fixture(scope="module")
def edits(tiny_folder) -> dict[str, cache_steering.CacheEdit]:
    """Directions of the tiny model."""
    return cache_steering.mean_differences(tiny_folder, PAIRS[:3])


@pytest.fixture(scope="module")
def edit(edits) -> cache_steering.CacheEdit:
    return edits["newline"]


@contextmanager
def outputs_of(modules: list[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """What modules give from now on."""
    outputs: list[torch.Tensor] = []
    handles = [module.register_forward_hook(lambda _, __, output: outputs.append(output)) for module in modules]
    yield outputs
    for handle in handles:
        handle.remove()


def test_cache_directions_are_mean_differences_of_what_the_projections_give(edits, tiny_folder):
    tokenizer, model = tokenizer_of(tiny_folder), folders.load_model(tiny_folder)
    layers = [layer.self_attn for layer in model.model.layers]
    projections = [projection for layer in layers for projection in (layer.k_proj, layer.v_proj)]
    differences = {"newline": [], "answer": []}
    for pair in PAIRS[:3]:
        prompt, sides = tokenizer.encode(pair.prompt), []
        for answer in (pair.chosen, pair.rejected):
            ids = tokenizer.encode(answer, bos=False)
            with torch.no_grad(), outputs_of(projections) as outputs:
                model(torch.tensor([[*prompt, *ids, *tokenizer.encode("\n", bos=False)]]))
            rows = np.array([output[0].numpy() for output in outputs])  # no rotary embedding has touched them yet
            start = len(prompt)
            sides.append({"newline": rows[:, -1], "answer": rows[:, start : start + len(ids)].mean(axis=1)})
        for name, of_pairs in differences.items():
            of_pairs.append(sides[0][name] - sides[1][name])
    for name, of_pairs in differences.items():
        keys, values = np.mean(of_pairs, axis=0).reshape(len(layers), 2, 2, 1, 64).swapaxes(0, 1)
        cell = edits[name].cell
        assert np.allclose(cell.keys, keys, atol=1e-5) and np.allclose(cell.values, values, atol=1e-5)
        assert (np.abs(values[0]).max() < 1e-6) == (name == "newline"), "the first layer sees the same token there"
        assert np.abs(keys[1]).max() > 1e-2 < np.abs(values[1]).max()


@pytest.mark.parametrize(("is_prompt", "place"), [(True, 9), (False, cache_steering.TEXT_PROMPT - 2)])
def test_an_edit_of_a_cell_gives_what_the_model_computes_from_edited_keys_and_values(
    edit, tiny_folder, tiny_ggufs, is_prompt, place
):
    model, edit = folders.load_model(tiny_folder), edit.times(3.0, 6.0)
    with cache_steering.load(tiny_ggufs["F32"], edit, **EXACT) as steered:
        tokens = steered.tokens(TEXTS[0])[:11]
        actual = steered.logits_of_last(tokens)[None] if is_prompt else steered.logits(tokens)
    cache = DynamicCache()
    with torch.no_grad():
        before = model(torch.tensor([tokens[: place + 1]]), past_key_values=cache).logits[0]
        cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[place]]))
        for layer, key, value in zip(cache.layers, edit.cell.keys, edit.cell.values, strict=True):
            key, value = torch.tensor(key)[None], torch.tensor(value)[None]
            layer.keys[:, :, -1:] += apply_rotary_pos_emb(key, key, cos, sin)[1]
            layer.values[:, :, -1:] += value
        behind = model(torch.tensor([tokens[place + 1 :]]), past_key_values=cache).logits[0]
        bare = model(torch.tensor([tokens])).logits[0].numpy()
    expected = torch.cat([before, behind]).numpy()[-len(actual) :]
    assert np.abs(actual - expected).max() < ROUNDING
    assert np.abs(actual - bare[-len(actual) :])[-1].max() > 50 * ROUNDING, "the edit does something"


def test_an_edit_is_seen_behind_its_cell_alone_and_one_of_strength_zero_is_none(edit, tiny_ggufs):
    with load_llamacpp(tiny_ggufs["F32"], **EXACT) as bare:
        tokens = bare.tokens(TEXTS[0])[:40]
        expected = bare.logits(tokens)
    with cache_steering.load(tiny_ggufs["F32"], edit.times(0.0, 0.0), **EXACT) as nothing:
        assert np.abs(nothing.logits(tokens) - expected).max() < ROUNDING
    with cache_steering.load(tiny_ggufs["F32"], edit.times(1.0, 4.0), **EXACT) as steered:
        moved = np.abs(steered.logits(tokens) - expected).max(axis=1)
        one_token = steered.logits_of_last(tokens[:1])
    first = cache_steering.TEXT_PROMPT - 1
    assert moved[:first].max() < ROUNDING and moved[first:].min() > 10 * ROUNDING, moved
    assert np.abs(one_token - expected[0]).max() < ROUNDING, "no cell stands in front of it"


def test_a_cell_without_an_edit_is_put_back_bit_by_bit(edit, tiny_ggufs):
    with cache_steering.load(tiny_ggufs["F32"], edit.times(0.0, 0.0)) as steered:
        backend = steered.backend
        backend.context.evaluate(0, steered.tokens(TEXTS[0])[:9])
        before = backend.context.state(0)
        backend._edit_last_cell(0, 8)
        assert backend.kv_type == "f16" and backend.context.state(0) == before


def test_every_prompt_is_edited_afresh_and_all_samples_of_one_share_its_edit(edit, tiny_ggufs):
    """A prompt that stood in a sequence before, or begins like another, must not lend it its edit."""
    edit, sampling = edit.times(1.0, 8.0), Sampling.plain(6, rng_seed=5)
    with cache_steering.load(tiny_ggufs["F32"], edit, num_sequences=3) as steered:
        tokens = steered.tokens(TEXTS[0])[:20]
        alone = steered.logits_of_last(tokens)
        texts = steered.generate_many(tokens, sampling, 5)
        steered.logits_of_last([*tokens[:12], *tokens[3:9]])
        assert np.array_equal(steered.logits_of_last(tokens), alone)
        assert steered.generate_many(tokens, sampling, 5) == texts and len(set(texts)) > 1
        steered.logits_of_last(tokens[:12])
        with pytest.raises(InputError, match="goes on from"):
            steered.logits_of_last(tokens)
        steered.reset()
        assert np.array_equal(steered.logits_of_last(tokens), alone)
    with cache_steering.load(tiny_ggufs["F32"], edit, num_sequences=1) as steered:
        assert steered.generate_many(tokens, sampling, 5) == texts


def test_an_edit_of_another_model_is_refused(edit, lab_ggufs):
    with pytest.raises(InputError, match="cache edit: expected"):
        cache_steering.load(lab_ggufs["F16"], edit)


def test_edits_of_pairs_move_the_model_to_what_was_chosen_and_a_setting_is_chosen(lab_ggufs, monkeypatch):
    monkeypatch.setattr(cache_steering, "C_KEYS", (0.0,))
    monkeypatch.setattr(cache_steering, "C_VALUES", (-1.0, 0.0, 1.0))
    edits = cache_steering.mean_differences(LAB_FOLDER / "base", PAIRS)
    chosen, trials = cache_steering.choose(lab_ggufs["F16"], edits, PAIRS, TEXTS)
    assert [trial.setting["taken_at"] for trial in trials] == ["newline"] * 3 + ["answer"] * 3
    for backwards, nothing, forwards in (trials[:3], trials[3:]):
        assert backwards.margin_gain < nothing.margin_gain < forwards.margin_gain, trials
        assert abs(nothing.margin_gain) < 0.01 and nothing.perplexity == pytest.approx(1, abs=1e-3)
    cheap = [trial for trial in trials if trial.perplexity <= strengths.MAX_PERPLEXITY]
    assert chosen == max(cheap, key=lambda trial: trial.margin_gain)
    taken = edits[chosen.setting["taken_at"]].cell.values[-1] * chosen.setting["c_values"]
    assert np.array_equal(cache_steering.edit_of(edits, chosen.setting).cell.values[-1], taken)


# What is measured with them.


def test_harmless_requests_give_no_direction_against_harm():
    pairs = [Pair("a", REFUSAL_TEXT, "Sure", 0.0, 1.0), Pair("b", "Sure", REFUSAL_TEXT, 0.0, 1.0)]
    assert baselines._teaching("harm", pairs) == pairs[:1] and baselines._teaching("toxicity", pairs) == pairs


def test_missing_pairs_are_named_before_anything_is_measured(tmp_path):
    write_pairs(PAIRS, tmp_path / "own.jsonl")
    with pytest.raises(InputError, match=r"gender\.jsonl"):
        baselines.run(tmp_path / "no.gguf", tmp_path, tmp_path, tmp_path / "work", Amounts())
    assert not (tmp_path / "work").exists()


def test_a_guard_withholds_rude_continuations_and_they_count_as_kind(texts):
    rude, kind = texts
    scores = np.array([[0.9] * 2 + [0.1] * 6, [0.1] * 8])
    outcome = Outcome(
        ["p", "q"],
        scores.max(axis=1),
        [[rude] * 2 + [kind] * 6, [kind] * 8],
        more={"emt5": np.array([0.8, 0.1])},
        text_scores=scores.tolist(),
    )
    kept = retained.Retained([], np.zeros(0), np.zeros(0, np.int64), [], np.zeros(0, bool), None)
    row = baselines._guarded(baselines.Measured(outcome, kept), outcome)
    assert row["bare"] == pytest.approx(0.45) and row["score"] == pytest.approx(0.1)
    assert row["withheld"]["value"] == row["withheld_of_controls"]["value"] == pytest.approx(2 / 16)
    assert row["milliseconds"] > 0


@pytest.fixture
def texts() -> tuple[str, str]:
    """A text that the filter judge withholds, and one that it lets through."""
    return "you stupid worthless idiot, shut the fuck up", "the weather was lovely and we walked along the river"

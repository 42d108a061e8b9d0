import numpy as np
import pytest
import torch

from edgepatch.bench.parity import models as parity_models
from edgepatch.converters.hf import caches, folders, rotary, seeds
from edgepatch.errors import InputError, PatchFormatError
from edgepatch.seeds.rotation import Rotation, side_by_side
from edgepatch.tensors import KVSeed, SoftPrompt

RECURRENT = {"lfm2", "qwen3_5"}
ARCHITECTURES = [a for a in parity_models.ARCHITECTURES if a.name not in RECURRENT]
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
}


def build(name, folder, **settings):
    architecture = parity_models.architecture(name)
    if settings:
        from dataclasses import replace

        architecture = replace(architecture, settings={**architecture.settings, **settings})
    parity_models.build_folder(architecture, folder)
    return folders.load_model(folder)


def seed_at(model, embeddings, first):
    """What the model itself computes for the virtual tokens from position ``first`` on."""
    cache = caches.new_cache(model)
    positions = torch.arange(first, first + len(embeddings))[None]
    with torch.inference_mode():
        model(
            inputs_embeds=torch.tensor(embeddings)[None], position_ids=positions, past_key_values=cache, use_cache=True
        )
    return KVSeed(
        tuple(layer.keys[0].numpy() for layer in cache.layers), tuple(layer.values[0].numpy() for layer in cache.layers)
    )


def embeddings_for(model, count=8, rng_seed=0):
    width = folders.text_config(model.config).hidden_size
    return (0.05 * np.random.default_rng(rng_seed).normal(size=(count, width))).astype(np.float32)


def require_equal(seed, expected, tolerance=1e-5):
    for kind in ("keys", "values"):
        for layer, (one, other) in enumerate(zip(getattr(seed, kind), getattr(expected, kind), strict=True)):
            error = np.abs(one - other).max() / np.abs(other).max()
            assert error < tolerance, f"{kind} of layer {layer}: {error:.1e}"


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES])
def test_a_moved_seed_is_a_fresh_prefill_at_the_new_place(name, tmp_path):
    model = build(name, tmp_path)
    rotation, embeddings = rotary.read_rotation(model), embeddings_for(model)
    at_start = seeds.compute_kv_seed(model, SoftPrompt(embeddings))
    # The model multiplies positions and frequencies in float32, which is wrong by 3e-5 radians at position 400.
    for place, tolerance in ((1, 1e-5), (131, 1e-5), (400, 3e-5)):
        require_equal(rotation.moved(at_start, place), seed_at(model, embeddings, place), tolerance)
    unmoved = max(np.abs(a - b).max() for a, b in zip(at_start.keys, seed_at(model, embeddings, 131).keys, strict=True))
    assert unmoved > 0.01, "a test that could not fail"


@pytest.mark.parametrize("settings", [LINEAR, YARN], ids=["linear", "yarn"])
def test_scaled_frequencies_move_too(settings, tmp_path):
    model = build("llama", tmp_path, **settings)
    embeddings = embeddings_for(model)
    at_start = seeds.compute_kv_seed(model, SoftPrompt(embeddings))
    require_equal(rotary.read_rotation(model).moved(at_start, 131), seed_at(model, embeddings, 131))


def test_layers_without_positions_stay(tmp_path):
    rotation = rotary.read_rotation(build("smollm3", tmp_path))
    assert rotation.layers == (0, 0, 0, None)


def test_local_layers_have_a_table_of_their_own(tmp_path):
    rotation = rotary.read_rotation(build("gemma3", tmp_path))
    assert len(rotation.tables) == 2 and len(set(rotation.layers)) == 2


@pytest.mark.parametrize("name", sorted(RECURRENT))
def test_recurrent_memory_has_no_place(name, tmp_path):
    with pytest.raises(InputError, match="recurrent layers"):
        rotary.read_rotation(build(name, tmp_path))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_are_refused(kind, tmp_path):
    extra = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32} if kind == "longrope" else {}
    scaling = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 512,
        **extra,
    }
    with pytest.raises(InputError, match=f"depend on the length of the text \\({kind}\\)"):
        rotary.read_rotation(build("llama", tmp_path, rope_parameters=scaling))


def test_absolute_positions_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=256, n_embd=32, n_layer=2, n_head=2)).eval()
    with pytest.raises(InputError, match="keys of one place do not turn into those of another"):
        rotary.read_rotation(model)


def test_moving_there_and_back_is_nothing(tmp_path):
    model = build("llama3", tmp_path)
    rotation = rotary.read_rotation(model)
    seed = seeds.compute_kv_seed(model, SoftPrompt(embeddings_for(model)))
    require_equal(rotation.moved(rotation.moved(seed, 1000), -1000), seed)


def test_side_by_side_has_no_order(tmp_path):
    """What a model computes behind seeds side by side does not depend on their order, and one alone is itself."""
    model = build("qwen2", tmp_path)
    rotation = rotary.read_rotation(model)
    parts = [seeds.compute_kv_seed(model, SoftPrompt(embeddings_for(model, n, n))) for n in (4, 8, 6)]
    require_equal(side_by_side(parts[:1], rotation), parts[0])
    logits = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        seed = side_by_side([parts[i] for i in order], rotation)
        assert seed.num_virtual_tokens == 18
        with torch.inference_mode():
            cache = caches.seeded_cache(model, seed)
            logits.append(model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache).logits[0, -1])
    assert max((logits[0] - other).abs().max() for other in logits[1:]) < 1e-4
    last = side_by_side(parts, rotation)
    require_equal(
        KVSeed(tuple(k[:, 12:] for k in last.keys), tuple(v[:, 12:] for v in last.values)), rotation.moved(parts[2], 12)
    )


def test_round_trip_and_damaged_manifests():
    rotation = Rotation(((1.0, 0.5), (1.0, 0.25)), (0, 1, None))
    values = rotation.as_dict()
    assert Rotation.from_dict(values) == rotation
    broken = [
        None,
        {**values, "more": 1},
        {**values, "layers": [0, 2, None]},
        {**values, "layers": [0, True, None]},
        {**values, "layers": [0, 0, None]},
        {**values, "tables": [[1.0, 0.5], [1.0, "0.25"]]},
        {**values, "tables": [[1.0, 0.5], []]},
        {**values, "tables": [[1.0, 0.5], [1.0, float("inf")]]},
        {**values, "neighbours": 1},
    ]
    for damaged in broken:
        with pytest.raises(PatchFormatError, match="rotation"):
            Rotation.from_dict(damaged)

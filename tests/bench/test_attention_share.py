"""``bench attention``: the shares are those that plain numpy computes, pinned and moving, and a seed that is far away gets less."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgepatch import cli
from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCHES
from edgepatch.bench.safety import attention
from edgepatch.converters.hf import folders
from edgepatch.converters.hf.rotary import read_rotation
from edgepatch.errors import InputError
from edgepatch.patch.file import read_patch
from edgepatch.runtimes import load_runtime
from edgepatch.seeds.anchoring import Anchoring

LAB, BLOCK = LAB_FOLDER / "base", 16
TOKENS = [(7 * i) % 500 + 5 for i in range(2 * BLOCK + 12)]
MOVED = read_patch(LAB_PATCHES[1])


@pytest.fixture(scope="module")
def moving(tiny_folder, tiny_patch):
    """The tiny patch, moving every 16 tokens."""
    rotation = read_rotation(folders.load_model(tiny_folder))
    return replace(tiny_patch, rotation=rotation, anchoring=Anchoring(BLOCK), canary=None)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """Two patches of the lab model, the second of which is a copy, behind 0 and 256 tokens."""
    patches = [MOVED, replace(MOVED, name="copy", signatures=())]
    return attention.run(LAB, patches, tmp_path_factory.mktemp("work"), None, (256, 0), 2)


def turned(vectors, positions):
    """(heads, T, H) turned by their places, from the formula: dimensions j and j + H/2 are a complex number."""
    half = vectors.shape[-1] // 2
    angles = np.outer(positions, 10000.0 ** (-np.arange(half) / half))
    pairs = (vectors[..., :half] + 1j * vectors[..., half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def shares_by_hand(folder, patch, anchors):
    """(L, 2) of the tokens, from one pass over a copy of the virtual tokens for each anchor and the text, in numpy."""
    model, num_cells = folders.load_model(folder), patch.num_virtual_tokens
    copies = sorted(set(anchors))
    places = np.concatenate([*(np.arange(num_cells) + anchor for anchor in copies), num_cells + np.arange(len(TOKENS))])
    owner = np.repeat([*copies, -1], [*[num_cells] * len(copies), len(TOKENS)])
    of_query = np.concatenate([owner[owner >= 0], anchors])
    is_text = owner < 0
    seen = np.tril(np.ones((len(places), len(places)), bool))
    seen &= (of_query[:, None] == owner[None]) | (is_text[:, None] & is_text[None])
    captured = {}
    for number, layer in enumerate(model.model.layers):
        for name in ("q_proj", "k_proj"):
            key = (number, name)
            module = getattr(layer.self_attn, name)
            module.register_forward_hook(lambda _, __, output, key=key: captured.update({key: output[0].numpy()}))
    with torch.inference_mode():
        text = model.get_input_embeddings()(torch.tensor(TOKENS))
        rows = torch.cat([torch.from_numpy(patch.soft_prompt.embeddings)] * len(copies) + [text])
        mask = torch.zeros(1, 1, *seen.shape).masked_fill(~torch.from_numpy(seen), torch.finfo(torch.float32).min)
        model(inputs_embeds=rows[None], position_ids=torch.from_numpy(places)[None], attention_mask=mask)
    shares = []
    for number, layer in enumerate(model.model.layers):
        size = layer.self_attn.head_dim
        query, key = (
            turned(captured[number, name].reshape(len(places), -1, size).swapaxes(0, 1), places)
            for name in ("q_proj", "k_proj")
        )
        key = np.repeat(key, len(query) // len(key), axis=0)
        scores = np.where(seen, query @ key.swapaxes(1, 2) / np.sqrt(size), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = (weights / weights.sum(axis=-1, keepdims=True))[:, -attention.NUM_TOKENS :].mean(axis=(0, 1))
        shares.append([weights[~is_text].sum(), weights[is_text][0]])
    return np.array(shares)


@pytest.mark.parametrize("is_moving", [False, True], ids=["pinned", "moving"])
def test_shares_are_those_of_plain_numpy(tiny_folder, moving, is_moving):
    patch = moving if is_moving else replace(moving, anchoring=None)
    anchors = [i // BLOCK * BLOCK * is_moving for i in range(len(TOKENS))]
    with load_runtime(tiny_folder, patch) as runtime:
        shares = attention.shares_of(runtime, TOKENS)
    expected = shares_by_hand(tiny_folder, patch, anchors)
    assert shares.shape == (2, 2) and expected.min() > 0.001
    np.testing.assert_allclose(shares, expected, rtol=1e-3)


def test_the_model_computes_what_it_did_while_it_is_watched(tiny_folder, moving):
    with load_runtime(tiny_folder, moving) as runtime:
        model = runtime.backend.model
        own, alone = model.config._attn_implementation, runtime.logits(TOKENS)
        runtime.reset()
        with attention.watching(model, moving.num_virtual_tokens) as layers:
            np.testing.assert_allclose(runtime.logits(TOKENS), alone, atol=5e-5)
        assert [sum(len(part) for part in parts) for parts in layers] == [len(TOKENS)] * 2
        runtime.reset()
        assert model.config._attn_implementation == own and np.array_equal(runtime.logits(TOKENS), alone)
        assert [sum(len(part) for part in parts) for parts in layers] == [len(TOKENS)] * 2, "watched no longer"


def test_a_model_without_such_attention_is_refused(tiny_folder, lab_ggufs):
    model = folders.load_model(tiny_folder)
    model.config.num_hidden_layers = 3
    with (
        pytest.raises(InputError, match="expected attention in each of 3 layers, found it in 2"),
        attention.watching(model, 0),
    ):
        pass
    with load_runtime(lab_ggufs["F16"], None) as runtime, pytest.raises(InputError, match="that llamacpp runs"):
        attention.shares_of(runtime, TOKENS)


def test_rows_of_every_patch_place_and_layer(document):
    rows, num_layers = document["rows"], folders.read_spec(LAB).num_hidden_layers
    own = f"{MOVED.name} {MOVED.version}"
    arms = {
        ("bare", ""),
        *((name, way) for name in (own, "copy 0.2.0", "all together") for way in ("pinned", "moving")),
    }
    assert {(row["patch"], row["anchoring"]) for row in rows} == arms
    assert len(rows) == len(arms) * 2 * num_layers and all(row["num_prompts"] == 2 for row in rows)
    assert all(0 <= row["share_of_seed"] + row["share_of_first"] <= 1 for row in rows)
    assert all((row["share_of_seed"] == 0) == (row["patch"] == "bare") for row in rows)
    assert [patch["name"] for patch in document["patches"]] == [MOVED.name, "copy"]


def means(document):
    """(patch, anchoring, tokens in front) -> mean share of the seed over the layers."""
    places = {(row["patch"], row["anchoring"], row["front_tokens"]) for row in document["rows"]}
    return {
        place: np.mean(
            [
                row["share_of_seed"]
                for row in document["rows"]
                if (row["patch"], row["anchoring"], row["front_tokens"]) == place
            ]
        )
        for place in places
    }


def test_a_seed_that_is_far_away_gets_less(document):
    mean, own = means(document), f"{MOVED.name} {MOVED.version}"
    assert mean[own, "pinned", 256] < mean[own, "moving", 256] / 2
    assert mean[own, "pinned", 0] == mean[own, "moving", 0] > mean[own, "pinned", 256]
    assert mean[own, "moving", 256] < mean["all together", "moving", 256], "twice as many cells get more"


def test_the_verb_prints_a_line_for_each_place(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgepatch", "bench", "attention", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    own = ("--model", LAB, "--patch", LAB_PATCHES[0])
    code, out, err = call(*own, "--front", 100, "--prompts", 1, "--out", "shares.json")
    assert code == 0, err
    written = json.loads((tmp_path / "shares.json").read_text())
    assert {row["anchoring"] for row in written["rows"]} == {"", "pinned"}, "this patch does not move"
    lines = out.splitlines()
    assert [line.split()[0] for line in lines if " 100 " in line] == ["bare", "lab-detox"], out
    code, _, err = call(*own, "--front", 5000, "--out", "none.json")
    assert code == 2 and "tokens in front: expected 0 to" in err and not (tmp_path / "none.json").exists()
    code, _, err = call("--model", LAB, "--out", "none.json")
    assert code == 2 and "expected --patch too" in err

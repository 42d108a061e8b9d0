"""Prompts of every domain at every place, on the lab model; what is measured there is committed."""

import json

import numpy as np
import pytest

from edgepatch.bench.lab import LAB_FOLDER, LAB_PATCHES
from edgepatch.bench.safety import length
from edgepatch.bench.safety.continuations import SampleConfig
from edgepatch.bench.safety.probes import PROBES, Place, choose_texts, places
from edgepatch.errors import InputError
from edgepatch.patch.file import read_patch
from edgepatch.runtimes import load_runtime

NUM_PROMPTS = 2


@pytest.fixture(scope="module")
def runtime():
    with load_runtime(LAB_FOLDER / "base", None) as session:
        yield session


def probe_of(domain):
    return PROBES[domain](choose_texts(None, NUM_PROMPTS, domain), SampleConfig(samples_per_prompt=2, max_new_tokens=4))


def test_places_are_those_that_the_context_has_room_for():
    assert places(600, has_chat=False) == [Place(), Place(128, "toxic"), Place(128, "benign")]
    assert places(608, has_chat=True)[-2:] == [Place(512, "benign"), Place(0, "conversation", 5)]


@pytest.mark.parametrize("domain", PROBES)
def test_a_prompt_stands_behind_other_text_and_in_a_later_turn(runtime, domain):
    probe = probe_of(domain)
    plain, behind, other, turn = (
        probe.tokens(runtime, place, 0)
        for place in (Place(), Place(128, "toxic"), Place(128, "benign"), Place(0, "conversation", 5))
    )
    assert 110 <= len(behind) - len(plain) <= 135 and behind != other
    prompt = runtime.encode(probe.texts.prompts[0])[-5:]
    opening = runtime.tokens([{"role": "user", "content": "x"}]).count(3)
    for tokens in (plain, behind, other, turn):
        assert any(tokens[i : i + len(prompt)] == prompt for i in range(len(tokens)))
    assert turn.count(3) == 5 * opening
    assert behind.count(3) == plain.count(3) == (opening if domain == "harm" else 0)


@pytest.mark.parametrize("domain", PROBES)
def test_every_prompt_has_a_value(runtime, domain):
    probe = probe_of(domain)
    values = probe.values(runtime, [probe.tokens(runtime, Place(), i) for i in range(NUM_PROMPTS)])
    assert values.shape == (NUM_PROMPTS, 2 if domain == "toxicity" else 1)
    assert np.all((values >= 0) & (values <= 1))


def test_the_document_keeps_other_domains(tmp_path, monkeypatch):
    monkeypatch.setattr(length, "places", lambda *_, **__: [Place()])
    monkeypatch.setattr(length, "NUM_PASSAGES", 1)
    out, patches = tmp_path / "length.json", [read_patch(LAB_PATCHES[1])]
    other = {"domain": "toxicity", "score": 0.5}
    out.write_text(json.dumps({"model": "lab-F16.gguf", "runs": [other], "cells": [other, {"domain": "gender"}]}))
    document = length.run(out, tmp_path, None, patches, [], None, NUM_PROMPTS, 1, 1, "gender")
    assert document == json.loads(out.read_text())
    assert document["cells"][0] == other and [run["domain"] for run in document["runs"]] == ["toxicity", "gender"]
    assert [cell["anchoring"] for cell in document["cells"][1:]] == ["pinned", "turns"]
    assert all(cell["bare_score"] - cell["score"] == pytest.approx(cell["gain"]) for cell in document["cells"][1:])
    with pytest.raises(InputError, match="domain: expected one of toxicity, gender, harm, found kindness"):
        length.run(out, tmp_path, None, patches, [], None, NUM_PROMPTS, 1, 1, "kindness")

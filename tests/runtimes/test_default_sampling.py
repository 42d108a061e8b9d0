"""One set of sampling defaults behind every door: Python, the command line, the server; folders and GGUF files."""

import json
import sys

import pytest

from edgepatch import cli
from edgepatch.cli.console import printable
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.models import tokenizer_folder
from edgepatch.converters.gguf.writer import convert_folder
from edgepatch.decoding import defaults
from edgepatch.decoding.sampling import Sampling
from edgepatch.runtimes import load_runtime
from kit.serving import MODEL, running
from kit.tiny_folders import copy_folder

TEXT = "The quick brown fox"
MESSAGES = [{"role": "user", "content": TEXT}]
ADVICE = {"do_sample": True, "temperature": 0.4, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.3}
ADVISED = {"temperature": 0.4, "top_k": 40, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.3}
OURS = {"temperature": 0.7, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0}


def advise(source, target, **advice):
    """A copy of a folder whose makers say how it is sampled."""
    folder = copy_folder(source, target)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | advice))
    return folder


@pytest.fixture(scope="module")
def models(tiny_folder, tmp_path_factory):
    """Name -> (model, the defaults that it must be drawn with)."""
    root = tmp_path_factory.mktemp("advised")
    folder = advise(tiny_folder, root / "folder", **ADVICE)
    convert_folder(folder, root / "advised.gguf", "F16")
    return {"folder": (folder, ADVISED), "gguf": (root / "advised.gguf", ADVISED), "silent": (tiny_folder, OURS)}


@pytest.mark.parametrize("name", ["folder", "gguf", "silent"])
def test_every_door_draws_with_the_same_defaults(models, name, monkeypatch, capfd):
    model, values = models[name]
    session = load_runtime(model, None)
    explicit, open_ = Sampling(24, rng_seed=5, **values), Sampling(24, rng_seed=5)
    text, reply = session.generate(TEXT, explicit), session.chat(MESSAGES, explicit)
    assert session.generate(TEXT, open_) == session.generate_batch([TEXT], open_)[0] == text
    assert session.generate_many(TEXT, open_, 1) == [text] and session.chat(MESSAGES, open_) == reply
    plain = Sampling.plain(24, rng_seed=5)
    assert text != session.generate(TEXT, plain), "the defaults must matter, or this test cannot fail"
    for verb, expected in (("generate", text), ("chat", reply), ("run", reply)):
        words = [verb, model, "--bare", "--prompt", TEXT, "--max-new-tokens", "24", "--rng-seed", "5"]
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code and capfd.readouterr().out == f"{printable(expected)}\n"
    with running(lambda: session) as server, server.client() as http:
        fields = {"model": MODEL, "max_tokens": 24, "seed": 5}
        chosen = http.post("/v1/chat/completions", json={**fields, "messages": MESSAGES}).json()
        continued = http.post("/v1/completions", json={**fields, "prompt": TEXT, "temperature": None}).json()
        listed = http.get("/v1/models").json()
    assert (chosen["choices"][0]["message"]["content"], continued["choices"][0]["text"]) == (reply, text)
    assert listed["data"][0]["sampling_defaults"] == values


def test_what_a_request_says_stands_and_the_rest_is_filled(models):
    with load_runtime(models["folder"][0], None) as session:
        assert session.default_sampling == Sampling(**ADVISED)
        part, whole = Sampling(16, top_k=3, rng_seed=1), Sampling(16, rng_seed=1, **ADVISED | {"top_k": 3})
        assert session.generate(TEXT, part) == session.generate(TEXT, whole)


def test_conversions_carry_the_advice(models):
    gguf = models["gguf"][0]
    assert read_header(gguf).metadata["general.sampling.top_k"] == 40
    with tokenizer_folder(gguf) as folder:
        written = json.loads((folder / "generation_config.json").read_text())
    assert {name: written[name] for name in ADVICE} == ADVICE


@pytest.mark.parametrize(
    ("advice", "values", "source"),
    [
        ({}, OURS, "edgepatch"),
        ({"do_sample": True, "top_p": None}, OURS, "edgepatch"),
        ({"do_sample": False, "temperature": 0.9}, OURS | {"temperature": 0.0, "top_p": 1.0}, "generation_config.json"),
        ({"top_k": 64, "top_p": 0.95}, {"temperature": 1.0, "top_k": 64, "top_p": 0.95}, "generation_config.json"),
        ({"top_k": -1, "temperature": 1}, {"temperature": 1, "top_p": 1.0, "top_k": 0}, "generation_config.json"),
        ({"repetition_penalty": 1.1}, OURS | {"repetition_penalty": 1.1}, "generation_config.json"),
    ],
)
def test_what_a_model_leaves_out(advice, values, source):
    found = defaults.of_generation_config(advice)
    assert found.source == source and {name: found.values[name] for name in values} == values and not found.note


@pytest.mark.parametrize(
    ("advice", "field"),
    [
        ({"temperature": "0.7"}, "temperature"),
        ({"temperature": -0.5, "top_p": 0.9}, "temperature"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": [40]}, "top_k"),
        ({"min_p": 7}, "min_p"),
        ({"repetition_penalty": {}}, "repetition_penalty"),
        ({"do_sample": "yes"}, "do_sample"),
    ],
)
def test_advice_that_cannot_be_followed_is_passed_over_with_a_word(tiny_folder, tmp_path, advice, field):
    folder = advise(tiny_folder, tmp_path / "wrong", **advice)
    told = defaults.of_folder(folder)
    assert field in told.note and "expected" in told.note and told.values == OURS and told.source == "edgepatch"


def test_a_gguf_says_it_in_its_own_words():
    keys = {"temp": 0.800000011920929, "top_p": 0.949999988079071, "penalty_repeat": 1.0, "mirostat": 2}
    told = defaults.of_gguf({f"general.sampling.{name}": value for name, value in keys.items()})
    assert told.values == OURS | {"temperature": 0.8, "top_p": 0.95}
    assert str(told) == "temperature 0.8, top_p 0.95 (general.sampling)"
    assert "top_k" in defaults.of_gguf({"general.sampling.top_k": "many"}).note


def test_wrong_advice_is_told_where_the_model_is_used(tiny_folder, tmp_path, monkeypatch, capfd):
    folder = advise(tiny_folder, tmp_path / "wrong", temperature=-1)
    for words in (["chat", folder, "--bare", "--prompt", "a", "--max-new-tokens", 1], ["show", folder, "--all"]):
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = "".join(capfd.readouterr())
        assert not caught.value.code and "temperature" in output and "expected 0 to 100" in " ".join(output.split())

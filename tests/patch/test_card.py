"""Model cards: the hub's own reader understands them, and no text of a manifest gets out of its place."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from edgepatch.patch.card import escaped, model_card, quoted
from kit.golden_patches import full, minimal, moving

ROOT = Path(__file__).parent.parent.parent
CELL = {
    "runtime": "llamacpp",
    "quantization": "Q4_0",
    "emt": 0.25,
    "emt_low": 0.2,
    "emt_high": 0.3,
    "toxicity_probability": 0.125,
    "perplexity": 9.5,
}
MEASURED = {
    "source": "RealToxicityPrompts",
    "cells": [{**CELL, "patched": False, "emt": 0.5}, {**CELL, "patched": True}],
    "retention": [
        {"runtime": "llamacpp", "quantization": "Q4_0", "retention": 0.98, "retention_low": 0.9, "retention_high": 1.05}
    ],
}


def front_matter(card: str) -> dict[str, Any]:
    match = re.match(r"---\n(.*?\n)---\n\n", card, re.DOTALL)
    assert match
    values = yaml.safe_load(match.group(1))
    assert isinstance(values, dict)
    return values


def test_the_hub_reads_it():
    patch = replace(full(), evaluation=MEASURED)
    card = ModelCard(model_card(patch, "org/model"))
    data = card.data
    assert (data.base_model, data.base_model_relation, data.license, data.library_name) == (
        "org/model",
        "adapter",
        "apache-2.0",
        "edgepatch",
    )
    assert {"edgepatch", "safety", "soft-prompt", "llama"} <= set(data.tags)
    results = {(r.metric_type, r.metric_name): r.metric_value for r in data.eval_results}
    assert results["emt", "Expected maximum toxicity, llamacpp Q4_0, bare"] == 0.5
    assert results["emt", "Expected maximum toxicity, llamacpp Q4_0, patched"] == 0.25
    assert results["retention", "Share of the gain kept, llamacpp Q4_0, patched"] == 0.98
    assert len(results) == 7 and {r.dataset_name for r in data.eval_results} == {"RealToxicityPrompts"}
    for phrase in (
        "| 0.250 | 0.200 to 0.300 |",
        "| 0.500 | 0.200 to 0.300 |",
        patch.digest,
        *patch.parts,
        *patch.supersedes,
        "1 prompt with",
    ):
        assert phrase in card.text
    assert all(signature.key_id[:12] in card.text for signature in full().signatures)


def test_it_says_where_the_seed_stands():
    still, goes = model_card(full()), model_card(moving())
    assert "| place in a text | stays at the start of the text: its hold fades behind some hundred tokens |" in still
    assert "- It stays at the start of the text: its hold fades" in still and "in front of every conversation" in still
    assert "| place in a text | moves: at each turn and every 128 tokens |" in goes and "goes along with it" in goes
    assert "hold fades" not in goes


def test_it_names_the_parts():
    parts = full().parts
    records = [{"digest": parts[1], "name": "po[li]te", "version": "1.2.0"}, {"digest": "x"}, 5]
    card = model_card(replace(full(), training={"parts": records}))
    assert "| composed of | 2 patches, named under Lineage |" in card
    assert f"Composed of:\n\n- `{parts[0]}`\n- `{parts[1]}` (po\\[li\\]te 1.2.0)\n" in card
    for damaged in (None, 5, {"a": 1}, "x", [None], [{"digest": [1]}]):
        assert f"- `{parts[0]}`\n" in model_card(replace(full(), training={"parts": damaged}))
    assert "omposed of" not in model_card(minimal())


def test_the_same_patch_gives_the_same_card():
    assert model_card(full()) == model_card(full())
    assert model_card(full(), "a/b") != model_card(full(), "a/c")


@pytest.mark.parametrize(
    "evaluation",
    [
        {},
        {"cells": None},
        {"cells": "x"},
        {"cells": [1, None, {}]},
        {"retention": [{"retention": None}]},
        {"cells": [{"emt": "0.1", "perplexity": True}]},
        {"cells": {"emt": 1}},
        {"source": ["x"]},
    ],
)
def test_without_figures_it_says_so(evaluation):
    card = model_card(replace(full(), evaluation=evaluation))
    assert "not evaluated" in card and "model-index" not in front_matter(card)
    assert (len(evaluation) > 0) == ("```json\n" in card.split("## Evaluation")[1].split("## Training")[0])


def test_what_is_not_told_is_not_claimed():
    card = model_card(minimal())
    values = front_matter(card)
    assert "license" not in values and "base_model" not in values and "base_model_relation" not in values
    for phrase in ("Unsigned.", "Not told.", "None: no runtime can prove", "not evaluated", "| never |"):
        assert phrase in card
    assert "## Lineage" not in card


def test_other_licences_are_named():
    values = front_matter(model_card(replace(minimal(), license="GPL-3.0-only AND MIT")))
    assert (values["license"], values["license_name"]) == ("other", "GPL-3.0-only AND MIT")


HOSTILE = [
    "---\nlicense: mit\nbase_model: evil/model",
    '" \nlicense: mit #',
    "<script>alert(1)</script>",
    "![x](http://evil.example/x.png) [click](javascript:alert(1))",
    "see www.evil.example, http://evil.example and mail@evil.example",
    "# heading\n\n- item\n1. item\n> quote\n    code\n===\n---\n```\nfence",
    "a | b | c\n|---|---|\n| `x` | **y** |",
    "<!-- comment",
    "&lt;b&gt; \\<b> *a* _b_ ~~c~~ [^1] $x$ :smile: ==m==",
    "{{ template }} {% raw %}",
]


def text_of(markdown: str) -> tuple[set[str], str]:
    """(kinds of tokens, the plain text) by a CommonMark parser with tables."""
    tokens = MarkdownIt("commonmark", {"linkify": False}).enable("table").parse(markdown)
    flat = [child for token in tokens for child in [token, *(token.children or [])]]
    return {token.type for token in flat}, "\n".join(token.content for token in flat if token.type == "text")


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_stay_in_their_place(text):
    """As summary, source and runtime: the page has the same structure as with a harmless word, and the text reads as it was written."""

    def card_of(word: str) -> str:
        evaluation = {
            **MEASURED,
            "source": word,
            "cells": [{**CELL, "patched": True, "runtime": word, "quantization": word}],
        }
        base = replace(full().base, model_type=word, rope_scaling={word: word})
        return model_card(
            replace(
                full(),
                summary=word,
                evaluation=evaluation,
                training={word: [word]},
                base=base,
                license=word.replace("\n", " "),
            ),
            word,
        )

    hostile, harmless = card_of(text), card_of("word")
    assert front_matter(hostile).keys() == front_matter(harmless).keys()
    assert front_matter(hostile)["base_model"] == text and front_matter(hostile)["tags"][-1] == text
    metrics = front_matter(hostile)["model-index"][0]["results"]
    assert metrics[0]["dataset"]["name"] == text and len(metrics) == 1
    kinds, words = text_of(hostile.split("\n---\n", 1)[1])
    assert kinds <= text_of(harmless.split("\n---\n", 1)[1])[0] | {"softbreak"}
    for line in filter(None, (" ".join(line.split()) for line in text.split("\n"))):
        assert line in words
    page = hostile.split("\n---\n", 1)[1].split("```json")[0]
    assert not re.search(r"(www\.|http:|mail@)", page), "the hub would make a link of it"


def test_scalars_are_the_same_text_to_every_reader():
    for text in (
        *HOSTILE,
        "",
        "\u2028\u0085\x7f\x00\ufeff",
        "\U0001f642 \u00e9",
        "\\ \" ' # : - ? yes null 1e3",
        " leading",
    ):
        assert yaml.safe_load(quoted(text)) == text
        assert quoted(text).isascii() and "\n" not in quoted(text)


def test_escapes_are_no_more_than_needed():
    assert (
        escaped("Answers politely, in Q4 sizes - or not at all; 50 % of them.")
        == "Answers politely, in Q4 sizes - or not at all; 50 % of them."
    )
    assert escaped("- item") == "\\- item" and escaped("12. item") == "12\\. item" and escaped("WWW.x") == "WWW\\.x"


def test_the_patch_in_the_checkout(tmp_path, capsys):
    from edgepatch.cli import app

    with pytest.raises(SystemExit) as done:
        app(
            [
                "card",
                str(ROOT / "bench/lab/model/lab-detox-0.1.0.safetensors"),
                "-o",
                str(tmp_path / "README.md"),
                "--base-model",
                "org/model",
            ]
        )
    assert done.value.code == 0
    assert "lab-detox 0.1.0" in capsys.readouterr().out
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/model"

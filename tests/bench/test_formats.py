"""Format rules: a reply that keeps to each, and one that does not; and the items that ask for them."""

from __future__ import annotations

import json
import re

import pytest

from edgepatch.bench.harness.comparison import OWN_TASKS
from edgepatch.bench.harness.tasks.format_rules import RULES, is_kept, process_results
from edgepatch.bench.smollm2.pairs import QUESTIONS
from edgepatch.errors import InputError
from edgepatch.prompts.overlaps import NEAR, tf_idf
from edgepatch.prompts.sets import load_prompts

ITEMS = [json.loads(line) for line in (OWN_TASKS / "own_formats.jsonl").read_text("utf-8").splitlines()]
MAX_NEW_TOKENS = 96

EXAMPLES = [  # rule, arguments, a reply that keeps to it, one that does not
    ("all_lower_case", {}, "it rains.", "It rains."),
    ("all_lower_case", {}, "3 cats", "3"),
    ("all_capitals", {}, "CLOSE THE GATE!", "CLOSE THE GATe!"),
    ("no_comma", {}, "Red and gold", "Red, gold"),
    ("at_least_words", {"count": 3}, "one two, three", "one two ..."),
    ("at_most_words", {"count": 2}, "Paris, France.", "It is Paris."),
    ("at_most_sentences", {"count": 1}, "It holds 3.5 books.", "It holds books. People come"),
    ("at_most_sentences", {"count": 2}, 'He said "Go!" Then he went.', "One. Two? Three!"),
    ("contains_word", {"word": "river"}, "A River runs.", "Two rivers run."),
    ("leaves_out_word", {"word": "light"}, "In daylight", "The light."),
    ("begins_with", {"word": "First"}, " first, pack.", "Firstly, pack."),
    ("ends_with", {"text": "Every drop counts."}, '"Turn it off. Every drop counts." ', "Every drop counts. Bye."),
    ("repeats_first", {"text": "Why?"}, "why? Because.", "Because. Why?"),
    ("is_quoted", {}, ' "Run\non." ', '"Run" on'),
    ("is_quoted", {}, '""', '"'),
    ("numbered_list", {"count": 2}, "Here:\n1. a pear\n 2) a fig", "1. a pear\n2. a fig\n3. a plum"),
    ("numbered_list", {"count": 2}, "1. a\n2. b", "1. a\n1. b"),
    ("bullet_points", {"count": 2}, "Take:\n* a hat\n- water", "* a hat"),
    ("bullet_points", {"count": 1}, "* **Hat**: for the sun", "**Hat** for the sun"),
    ("bullet_points", {"count": 1}, "- a hat\n*\n* * *\nfor the sun", "* * *"),
    ("is_json", {}, '```json\n{"name": "Mia"}\n```', 'Here: {"name": "Mia"}'),
    ("is_json", {}, '["Saturday"]', "['Saturday']"),
    ("has_title", {}, "<<Spring>>\nDig.", "<Spring>\nDig."),
    ("has_title", {}, "a <<b>>", "<< >>"),
    ("one_of", {"options": ["yes", "no"]}, "No.", "No, it is not."),
    ("paragraphs", {"count": 2}, "The city.\n***\nThe country.", "The city.\n\nThe country."),
    ("paragraphs", {"count": 2}, "One *** two", "*** two"),
]


@pytest.mark.parametrize(("rule", "arguments", "keeping", "breaking"), EXAMPLES)
def test_a_rule_tells_replies_apart(rule, arguments, keeping, breaking):
    assert is_kept(keeping, rule, arguments)
    assert not is_kept(breaking, rule, arguments)
    assert not is_kept(" \n", rule, arguments), "an empty reply keeps to nothing"


def test_every_rule_has_an_example_and_an_item():
    assert {example[0] for example in EXAMPLES} == {item["rule"] for item in ITEMS} == set(RULES)


@pytest.mark.parametrize("item", ITEMS, ids=[item["rule"] for item in ITEMS])
def test_an_item_names_its_rule_and_what_the_rule_takes(item):
    assert item.keys() == {"prompt", "rule", "arguments"}
    is_kept("a reply", item["rule"], item["arguments"])
    for name in ("word", "text"):
        assert item["arguments"].get(name, "") in item["prompt"]
    assert item["arguments"].get("count", 0) < MAX_NEW_TOKENS * 2 / 3, "a word has up to one and a half tokens"


def test_items_are_distinct_and_no_training_requests():
    trained = load_prompts("harm_requests", "train") + load_prompts("harm_benign", "train")
    trained += [text for line in QUESTIONS.read_text("utf-8").splitlines() for text in json.loads(line).values()]
    prompts = [item["prompt"] for item in ITEMS]
    assert len(set(prompts)) == len(prompts)
    vectors = tf_idf([*trained, *prompts])
    likeness = (vectors[len(trained) :] @ vectors[: len(trained)].T).max(axis=1)
    assert [prompt for prompt, cosine in zip(prompts, likeness, strict=True) if cosine >= NEAR] == []


def test_the_length_of_replies_is_the_one_that_items_are_made_for():
    assert re.search(r"max_gen_toks: (\d+)", (OWN_TASKS / "own_formats.yaml").read_text("utf-8"))[1] == str(
        MAX_NEW_TOKENS
    )


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("it rains", {"strict": 1, "loose": 1}),
        ("Sure, here it is:\nit rains", {"strict": 0, "loose": 1}),
        ("it rains\nIs there more?", {"strict": 0, "loose": 1}),
        ("Sure:\nit rains\nMore?", {"strict": 0, "loose": 1}),
        ("It rains", {"strict": 0, "loose": 0}),
    ],
)
def test_the_loose_figure_forgives_lines_around_the_answer(reply, expected):
    doc = {"rule": "all_lower_case", "arguments": {"count": None, "word": None}}
    assert process_results(doc, [reply]) == expected


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [("rhymes", {}, "no format rule rhymes"), ("no_comma", {"count": 1}, "no_comma"), ("at_least_words", {}, "count")],
)
def test_what_is_no_rule_is_refused(rule, arguments, message):
    with pytest.raises(InputError, match=message):
        is_kept("a reply", rule, arguments)

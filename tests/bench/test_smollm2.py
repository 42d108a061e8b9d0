"""``bench smollm2``: each patch in its own domain, all together in every domain, a verdict for each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepatch.bench.columns import TORCH, Column
from edgepatch.bench.datasets import arc, data_folder, openbookqa
from edgepatch.bench.evidence.cells import EvidenceConfig
from edgepatch.bench.evidence.questions import Amounts, Question, Scope, plan_model
from edgepatch.bench.lab import corpus
from edgepatch.bench.safety.gender_prompts import known_gender_prompts
from edgepatch.bench.safety.harm import evaluation_requests, harmless_requests
from edgepatch.bench.smollm2 import formats, matrix, together
from edgepatch.bench.smollm2.pairs import OPENING_WORDS, QUESTIONS, REFUSAL_TEXT, harm_pairs, known_gender_pairs
from edgepatch.bench.smollm2.shipped import newest_patches
from edgepatch.errors import InputError
from edgepatch.patch.file import read_patch
from edgepatch.prompts.overlaps import NEAR, content_words, tf_idf
from edgepatch.runtimes import load_runtime
from edgepatch.training.pairs.preferences import Pair, write_pairs

FORMS = (Column("llamacpp Q4_1", "llamacpp", "Q4_1", "a.gguf", "f16"), TORCH)


def question() -> Question:
    patches = {"detox": Path("detox.safetensors"), "fairness": Path("fairness.safetensors")}
    return matrix.question_of(Path("model.gguf"), patches, ("torch",), Amounts(), 1, 1)


def test_an_arm_is_measured_in_its_domain_and_on_its_forms_alone():
    asked = question()
    config = EvidenceConfig(known_columns=FORMS, domains=asked.domains, arms=("bare", "patch"), composition=False)
    keys = plan_model(config, list(asked.arms), ["toxic-128"], asked.scopes | {"safe_prompt": Scope(num_forms=1)})
    measured = {(key.arm, key.domain, key.column) for key in keys if key.measure == "safety"}
    assert {domain for arm, domain, _ in measured if arm == "fairness"} == {"gender"}
    assert {domain for arm, domain, _ in measured if arm == "patch"} == {"toxicity", "gender"}
    assert {column for arm, _, column in measured if arm == "safe_prompt"} == {FORMS[0].name}
    assert {column for arm, _, column in measured if arm == "detox"} == {form.name for form in FORMS}
    assert {key.arm for key in keys if key.front} == {"bare", "safe_prompt", "patch", "detox"} - {"safe_prompt"}
    assert {key.domain for key in keys if key.measure == "margins" and key.arm == "fairness"} == {"gender"}


def test_each_patch_has_a_verdict_of_its_own():
    def row(arm: str, domain: str, gain: float) -> dict:
        ends = {"gain_low": gain - 0.1, "gain_high": gain + 0.1} if arm != "bare" else {}
        kept = {"perplexity_change": 0.0, "over_refusal_change": 0.0, "margin_retention": None, "retention": 1.0}
        score = {"score": 0.5 - gain, "gain": gain if arm != "bare" else None, "emt5": None}
        return {"domain": domain, "arm": arm, "column": "torch F32", "failed": [], **score, **ends, **kept}

    rows = [
        row("bare", "toxicity", 0.0),
        row("bare", "gender", 0.0),
        row("patch", "toxicity", 0.3),
        row("patch", "gender", 0.0),
        row("detox", "toxicity", 0.3),
        row("fairness", "gender", 0.0),
    ]
    document = {"cells": rows, "fronted": [], "reference": "torch F32", "verdict": {"holds": False}}
    judged = matrix.verdicts(document, ["detox", "fairness"])
    assert {arm: verdict["holds"] for arm, verdict in judged.items()} == {
        "patch": False,
        "detox": True,
        "fairness": False,
    }


def test_pairs_of_harm_are_openings_of_refusals_and_of_the_models_own_replies(lab_ggufs, monkeypatch):
    tasks = corpus.harmless_split()[0][:20]  # of 268, for the time
    monkeypatch.setattr(corpus, "harmless_split", lambda: (tasks, []))
    with load_runtime(lab_ggufs["F16"], None, num_sequences=8) as bare:
        pairs = harm_pairs(None, bare)
    refused = [pair for pair in pairs if pair.chosen == REFUSAL_TEXT]
    answered = [pair for pair in pairs if pair.rejected == REFUSAL_TEXT]
    assert len(refused) > 90 and len(answered) > 90 and len(refused) + len(answered) == len(pairs)
    assert all(len(pair.rejected.split()) <= OPENING_WORDS for pair in refused)
    asked = {pair.prompt[0]["content"] for pair in pairs}
    assert "How do I kill the weeds between my paving stones?" in asked
    assert not asked & {*harmless_requests(None), *(request for _, request in evaluation_requests(None))}


def test_harmful_questions_have_harmless_twins_that_share_their_words():
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    assert len({row[kind] for row in rows for kind in ("harmful", "harmless")}) == 2 * len(rows) == 254
    shared = [set(content_words(row["harmful"])) & set(content_words(row["harmless"])) for row in rows]
    assert sum(map(bool, shared)) >= 123, "four pairs share words of asking, or other forms of a word"


def test_the_shipped_patches_are_taken_in_their_newest_version(tmp_path):
    for name in ("detox-0.9.0", "detox-0.10.0", "harm-0.1.0", "other-0.1.0"):
        (tmp_path / f"smollm2-{name}.safetensors").touch()
    assert {name: path.stem for name, path in newest_patches(tmp_path).items()} == {
        "detox": "smollm2-detox-0.10.0",
        "harm": "smollm2-harm-0.1.0",
    }
    with pytest.raises(InputError, match="no patch"):
        newest_patches(tmp_path / "empty")
    for name, path in newest_patches().items():
        assert read_patch(path).name == f"smollm2-{name}"


def test_some_prompts_of_joint_training_are_in_capitals_or_small_letters_and_pronouns_stay(tmp_path):
    ask = ({"role": "user", "content": "How do I whet a Knife?"},)
    for name, prompt in (("own", "What a Day"), ("gender", "The Nurse said that"), ("harm", ask)):
        write_pairs([Pair(prompt, " Yes", " No", 0.0, 1.0)] * 400, tmp_path / f"{name}.jsonl")
    tasks = together.tasks_of(tmp_path)
    assert {name: len(pairs) for name, pairs in tasks.items()} == {"detox": 400, "fairness": 320, "harm": 400}
    assert {pair.prompt for pair in tasks["fairness"]} == {"The Nurse said that"}
    for pairs, text in ((tasks["detox"], lambda p: p), (tasks["harm"], lambda p: p[0]["content"])):
        prompts = [text(pair.prompt) for pair in pairs]
        share = {
            form.__name__: sum(prompt == form(prompts[0]) for prompt in prompts) for form in (str.upper, str.lower)
        }
        assert len(set(prompts)) == 3 and all(20 < count < 80 for count in share.values()), share
    assert {(pair.chosen, pair.rejected) for pairs in tasks.values() for pair in pairs} == {(" Yes", " No")}


def test_formats_of_training_are_many_and_none_that_is_measured():
    asked, measured = formats.requests(None), formats.measured_requests()
    assert len(asked) == len(set(asked)) == formats.NUM_FORMS
    forms = {form.partition("{}")[::2] for form in formats.FORMS}
    drawn = {form for form in forms for text in asked if text.startswith(form[0]) and text.endswith(form[1])}
    assert drawn == forms and len(forms) == len(formats.FORMS), "a form that is like a measured request is never drawn"
    for text in asked:
        vectors = tf_idf([*measured, text])
        assert (vectors[:-1] @ vectors[-1]).max() < NEAR, text


def test_requests_are_kept_with_the_bare_models_whole_answers(lab_ggufs):
    with load_runtime(lab_ggufs["F16"], None, num_sequences=4) as bare:
        texts = formats.answered(bare, formats.requests(None)[:4])
    for request, answer in texts:
        assert (request["role"], answer["role"]) == ("user", "assistant") and answer["content"].strip()


def test_pairs_of_known_genders_choose_the_right_pronoun_and_none_is_measured():
    pairs = known_gender_pairs()
    assert {pair.chosen for pair in pairs} == {" he", " she"}
    assert {pair.rejected for pair in pairs} == {" they", " he", " she"}
    genders = {prompt.text: prompt.gender for prompt in known_gender_prompts("train")}
    assert all((pair.chosen == " he") == (genders[pair.prompt] > 0) for pair in pairs)
    assert not genders.keys() & {prompt.text for prompt in known_gender_prompts()}


@pytest.mark.skipif(data_folder() is None, reason="EDGEPATCH_DATA names no data folder")
def test_questions_that_stay_as_they_are_are_none_that_a_patch_is_measured_on():
    texts = together.question_texts(data_folder())
    measured = {item.question for item in (*arc(data_folder(), "Easy"), *arc(data_folder(), "Challenge"))}
    measured |= {item.question for item in openbookqa(data_folder())}
    asked = [text.removeprefix("Question: ").partition("\nAnswer: ")[0] for text in texts]
    assert len(asked) > 400 and not set(asked) & measured and all("\nAnswer: " in text for text in texts)

"""Readers for the public data sets that training and evaluation use.

The files are not part of the project. Their folder is named by the caller or by the environment variable
``EDGEPATCH_DATA``; each reader returns plain Python values and knows which rows may be trained on.

RealToxicityPrompts protocol of this project: "challenging" prompts with index below ``RTP_SPLIT`` may be used for
training (pairs, language-model text), the others are evaluation only.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgepatch.errors import InputError
from edgepatch.prompts.sets import evenly

RTP_SPLIT = 700
"""Challenging RealToxicityPrompts with an index below this may be trained on; the rest is evaluation only."""

DATA_VARIABLE = "EDGEPATCH_DATA"

# Continuations by instructed models; see the data description: these three obey a plain system prompt.
CLEAN_SOURCES = frozenset({"gpt4.t=0.out0", "gpt4.t=0.out2", "gpt3.t=0.out0"})


@dataclass(frozen=True)
class Continuation:
    """A prompt with one continuation. ``toxicity`` is Perspective's score of the continuation, where there is one."""

    prompt: str
    text: str
    toxicity: float | None = None
    source: str = ""


def data_folder(folder: Path | None = None) -> Path | None:
    """The folder named by the caller, else by ``EDGEPATCH_DATA``, else ``None``.

    Raises:
        InputError: the named folder does not exist.
    """
    named = folder or (Path(os.environ[DATA_VARIABLE]) if os.environ.get(DATA_VARIABLE) else None)
    if named is not None and not named.is_dir():
        raise InputError(f"data folder {named} does not exist", hint=f"name an existing folder in {DATA_VARIABLE}")
    return named


def _open(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise InputError(f"data file {name} is missing in {folder}", hint="bench/data.md lists the files and sources")
    return path


def _json_lines(path: Path) -> Iterator[dict]:  # type: ignore[type-arg]
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}, line {number}: not JSON ({error.msg})") from None


def _csv_rows(path: Path, delimiter: str = ",", quoting: Literal[0, 3] = csv.QUOTE_MINIMAL) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter=delimiter, quoting=quoting))


def _rtp(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return list(_json_lines(path))


def _as_continuation(record: dict) -> Continuation:  # type: ignore[type-arg]
    continuation = record["continuation"]
    return Continuation(record["prompt"]["text"], continuation["text"], continuation.get("toxicity"))


def rtp_challenging(folder: Path) -> list[Continuation]:
    """All 1,196 challenging prompts in order, with their original continuations; respect ``RTP_SPLIT``."""
    return [_as_continuation(r) for r in _rtp(_open(folder, "toxicity/rtp_challenging_toxic.jsonl"))]


def rtp_nontoxic(folder: Path) -> list[Continuation]:
    """1,200 nontoxic prompts: evaluation only."""
    return [_as_continuation(r) for r in _rtp(_open(folder, "toxicity/rtp_nontoxic.jsonl"))]


def rtp_segments(folder: Path) -> list[tuple[str, float]]:
    """(text, Perspective toxicity) of every scored prompt and continuation of the two evaluation files."""
    segments = []
    for name in ("toxicity/rtp_challenging_toxic.jsonl", "toxicity/rtp_nontoxic.jsonl"):
        for record in _rtp(_open(folder, name)):
            for part in (record["prompt"], record["continuation"]):
                if part.get("toxicity") is not None:
                    segments.append((part["text"], part["toxicity"]))
    return segments


def rtp_training_records(folder: Path) -> list[dict]:  # type: ignore[type-arg]
    """Records of ``rtp_quark_val`` that are in neither evaluation file (compared by file name and offset)."""
    evaluation = {
        (r["filename"], r["begin"])
        for name in ("toxicity/rtp_challenging_toxic.jsonl", "toxicity/rtp_nontoxic.jsonl")
        for r in _rtp(_open(folder, name))
    }
    records = _rtp(_open(folder, "toxicity/rtp_quark_val.jsonl"))
    return [r for r in records if (r["filename"], r["begin"]) not in evaluation]


def rtp_training(folder: Path) -> list[Continuation]:
    """``rtp_training_records`` as prompts with continuations."""
    return [_as_continuation(r) for r in rtp_training_records(folder)]


def instructed_continuations(folder: Path) -> list[Continuation]:
    """Continuations of challenging prompts with index below ``RTP_SPLIT`` by nine instructed models."""
    rows = _json_lines(_open(folder, "toxicity/dt_generations_packed.jsonl"))
    return [Continuation(r["prompt"], r["continuation"], None, r["source"]) for r in rows if r["idx"] < RTP_SPLIT]


def paradetox(folder: Path) -> list[tuple[str, list[str]]]:
    """(toxic sentence, its neutral rewrites)."""
    rows = _csv_rows(_open(folder, "toxicity/paradetox.tsv"), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(r["toxic"], [r[k] for k in ("neutral1", "neutral2", "neutral3") if r.get(k)]) for r in rows]


def tweets(folder: Path) -> list[tuple[str, int]]:
    """(tweet, class): 0 hate speech, 1 offensive, 2 neither."""
    return [(r["tweet"], int(r["class"])) for r in _csv_rows(_open(folder, "toxicity/davidson_labeled_data.csv"))]


def advbench(folder: Path) -> list[tuple[str, str]]:
    """(request, target prefix) of AdvBench without the requests that JailbreakBench or StrongREJECT also hold."""
    taken = {r["Goal"].strip() for r in _csv_rows(_open(folder, "refusal/jailbreakbench_behaviors.csv"))}
    taken |= {r["forbidden_prompt"].strip() for r in _csv_rows(_open(folder, "refusal/strongreject.csv"))}
    rows = _csv_rows(_open(folder, "refusal/advbench_harmful_behaviors.csv"))
    return [(r["goal"], r["target"]) for r in rows if r["goal"].strip() not in taken]


def jailbreakbench(folder: Path) -> list[str]:
    """100 harmful requests: evaluation only."""
    return [r["Goal"] for r in _csv_rows(_open(folder, "refusal/jailbreakbench_behaviors.csv"))]


def harmbench(folder: Path) -> list[str]:
    """HarmBench's 200 "standard" requests, without those that need a context or ask for copyrighted text: evaluation only."""
    rows = _csv_rows(_open(folder, "refusal/harmbench_behaviors_text_all.csv"))
    return [r["Behavior"] for r in rows if r["FunctionalCategory"] == "standard"]


def strongreject(folder: Path) -> list[str]:
    """313 harmful requests, most of them questions: evaluation only."""
    return [r["forbidden_prompt"].strip() for r in _csv_rows(_open(folder, "refusal/strongreject.csv"))]


def safe_answers(folder: Path) -> list[tuple[str, str]]:
    """(request, safe answer) of Bianchi et al. 2023, CC BY-NC: here evaluation only."""
    rows = json.loads(_open(folder, "refusal/safety_only_data_Instructions.json").read_text(encoding="utf-8"))
    return [(r["instruction"].strip(), r["output"].strip()) for r in rows]


def xstest(folder: Path) -> list[tuple[str, bool]]:
    """(request, is safe) of XSTest: evaluation only."""
    return [(r["prompt"], r["label"] == "safe") for r in _csv_rows(_open(folder, "refusal/xstest_prompts.csv"))]


def _turns(dialogue: str) -> list[dict[str, str]]:
    messages = []
    for block in dialogue.split("\n\nHuman:")[1:]:
        human, _, assistant = block.partition("\n\nAssistant:")
        messages.append({"role": "user", "content": human.strip()})
        messages.append({"role": "assistant", "content": assistant.strip()})
    return messages


def hh_harmless(folder: Path) -> list[tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """(chosen, rejected) dialogues of HH-RLHF harmless-base test, as chat messages."""
    with gzip.open(_open(folder, "refusal/hh_rlhf_harmless_base_test.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(_turns(r["chosen"]), _turns(r["rejected"])) for r in rows]


def instructions(folder: Path) -> list[tuple[str, str]]:
    """(instruction, answer) of the Dolly and role-play sets."""
    pairs = []
    for name, answer in (("general/dolly_3k.json", "output"), ("general/gpteacher_roleplay.json", "response")):
        for row in json.loads(_open(folder, name).read_text(encoding="utf-8")):
            request = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
            pairs.append((request.strip(), row[answer].strip()))
    return pairs


def gsm8k_train(folder: Path) -> list[tuple[str, str]]:
    """(question, worked answer) without the calculator annotations."""
    rows = _json_lines(_open(folder, "general/gsm8k_train.jsonl"))
    return [(r["question"], re.sub(r"<<.*?>>", "", r["answer"])) for r in rows]


def novels(folder: Path) -> dict[str, str]:
    """File stem -> text of the 35 novels."""
    paths = sorted((folder / "general/novels").glob("*.txt"))
    if not paths:
        raise InputError(f"no novels in {folder / 'general/novels'}", hint="bench/data.md lists the files and sources")
    return {p.stem: p.read_text(encoding="utf-8-sig") for p in paths}


def wikitext2(folder: Path, part: str) -> str:
    """Text of WikiText-2 ``valid`` (may be trained on) or ``test`` (evaluation only), as distributed."""
    return _open(folder, f"general/wikitext2_{part}.txt").read_text(encoding="utf-8")


def wikitext_paragraphs(folder: Path, part: str, count: int) -> list[str]:
    """``count`` paragraphs of 60 to 160 words of ``wikitext2``, at even distances."""
    lines = [line.strip() for line in wikitext2(folder, part).splitlines()]
    return evenly([line for line in lines if 60 <= len(line.split()) <= 160], count)


def require_blimp(folder: Path) -> Path:
    """The archive of BLiMP, which takes long to read.

    Raises:
        InputError: it is missing.
    """
    return _open(folder, "general/BLiMP.zip")


def blimp(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Phenomenon file -> 1,000 (acceptable, unacceptable) sentences: evaluation only."""
    pairs = {}
    with zipfile.ZipFile(require_blimp(folder)) as archive:
        for name in sorted(n for n in archive.namelist() if n.startswith("data/") and n.endswith(".jsonl")):
            rows = [json.loads(line) for line in archive.read(name).decode("utf-8").splitlines() if line]
            pairs[Path(name).stem] = [(r["sentence_good"], r["sentence_bad"]) for r in rows]
    return pairs


@dataclass(frozen=True)
class Choice:
    """A question, or the beginning of a sentence, with its answers and the number of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


def arc(folder: Path, part: Literal["Easy", "Challenge"]) -> list[Choice]:
    """Test items of AI2's Reasoning Challenge."""
    with _open(folder, f"general/ai2_arc/test/ARC-{part}_test.csv").open(encoding="utf-8", newline="") as lines:
        return [Choice(stem, tuple(choices), "ABCD".index(letter)) for stem, *choices, letter in csv.reader(lines)]


def openbookqa(folder: Path) -> list[Choice]:
    """OpenBookQA's test items."""
    questions = [(row["question"], row["answerKey"]) for row in _json_lines(_open(folder, "general/openbookqa.jsonl"))]
    return [
        Choice(question["stem"], tuple(choice["text"] for choice in question["choices"]), "ABCD".index(letter))
        for question, letter in questions
    ]


def winobias_occupations(folder: Path) -> tuple[list[str], list[str]]:
    """The 20 stereotypically male and the 20 stereotypically female occupations."""
    lists = [_open(folder, f"gender/winobias/{g}_occupations.txt").read_text().split("\n") for g in ("male", "female")]
    male, female = ([line.strip() for line in names if line.strip()] for names in lists)
    return male, female


def winobias_stereotyped(folder: Path) -> list[str]:
    """Pro-stereotyped development sentences (may be trained on), without their markup."""
    sentences = []
    for kind in ("1", "2"):
        for line in _open(folder, f"gender/winobias/pro_stereotyped_type{kind}.txt.dev").read_text().splitlines():
            sentences.append(line.split(" ", 1)[1].replace("[", "").replace("]", ""))
    return sentences


def professions(folder: Path) -> list[tuple[str, float]]:
    """(profession, stereotype from -1 female to +1 male), without professions that name a gender by definition."""
    rows = json.loads(_open(folder, "gender/debiaswe/professions.json").read_text())
    return [(name.replace("_", " "), stereotype) for name, definitional, stereotype in rows if abs(definitional) < 0.3]


def _winobias_sentences(folder: Path, name: str) -> list[str]:
    lines = _open(folder, f"gender/winobias/{name}").read_text(encoding="utf-8").splitlines()
    return [re.sub(r"[\[\]]", "", line.split(" ", 1)[1]) for line in lines]


def _without_pronouns(sentence: str) -> str:
    return re.sub(r"\b(he|she|his|her|him|hers|himself|herself)\b", "", sentence.lower())


def winobias_test_pairs(folder: Path) -> list[tuple[str, str]]:
    """(pro-stereotyped, anti-stereotyped) test sentences that differ in pronouns alone (782 of 792): evaluation only."""
    pairs = []
    for kind in ("1", "2"):
        pro, anti = (_winobias_sentences(folder, f"{side}_stereotyped_type{kind}.txt.test") for side in ("pro", "anti"))
        pairs += list(zip(pro, anti, strict=True))
    return [(pro, anti) for pro, anti in pairs if _without_pronouns(pro) == _without_pronouns(anti)]


def crows_gender_pairs(folder: Path) -> list[tuple[str, str]]:
    """(more, less stereotyping) sentences of CrowS-Pairs on gender: evaluation only."""
    rows = _csv_rows(_open(folder, "gender/crows_pairs_anonymized.csv"))
    return [(r["sent_more"], r["sent_less"]) for r in rows if r["bias_type"] == "gender"]


def dong_templates(folder: Path) -> list[str]:
    """The lines "My friend ..." of Dong et al. 2024, each once: evaluation only."""
    paths = [_open(folder, f"gender/dong2024/{name}.txt") for name in ("templates_200", "templates_200_1")]
    lines = [line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def bec_pro_stereotyped(folder: Path) -> list[str]:
    """Sentences of BEC-Pro in which the person's gender is the profession's typical one."""
    rows = _csv_rows(_open(folder, "gender/bec_pro_en.tsv"), delimiter="\t")
    return [r["Sentence"] for r in rows if r["Gender"] == r["Prof_Gender"]]


def bold_wikipedia(folder: Path) -> list[str]:
    """Wikipedia passages of BOLD on professions and people."""
    texts = []
    for name in ("gender/bold/gender_wiki.json", "gender/bold/profession_wiki.json"):
        for group in json.loads(_open(folder, name).read_text(encoding="utf-8")).values():
            texts += [" ".join(sentences) for sentences in group.values()]
    return texts

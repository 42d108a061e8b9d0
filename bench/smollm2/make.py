"""Writes the training data of the shipped patches: ``python -m edgepatch.bench.smollm2.make DATA OUT``.

Beside them stand ``benign-formats.jsonl`` and ``known-genders.jsonl``, of an attempt that is not shipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgepatch.bench import datasets
from edgepatch.bench.safety.gender import GenderDomain
from edgepatch.bench.safety.harm import HarmDomain
from edgepatch.bench.safety.toxicity import ToxicityDomain
from edgepatch.bench.smollm2 import formats, together
from edgepatch.bench.smollm2.own_samples import SAMPLES, own_pairs, read_own, sample_own, training_prompts
from edgepatch.bench.smollm2.pairs import gender_pairs, harm_pairs, known_gender_pairs, toxicity_pairs
from edgepatch.known_models import find
from edgepatch.runtimes import load_runtime
from edgepatch.training.pairs.preferences import write_pairs

NUM_SAMPLED_PROMPTS = 196
"""What detox was trained on: 432 pairs from all of them in joint training, 227 from the first 98 before."""

NUM_PARAGRAPHS = 100
CONTEXT = 4096


def main(data: Path, out: Path) -> None:
    """Writes pairs and benign texts of the patches.

    Args:
        data: folder of the public data sets.
        out: folder to write to; own samples that stand there are not made again.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_pairs(toxicity_pairs(data), out / "other-models.jsonl")
    write_pairs(gender_pairs(data), out / "gender.jsonl")
    write_pairs(known_gender_pairs(), out / "known-genders.jsonl")
    together.write_texts(ToxicityDomain(data).benign_texts(), out / "benign-toxicity.jsonl")
    paragraphs = datasets.wikitext_paragraphs(data, "valid", NUM_PARAGRAPHS)
    together.write_texts([*GenderDomain(data).benign_texts(), *paragraphs], out / "benign-gender.jsonl")
    together.write_texts([*HarmDomain(data).benign_texts(), *paragraphs], out / "benign-harm.jsonl")
    prompts, journal = training_prompts(data)[:NUM_SAMPLED_PROMPTS], out / "own-samples.jsonl"
    sequences = SAMPLES.samples_per_prompt
    with load_runtime(find("smollm2"), None, num_sequences=sequences, context_length=CONTEXT) as runtime:
        for _ in sample_own(runtime, prompts, journal):
            pass
        write_pairs(harm_pairs(data, runtime), out / "harm.jsonl")
        together.write_texts(formats.answered(runtime, formats.requests(data)), out / "benign-formats.jsonl")
    write_pairs(own_pairs(read_own(journal)), out / "own.jsonl")
    together.write(data, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))

"""Forged GGUF files end a child at most: never the process of a user, and never with an exception of another kind than ours."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgepatch.bench.first_contact.corpus import corpus, sound_model
from edgepatch.bench.first_contact.forged import DIED, UNCAUGHT, judge, slice_of_corpus, table
from edgepatch.converters.gguf.header import read_header
from edgepatch.converters.gguf.specs import quantization, spec_of
from edgepatch.converters.weight_sketches import sketch_of_gguf
from edgepatch.errors import EdgepatchError
from edgepatch.runtimes import load_runtime
from kit.amounts import examples

STEP = examples(40, 1)
"""Of the corpus, for children; ``edgepatch bench security --only F12`` judges all of it."""


def test_the_sound_file_runs(tmp_path: Path):
    path = tmp_path / "sound.gguf"
    path.write_bytes(sound_model().data())
    with load_runtime(path, None, num_threads=1) as runtime:
        assert runtime.notes == () and len(runtime.logits_of_last([1, 2])) == runtime.spec.vocab_size


def test_the_corpus_is_large_of_many_kinds_and_the_same_each_time():
    kinds = Counter(kind for kind, _ in corpus())
    assert kinds.total() >= 2000 and len(kinds) >= 14 and min(kinds.values()) >= 9
    assert next(corpus()) == next(corpus()) and next(corpus(1)) != next(corpus(2))


def test_the_parser_refuses_with_errors_of_ours_alone(tmp_path: Path):
    path, refused = tmp_path / "forged.gguf", 0
    step = examples(4, 1)
    for number, (kind, data) in enumerate(slice_of_corpus(step)):
        path.write_bytes(data)
        try:
            header = read_header(path)
            spec_of(header)
            quantization(header)
            with np.errstate(all="ignore"):  # weights that are no numbers
                sketch_of_gguf(header)
        except EdgepatchError:
            refused += 1
        except Exception as error:
            pytest.fail(f"file {number} ({kind}): {type(error).__name__}: {error}")
    assert refused > 800 // step


def test_what_the_parser_lets_through_never_ends_the_parent():
    verdicts = judge(slice_of_corpus(STEP))
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    failed = [verdict for verdict in verdicts if verdict.outcome in (DIED, UNCAUGHT)]
    assert not failed, failed
    assert len(verdicts) >= 50 and outcomes["loaded"] >= 5 and outcomes["refused in a child"] >= 5, table(verdicts)

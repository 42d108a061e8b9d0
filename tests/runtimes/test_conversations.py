"""Conversations saved and continued: the same reply, and never under another model or patch."""

from __future__ import annotations

import json

import numpy as np
import pytest

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InputError
from edgepatch.runtimes.conversations import load_conversation, save_conversation
from edgepatch.runtimes.reference import TorchRuntime

GREEDY = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture
def runtime(tiny_folder, tiny_patch):
    with TorchRuntime(tiny_folder, tiny_patch, num_sequences=2) as loaded:
        yield loaded


def test_a_saved_conversation_goes_on_as_if_never_left(runtime, tiny_folder, tiny_patch, tmp_path):
    ids = runtime.tokens("The quick brown fox") + [
        piece.token_id for piece in runtime.stream("The quick brown fox", GREEDY)
    ]
    expected = runtime.generate([*ids, 5], GREEDY)
    runtime.logits_of_last(ids)
    save_conversation(runtime, tmp_path / "talk.json")
    with TorchRuntime(tiny_folder, tiny_patch, num_sequences=2) as later:
        loaded = load_conversation(later, tmp_path / "talk.json", sequence=1)
        assert loaded == ids and later.num_cached(ids, sequence=1) == len(ids)
        assert "".join(p.text for p in later.stream([*loaded, 5], GREEDY, sequence=1)) == expected
        later.swap(None)
        with pytest.raises(InputError, match="held with"):
            load_conversation(later, tmp_path / "talk.json")


def test_nothing_to_save(runtime, tmp_path):
    with pytest.raises(InputError, match="no conversation"):
        save_conversation(runtime, tmp_path / "talk.json", sequence=1)
    with pytest.raises(InputError, match="sequence"):
        save_conversation(runtime, tmp_path / "talk.json", sequence=2)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', "\x00\xff"])
def test_damaged_files_are_refused(runtime, tmp_path, content):
    (tmp_path / "talk.json").write_text(content)
    before = runtime.logits([1, 2, 3])
    with pytest.raises(InputError, match="conversation"):
        load_conversation(runtime, tmp_path / "talk.json")
    assert np.array_equal(runtime.logits([1, 2, 3]), before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "format"),
        ({"tokens": []}, "empty"),
        ({"tokens": [10**6]}, "vocabulary"),
        ({"tokens": [1] * 600}, "context holds"),
    ],
)
def test_contents_that_do_not_fit_are_refused(runtime, tmp_path, change, words):
    runtime.logits_of_last([1, 2, 3])
    save_conversation(runtime, tmp_path / "talk.json")
    content = json.loads((tmp_path / "talk.json").read_text()) | change
    (tmp_path / "talk.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        load_conversation(runtime, tmp_path / "talk.json")


def test_a_missing_file_is_named(runtime, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json"):
        load_conversation(runtime, tmp_path / "nowhere.json")

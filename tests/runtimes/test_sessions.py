"""What a session owns on every backend: snapshots, the books of its sequences, and a patch that is never silently lost."""

from __future__ import annotations

import numpy as np
import pytest

from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import EdgepatchError, InactivePatchError, InputError
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.runtime import LlamaCppRuntime
from edgepatch.runtimes.session import Session

PROMPT, OTHER = [5, 6, 7, 8, 9, 10], [11, 12, 13]
GREEDY = Sampling(max_new_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def gguf_file(tiny_ggufs):
    return tiny_ggufs["F32"]


@pytest.fixture(scope="module", params=["llamacpp", "onnx", "torch"])
def session(request, tiny_folder, tiny_patch):
    if request.param == "onnx":
        pytest.importorskip("onnxruntime_genai")
        model, options = request.getfixturevalue("onnx_folders")["fp32"], {"num_threads": 1}
    elif request.param == "llamacpp":
        model, options = request.getfixturevalue("gguf_file"), {"kv_type": "f32", "flash_attention": False}
    else:
        model, options = tiny_folder, {}
    with load_runtime(model, tiny_patch, num_sequences=2, **options) as loaded:
        yield loaded


def test_a_snapshot_goes_on_as_if_never_left(session):
    session.reset()
    expected = session.generate([*PROMPT, 3], GREEDY)
    session.reset()
    session.logits_of_last(PROMPT)
    snapshot = session.sequences.save()
    session.generate(OTHER, GREEDY)
    session.logits_of_last(OTHER, sequence=1)
    session.sequences.restore(snapshot)
    assert session.sequences.evaluated(0) == PROMPT and session.sequences.evaluated(1) == []
    assert session.sequences.num_cached([*PROMPT, 3]) == len(PROMPT)
    assert session.generate([*PROMPT, 3], GREEDY) == expected
    fresh = session.logits_of_last(OTHER)
    assert np.abs(session.logits_of_last(OTHER, sequence=1) - fresh).max() < 1e-4, "the other sequence starts afresh"


def test_a_snapshot_is_of_use_behind_its_own_seed_alone(session, tiny_patch):
    session.logits_of_last(PROMPT)
    snapshot = session.sequences.save()
    session.swap(None)
    bare = session.logits_of_last(PROMPT)
    with pytest.raises(InputError, match="active is no patch"):
        session.sequences.restore(snapshot)
    assert np.abs(session.logits_of_last(PROMPT) - bare).max() < 1e-4, "nothing was put back"
    session.swap(tiny_patch)
    session.sequences.restore(snapshot)
    assert session.sequences.evaluated() == PROMPT
    with pytest.raises(InputError, match="sequence"):
        session.sequences.save(2)


def test_a_prompt_begins_with_what_any_sequence_holds_of_it(session):
    """Where sequences can share; elsewhere it begins with what its own holds."""
    prompt, sequences = [*PROMPT, 3, 4], session.sequences
    session.reset()
    expected = session.generate(prompt, GREEDY)
    session.reset()
    session.logits_of_last([*PROMPT, 12])
    session.logits_of_last([*PROMPT[:2], 13], sequence=1)
    assert sequences.adopt(prompt, 1) == (len(PROMPT) if session.backend.is_forkable else 2)
    begun = session.begin(prompt, GREEDY, sequence=1)
    assert "".join(session.advance([begun])[0].text for _ in range(GREEDY.max_new_tokens)) == expected
    assert sequences.evaluated(0) == [*PROMPT, 12], "whoever held it keeps all"
    session.logits_of_last(prompt)
    assert sequences.adopt(prompt, 0) == len(prompt) - 1, "behind the last token logits are asked for"


def test_sequences_that_lack_one_token_are_evaluated_together(session, monkeypatch):
    session.reset()
    calls, forward_rows = [], session.backend.forward_rows
    monkeypatch.setattr(
        session.backend, "forward_rows", lambda rows, tokens: calls.append(list(rows)) or forward_rows(rows, tokens)
    )
    expected = [session.logits_of_last([*text, 4]) for text in (PROMPT, OTHER)]
    session.sequences.evaluate({0: PROMPT, 1: OTHER})
    calls.clear()
    together = session.sequences.evaluate({0: [*PROMPT, 4], 1: [*OTHER, 4]})
    assert calls == [[0, 1]]
    assert max(np.abs(together[i][0] - expected[i]).max() for i in (0, 1)) < 1e-4
    again = session.sequences.evaluate({0: [*PROMPT, 4], 1: [*OTHER, 4, 5]})
    assert calls == [[0, 1], [1]] and np.abs(again[0][0] - expected[0]).max() < 1e-4


def test_a_patch_that_cannot_be_put_back_closes_the_model(gguf_file, tiny_patch, monkeypatch):
    """A model without its patch must not answer."""
    session = load_runtime(gguf_file, tiny_patch, num_threads=1)

    def refuse(patch):
        raise InactivePatchError("the seed was not taken")

    monkeypatch.setattr(session.backend, "install", refuse)
    with pytest.raises(InactivePatchError, match="not taken"):
        session.swap(None)
    with pytest.raises(EdgepatchError, match="closed"):
        session.generate(PROMPT, GREEDY)


def test_a_session_closes_a_runtime_whose_patch_does_not_work(gguf_file, tiny_patch, monkeypatch):
    runtime = LlamaCppRuntime(gguf_file, num_threads=1)
    monkeypatch.setattr(runtime, "install", lambda patch: "stored")  # pretends, and applies nothing
    with pytest.raises(EdgepatchError):
        Session(runtime, tiny_patch)
    with pytest.raises(EdgepatchError, match="closed"):
        runtime.encode("text")

"""A seed that goes along with the text, on every runtime against one forward pass of Transformers over all copies of the seed."""

from __future__ import annotations

import functools
import random
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from edgepatch.bench.parity import models as parity_models
from edgepatch.bench.parity.moved import moved_logits
from edgepatch.bench.parity.rows import divergence, make_oracle
from edgepatch.converters.dequantization import dequantize
from edgepatch.converters.gguf import specs, writer
from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.hf.rotary import read_rotation
from edgepatch.converters.llamacpp.layout import decode_rows, seeded_state
from edgepatch.converters.llamacpp.rows import encode
from edgepatch.converters.llamacpp.state import read_state
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.decoding.sampling import Sampling
from edgepatch.errors import InactivePatchError, InputError
from edgepatch.patch.file import Patch
from edgepatch.runtimes import load_runtime
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.tensors import SoftPrompt
from kit import tiny_gguf
from kit.amounts import examples

ANCHORING = Anchoring(16, (7, 9))
EXACT = {"torch": 5e-5, "llamacpp": 5e-5, "builder": 1e-4, "transformers": 1e-4}
"""Forms in full precision throughout, and the largest difference of a logit."""

FLOAT32 = {"kv_type": "f32", "flash_attention": False, "context_length": 200}
GREEDY = Sampling(max_new_tokens=40, temperature=0, ignore_end_tokens=True)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return folders.load_model(tiny_folder)


def make_patch(model, spec, num_virtual_tokens: int, anchoring: Anchoring | None, name: str = "moving") -> Patch:
    """A random patch whose float32 seed and canary are the model's."""
    rng = np.random.default_rng(num_virtual_tokens)
    soft_prompt = SoftPrompt((rng.standard_normal((num_virtual_tokens, spec.hidden_size)) * 0.3).astype(np.float32))
    rotation, seed = read_rotation(model), seeds.compute_kv_seed(model, soft_prompt)
    canary = seeds.compute_canary(model, soft_prompt, seed, rotation, anchoring)
    return Patch(name, "1.0.0", spec, soft_prompt, seed, rotation=rotation, anchoring=anchoring, canary=canary)


@pytest.fixture(scope="module")
def patch(model, tiny_folder):
    return make_patch(model, folders.read_spec(tiny_folder), 10, ANCHORING)


class Forms:
    """Name -> model and options of its runtime; each is made when a test first asks for it."""

    def __init__(self, source, folder, request):
        self.source, self.folder, self.request = source, folder, request

    @functools.cache  # noqa: B019 - as long as the module's tests
    def __getitem__(self, name):
        options = {"num_threads": 1, "context_length": 200}
        if name == "torch":
            return self.source, {}
        if name in ("builder", "int4"):
            folders = self.request.getfixturevalue("onnx_folders")
            return folders["fp32" if name == "builder" else "int4"], options
        if name == "transformers":
            onnx.export(self.source, self.folder / name, "fp32", "transformers")
            return self.folder / name, options
        kind = "F32" if name == "llamacpp" else name
        path = self.folder / f"{kind}.gguf"
        if kind == "Q8_0":
            writer.quantize(self["llamacpp"][0], path, kind, num_threads=1)
        else:
            writer.convert_folder(self.source, path, kind)
        return path, options | (FLOAT32 if name == "llamacpp" else {})


@pytest.fixture(scope="module")
def forms(tiny_folder, tmp_path_factory, request):
    return Forms(tiny_folder, tmp_path_factory.mktemp("forms"), request)


def load(forms, form, patch, **options):
    path, usual = forms[form]
    return load_runtime(path, patch, **usual, **options)


@pytest.fixture(scope="module", params=EXACT)
def session(request, forms, patch):
    with load(forms, request.param, patch, num_sequences=3) as loaded:
        yield loaded


def text(length: int, rng_seed: int = 0) -> list[int]:
    """Random tokens, a few of which open a turn."""
    return [int(token) for token in np.random.default_rng([length, rng_seed]).integers(3, 200, length)]


def expect(model, patch, tokens):
    return moved_logits(model, patch.soft_prompt, patch.anchoring, tokens)


TEXTS = [text(1), text(8), text(16), text(17), text(70), [7] * 50, [5, 7, 9] * 20, text(120)]


def test_the_texts_are_of_every_kind():
    anchors = [set(ANCHORING.anchors(tokens)) for tokens in TEXTS]
    assert [len(places) for places in anchors][:2] == [1, 1] and max(map(len, anchors)) >= 8
    assert any(place % 16 for places in anchors for place in places), "a turn moves the seed between two blocks"


def test_logits_are_those_of_one_forward_pass(session, model, patch):
    pinned = replace(patch, anchoring=None, canary=None)
    for tokens in TEXTS:
        expected = expect(model, patch, tokens)
        assert np.abs(session.logits(tokens) - expected).max() < EXACT_OF[session.name]
        assert np.abs(session.logits_of_last(tokens) - expected[-1]).max() < EXACT_OF[session.name]
    moved = session.logits(TEXTS[-1])
    session.swap(pinned)
    assert np.abs(session.logits(TEXTS[-1])[:16] - moved[:16]).max() < 2e-4
    assert np.abs(session.logits(TEXTS[-1])[16:] - moved[16:]).max() > 0.1, "it would not show if nothing moved"
    session.swap(patch)


EXACT_OF = {"torch": 5e-5, "llamacpp": 5e-5, "onnx": 1e-4}


@pytest.mark.parametrize("form", ["F16", "Q8_0", "int4"])
def test_rounded_forms_stay_near(form, forms, model, patch):
    expected = expect(model, patch, TEXTS[-1])
    with load(forms, form, None) as bare:
        error = divergence(model_logits(model, TEXTS[-1]), bare.logits(TEXTS[-1]))["kl"]
    caches, routes = ("f16", "q8_0", "q4_0"), ("stored", "decoded")
    settings = [{}] if form == "int4" else [{"kv_type": t, "seed_route": r} for t in caches for r in routes]
    for options in settings:
        # This patch's effect on a long text is beyond what a q4_0 cache can hold, as its canary says.
        loaded = replace(patch, canary=None) if options.get("kv_type") == "q4_0" else patch
        with load(forms, form, loaded, **options) as runtime:
            moved, stepwise = runtime.logits(TEXTS[-1]), []
            runtime.reset()
            for i in range(1, 40):
                stepwise.append(runtime.logits_of_last(TEXTS[-1][:i]))
        divergent = divergence(expected, moved)["kl"]
        # A q4_0 cache rounds the text as well as the seed.
        assert divergent <= 1.75 * error + {"q8_0": 1e-3, "q4_0": 5e-2}.get(options.get("kv_type"), 1e-5), options
        assert divergence(moved[:39], np.array(stepwise))["kl"] < (5e-3 if options.get("kv_type") == "q4_0" else 5e-4)
        pinned = divergence(expected, torch_pinned(model, patch, TEXTS[-1]))["kl"]
        assert divergent < 0.3 * pinned, options


def model_logits(model, tokens):
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].numpy()


def torch_pinned(model, patch, tokens):
    return moved_logits(model, patch.soft_prompt, Anchoring(512), tokens)


def test_greedy_text_crosses_anchors(session, model, patch):
    prompt = text(13)
    tokens = [piece.token_id for piece in session.stream(prompt, GREEDY)]
    logits = expect(model, patch, prompt + tokens)[len(prompt) - 1 : -1]
    gaps = logits.max(axis=-1) - logits[np.arange(len(tokens)), tokens]
    assert len(set(ANCHORING.anchors(prompt + tokens))) > 3 and gaps.max() < 1e-3


def test_many_are_those_of_one_after_the_other(session):
    """Rows of different lengths come to their anchors at different steps."""
    prompts = [text(n, n) for n in (5, 13, 13, 31, 15, 13, 2)]
    expected = [session.generate(prompt, GREEDY) for prompt in prompts]
    assert session.generate_batch(prompts, GREEDY) == expected
    drawn = Sampling(max_new_tokens=24, rng_seed=3, ignore_end_tokens=True)
    one_by_one = [session.generate(prompts[1], replace(drawn, rng_seed=3 + i)) for i in range(5)]
    assert len(set(one_by_one)) > 1 and session.generate_many(prompts[1], drawn, 5) == one_by_one


def test_sequences_take_turns(session, model, patch):
    """As the server does it: prompts in parts, and then a token of each in one batch."""
    texts = [text(n, 50 + n) for n in (14, 15, 40)]
    for end in (9, 14):
        for sequence, tokens in enumerate(texts):
            session.logits_of_last(tokens[:end], sequence)
    continuations = [session.begin(tokens, GREEDY, i) for i, tokens in enumerate(texts)]
    for _ in range(20):
        session.advance(continuations)
    for continuation in continuations:
        tokens = continuation.reply.tokens[:-1]
        logits = session.logits_of_last(tokens, continuation.sequence)
        assert np.abs(logits - expect(model, patch, tokens)[-1]).max() < EXACT_OF[session.name]


@pytest.mark.parametrize("form", ["Q8_0", "int4"])
def test_what_others_have_asked_leaves_no_trace(form, forms, patch):
    """What is evaluated of a prompt is evaluated in the parts in which it would be without them, as roundings show.

    llama.cpp adds the cells up in the order of their place in its one cache, in float16; ONNX Runtime has a cache for each sequence.
    """
    with load(forms, form, patch, num_sequences=3) as session:
        for length, kept in ((70, 57), (90, 31), (50, 49), (40, 3)):
            prompt = text(length, 3)
            session.reset()
            alone = session.logits_of_last(prompt)
            session.reset()
            others = [session.begin([*prompt[:kept], *text(20, i)], GREEDY, i) for i in (0, 1)]
            for _ in range(5):
                session.advance(others)
            sequence = 2 if session.backend.is_forkable else 1
            cached = session.sequences.adopt(prompt, sequence)
            assert cached == patch.anchoring.anchors(prompt)[kept] and (cached > 0 or kept == 3)
            logits = session.logits_of_last(prompt, sequence)
            assert np.array_equal(logits, alone) if form == "int4" else divergence(alone, logits)["kl"] < 1e-3, (
                length,
                kept,
            )


class Conversations:
    """Does to a session what clients do, and keeps the text that each sequence should hold."""

    def __init__(self, session, patch, rng_seed):
        self.session, self.patch, self.random = session, patch, random.Random(rng_seed)
        self.texts = [[] for _ in range(session.num_sequences)]
        self.snapshots = []
        self.acts = [
            self.turn,
            self.edit,
            self.branch,
            self.restart,
            self.reply,
            self.save,
            self.restore,
            self.many,
            self.adopt,
        ]

    def some(self, most=30):
        return [self.random.randrange(3, 60) for _ in range(self.random.randint(1, most))]

    def say(self, sequence, tokens):
        self.texts[sequence] = tokens[:150]
        self.session.logits_of_last(self.texts[sequence], sequence)

    def turn(self, sequence):
        self.say(sequence, self.texts[sequence] + self.some())

    def edit(self, sequence):
        kept = self.random.randint(0, len(self.texts[sequence]))
        self.say(sequence, self.texts[sequence][:kept] + self.some(4))

    def branch(self, sequence):
        source = self.random.randrange(len(self.texts))
        kept = self.texts[source][: self.random.randint(0, len(self.texts[source]))]
        if kept and not self.session.sequences.share(source, sequence, kept):
            self.session.logits_of_last(kept, sequence)
        self.say(sequence, kept + self.some(3))

    def adopt(self, sequence):
        """As the server begins: whatever any sequence holds of a prompt is used."""
        source = self.random.choice(self.texts)
        tokens = source[: self.random.randint(0, len(source))] + self.some(3)
        cached = self.session.sequences.adopt(tokens, sequence)
        assert cached < len(tokens) and self.session.sequences.evaluated(sequence) == tokens[:cached]
        assert cached in (0, self.patch.anchoring.anchors(tokens)[cached], *map(len, self.texts))
        self.say(sequence, tokens)

    def restart(self, sequence):
        if self.random.random() < 0.3:
            self.session.reset()
            self.texts = [[] for _ in self.texts]
        self.say(sequence, self.some())

    def reply(self, sequence):
        self.turn(sequence)
        sampling = Sampling(max_new_tokens=self.random.randint(1, 12), rng_seed=1, ignore_end_tokens=True)
        pieces = self.session.stream(self.texts[sequence], sampling, sequence=sequence)
        self.texts[sequence] = self.texts[sequence] + [piece.token_id for piece in pieces]

    def save(self, sequence):
        self.turn(sequence)
        self.snapshots = [*self.snapshots[-2:], (self.session.sequences.save(sequence), self.texts[sequence])]

    def restore(self, sequence):
        """Also into another sequence; all others start afresh."""
        if self.snapshots:
            snapshot, tokens = self.random.choice(self.snapshots)
            self.session.sequences.restore(snapshot, sequence)
            self.texts = [[] for _ in self.texts]
            self.texts[sequence] = list(tokens)
        self.edit(sequence)

    def many(self, sequence):
        sampling = Sampling(max_new_tokens=3, rng_seed=1)
        self.session.generate_batch([self.some(), self.some(), self.some()], sampling)
        self.texts = [[] for _ in self.texts]
        self.turn(sequence)

    def exchange(self):
        for patch in (replace(self.patch, anchoring=None, canary=None), None, self.patch):
            self.session.swap(patch)
            self.session.logits_of_last(self.some())
        self.texts, self.snapshots = [[] for _ in self.texts], []

    def converse(self):
        """The sequence it was held in."""
        sequence = self.random.randrange(len(self.texts))
        for act in self.random.choices(self.acts, [8, 5, 3, 2, 3, 2, 2, 1, 3], k=self.random.randint(1, 4)):
            act(sequence)
        if self.random.random() < 0.05:
            self.exchange()
            self.turn(sequence)
        return sequence


def test_no_conversation_loses_the_seed(session, model, patch):
    """Random conversations with edits, branches, replies and saved states; what each holds is what one forward pass gives."""
    session.reset()
    conversations, longest = Conversations(session, patch, 7), 0
    for _ in range(examples(60, 150)):
        sequence = conversations.converse()
        tokens = conversations.texts[sequence]
        logits = session.logits_of_last(tokens, sequence)
        assert np.abs(logits - expect(model, patch, tokens)[-1]).max() < EXACT_OF[session.name], tokens
        longest = max(longest, len(tokens))
    assert longest > 3 * ANCHORING.block


@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("num_virtual_tokens, block", [(1, 8), (200, 8), (3, 512)])
def test_short_and_long_seeds_and_blocks(form, num_virtual_tokens, block, forms, model, tiny_folder):
    patch = make_patch(model, folders.read_spec(tiny_folder), num_virtual_tokens, Anchoring(block))
    options = {} if form == "torch" else {"context_length": 256}
    path, usual = forms[form]
    with load_runtime(path, patch, **usual | options, num_sequences=2) as runtime:
        length = min(56, runtime.context_length)
        for sequence in (0, 1):
            tokens = text(length, sequence)
            logits = runtime.logits(tokens, sequence)
            assert np.abs(logits - expect(model, patch, tokens)).max() < 2 * EXACT[form]
            runtime.logits_of_last(tokens[:20] + text(3), sequence)


@pytest.mark.parametrize("form", ["llamacpp", "builder", "transformers"])
@pytest.mark.parametrize("context_length, num_virtual_tokens", [(96, 10), (15, 10), (256, 200)])
def test_a_context_is_filled_to_the_brim(form, context_length, num_virtual_tokens, forms, model, tiny_folder):
    """Also one that is shorter than a block, and with every sequence full."""
    patch = make_patch(model, folders.read_spec(tiny_folder), num_virtual_tokens, ANCHORING)
    patch = replace(patch, canary=None)  # its long prompt does not fit everywhere
    path, usual = forms[form]
    with load_runtime(path, patch, **(usual | {"context_length": context_length}), num_sequences=3) as runtime:
        room = context_length - num_virtual_tokens
        prompts = [text(room - min(20, room - 2), i) for i in range(3)]
        texts = []
        for sequence, prompt in enumerate(prompts):
            pieces = list(runtime.stream(prompt, replace(GREEDY, max_new_tokens=500), sequence=sequence))
            assert pieces[-1].finish_reason == "length"
            texts.append((prompt + [piece.token_id for piece in pieces])[:room])
        for sequence, tokens in enumerate(texts):
            assert len(tokens) == room
            logits = runtime.logits_of_last(tokens, sequence)
            assert np.abs(logits - expect(model, patch, tokens)[-1]).max() < EXACT[form]
        with pytest.raises(InputError, match="context holds"):
            runtime.logits_of_last([*texts[0], 5])


def test_nothing_is_evaluated_without_the_seed(forms, patch):
    with load(forms, "llamacpp", patch, num_sequences=2) as runtime:
        runtime.logits_of_last(text(40))
        runtime.backend.context.forget(0)
        with pytest.raises(InactivePatchError, match="sequence 0"):
            runtime.logits_of_last([*text(40), 5])


@pytest.mark.parametrize("ggml_type", [0, 1, 2, 8, 30])
def test_rows_are_encoded_as_gguf_does(ggml_type):
    rows = np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
    expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType(ggml_type))
    assert encode(rows, ggml_type).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_a_moved_state_is_that_of_the_moved_seed(forms, patch, kv_type):
    """All layers at once, against the layout of one seed that was moved before."""
    with load(forms, "F16", replace(patch, canary=None), kv_type=kv_type) as runtime:
        anchor = 37
        for other in range(100, 109):  # its memory has held other places before
            runtime.backend.places.state_at(other)
        state = read_state(runtime.backend.places.state_at(anchor).tobytes())
        layout = runtime.backend.calibration.layout
        expected = read_state(seeded_state(state, layout, patch.rotation.moved(patch.kv_seed, anchor)))
    assert state.caches[0].positions == tuple(range(anchor, anchor + 10))
    for actual, moved in zip(state.caches, expected.caches, strict=True):
        assert actual.values == moved.values
        decoded = ([decode_rows(layer, 10, (2, 64), False) for layer in cache.keys] for cache in (actual, moved))
        # Rounding of a turned key may fall to the other side.
        for one, other in zip(*decoded, strict=True):
            assert np.abs(one - other).max() <= {"f16": 2e-3, "q8_0": 0.05, "q4_0": 0.7}[kv_type] * np.abs(other).max()
            assert np.linalg.norm(one - other) < 0.01 * np.linalg.norm(other)


# Sliding windows.


def test_graphs_with_windows_are_left_alone(forms, patch):
    """They count cells, so a seed that moves would be invisible to some layers without any error."""
    with load(forms, "builder", patch) as runtime:
        runtime.backend._graph = replace(runtime.backend._graph, windows=("window",))
        with pytest.raises(InputError, match="sliding window count cells") as caught:
            runtime.swap(replace(patch, name="other"))
        assert "--pinned" in caught.value.hint


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A GGUF file with two layers of a window of eight, and its Transformers folder."""
    folder = tmp_path_factory.mktemp("gemma3")
    tiny_gguf.write_gemma3(folder / "model.gguf")
    dequantize(folder / "model.gguf", folder / "hf", force=True)
    return folder


@pytest.mark.parametrize("num_virtual_tokens", [6, 20])
@pytest.mark.parametrize("route", ["stored", "decoded"])
def test_layers_with_a_window_see_a_seed_that_moves(gemma3, num_virtual_tokens, route):
    """Behind the window a pinned seed is invisible to them; what is left of its effect is a fraction."""
    model, length = folders.load_model(gemma3 / "hf"), 60
    anchoring = Anchoring(8)
    patch = make_patch(model, folders.read_spec(gemma3 / "hf"), num_virtual_tokens, anchoring)
    patch = replace(patch, base=specs.read_spec(gemma3 / "model.gguf"))
    tokens = [int(token) for token in np.random.default_rng(1).integers(3, 250, length)]
    moved, pinned = (moved_logits(model, patch.soft_prompt, a, tokens) for a in (anchoring, Anchoring(512)))
    stays = replace(patch, anchoring=None, canary=None)
    options = {**FLOAT32, "context_length": 100, "num_threads": 1, "seed_route": route}
    with load_runtime(gemma3 / "model.gguf", patch, **options, num_sequences=2) as runtime:
        assert np.abs(runtime.logits(tokens) - moved).max() < parity_models.GELU_TABLE
        _prove_saved_texts(runtime, tokens, moved)
        runtime.swap(stays)
        assert np.abs(runtime.logits(tokens) - pinned).max() < parity_models.GELU_TABLE
        runtime.swap(None)
        bare = runtime.logits(tokens)
    effects = [np.linalg.norm((logits - bare)[24:], axis=-1).mean() for logits in (pinned, moved)]
    assert effects[1] > 1.5 * effects[0], effects


def _prove_saved_texts(runtime, tokens, expected):
    """llama.cpp saves of a text what its next token sees; tokens further in front see more, so the text is evaluated again for them."""
    runtime.logits_of_last(tokens)
    snapshot = runtime.sequences.save()
    for sequence, end in ((0, 60), (1, 58), (0, 55), (1, 53), (0, 30), (1, 3)):
        runtime.sequences.restore(snapshot, sequence)
        logits = runtime.logits_of_last(tokens[:end], sequence)
        assert np.abs(logits - expected[end - 1]).max() < parity_models.GELU_TABLE, end


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "cohere", "stablelm", "smollm3", "llama3"])
def test_the_reference_moves_on_every_kind_of_model(name, tmp_path):
    """Windows, neighbours that turn together, parts of a head that do not turn, layers without positions, stretched frequencies."""
    spec = parity_models.architecture(name)
    parity_models.build_folder(spec, tmp_path)
    oracle = make_oracle(spec, tmp_path)
    assert oracle.moving is not None, oracle.cannot_move
    with load_runtime(tmp_path, oracle.moving) as runtime:
        whole = runtime.logits(oracle.tokens)
        runtime.reset()
        stepwise = [runtime.logits_of_last(oracle.tokens[:end]) for end in range(1, len(oracle.tokens) + 1)]
    assert np.abs(whole - oracle.moved).max() < 5e-5 and np.abs(np.array(stepwise) - oracle.moved).max() < 5e-5
    assert np.abs(oracle.moved - oracle.patched)[20:].max() > 0.1

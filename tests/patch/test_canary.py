"""The canary: an inactive or foreign seed is always caught, and a right one never refused (figure F8 of the threat model)."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from edgepatch.converters.hf import folders, seeds
from edgepatch.errors import InactivePatchError, InputError, PatchFormatError
from edgepatch.patch import canary
from edgepatch.patch.file import Patch, parse_patch, patch_bytes
from edgepatch.runtimes import load_runtime
from edgepatch.runtimes.llamacpp.seeds import SeedStates
from edgepatch.runtimes.patching import PatchSlot
from edgepatch.tensors import Canary, SoftPrompt
from kit.amounts import examples

LOADS = examples(160, 1000)
"""Each of 16 forms; ``edgepatch bench security --only F8`` takes all."""

TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0")
CACHES = (("f16", True), ("f32", False), ("q8_0", True), ("q4_0", True))


@pytest.fixture(scope="module")
def patches(tiny_folder, tiny_patch) -> list[Patch]:
    """25 random patches of strengths from weak to overwhelming, with P from 1 to 50."""
    model, rng = folders.load_model(tiny_folder), np.random.default_rng(5)
    completed = []
    for number in range(25):
        strength, length = 0.05 * 1.2**number, int(rng.integers(1, 51))
        prompt = SoftPrompt((rng.standard_normal((length, tiny_patch.base.hidden_size)) * strength).astype(np.float32))
        completed.append(seeds.complete(Patch(f"p{number}", "1.0.0", tiny_patch.base, prompt), model))
    return completed


@pytest.fixture(scope="module")
def files(tiny_ggufs):
    return tiny_ggufs


def test_no_false_alarm_and_no_foreign_seed_unseen(files, patches):
    """Each load proves a right patch; then a patch with another's seed is tried in its place."""
    loads = caught = foreign = 0
    for name, (kv_type, flash_attention) in product(TYPES, CACHES):
        options = {"kv_type": kv_type, "flash_attention": flash_attention, "num_threads": 1, "context_length": 128}
        with load_runtime(files[name], None, **options) as runtime:
            for number in range(-(-LOADS // len(TYPES) // len(CACHES))):
                patch, other = patches[loads % 25], patches[(loads + 7) % 25]
                runtime.slot.exchange([patch], [None])
                loads += 1
                if number % 5 == 0:
                    foreign += 1
                    with pytest.raises(InactivePatchError, match="canary"):
                        runtime.swap(replace(other, canary=patch.canary))
                    caught += 1
                    assert runtime.patch is patch
    assert loads >= LOADS and caught == foreign >= LOADS // 5


def test_an_inactive_patch_is_caught(files, patches, monkeypatch):
    """A runtime that reports a patch and does not apply it, the fault of ignored adapters elsewhere."""
    with load_runtime(files["Q4_0"], None, num_threads=1) as runtime:
        install = runtime.backend.install

        def pretend(patch):
            install(None)
            runtime.backend.patch = patch
            return "stored"

        monkeypatch.setattr(runtime.backend, "install", pretend)
        monkeypatch.setattr(type(runtime.backend), "num_virtual_tokens", 0)
        for patch in patches:
            with pytest.raises(InactivePatchError, match=r"deviates by 1\.00"):
                runtime.swap(patch)


def test_a_device_asks_the_whole_canary_once_and_again_when_what_it_rests_on_has_changed(
    files, patches, monkeypatch, tmp_path
):
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    asked = []
    prove = PatchSlot._prove
    monkeypatch.setattr(
        PatchSlot, "_prove", lambda self, prompts, route: (asked.append(len(prompts)), prove(self, prompts, route))
    )

    def load(patch, **options):
        asked.clear()
        with load_runtime(files["Q8_0"], patch, num_threads=1, context_length=128, **options) as runtime:
            runtime.prove()
        return list(asked)

    whole = len(patches[0].canary.prompts)
    assert whole > 1
    assert [load(patches[0]) for _ in range(2)] == [[whole, whole], [1, whole]]
    assert load(patches[1]) == load(patches[0], kv_type="q8_0") == [whole, whole]
    [file] = [file for file in tmp_path.rglob("calibration/*.json") if len(json.loads(file.read_text())["proved"]) == 2]
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "layout": {**kept["layout"], "key_block": 32}}))
    with pytest.raises(InactivePatchError, match="canary"):
        load(patches[0])
    assert asked == [whole]


def test_a_patch_that_has_passed_and_does_not_work_now_is_caught(files, patches, monkeypatch, tmp_path):
    """What a device remembers never stands in for a measurement."""
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path))
    load_runtime(files["Q8_0"], patches[0], num_threads=1, context_length=128).close()
    seed = patches[0].kv_seed
    wrong = replace(patches[0], kv_seed=replace(seed, values=tuple(-value for value in seed.values)))
    monkeypatch.setattr(
        SeedStates,
        "_lay_out",
        lambda self, patch, layout, real=SeedStates._lay_out: real(self, wrong, layout),
    )
    with pytest.raises(InactivePatchError, match="canary"):
        load_runtime(files["Q8_0"], patches[0], num_threads=1, context_length=128)


def test_the_reference_runtime_proves_its_patch_too(tiny_folder, tiny_patch, patches):
    with load_runtime(tiny_folder, tiny_patch) as runtime:
        with pytest.raises(InactivePatchError, match="canary"):
            runtime.swap(replace(patches[3], canary=patches[4].canary))
        assert runtime.patch is tiny_patch


def test_a_canary_survives_the_file(tiny_patch):
    again = parse_patch(patch_bytes(tiny_patch))
    assert again.canary == tiny_patch.canary and len(again.canary.prompts) == len(canary.PROMPT_LENGTHS)
    assert parse_patch(patch_bytes(replace(tiny_patch, canary=None))).canary is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.pop("bare"),
        lambda p: p.update(extra=[1]),
        lambda p: p.update(tokens=[]),
        lambda p: p.update(tokens=["1"]),
        lambda p: p.update(token_ids=[True, False]),
        lambda p: p["bare"].pop(),
        lambda p: p.update(patched=p["bare"]),
        lambda p: p.update(bare=[float("nan")] * len(p["bare"])),
        lambda p: p.update(token_ids=[p["token_ids"][0]] * len(p["token_ids"])),
    ],
)
def test_a_damaged_canary_is_refused(tiny_patch, damage):
    values = tiny_patch.canary.as_dict()
    damage(values["prompts"][0])
    with pytest.raises(PatchFormatError, match="canary"):
        Canary.from_dict(values)


@pytest.mark.parametrize(
    "values", [None, [], {}, {"prompts": []}, {"prompts": [3]}, {"prompts": 3}, {"prompts": [{}] * 17}]
)
def test_a_malformed_canary_is_refused(values):
    with pytest.raises(PatchFormatError, match="canary"):
        Canary.from_dict(values)


def test_ids_outside_the_vocabulary_are_refused(tiny_patch):
    values = tiny_patch.canary.as_dict()
    values["prompts"][0]["tokens"] = [tiny_patch.base.vocab_size]
    with pytest.raises(PatchFormatError, match="vocabulary"):
        replace(tiny_patch, canary=Canary.from_dict(values))


def test_nan_logits_are_an_inactive_patch(tiny_patch):
    prompt = tiny_patch.canary.prompts[0]
    logits = np.full(tiny_patch.base.vocab_size, np.nan, dtype=np.float32)
    with pytest.raises(InactivePatchError, match="nan"):
        canary.require_active(prompt, logits, logits, 0.5)


def test_a_prompt_on_which_the_patch_does_nothing_proves_nothing_and_is_left_out():
    rng = np.random.default_rng(0)
    bare = {tokens: rng.normal(size=512) for tokens in canary.canary_prompts(512)}
    first, second, third = bare
    slope = np.linspace(-1, 1, 512)
    together = np.where(
        np.arange(512) < 64, 50.0, 0.0
    )  # moves the tokens that are looked at by the same, which is no effect on them
    effects = {first: 3 * slope, second: together, third: slope}
    measured = canary.make_canary(512, lambda t: bare[tuple(t)], lambda t: bare[tuple(t)] + effects[tuple(t)])
    assert [prompt.tokens for prompt in measured.prompts] == [first, third]
    effects[second] = 0.01 * slope
    measured = canary.make_canary(512, lambda t: bare[tuple(t)], lambda t: bare[tuple(t)] + effects[tuple(t)])
    assert [prompt.tokens for prompt in measured.prompts] == [first, third]


def test_a_part_that_acts_on_texts_alone_is_proven_by_one_of_them():
    """A patch that was trained beside others may leave tokens by chance as they are."""
    rng = np.random.default_rng(0)
    bare, slope = rng.normal(size=512), np.linspace(-1, 1, 512)
    own = np.roll(slope, 256)
    text, other = tuple(range(20)), tuple(range(20, 30))

    def whole(tokens):
        return bare + 2 * slope + (3 * own if tuple(tokens) == text else 0.1 * own)

    parts = {"wide": lambda tokens: whole(tokens) - 2 * slope, "narrow": lambda tokens: bare + 2 * slope}
    with pytest.raises(InputError, match=r"canary: narrow: expected a part with 0\.3 .*, found 0\.\d+ at best"):
        canary.make_canary(512, lambda _: bare, whole, without_part=parts)
    measured = canary.make_canary(512, lambda _: bare, whole, without_part=parts, texts=(other, text))
    *_, wide, narrow = measured.prompts
    assert len(wide.tokens) <= 3, "what is proven by short prompts stays so: they are asked at each load"
    assert narrow.tokens == text
    missing = canary.deviation(narrow, bare, parts["narrow"](text))
    assert missing > canary.LEAST_SHARE and canary.deviation(narrow, bare, whole(text)) < 1e-3


def test_a_canary_has_a_bound(tiny_patch):
    """Whoever verifies a patch reads all of its ids."""
    prompt = tiny_patch.canary.prompts[0]
    long = replace(prompt, tokens=(1,) * 30_000)
    assert Canary((long,))
    with pytest.raises(InputError, match="expected at most 32768 token ids, found"):
        Canary((long,) * 14)


def test_no_tolerance_lets_another_patchs_seed_pass():
    """Seeds of other patches deviate by 0.53 or more."""
    types = ("F32", "Q8_0", "Q4_K_M", "Q3_K_M", "IQ1_S", "TQ1_0", "whatever")
    assert (
        max(canary.tolerance(t, kv, decoded) for t in types for kv in ("f16", "q4_0") for decoded in (False, True))
        <= 0.5
    )

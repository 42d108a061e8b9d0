"""Composed patches: parts side by side, in no order, each of them proven on the device."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import accumulate, permutations

import numpy as np
import pytest

from edgepatch.bench.parity import models as parity_models
from edgepatch.converters.hf import caches, folders, rotary, seeds
from edgepatch.errors import InactivePatchError, InputError, MismatchError, PatchFormatError
from edgepatch.patch.composition import compose_on_device
from edgepatch.patch.file import PAYLOAD_TYPE, Patch, patch_bytes, read_patch, signed, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import side_by_side
from edgepatch.tensors import KVSeed, SoftPrompt
from edgepatch.training import composition
from edgepatch.training.composition import compose
from edgepatch.trust.signatures import sign
from kit.amounts import examples
from kit.stores import KEYS

TOKENS = [1, 17, 230, 5, 99, 404, 41, 8]
TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0")


@pytest.fixture(scope="module")
def model(tiny_folder):
    return folders.load_model(tiny_folder)


@pytest.fixture(scope="module")
def parts(tiny_patch, model) -> list[Patch]:
    """A signed soft prompt with its seed, a soft prompt alone, and a K/V prefix."""

    def prompt(rng_seed: int, count: int) -> SoftPrompt:
        rng = np.random.default_rng(rng_seed)
        return SoftPrompt((rng.standard_normal((count, tiny_patch.base.hidden_size)) * 0.3).astype(np.float32))

    first = seeds.complete(replace(tiny_patch, license="Apache-2.0"), model)
    prefix = seeds.compute_kv_seed(model, prompt(6, 12), np.float16)
    return [
        signed(first, sign(first.manifest, PAYLOAD_TYPE, KEYS["vendor"])),
        Patch(
            "second",
            "2.0.0",
            tiny_patch.base,
            prompt(5, 7),
            evaluation={"emt": 0.1},
            license="MIT",
            expires="2031-01-01T00:00:00Z",
        ),
        Patch("third", "0.1.0", tiny_patch.base, None, prefix, license="MIT"),
    ]


@pytest.fixture(scope="module")
def composed(parts, tiny_folder) -> Patch:
    return compose(parts, tiny_folder, "all", "1.0.0")


@pytest.fixture(scope="module")
def files(tiny_ggufs):
    return tiny_ggufs


def alone(part: Patch, model) -> KVSeed:
    return part.kv_seed or seeds.compute_kv_seed(model, part.soft_prompt)


def cells_of(composed: Patch, parts: list[Patch]) -> dict[str, slice]:
    """Name of each part -> its cells."""
    ordered = sorted(parts, key=lambda part: part.digest)
    ends = list(accumulate(part.num_virtual_tokens for part in ordered))
    return {part.name: slice(end - part.num_virtual_tokens, end) for part, end in zip(ordered, ends, strict=True)}


# What it is.


def test_it_computes_what_its_parts_compute_side_by_side(parts, composed, model, tiny_folder):
    """Held against a plain forward pass behind the parts' seeds in another order."""
    together = side_by_side([alone(part, model) for part in parts[::-1]], rotary.read_rotation(model))
    expected = seeds.logits_behind(model, caches.seeded_cache(model, together), TOKENS)
    with load_runtime(tiny_folder, composed) as runtime:
        assert np.abs(runtime.logits(TOKENS)[-1] - expected).max() < 2e-2  # the seed is float16
    embeddings = [part.soft_prompt.embeddings for part in parts[:2]]
    sequential = seeds.compute_kv_seed(model, SoftPrompt(np.concatenate(embeddings)))
    behind_each_other = seeds.logits_behind(model, caches.seeded_cache(model, sequential), TOKENS)
    pair = side_by_side([alone(part, model) for part in parts[:2]], rotary.read_rotation(model))
    beside = seeds.logits_behind(model, caches.seeded_cache(model, pair), TOKENS)
    assert np.abs(behind_each_other - beside).max() > 0.5, "another form than one behind the other"


def test_each_part_keeps_its_values_and_its_keys_end_in_front_of_the_text(parts, composed, model):
    rotation = rotary.read_rotation(model)
    for part in parts:
        seed, cells = alone(part, model), cells_of(composed, parts)[part.name]
        for layer in range(2):
            moved = rotation.turned(seed.keys[layer], layer, 29 - part.num_virtual_tokens)
            assert np.abs(composed.kv_seed.keys[layer][:, cells] - moved).max() < 1e-2
            assert np.abs(composed.kv_seed.values[layer][:, cells] - seed.values[layer]).max() < 1e-2


def test_no_order_changes_a_byte(parts, composed, tiny_folder):
    orders = [*permutations(parts)][1:]
    orders = examples(orders[2::2], orders)  # one turned, and the reversed one
    bytes_of = {patch_bytes(compose(order, tiny_folder, "all", "1.0.0")) for order in orders}
    assert bytes_of == {patch_bytes(composed)}


def test_a_device_composes_the_same_seed(parts, composed, model, tiny_folder):
    ready = [seeds.complete(part, model) for part in parts]
    vendors, devices = compose(ready, tiny_folder, "all", "1.0.0"), compose_on_device(ready)
    assert vendors.parts == devices.parts and vendors.rotation == devices.rotation
    for kind in ("keys", "values"):
        for a, b in zip(getattr(vendors.kv_seed, kind), getattr(devices.kv_seed, kind), strict=True):
            assert np.array_equal(a, b)


def test_its_manifest_tells_what_it_is(parts, composed, model):
    assert composed.parts == tuple(sorted(part.digest for part in parts))
    assert (composed.evaluation, composed.signatures, composed.created) == ({}, (), "")
    assert (composed.license, composed.expires, composed.channel) == ("", "2031-01-01T00:00:00Z", "stable") or (
        set(composed.license.split(" AND ")) == {"Apache-2.0", "MIT"}
    )
    assert composed.training["method"] == "side by side"
    records = {part["name"]: part for part in composed.training["parts"]}
    assert set(records) == {"tiny", "second", "third"} and records["third"]["num_virtual_tokens"] == 12
    assert composed.soft_prompt is None and composed.rotation == rotary.read_rotation(model)
    assert composed.anchoring is None and composed.weight_sketch is not None


def test_it_moves_where_one_of_its_parts_does_and_says_which_did_not(parts, model, tiny_folder, tmp_path, capfd):
    from edgepatch.cli import app

    moving = seeds.complete(replace(parts[0], rotation=rotary.read_rotation(model), anchoring=Anchoring(16)), model)
    files = [tmp_path / f"{number}.safetensors" for number in range(len(parts))]
    for part, file in zip([moving, *parts[1:]], files, strict=True):
        write_patch(part, file)
    with pytest.raises(SystemExit):
        app(["compose", *map(str, [*files, "-o", tmp_path / "all", "--model", tiny_folder, "--name", "all"])])
    out, errors = capfd.readouterr()
    assert "moves: every 16 tokens" in out and errors.count("alone stays at the start") == len(parts) - 1
    assert all(f"{part.name} {part.version} alone" in errors for part in parts[1:])
    whole = read_patch(tmp_path / "all")
    assert whole.anchoring == Anchoring(16) and len(max((p.tokens for p in whole.canary.prompts), key=len)) == 34
    with load_runtime(tiny_folder, whole) as runtime:
        assert runtime.patch is whole
    with pytest.raises(InactivePatchError), load_runtime(tiny_folder, replace(whole, anchoring=Anchoring(32))):
        pass


def test_what_is_told_takes_the_place_of_what_follows_from_the_parts(parts, composed, tiny_folder):
    other = compose(parts, tiny_folder, "all", "1.0.0", created="2026-11-21T10:00:00Z", license="MIT")
    assert (other.created, other.license) == ("2026-11-21T10:00:00Z", "MIT") and other.digest != composed.digest


# Its canary.


@pytest.mark.parametrize("quantization", TYPES)
def test_the_right_composition_passes_and_one_with_a_wrong_part_does_not(files, parts, composed, model, quantization):
    rng = np.random.default_rng(8)
    with load_runtime(files[quantization], None, num_threads=1, context_length=128) as runtime:
        runtime.slot.exchange([composed], [None])
        if quantization not in ("F16", "Q4_0"):
            return
        for cells in cells_of(composed, parts).values():
            count = cells.stop - cells.start
            prompt = SoftPrompt((rng.standard_normal((count, composed.base.hidden_size)) * 0.3).astype(np.float32))
            foreign = seeds.compute_kv_seed(model, prompt, np.float16)
            nothing = KVSeed(*(tuple(np.zeros_like(t) for t in kind) for kind in (foreign.keys, foreign.values)))
            for other in (nothing, foreign):
                with pytest.raises(InactivePatchError, match="canary"):
                    runtime.slot.exchange([_with_cells(composed, cells, other)], [None])


def _with_cells(patch: Patch, cells: slice, other: KVSeed) -> Patch:
    """The patch with the cells of a part replaced."""

    def replaced(tensors, others):
        changed = [tensor.copy() for tensor in tensors]
        for tensor, new in zip(changed, others, strict=True):
            tensor[:, cells] = new
        return tuple(changed)

    seed = KVSeed(replaced(patch.kv_seed.keys, other.keys), replaced(patch.kv_seed.values, other.values))
    return replace(patch, kv_seed=seed)


def test_every_one_of_twelve_parts_is_proven(tiny_patch, model, files, tiny_folder):
    parts = []
    for number in range(12):
        rng = np.random.default_rng(number)
        prompt = SoftPrompt((rng.standard_normal((5 + number, tiny_patch.base.hidden_size)) * 0.3).astype(np.float32))
        parts.append(Patch(f"p{number}", "1.0.0", tiny_patch.base, prompt))
    composed = compose(parts, tiny_folder, "twelve", "1.0.0")
    empty = KVSeed(*(tuple(np.zeros((2, 1, 64), np.float16) for _ in range(2)) for _ in range(2)))
    with load_runtime(files["Q4_0"], None, num_threads=1, context_length=256) as runtime:
        runtime.slot.exchange([composed], [None])
        for cells in cells_of(composed, parts).values():
            with pytest.raises(InactivePatchError, match="canary"):
                runtime.slot.exchange([_with_cells(composed, cells, empty)], [None])


def test_a_part_that_does_nothing_is_refused(parts, tiny_folder):
    idle = replace(parts[1], name="idle", soft_prompt=SoftPrompt(np.zeros((1, 256), np.float32)))
    with pytest.raises(InputError, match=r"canary: idle: expected a part with 0\.3 of the whole"):
        compose([parts[0], idle], tiny_folder, "x", "1.0.0")


# What cannot be composed.


def test_a_gguf_file_of_full_precision_will_do(parts, composed, files):
    patch = compose(parts, files["F16"], "all", "1.0.0")
    assert patch.parts == composed.parts
    assert np.abs(patch.kv_seed.keys[1].astype(np.float32) - composed.kv_seed.keys[1].astype(np.float32)).max() < 0.05
    with pytest.raises(InputError, match=r"expected full precision .*, found Q4_0") as refused:
        compose(parts, files["Q4_0"], "all", "1.0.0")
    assert f"convert base {files['Q4_0'].name} FOLDER --to transformers" in refused.value.hint


def test_parts_that_do_not_go_together(parts, tiny_folder):
    first, second, _ = parts
    foreign = replace(second, base=replace(second.base, rope_theta=5e5, tokenizer_digest="0" * 64))
    with pytest.raises(MismatchError) as caught:
        compose([first, foreign], tiny_folder, "x", "1.0.0")
    assert set(caught.value.differences) == {"rope_theta", "tokenizer_digest"}
    with pytest.raises(MismatchError) as caught:
        compose([foreign, replace(foreign, name="other")], tiny_folder, "x", "1.0.0")
    assert set(caught.value.differences) == {"rope_theta", "tokenizer_digest"}
    with pytest.raises(InputError, match="different names, found tiny twice"):
        compose([first, replace(first, version="1.0.1")], tiny_folder, "x", "1.0.0")
    with pytest.raises(InputError, match="expected 2 to 12 patches, found 1"):
        compose([first], tiny_folder, "x", "1.0.0")
    many = [replace(second, name=f"part-{number}") for number in range(13)]
    with pytest.raises(InputError, match="expected 2 to 12 patches, found 13"):
        compose(many, tiny_folder, "x", "1.0.0")
    halves = [
        replace(second, name=name, soft_prompt=SoftPrompt(np.repeat(second.soft_prompt.embeddings[:1], 256, axis=0)))
        for name in ("half", "other-half")
    ]
    with pytest.raises(InputError, match="fewer than the model's context of 512, found 512"):
        compose(halves, tiny_folder, "x", "1.0.0")
    with pytest.raises(PatchFormatError, match="version"):
        compose(parts, tiny_folder, "x", "one")


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32}


@pytest.mark.parametrize(
    "kind, settings, why",
    [("phi3", {"rope_parameters": LONGROPE}, r"length of the text \(longrope\)"), ("lfm2", {}, "recurrent layers")],
)
def test_bases_whose_keys_do_not_turn(tmp_path, kind, settings, why):
    architecture = parity_models.architecture(kind)
    parity_models.build_folder(replace(architecture, settings={**architecture.settings, **settings}), tmp_path)
    base = folders.read_spec(tmp_path)
    prompt = SoftPrompt((np.random.default_rng(1).standard_normal((4, base.hidden_size)) * 0.3).astype(np.float32))
    both = [Patch(name, "1.0.0", base, prompt) for name in ("a", "b")]
    with pytest.raises(InputError, match=rf"cannot stand side by side: {kind}.*{why}") as refused:
        compose(both, tmp_path, "x", "1.0.0")
    assert "train one patch" in refused.value.hint


def test_a_fine_tune_of_the_base_is_refused(parts, tiny_folder, tmp_path):
    model = folders.load_model(tiny_folder)
    for name, weight in model.named_parameters():
        if "mlp" in name:
            weight.mul_(1.05)
    model.save_pretrained(tmp_path / "tuned")
    for file in tiny_folder.glob("tokenizer*"):
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(MismatchError, match="weights"):
        compose(parts, tmp_path / "tuned", "x", "1.0.0")


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (("MIT", "MIT"), "MIT"),
        (("MIT", ""), ""),
        (("", ""), ""),
        (("A OR B", "MIT"), "(A OR B) AND MIT"),
        (("x" * 100, "y" * 100), ""),
    ],
)
def test_licences(licences, expected):
    assert composition._licence_of(licences) == expected


def test_verb(parts, composed, tiny_folder, tmp_path, capsys):
    from edgepatch.cli import app

    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for part, file in zip(parts[::-1], files, strict=True):
        write_patch(part, file)
    out = tmp_path / "all.safetensors"
    options = ["-o", str(out), "--model", str(tiny_folder), "--name", "all", "--version", "1.0.0", "--json"]
    with pytest.raises(SystemExit) as done:
        app(["compose", *map(str, files), *options])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["num_virtual_tokens"] == 29
    assert patch_bytes(read_patch(out)) == patch_bytes(composed)
    with pytest.raises(SystemExit):
        app(["show", str(out), "--all"])
    printed = capsys.readouterr().out
    assert "not evaluated" in printed and parts[0].digest[:20] in printed

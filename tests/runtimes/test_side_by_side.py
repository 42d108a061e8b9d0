"""Several patches on one model: each part proven, all of them acting, in any order, and one taken off leaves the others."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from edgepatch.cli import main
from edgepatch.errors import InactivePatchError, InputError, MismatchError
from edgepatch.patch.composition import compose_on_device, trained_alone
from edgepatch.patch.file import Patch, patch_bytes, read_patch, write_patch
from edgepatch.runtimes import load_runtime
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances
from edgepatch.tensors import SoftPrompt

PROMPT = "The quick brown fox"
UNSIGNED = Allowances(unsigned="test")


@pytest.fixture(scope="module")
def parts(tiny_folder, tiny_patch):
    """Three complete patches for the tiny model; the seed of one moves every 16 tokens."""
    from edgepatch.converters.hf import folders, rotary, seeds

    model, rng = folders.load_model(tiny_folder), np.random.default_rng(5)
    rotation = rotary.read_rotation(model)
    completed = []
    for name, count, anchoring in (("gender", 6, None), ("harm", 9, Anchoring(16)), ("toxicity", 4, None)):
        prompt = SoftPrompt((rng.standard_normal((count, tiny_patch.base.hidden_size)) * 0.3).astype(np.float32))
        patch = Patch(name, "1.0.0", tiny_patch.base, prompt, rotation=rotation, anchoring=anchoring)
        completed.append(seeds.complete(replace(patch, weight_sketch=tiny_patch.weight_sketch), model))
    return completed


@pytest.fixture(scope="module", params=["torch", "llamacpp", "onnx"])
def model(request, tiny_folder, tiny_ggufs, onnx_folders):
    if request.param == "torch":
        return tiny_folder
    return tiny_ggufs["F16"] if request.param == "llamacpp" else onnx_folders["fp32"]


@pytest.fixture
def files(parts, tmp_path):
    paths = [tmp_path / f"{part.name}.safetensors" for part in parts]
    for part, path in zip(parts, paths, strict=True):
        write_patch(part, path)
    return paths


def logits(session, length=40):
    """Behind a prompt of more than two blocks, evaluated afresh."""
    session.reset()
    return session.logits([(7 * i) % 500 + 3 for i in range(length)], count=3)


@pytest.mark.parametrize(
    ("records", "alone"),
    [
        (({"kind": "soft_prompt"}, {"kind": "kv_prefix"}, {}), ["gender", "harm"]),
        (({"kind": "soft_prompt"}, {"kind": "kv_prefix", "company": ["a" * 64]}, {"kind": "side_by_side"}), ["gender"]),
        (({"kind": "side_by_side"},) * 3, []),
    ],
)
def test_patches_that_were_trained_alone_are_named(parts, tiny_folder, tmp_path, capfd, monkeypatch, records, alone):
    """Whether their gains are kept beside others, nobody has looked at while they were made."""
    trained = [replace(part, training=record) for part, record in zip(parts, records, strict=True)]
    store = Store(tmp_path / "store")
    for part in trained:
        write_patch(part, tmp_path / f"{part.name}.safetensors")
        change = store.apply(tmp_path / f"{part.name}.safetensors", UNSIGNED)
    assert list(change.trained_alone) == alone
    with load_runtime(tiny_folder, store=store.folder) as session:
        notes = " ".join(session.slot.notes)
    assert notes.startswith(f"trained alone, not for company: {', '.join(alone)};") if alone else not notes
    monkeypatch.setattr(sys, "argv", ["edgepatch", "status", "--store", str(store.folder)])
    with pytest.raises(SystemExit):
        main()
    assert ("trained alone" in " ".join(capfd.readouterr().err.split())) is bool(alone)
    with load_runtime(tiny_folder, tmp_path / "gender.safetensors") as session:
        assert not session.slot.notes, "one patch has no company"


@pytest.mark.parametrize(
    ("recorded", "evaluation", "is_named"),
    [
        (["gender", "harm"], {}, True),
        (["gender", "harm"], {"results": []}, False),
        ([], {}, False),
        ("gender", {}, False),
        ([7], {}, False),
    ],
)
def test_a_composed_file_names_parts_that_were_trained_alone_until_it_is_measured(
    parts, recorded, evaluation, is_named
):
    whole = replace(
        compose_on_device(parts),
        training={"method": "side by side", "parts": [], "trained_alone": recorded},
        evaluation=evaluation,
    )
    assert trained_alone([whole]) == (recorded if is_named else [])


def test_a_composed_file_of_patches_that_were_trained_alone_warns_wherever_it_runs(
    parts, tiny_folder, tmp_path, capfd, monkeypatch
):
    from edgepatch.training.composition import compose

    alone = [replace(part, training={"kind": "soft_prompt"}) for part in parts[:2]]
    whole = compose(alone, tiny_folder, "all", "1.0.0")
    assert whole.training["trained_alone"] == ["gender", "harm"]
    write_patch(whole, tmp_path / "all.safetensors")
    with load_runtime(tiny_folder, tmp_path / "all.safetensors") as session:
        assert session.slot.notes[0].startswith("trained alone, not for company: gender, harm;")
    store = Store(tmp_path / "store")
    assert store.apply(tmp_path / "all.safetensors", UNSIGNED).trained_alone == ("gender", "harm")
    monkeypatch.setattr(sys, "argv", ["edgepatch", "status", "--store", str(store.folder)])
    with pytest.raises(SystemExit):
        main()
    assert "trained alone, not for company: gender, harm" in " ".join(capfd.readouterr().err.split())


def test_side_by_side(model, parts, files, tmp_path):
    """The device composes as a vendor does; order changes no bit; every part acts; the others stay when one goes."""
    store = Store(tmp_path / "store")
    for file in (files[2], files[0], files[1]):
        store.apply(file, UNSIGNED)
    whole = compose_on_device(parts)
    write_patch(whole, tmp_path / "whole.safetensors")
    with load_runtime(model, store=store.folder) as session:
        assert [part.digest for part in session.parts] == sorted(part.digest for part in parts)
        assert session.patch.parts == tuple(part.digest for part in session.parts)
        assert session.patch.num_virtual_tokens == 19 == session.backend.num_virtual_tokens
        assert session.system_fingerprint.endswith(f"+{whole.digest[:12]}")
        together = logits(session)
        session.swap([parts[1], parts[2], parts[0]])
        assert (logits(session) == together).all(), "another order"
        session.swap(read_patch(tmp_path / "whole.safetensors"))
        assert (logits(session) == together).all(), "as its vendor composes it"
        pairs = []
        for missing in parts:
            rest = [part for part in parts if part is not missing]
            session.swap(rest)
            pairs.append(logits(session))
            assert np.abs(pairs[-1] - together).max() > 0.05, f"{missing.name} does nothing"
        session.swap(None)
        assert session.parts == () and session.patch is None
        assert np.abs(logits(session) - together).max() > 0.05
        session.swap(parts)
        session.prove()
        assert (logits(session) == together).all()
    store.deactivate("not wanted here", patch="gender")
    with load_runtime(model, store=store.folder) as session:
        assert {part.name for part in session.parts} == {"harm", "toxicity"}
        assert (logits(session) == pairs[0]).all()
    store.deactivate("nor here", patch="harm")
    with load_runtime(model, store=store.folder) as session:
        assert session.patch.digest == parts[2].digest and session.parts == (session.patch,)


def test_the_seed_in_the_cache_is_the_composition_bit_for_bit(tiny_ggufs, parts):
    states = []
    for order in (parts, parts[::-1]):
        with load_runtime(tiny_ggufs["F16"], order, num_threads=1) as session:
            assert session.seed_route == "stored"
            states.append(session.backend.seed_state())
    assert states[0] == states[1]


def test_what_a_part_fails_at_is_told_and_the_session_keeps_what_it_had(model, parts):
    broken = replace(parts[1], canary=parts[0].canary)
    foreign = replace(parts[1], base=replace(parts[1].base, rope_theta=5000.0))
    still = replace(parts[1], rotation=None, anchoring=None)
    cases = [
        ([parts[0], broken], InactivePatchError, "harm 1.0.0 .*one of 2 patches: canary"),
        ([parts[0], replace(parts[1], name="gender")], InputError, "found gender twice"),
        ([parts[0], parts[0]], InputError, "found gender twice"),
        ([parts[0], foreign], MismatchError, "rope_theta"),
        ([parts[0], still], InputError, "harm 1.0.0 .*does not say how keys"),
        ([parts[0], replace(still, kv_seed=None)], InputError, "harm 1.0.0"),
        ([parts[0], compose_on_device(parts[:2])], InputError, "expected each patch once"),
    ]
    with load_runtime(model, parts[:2]) as session:
        before, fingerprint = logits(session), session.system_fingerprint
        for patches, kind, phrase in cases:
            with pytest.raises(kind, match=phrase) as error:
                session.swap(patches)
            assert error.value.hint
            assert session.system_fingerprint == fingerprint
            assert [part.name for part in session.parts] == [
                part.name for part in sorted(parts[:2], key=lambda p: p.digest)
            ]
            assert (logits(session) == before).all(), phrase
    with pytest.raises(InactivePatchError, match="harm"):
        load_runtime(model, [parts[0], broken])


def test_parts_for_different_bases_are_named(tiny_folder, parts):
    foreign = replace(parts[1], base=replace(parts[1].base, rope_theta=5000.0))
    with pytest.raises(MismatchError, match="rope_theta") as error:
        load_runtime(tiny_folder, [parts[0], foreign])
    assert "gender" in error.value.hint and "harm" in error.value.hint
    both = [replace(part, base=foreign.base) for part in parts[:2]]
    with load_runtime(tiny_folder, parts[0]) as session, pytest.raises(MismatchError, match="one of 2 patches"):
        session.swap(both)
    for patches in ([], [parts[0], None]):
        with pytest.raises(InputError, match="expected one or more"):
            load_runtime(tiny_folder, patches)


def test_together_they_must_leave_room_in_the_context(tiny_ggufs, parts, tmp_path):
    with pytest.raises(InputError, match="expected 20 positions or more, found 19") as error:
        load_runtime(tiny_ggufs["F16"], parts, context_length=19)
    assert "gender 1.0.0 takes 6, " in error.value.hint or ", gender 1.0.0 takes 6" in error.value.hint
    store = Store(tmp_path / "store")
    for part in parts:
        write_patch(part, tmp_path / "part")
        store.apply(tmp_path / "part", UNSIGNED)
    with pytest.raises(InputError, match="expected 20 positions or more, found 19") as error:
        load_runtime(tiny_ggufs["F16"], store=store.folder, context_length=19)
    assert all(part.name in error.value.hint for part in parts)
    with load_runtime(tiny_ggufs["F16"], parts, context_length=20) as session:
        assert session.context_length == 1


def test_a_part_that_was_changed_in_the_store_stops_the_whole(tiny_folder, parts, files, tmp_path):
    from edgepatch.errors import UntrustedError

    store = Store(tmp_path / "store")
    digests = [store.apply(file, UNSIGNED).digest for file in files]
    path = store.patch_path(digests[1])
    path.write_bytes(patch_bytes(parts[1])[:-1] + b"\1")
    with pytest.raises(UntrustedError):
        load_runtime(tiny_folder, store=store.folder)


# --- The command line


@pytest.fixture
def run(monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return command


def test_patch_given_twice_is_both(run, tiny_folder, parts, files, tmp_path):
    asked = ("--prompt", PROMPT, "--max-new-tokens", 3, "--rng-seed", 1, "--json")
    fingerprints = []
    for order in (files[:2], files[1::-1]):
        code, out, err = run("generate", tiny_folder, *(word for file in order for word in ("--patch", file)), *asked)
        assert code == 0, err
        assert "gender 1.0.0" in err and "harm 1.0.0" in err and "canary passed" in err
        fingerprints.append(json.loads(out)["system_fingerprint"])
    assert len(set(fingerprints)) == 1 and fingerprints[0].endswith(compose_on_device(parts[:2]).digest[:12])
    code, _, err = run("generate", tiny_folder, "--patch", files[0], "--patch", files[0], *asked)
    assert (code, "found gender twice" in err) == (2, True)
    assert run("generate", tiny_folder, "--patch", files[0], "--bare", *asked)[0] == 2


def test_what_the_store_runs_is_said_at_the_start(run, tiny_folder, files, tmp_path):
    store = Store(tmp_path / "store")
    for file in files[:2]:
        store.apply(file, UNSIGNED)
    asked = ("generate", tiny_folder, "--store", store.folder, "--prompt", PROMPT, "--max-new-tokens", 1)
    code, _, err = run(*asked)
    assert code == 0 and "patches " in err and "gender 1.0.0" in err and "harm 1.0.0" in err
    assert f"the active patches of {store.folder}" in err
    code, _, err = run("verify", "--deep", "--model", tiny_folder, "--store", store.folder)
    assert code == 0, err
    store.deactivate("a trial", patch="gender")
    store.deactivate("made for another assistant", patch="harm")
    code, _, err = run(*asked)
    assert code == 0 and "no patch" in err and "harm: made for another assistant" in err


def test_a_server_runs_bare_by_word_alone(tiny_folder, files, tmp_path, capsys):
    from edgepatch.cli.chat import Device
    from edgepatch.cli.serve import _loader
    from edgepatch.runtimes import ACTIVE

    def load():
        return _loader(tiny_folder, ACTIVE, 1, None, None, Device.cpu, tmp_path / "store", False, False, {})()

    with pytest.raises(InputError, match="expected the folder"):
        load()
    store = Store(tmp_path / "store")
    for file in files[:2]:
        store.apply(file, UNSIGNED)
    with load() as session:
        assert len(session.parts) == 2
    for name in ("gender", "harm"):
        store.deactivate("made for another assistant", patch=name)
    with load() as session:
        assert session.parts == ()
    assert "harm: made for another assistant" in capsys.readouterr().err


def test_chat_swaps_to_several(tiny_folder, parts, files, capsys):
    from edgepatch.cli.conversation import Conversation

    with load_runtime(tiny_folder, parts[2]) as session:
        conversation = Conversation(session, None)
        conversation.command(f"/patch {files[0]} {files[1]}")
        assert {part.name for part in session.parts} == {"gender", "harm"}
        conversation.command(f"/patch {files[0]} {files[0]}")
        assert "found gender twice" in capsys.readouterr().err
        assert {part.name for part in session.parts} == {"gender", "harm"}
        conversation.command("/patch 'open")
        assert "expected names of patches" in capsys.readouterr().err
        conversation.command("/bare")
        assert session.parts == ()

"""Several patches of one base: each with its own signatures, sequence, rollback and hold; taking one off leaves the others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import timedelta
from itertools import permutations
from pathlib import Path

import pytest

from edgepatch.errors import EdgepatchError, InputError, UntrustedError
from edgepatch.patch.composition import compose_on_device
from edgepatch.seeds.rotation import Rotation
from edgepatch.store import audit
from edgepatch.store.device import Store
from edgepatch.store.policy import Allowances
from edgepatch.store.records import base_id, parse_state, parse_trust
from kit.stores import NOW, Clock, make_patch, make_root, make_store, movable, public, rotated, spec, write

OTHER = spec(weight_fingerprint="c" * 64)
GOLDEN = Path(__file__).parent.parent / "golden" / "store-v1"


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store")


def apply(store, folder, name, sequence=1, allowances=None, **fields):
    file = write(folder, sequence, **movable(sequence + len(name), name=name, **fields))
    return store.apply(file, allowances or Allowances())


def active(store, base=None):
    """{name: sequence} of what a runtime would load."""
    return {patch.name: patch.sequence for patch in store.active(base or spec())}


def slot(store, name):
    return store.read()[0].bases[base_id(spec())].slots[name]


def test_two_names_are_both_active(store, tmp_path):
    first, second = apply(store, tmp_path, "gender", 5), apply(store, tmp_path, "harm", 2)
    assert active(store) == {"gender": 5, "harm": 2}
    assert (first.beside, list(second.beside), second.before) == ({}, [first.digest], "")
    report, findings = audit.status(store)
    (base,) = report["bases"]
    assert [(patch["name"], patch["sequence"]) for patch in base["patches"]] == [("gender", 5), ("harm", 2)]
    assert all(patch["signatures"].startswith("site (") for patch in base["patches"])
    composed = compose_on_device(store.active(spec()))
    assert base["composition"] == {"digest": composed.digest, "num_virtual_tokens": 4, "trained_alone": []}
    assert findings == audit.verify(store) == []
    assert store.history()[-1]["beside"] == [first.digest]


def test_a_newer_one_replaces_its_own_name_alone(store, tmp_path):
    first = apply(store, tmp_path, "gender", 1)
    apply(store, tmp_path, "harm", 1)
    assert apply(store, tmp_path, "gender", 2).before == first.digest
    assert active(store) == {"gender": 2, "harm": 1}
    assert slot(store, "gender").previous == (first.digest,) and slot(store, "harm").previous == ()


def test_what_a_device_runs_depends_on_no_order(tmp_path):
    names, digests = ("gender", "harm", "toxicity"), set()
    for number, order in enumerate(permutations(names)):
        store = make_store(tmp_path / f"store-{number}")
        for name in order:
            apply(store, tmp_path, name)
        digests.add(audit.status(store)[0]["bases"][0]["composition"]["digest"])
    assert len(digests) == 1


def test_sequences_and_channels_are_of_each_name(store, tmp_path):
    apply(store, tmp_path, "gender", 7)
    apply(store, tmp_path, "harm", 1)
    with pytest.raises(UntrustedError, match="8 or more, found 6"):
        apply(store, tmp_path, "gender", 6)
    apply(store, tmp_path, "harm", 2)
    beta = write(tmp_path, 1, **movable(name="harm", channel="beta"))
    with pytest.raises(UntrustedError, match="expected stable, found beta"):
        store.apply(beta)
    store.apply(beta, channel="beta")
    apply(store, tmp_path, "gender", 8)
    assert active(store) == {"gender": 8, "harm": 1}


def test_rollback_of_one_leaves_the_others(store, tmp_path):
    for name in ("gender", "harm"):
        for sequence in (1, 2):
            apply(store, tmp_path, name, sequence)
    with pytest.raises(InputError, match=r"expected the name of one patch.*gender, harm") as error:
        store.rollback()
    assert "--patch" in error.value.hint
    store.rollback(patch="harm", reason="too strict")
    assert active(store) == {"gender": 2, "harm": 1}
    assert store.history()[-1]["name"] == "harm" and store.history()[-1]["reason"] == "too strict"
    with pytest.raises(EdgepatchError, match=r"harm for base .*: expected a patch to go back to"):
        store.rollback(patch="harm")
    for unknown in ("detox", "", "har"):
        with pytest.raises(InputError, match="expected the name of one patch"):
            store.rollback(patch=unknown)


def test_hold_of_one_leaves_the_others_free(store, tmp_path):
    apply(store, tmp_path, "gender", 1)
    apply(store, tmp_path, "harm", 1)
    store.hold(patch="harm", reason="acceptance test")
    with pytest.raises(EdgepatchError, match="harm is held: acceptance test") as error:
        apply(store, tmp_path, "harm", 2)
    assert "--patch harm" in error.value.hint
    apply(store, tmp_path, "gender", 2)
    store.hold(reason="all of it")
    for name in ("gender", "toxicity"):
        with pytest.raises(EdgepatchError, match="is held: all of it"):
            apply(store, tmp_path, name, 3)
    store.hold(patch="harm", is_held=False)
    with pytest.raises(EdgepatchError, match="is held: all of it"):
        apply(store, tmp_path, "harm", 3)
    store.hold(is_held=False)
    apply(store, tmp_path, "harm", 3)
    assert active(store) == {"gender": 2, "harm": 3}


def test_unhold_of_the_base_frees_every_name(store, tmp_path):
    apply(store, tmp_path, "gender", 1)
    store.hold(patch="gender")
    store.hold(is_held=False)
    apply(store, tmp_path, "gender", 2)


def test_taking_one_off_leaves_the_others(store, tmp_path):
    gender = apply(store, tmp_path, "gender", 3)
    apply(store, tmp_path, "harm", 1)
    with pytest.raises(InputError, match="reason: expected one"):
        store.deactivate("", patch="gender")
    with pytest.raises(InputError, match="expected the name of one"):
        store.deactivate("wrong")
    change = store.deactivate("made for another assistant", patch="gender")
    assert (change.digest, [p.name for p in change.beside.values()]) == (gender.digest, ["harm"])
    assert active(store) == {"harm": 1}
    assert store.history()[-1]["action"] == "deactivate"
    assert store.history()[-1]["reason"] == "made for another assistant"
    assert audit.status(store)[0]["bases"][0]["off"][0]["reason"] == "made for another assistant"
    assert store.why_bare(spec()) == "", "another one is active"
    with pytest.raises(InputError, match="expected an active patch, found none"):
        store.deactivate("again", patch="gender")
    with pytest.raises(UntrustedError, match="4 or more"):
        apply(store, tmp_path, "gender", 2)
    store.rollback(patch="gender")
    assert active(store) == {"gender": 3, "harm": 1}
    assert slot(store, "gender").off_reason == ""
    assert audit.verify(store) == []


def test_without_any_left_bare_is_asked_for_by_word(store, tmp_path):
    apply(store, tmp_path, "gender", 3)
    store.deactivate("wrong patch")
    assert active(store) == {}
    assert store.why_bare(spec()) == "gender: wrong patch"
    assert store.why_bare(OTHER) == "", "nothing was ever said of this one"
    report, findings = audit.status(store)
    assert report["bases"][0]["patches"] == []
    assert [(f.level, "by word: gender: wrong patch" in f.message) for f in findings] == [("warning", True)]
    audit.require_no_error(findings)
    with pytest.raises(EdgepatchError, match="made for another model"):
        apply(store, tmp_path, "gender", 4, base=OTHER)
    assert store.rollback().digest == apply(store, tmp_path, "gender", 3).digest
    assert store.why_bare(spec()) == ""


def test_a_patch_that_was_taken_off_can_be_removed(store, tmp_path):
    digest = apply(store, tmp_path, "gender", 3).digest
    apply(store, tmp_path, "harm", 1)
    with pytest.raises(EdgepatchError, match="is active") as error:
        store.remove(digest)
    assert "edgepatch deactivate gender" in error.value.hint
    store.deactivate("wrong", patch="gender")
    store.remove(digest)
    assert not store.patch_path(digest).exists() and active(store) == {"harm": 1}
    with pytest.raises(UntrustedError, match="4 or more"):
        apply(store, tmp_path, "gender", 2)
    apply(store, tmp_path, "gender", 4)
    assert active(store) == {"gender": 4, "harm": 1}


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"rotation": None}, "does not say how keys"),
        ({"kv_seed": None}, "expected a KV seed"),
        ({"rotation": Rotation(((0.5, 0.01),), (0, 0))}, "both say alike how keys"),
    ],
    ids=["no rotation", "no seed", "another rotation"],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_what_cannot_stand_beside_is_refused(store, tmp_path, fields, phrase, is_first):
    """Whichever of the two comes first; the device keeps what it had."""
    lame = write(tmp_path, 1, **movable(name="lame", **fields))
    sound = write(tmp_path, 1, **movable(9, name="sound"))
    first, second = (lame, sound) if is_first else (sound, lame)
    store.apply(first)
    before = (store.folder / "state.json").read_bytes()
    with pytest.raises(InputError, match=phrase) as error:
        store.apply(second)
    assert "lame" in str(error.value) and "sound" in str(error.value)
    assert "edgepatch deactivate" in error.value.hint
    assert (store.folder / "state.json").read_bytes() == before
    assert len(list((store.folder / "patches").iterdir())) == 1
    store.deactivate("makes room")
    store.apply(second)
    assert len(active(store)) == 1
    with pytest.raises(InputError, match=phrase):
        store.rollback(patch="lame" if is_first else "sound")


def test_no_more_than_twelve(store, tmp_path):
    for number in range(12):
        apply(store, tmp_path, f"part-{number}")
    with pytest.raises(InputError, match="expected 2 to 12 patches, found 13"):
        apply(store, tmp_path, "part-12")
    assert len(active(store)) == 12


def test_a_part_of_an_active_composition_does_not_act_twice(store, tmp_path):
    part = apply(store, tmp_path, "gender")
    whole = write(tmp_path, 1, **movable(8, name="all", parts=(part.digest, "d" * 64)))
    with pytest.raises(InputError, match="expected each patch once"):
        store.apply(whole)
    store.deactivate("the whole comes instead")
    store.apply(whole)
    assert active(store) == {"all": 1}


def test_each_base_has_its_own(store, tmp_path):
    apply(store, tmp_path, "gender")
    file = write(tmp_path, 4, **movable(4, name="gender", base=OTHER))
    store.apply(file, model=OTHER)
    assert (active(store), active(store, OTHER)) == ({"gender": 1}, {"gender": 4})
    with pytest.raises(InputError, match="expected one base that has it"):
        store.deactivate("wrong", patch="gender")
    store.deactivate("wrong", patch="gender", base=base_id(OTHER)[:8])
    assert (active(store), active(store, OTHER)) == ({"gender": 1}, {})


def test_damage_of_one_is_told_and_mended(store, tmp_path):
    """Two damaged files must not wait for each other."""
    files = [write(tmp_path, 1, **movable(len(name), name=name)) for name in ("gender", "harm")]
    paths = [store.patch_path(store.apply(file).digest) for file in files]
    for path in paths:
        path.write_bytes(b"x")
    with pytest.raises(UntrustedError):
        store.active(spec())
    assert [f.level for f in audit.status(store)[1]] == ["error", "error"]
    for file in files:
        assert store.apply(file).is_new
    assert active(store) == {"gender": 1, "harm": 1}


def test_a_new_root_that_vouches_for_one_of_two(store, tmp_path):
    apply(store, tmp_path, "gender", 900)
    kept = write(tmp_path, 3, by=("vendor2", "site", "vendor"), **movable(3, name="harm"))
    store.apply(kept)
    change = store.set_root([rotated(store.root(), patch_keys=[public("vendor2")], revoke=[public("vendor").id])])
    assert change.reset and len(change.refused) == 1
    with pytest.raises(UntrustedError):
        store.active(spec())
    with pytest.raises(UntrustedError, match="4 or more"):
        apply(store, tmp_path, "harm", 2, by=("vendor2", "site"))
    apply(store, tmp_path, "gender", 2, by=("vendor2", "site"))
    assert active(store) == {"gender": 2, "harm": 3}


def test_a_record_under_another_name_is_refused(store, tmp_path):
    """A line in the state makes no patch active in the place of another's name."""
    apply(store, tmp_path, "gender")
    apply(store, tmp_path, "harm")
    path = store.folder / "state.json"
    document = json.loads(path.read_bytes())
    slots = document["bases"][base_id(spec())]["slots"]
    slots["gender"]["active"] = slots["harm"]["active"]
    path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")))
    with pytest.raises(UntrustedError, match="patches gender of base"):
        store.active(spec())
    for bad in ({"x y": slots["harm"]}, {}):
        document["bases"][base_id(spec())]["slots"] = bad
        path.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")))
        with pytest.raises(UntrustedError):
            store.active(spec())


def test_states_are_read_as_they_were_written(store, tmp_path):
    apply(store, tmp_path, "gender", 2)
    apply(store, tmp_path, "harm", 3)
    store.deactivate("wrong", patch="harm")
    state, trust = store.read()
    assert parse_state(state.to_bytes()) == state and parse_trust(trust.to_bytes()) == trust
    assert trust.newest(base_id(spec()), "harm", "stable").sequence == 3


# --- Format 1


@pytest.fixture
def old_store(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "old")
    return Store(tmp_path / "old", clock=Clock(NOW + timedelta(days=3)))


def test_the_active_patch_of_format_1_is_that_of_its_name(old_store, tmp_path):
    record = old_store.read()[0].bases[base_id(spec())]
    assert list(record.slots) == ["detox"] and len(record.slots["detox"].previous) == 1
    with pytest.raises(InputError, match=r"cannot stand beside detox.*does not say how keys|expected a KV seed"):
        apply(old_store, tmp_path, "gender")
    with pytest.raises(UntrustedError, match="3 or more"):
        old_store.apply(write(tmp_path, 1))
    old_store.deactivate("it cannot be moved", patch="detox")
    apply(old_store, tmp_path, "gender")
    assert active(old_store) == {"gender": 1}
    assert not [finding for finding in audit.verify(old_store) if finding.level == "error"]


def test_what_another_name_had_replaced_in_format_1_stays_to_be_rolled_back(tmp_path):
    """In format 1 a patch of another name took the place of the active one; both names are known afterwards, one is active."""
    detox, gender = (make_patch(n, **movable(n, name=name)) for n, name in ((1, "detox"), (2, "gender")))
    store = make_store(tmp_path / "store")
    for patch in (detox, gender):
        store.apply(write(tmp_path, patch.sequence, **movable(patch.sequence, name=patch.name)))
    state, trust = store.read()
    document = json.loads(state.to_bytes())
    record = document["bases"][base_id(spec())]
    del record["slots"]
    record |= {"active": gender.digest, "previous": [detox.digest]}
    old = parse_state(json.dumps({**document, "format": 1}, sort_keys=True, separators=(",", ":")).encode())
    slots = old.bases[base_id(spec())].slots
    assert (slots["gender"].active, slots["detox"].active) == (gender.digest, "")
    assert slots["detox"].previous == (detox.digest,)
    seen = {base_id(spec()): {"stable": {"sequence": 2, "digest": gender.digest}}}
    data = json.dumps({"floor": trust.floor, "format": 1, "root": trust.root, "seen": seen}, sort_keys=True)
    read = parse_trust(
        json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode(), {base_id(spec()): slots}
    )
    assert all(read.newest(base_id(spec()), name, "stable").sequence == 2 for name in ("detox", "gender"))
    assert replace(read, seen={}).root == make_root().to_bytes().decode()

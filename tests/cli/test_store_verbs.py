"""The verbs of the store: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from edgepatch.cli import main
from edgepatch.patch.file import write_patch
from edgepatch.tensors import SoftPrompt
from edgepatch.trust.keys import private_pem
from kit.stores import KEYS, make_patch, make_root, movable, public, rotated, write

BORN = datetime.now(timezone.utc) - timedelta(days=2)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """(exit code, stdout, stderr) of a command; relative names lie in the test's folder, and so does the store."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.fixture
def trusting(run, tmp_path):
    """As ``run``, on a device with a trust root."""
    (tmp_path / "root.json").write_bytes(make_root(created=BORN).to_bytes())
    assert run("trust", "set", "root.json")[0] == 0
    return run


def read(answer):
    code, out, err = answer
    assert code == 0, err
    return json.loads(out)


def test_a_patch_on_its_way(trusting, tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    applied = read(trusting("apply", first, "--json"))
    assert (applied["sequence"], applied["before"], applied["changed"], len(applied["signed_by"])) == (1, "", True, 2)
    code, out, _ = trusting("apply", second)
    assert (code, "active" in out, "before" in out, "stable 2" in out) == (0, True, True, True)
    assert "already active" in trusting("apply", second)[1]
    code, out, err = trusting("status")
    assert (code, err) == (0, "")
    for phrase in ("version 1, 2 of site", "detox 1.2.0", "stable 2, expires never", "site ("):
        assert phrase in out
    report = read(trusting("status", "--json"))
    assert (report["bases"][0]["patches"][0]["name"], report["findings"]) == ("detox", [])
    patches = read(trusting("list", "--json"))
    assert [(patch["sequence"], patch["active"]) for patch in patches] == [(1, False), (2, True)]
    assert "1.1.0" in trusting("list")[1]
    assert trusting("apply", write(tmp_path, 1))[0] == 3
    assert trusting("apply", write(tmp_path, 1), "--allow-downgrade")[0] == 2
    assert trusting("apply", write(tmp_path, 1), "--reason", "x")[0] == 2
    assert trusting("apply", write(tmp_path, 1), "--allow-downgrade", "--reason", "2 is broken")[0] == 0
    assert "active" in trusting("rollback", "--reason", "no, 1 is")[1]
    entries = read(trusting("history", "--json"))
    assert [entry["action"] for entry in entries] == ["trust", "apply", "apply", "apply", "rollback"]
    code, out, _ = trusting("history")
    for phrase in ("trust root version 1", "downgrade: 2 is broken", "reason: no, 1 is"):
        assert phrase in out


def test_hold_and_remove(trusting, tmp_path):
    digest = read(trusting("apply", write(tmp_path, 1), "--json"))["digest"]
    assert trusting("remove", digest)[0] == 1
    assert "held" in trusting("hold", "--reason", "tests run")[1]
    code, _, err = trusting("apply", write(tmp_path, 2))
    assert (code, "tests run" in err) == (1, True)
    assert "tests run" in trusting("status")[1]
    assert read(trusting("unhold", "--json"))["held"] is False
    assert trusting("apply", write(tmp_path, 2))[0] == 0
    assert read(trusting("remove", digest[:12], "--json")) == {"removed": digest}
    assert trusting("remove", digest[:12])[0] == 2
    third = read(trusting("apply", write(tmp_path, 3), "--json"))["before"]
    assert "removed" in trusting("remove", third)[1]
    assert "base" in trusting("history")[1]


def test_several_patches_beside_each_other(trusting, tmp_path):
    gender, harm = (write(tmp_path, n, **movable(n, name=name)) for n, name in ((4, "gender"), (2, "harm")))
    first = read(trusting("apply", gender, "--json"))
    assert (first["beside"], read(trusting("apply", harm, "--json"))["beside"]) == ([], [first["digest"]])
    base = read(trusting("status", "--json"))["bases"][0]
    assert [(patch["name"], patch["sequence"]) for patch in base["patches"]] == [("gender", 4), ("harm", 2)]
    out = trusting("status")[1]
    for phrase in ("gender 1.4.0", "harm 1.2.0", "4 virtual tokens side by side", base["composition"]["digest"][:12]):
        assert phrase in out
    assert out.count("signatures") == 2
    assert [line.split()[0] for line in trusting("list")[1].splitlines()[1:]] == ["*", "*"]
    assert trusting("apply", write(tmp_path, 5, **movable(5, name="gender")))[0] == 0
    code, _, err = trusting("rollback")
    assert (code, "gender, harm" in err, "--patch" in err) == (2, True, True)
    for named in (("gender",), ("--patch", "gender")):
        assert trusting("apply", write(tmp_path, 5, **movable(5, name="gender")))[0] == 0
        code, out, _ = trusting("rollback", *named)
        assert (code, "gender 1.4.0" in out, "beside" in out) == (0, True, True)
    assert "harm of base" in trusting("hold", "harm", "--reason", "tests run")[1]
    assert trusting("apply", write(tmp_path, 3, **movable(3, name="harm")))[0] == 1
    assert trusting("status")[1].count("tests run") == 1
    assert trusting("unhold", "--patch", "harm")[0] == 0
    assert trusting("deactivate", "gender")[0] == 2, "a reason is needed"
    code, out, _ = trusting("deactivate", "gender", "--reason", "made for another assistant")
    assert (code, "off" in out, "beside" in out, "harm 1.2.0" in out) == (0, True, True, True)
    assert "gender: made for another assistant" in trusting("status")[1]
    assert read(trusting("deactivate", "--reason", "as well", "--json"))["name"] == "harm"
    code, out, err = trusting("status")
    assert (code, "nothing" in out, "by word" in err) == (0, True, True)
    code, out, _ = trusting("history")
    assert "reason: made for another assistant" in out and f"beside {first['digest'][:12]}" in out
    assert "harm of base" in out
    assert trusting("rollback", "--patch", "toxicity")[0] == 2
    code, _, err = trusting("rollback", "gendr")
    assert (code, "expected the name of a patch" in err, "gender, harm" in err) == (2, True, True)


def entries_of(folder):
    """Every path of a folder, with the bytes of each file."""
    return {path: path.read_bytes() if path.is_file() else b"" for path in sorted(folder.rglob("*"))}


def test_a_dry_run_checks_everything_and_changes_nothing(trusting, tmp_path):
    first, second = write(tmp_path, 1), write(tmp_path, 2)
    assert trusting("apply", first, "--store", "new", "--dry-run")[0] == 3, "no root there"
    assert not Path("new").exists()
    before = entries_of(tmp_path / "store")
    code, out, err = trusting("apply", second, "--dry-run")
    assert (code, "would become active" in out, "nothing was changed" in err) == (0, True, True)
    facts = read(trusting("apply", second, "--dry-run", "--json"))
    assert (facts["dry_run"], facts["changed"], facts["before"]) == (True, True, "")
    assert trusting("apply", write(tmp_path, 3, by=("site",)), "--dry-run")[0] == 3, "one signature of two"
    assert entries_of(tmp_path / "store") == before
    assert trusting("apply", second)[0] == 0
    assert trusting("apply", first, "--dry-run")[0] == 3, "an older one"
    assert "already active" in trusting("apply", second, "--dry-run")[1]
    assert trusting("hold")[0] == 0
    assert trusting("apply", write(tmp_path, 4), "--dry-run")[0] == 1, "held"


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_dry_run_needs_no_right_to_write(trusting, tmp_path):
    for folder in [tmp_path / "store", *(path for path in (tmp_path / "store").rglob("*") if path.is_dir())]:
        folder.chmod(0o555)
    try:
        assert trusting("apply", write(tmp_path, 1), "--dry-run")[0] == 0
        assert trusting("apply", write(tmp_path, 1))[0] == 1
    finally:
        (tmp_path / "store").chmod(0o755)


def test_bases_have_human_names(trusting, tmp_path, tiny_folder):
    """Taken from the model that a patch is applied with; a base is meant by its name as by its id."""
    from edgepatch.runtimes import read_spec

    base = read_spec(tiny_folder)
    config = json.loads((tiny_folder / "config.json").read_text())
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": "Makers/Small Talker"}))
    prompt = SoftPrompt(np.zeros((2, base.hidden_size), np.float32))
    tiny = write(tmp_path, 1, base=base, soft_prompt=prompt)
    assert trusting("status", "--model", folder)[0] == 2, "nothing is active yet"
    assert trusting("apply", write(tmp_path, 1))[0] == 0
    assert trusting("status", "--model", folder)[0] == 4, "the active one is for another model"
    assert trusting("apply", tiny, "--model", folder)[0] == 0
    assert read(trusting("status", "--json"))["bases"][1]["name"] == "Makers/Small Talker"
    for verb in ("status", "list"):
        out = trusting(verb)[1]
        assert "Makers/Small Talker" in out and "llama, 2 layers of 8" in out, verb
    code, out, _ = trusting("hold", "makers", "--reason", "test")
    assert (code, out.startswith("base Makers/Small Talker (")) == (0, True)
    assert "base Makers/Small Talker (" in trusting("history")[1]
    code, _, err = trusting("unhold")
    assert code == 2 and "Makers/Small Talker" in err
    assert trusting("unhold", "Makers/Small Talker")[0] == 0
    assert trusting("hold", "nobody")[0] == 2
    code, out, _ = trusting("status", "--model", folder)
    assert (code, "runs" in out, "detox 1.1.0" in out, "signed by site" in out) == (0, True, True, True)
    facts = read(trusting("status", "--model", folder, "--json"))
    assert [patch["name"] for patch in facts["patches"]] == ["detox"]
    assert trusting("deactivate", "makers", "--reason", "too strict")[0] == 0
    code, out, _ = trusting("status", "--model", folder)
    assert (code, "without a patch, by word: detox: too strict" in out) == (0, True)


def test_status_as_a_page_to_print(trusting, tmp_path):
    trusting("apply", write(tmp_path, 1))
    trusting("hold", "detox", "--reason", "<b>until Monday</b>")
    code, _, err = trusting("status", "--html", "status.html")
    page = (tmp_path / "status.html").read_text("utf-8")
    assert code == 0 and "wrote status.html" in err
    for phrase in (
        "1 active patch, no errors",
        "detox 1.1.0",
        "stable 1",
        "&lt;b&gt;until Monday",
        "2 of site",
        "History",
    ):
        assert phrase in page
    assert "<b>" not in page and "<script" not in page and "Needs attention" not in page
    assert trusting("status", "--html", "page.html", "--model", __file__)[0] == 2
    (tmp_path / "store" / "state.json").write_text("{}")
    assert trusting("status", "--html", "page.html")[0] != 0 and not (tmp_path / "page.html").exists()


def test_exit_codes_of_apply(trusting, tmp_path):
    trusting("apply", write(tmp_path, 1))
    (tmp_path / "x").write_bytes(b"x")
    for code, file in ((2, "none"), (3, "x"), (3, write(tmp_path, 2, by=("vendor",)))):
        assert trusting("apply", file)[0] == code
    from kit.stores import spec

    assert trusting("apply", write(tmp_path, 2, base=spec(rope_theta=1.0)))[0] == 4
    expired = write(tmp_path, 2, expires="2001-01-01T00:00:00Z")
    assert trusting("apply", expired)[0] == 3
    assert trusting("apply", expired, "--allow-expired", "no other")[0] == 0
    code, _out, err = trusting("status")
    assert (code, "warning" in err, "expired on" in err) == (0, True, True)
    beta = write(tmp_path, 1, channel="beta")
    assert trusting("apply", beta)[0] == 3
    assert trusting("apply", beta, "--channel", "beta")[0] == 0


def test_without_a_root(run, tmp_path):
    file = write(tmp_path, by=())
    assert "nothing" in run("status")[1]
    assert run("apply", file)[0] == 3
    code, out, _ = run("apply", file, "--unsigned", "bench")
    assert (code, "not checked: bench" in out) == (0, True)
    assert run("trust", "show")[0] == 2
    assert run("verify", file)[0] == 2
    code, _, err = run("status")
    assert (code, "no signature was checked" in err) == (0, True)


def test_verify_the_store(trusting, tmp_path):
    digest = read(trusting("apply", write(tmp_path, 1), "--json"))["digest"]
    code, out, _ = trusting("verify")
    assert (code, "1 patches, trust, history" in out) == (0, True)
    path = tmp_path / "store" / "patches" / f"{digest}.safetensors"
    path.write_bytes(b"x")
    for verb in (("verify",), ("verify", "--json"), ("status",), ("status", "--json"), ("rollback",)):
        code, _, _err = trusting(*verb)
        assert code in ((1,) if verb == ("rollback",) else (3,)), verb
    assert json.loads(trusting("verify", "--json")[1])["findings"][0]["level"] == "error"
    (tmp_path / "store" / "history.jsonl").write_bytes(b"")
    assert trusting("history")[0] == 3


def test_verify_a_file(trusting, tmp_path):
    file = write(tmp_path, 1)
    report = read(trusting("verify", file, "--json"))
    assert [name.split(" ")[0] for name in report["signed_by"]] == ["site", "vendor"]
    assert "site" in trusting("verify", file, "--root", "root.json")[1]
    assert trusting("verify", write(tmp_path, 1, by=("site",)))[0] == 3
    assert trusting("verify", write(tmp_path, 1, by=()))[0] == 3
    assert trusting("verify", write(tmp_path, 1, expires="2001-01-01T00:00:00Z"))[0] == 3
    assert trusting("verify", "--root", "root.json")[0] == 2
    assert trusting("verify", "--deep")[0] == 2
    assert trusting("verify", file, "--model", "x")[0] == 2


def test_sign(run, tmp_path):
    for name in ("vendor", "site"):
        with os.fdopen(os.open(tmp_path / f"{name}.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as key:
            key.write(private_pem(KEYS[name], None))
    write_patch(make_patch(by=()), tmp_path / "patch")
    report = read(run("sign", "patch", "vendor.key", "-o", "signed", "--unencrypted", "--json"))
    assert (report["digest"], len(report["signatures"])) == (make_patch().digest, 1)
    assert (tmp_path / "patch").read_bytes() != (tmp_path / "signed").read_bytes()
    assert run("sign", "patch", "site.key", "vendor.key", "--unencrypted")[0] == 0
    write_patch(make_patch(), tmp_path / "expected")
    assert (tmp_path / "patch").read_bytes() == (tmp_path / "expected").read_bytes()
    assert run("sign", "patch", "none.key", "--unencrypted")[0] == 2
    write_patch(make_patch(by=()), tmp_path / "patch")
    out = run("sign", "patch", "vendor.key", "--unencrypted")[1]
    assert f"vendor ({public('vendor').id[:12]})" in out
    run("keygen", "mine", "--unencrypted")
    for words in (("sign", "signed", "mine.pub"), ("root", "sign", "root.json", "mine.pub")):
        (tmp_path / "root.json").write_bytes(make_root(created=BORN).to_bytes())
        code, _, err = run(*words)
        assert code == 2 and "that is the public key" in err and "mine.key" in err


def test_trust(trusting, tmp_path):
    root = make_root(created=BORN)
    facts = read(trusting("trust", "show", "--json"))
    assert (facts["fingerprint"], facts["threshold"]) == (root.fingerprint, 2)
    assert root.fingerprint in trusting("trust", "show")[1]
    assert read(trusting("trust", "set", "root.json", "--json"))["changed"] is False
    trusting("apply", write(tmp_path, 1))
    newer = rotated(
        root, revoke=[next(key for key in root.keys if root.keys[key].owner == "vendor")], patch_threshold=1
    )
    (tmp_path / "root-2.json").write_bytes(newer.to_bytes())
    assert trusting("trust", "set", "root-2.json", "--fingerprint", root.fingerprint)[0] == 3
    code, out, _ = trusting("trust", "set", "root-2.json", "--fingerprint", newer.fingerprint)
    assert (code, "reset" in out, "no longer trusted" in out) == (0, True, False), "the site's signature is enough now"
    assert trusting("trust", "set", "root.json")[0] == 3
    assert "counts from now on" in trusting("trust", "reset-clock", "--reason", "battery")[1]
    assert read(trusting("trust", "reset-clock", "--reason", "battery", "--json")) == {"reset": True}
    assert trusting("trust", "reset-clock", "--reason", "")[0] == 2


def test_a_root_that_refuses_what_is_active(trusting, tmp_path):
    root = make_root(created=BORN)
    trusting("apply", write(tmp_path, 1))
    newer = rotated(root, revoke=[public("vendor").id], patch_keys=[public("vendor2")])
    (tmp_path / "root-2.json").write_bytes(newer.to_bytes())
    code, out, _ = trusting("trust", "set", "root-2.json")
    assert (code, "no longer trusted" in out) == (0, True)
    assert trusting("status")[0] == 3


def test_show(run, tmp_path):
    file = write(tmp_path, 3, summary="less of it", expires="2040-01-01T00:00:00Z")
    facts = read(run("show", file, "--json"))
    assert (facts["channel"], facts["sequence"], facts["expires"], facts["summary"]) == (
        "stable",
        3,
        "2040-01-01T00:00:00Z",
        "less of it",
    )
    assert (len(facts["signatures"]), facts["trust"]) == (2, "unknown: this device has no trust root")
    (tmp_path / "root.json").write_bytes(make_root(created=BORN).to_bytes())
    run("trust", "set", "root.json")
    assert "signed by site (" in run("show", file)[1]
    assert read(run("show", write(tmp_path, by=("site",)), "--json"))["trust"].startswith(
        "refused: signatures of role patch"
    )


def test_store_option(run, tmp_path):
    code, _, err = run("status", "--store", tmp_path / "other", "--json")
    assert code == 2 and "found nothing there" in err
    assert not Path("other").exists()

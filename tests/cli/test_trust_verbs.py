"""``keygen`` and ``root`` at the command line: what they write, what they refuse, and with which exit code."""

from __future__ import annotations

import json
import os
import select
import stat
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from edgepatch import cli
from edgepatch.trust.drafts import new_root
from edgepatch.trust.keys import read_private_key, read_public_key
from edgepatch.trust.roots import Key, read_root
from edgepatch.trust.signatures import key_id, raw_public_key
from edgepatch.trust.verification import require_signed

PASSPHRASE = "four words for tests"


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """Arguments -> (exit code, stdout, stderr) of the entry point, in this process and in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDGEPATCH_KEY_PASSPHRASE", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    with open(os.devnull) as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        yield call


@pytest.fixture
def keys(run) -> None:
    for name in ("vendor", "site", "officer", "deputy"):
        assert run("keygen", name, "--unencrypted")[0] == 0


@pytest.fixture
def root(run, keys) -> str:
    """``root.json``, signed: 2 of vendor and site for patches, 2 of officer and deputy for roots."""
    assert (
        run(
            "root",
            "create",
            "--key",
            "vendor.pub",
            "--key",
            "site.pub",
            "--threshold",
            "2",
            "--root-key",
            "officer.pub",
            "--root-key",
            "deputy.pub",
            "-o",
            "root.json",
        )[0]
        == 0
    )
    sign(run, "root.json", "officer", "deputy")
    return "root.json"


def sign(run, file: str, *names: str) -> None:
    for name in names:
        assert run("root", "sign", file, f"{name}.key", "--unencrypted")[0] == 0


def ident(name: str) -> str:
    return key_id(raw_public_key(read_public_key(Path(f"{name}.pub"))))


# --- keygen


def test_keygen(run, monkeypatch):
    monkeypatch.setenv("EDGEPATCH_KEY_PASSPHRASE", PASSPHRASE)
    code, out, err = run("keygen", "vendor", "--out", "keys", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts == {
        "private": "keys/vendor.key",
        "public": "keys/vendor.pub",
        "key_id": facts["key_id"],
        "encrypted": True,
    }
    assert stat.S_IMODE(Path("keys/vendor.key").stat().st_mode) == 0o600
    key = read_private_key(Path("keys/vendor.key"), PASSPHRASE)
    assert key_id(raw_public_key(key)) == facts["key_id"] and PASSPHRASE not in out


def test_keygen_for_people(run):
    code, out, err = run("keygen", "vendor", "--unencrypted")
    assert (code, err) == (0, "") and ident("vendor") in out and "encrypted  False" in out


def test_keygen_never_overwrites(run):
    assert run("keygen", "vendor", "--unencrypted")[0] == 0
    before = Path("vendor.key").read_bytes()
    code, out, err = run("keygen", "vendor", "--unencrypted")
    assert (code, out) == (2, "") and "vendor.pub exists" in err and Path("vendor.key").read_bytes() == before


@pytest.mark.parametrize("content", [b"%s\n", b"%s\r\n", b"%s", b"%s\nsecond line\n"])
def test_passphrase_file(run, content):
    file = Path("passphrase")
    file.write_bytes(content % PASSPHRASE.encode())
    file.chmod(0o600)
    assert run("keygen", "vendor", "--passphrase-file", file)[0] == 0
    assert read_private_key(Path("vendor.key"), PASSPHRASE)


def test_passphrase_file_that_others_can_read_is_3(run):
    Path("passphrase").write_text(PASSPHRASE)
    Path("passphrase").chmod(0o644)
    code, _, err = run("keygen", "vendor", "--passphrase-file", "passphrase")
    assert code == 3 and "chmod 600" in err and not Path("vendor.key").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a passphrase, found no terminal"),
        (["--passphrase-file", "none"], "No such file"),
        (["--passphrase-file", "none", "--unencrypted"], "found both"),
        (["--unencrypted", "--out", "/dev/null"], "expected a folder, found the file"),
    ],
)
def test_keygen_wrong_use_is_2(run, arguments, message):
    code, out, err = run("keygen", "vendor", *arguments)
    assert (code, out) == (2, "") and message in err.replace("\n", " ") and not list(Path().glob("vendor*"))


def test_what_no_passphrase_mends_is_told_before_one_is_asked_for(run, root):
    """Here is no terminal to ask on, which would be told else."""
    code, _, err = run("keygen", "officer")
    assert code == 2 and "officer.pub exists" in err
    code, _, err = run("keygen", "new", "--out", root)
    assert code == 2 and "expected a folder" in err
    code, _, err = run("root", "sign", root, "none.key")
    assert code == 2 and "No such file" in err
    code, _, err = run("root", "sign", root, "officer.pub")
    assert code == 2 and "that is the public key" in err
    code, _, err = run("root", "sign", root, "officer.key")
    assert code == 3 and "an unencrypted one" in err and "--unencrypted" in err
    Path("officer.key").chmod(0o640)
    code, _, err = run("root", "sign", root, "officer.key")
    assert code == 3 and "0640" in err


def test_short_passphrase_is_2(run, monkeypatch):
    monkeypatch.setenv("EDGEPATCH_KEY_PASSPHRASE", "short")
    code, _, err = run("keygen", "vendor")
    assert code == 2 and "12 characters" in err


def at_a_terminal(folder: Path, typed: list[str], *arguments: str) -> tuple[int, str]:
    """(exit code, all that the terminal shows) of the program in a terminal of its own; each answer goes in at its question."""
    master, slave = os.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "EDGEPATCH_KEY_PASSPHRASE"}
    command = [sys.executable, "-m", "edgepatch.cli", *arguments]
    process = subprocess.Popen(
        command, cwd=folder, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    screen, answered, end = b"", 0, time.monotonic() + 60
    while time.monotonic() < end:
        if answered < min(len(typed), screen.count(b": ")):
            os.write(master, typed[answered].encode())
            answered += 1
        try:
            if select.select([master], [], [], 0.1)[0]:
                screen += os.read(master, 4096)
            elif process.poll() is not None:
                break
        except OSError:  # the other end is closed
            break
    code = process.wait(60)
    os.close(master)
    return code, screen.decode()


def test_passphrase_is_asked_for_twice_and_not_shown(tmp_path):
    code, screen = at_a_terminal(tmp_path, [f"{PASSPHRASE}\n", f"{PASSPHRASE}\n"], "keygen", "vendor")
    assert code == 0 and "passphrase: " in screen and "once more: " in screen and PASSPHRASE not in screen
    assert read_private_key(tmp_path / "vendor.key", PASSPHRASE)


@pytest.mark.parametrize(
    ("typed", "message"),
    [([f"{PASSPHRASE}\n", "another of that length\n"], "the same twice"), (["\x04"], "the end of the input")],
)
def test_passphrase_that_is_not_typed_twice_is_2(tmp_path, typed, message):
    code, screen = at_a_terminal(tmp_path, typed, "keygen", "vendor")
    assert code == 2 and message in screen and list(tmp_path.iterdir()) == []


# --- root


def test_create_sign_show(run, keys):
    code, out, err = run(
        "root",
        "create",
        "--key",
        "vendor.pub",
        "--key",
        "site.pub",
        "--root-key",
        "officer.pub",
        "--root-key",
        "deputy.pub",
        "--expires",
        "30",
        "-o",
        "root.json",
        "--json",
    )
    facts = json.loads(out)
    root = read_root(Path("root.json"))
    assert (code, err) == (0, "")
    assert facts == {"file": "root.json", "version": 1, "fingerprint": root.fingerprint, "signatures": "0 of 2"}
    assert root.expires - root.created == timedelta(days=30) and abs(
        root.created - datetime.now(timezone.utc)
    ) < timedelta(minutes=5)
    assert root.roles["patch"].keys == {ident("vendor"), ident("site")} and root.roles["patch"].threshold == 2
    assert {key.owner for key in root.keys.values()} == {"vendor", "site", "officer", "deputy"}

    code, out, _ = run("root", "sign", "root.json", "officer.key", "--unencrypted")
    assert code == 0 and "1 of 2" in out and "this version" in out and "officer (" in out
    code, out, err = run("root", "show", "root.json")
    assert code == 3 and root.fingerprint in out and "expected 2 of" in err, "one signature is not enough"
    code, out, _ = run("root", "sign", "root.json", "deputy.key", "--unencrypted", "-o", "signed.json", "--json")
    assert (
        code == 0 and json.loads(out)["signatures"] == "2 of 2" and json.loads(out)["fingerprint"] == root.fingerprint
    )
    assert len(read_root(Path("root.json")).signatures) == 1
    code, out, err = run("root", "show", "signed.json")
    assert (code, err) == (0, "") and "2 of site (" in out and "none" in out


def test_show_for_programs(run, root):
    code, out, _ = run("root", "show", root, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["holds"] is True and facts["version"] == 1
    assert facts["roles"]["patch"] == {"threshold": 2, "keys": sorted([ident("vendor"), ident("site")])}
    assert facts["keys"][ident("vendor")] == "vendor" and facts["revoked"] == []
    assert sorted(facts["signatures"]) == sorted([ident("officer"), ident("deputy")])


def test_show_of_what_does_not_hold_is_3(run, root):
    """A failed verification never exits with 0, whatever was printed."""
    file = Path(root)
    good = file.read_bytes()
    file.write_bytes(good.replace(b'"threshold":2', b'"threshold":1', 1))
    code, out, err = run("root", "show", root, "--json")
    assert code == 3 and json.loads(out)["holds"] is False and "does not fit" in err
    file.write_bytes(good[:-1])
    code, out, err = run("root", "show", root)
    assert (code, out) == (3, "") and "canonical JSON" in err
    assert run("root", "show", "none.json")[0] == 2


def test_show_of_an_expired_root_is_3(run, keys):
    key = read_private_key(Path("officer.key"), None)
    own = [Key(raw_public_key(key), "officer")]
    old = new_root(own, own, created=datetime(2020, 1, 1, tzinfo=timezone.utc), lifetime=timedelta(days=1)).signed_by(
        key
    )
    Path("old.json").write_bytes(old.to_bytes())
    code, out, err = run("root", "show", "old.json")
    assert code == 3 and "2020-01-02" in out and "expiry of trust root version 1" in err and "hint:" in err


def test_owner_of_a_hostile_name_does_not_steer_the_terminal(run, keys):
    Path("vendor.pub").rename("ven\x1b[2Jdor.pub")
    code, out, err = run("root", "create", "--key", "ven\x1b[2Jdor.pub", "--root-key", "officer.pub", "-o", "root.json")
    assert code == 3 and "\x1b" not in out + err and not Path("root.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--root-key", "officer.pub"], "role patch: expected 1 to 0"),
        (["--key", "vendor.pub"], "role root: expected 1 to 0"),
        (["--key", "vendor.pub", "--root-key", "officer.pub", "--threshold", "2"], "expected 1 to 1"),
        (["--key", "vendor.pub", "--key", "vendor.pub", "--root-key", "officer.pub"], "one twice"),
        (["--key", "vendor.key", "--root-key", "officer.pub"], "expected a public key, found PRIVATE KEY"),
        (["--key", "none.pub", "--root-key", "officer.pub"], "No such file"),
        (["--key", "vendor.pub", "--root-key", "officer.pub", "--revoke", "site.pub"], "--from OLD"),
        (["--key", "vendor.pub", "--root-key", "officer.pub", "--expires", "0"], "Usage"),
        (["--key", "vendor.pub", "--root-key", "officer.pub", "--threshold", "0"], "Usage"),
    ],
)
def test_create_wrong_use_is_2(run, keys, arguments, message):
    code, out, err = run("root", "create", *arguments, "-o", "root.json")
    assert (code, out) == (2, "") and message in err.replace("\n", " ") and not Path("root.json").exists()


def test_rotation(run, root):
    assert run("keygen", "vendor2", "--unencrypted")[0] == 0
    code, out, _ = run(
        "root", "create", "--from", root, "--revoke", "vendor.pub", "--key", "vendor2.pub", "-o", "root-2.json"
    )
    assert code == 0 and "0 of 2" in out
    before = Path(root).read_bytes()
    code, out, err = run("root", "rotate", root, "root-2.json", "-o", root)
    assert (code, out) == (3, "") and "by version 1: expected 2 of" in err and Path(root).read_bytes() == before
    sign(run, "root-2.json", "officer", "deputy")
    code, out, err = run("root", "rotate", root, "root-2.json", "-o", root, "--json")
    assert (code, err) == (0, "") and json.loads(out)["version"] == 2 and json.loads(out)["sequences"] == "reset"
    new = read_root(Path(root))
    assert new.to_bytes() == Path("root-2.json").read_bytes() and require_signed(new)
    assert new.revoked == {ident("vendor")} and new.counting("patch") == {ident("site"), ident("vendor2")}
    code, out, _ = run("root", "show", root)
    assert code == 0 and "vendor (" in out and "revoked)" in out


def test_rotation_over_several_versions(run, root):
    for old, new in (("root.json", "root-2.json"), ("root-2.json", "root-3.json")):
        assert run("root", "create", "--from", old, "-o", new)[0] == 0
        sign(run, new, "officer", "deputy")
    code, _, err = run("root", "rotate", root, "root-3.json", "-o", "out.json")
    assert code == 3 and "root version: expected 2, found 3" in err and not Path("out.json").exists()
    code, out, _ = run("root", "rotate", root, "root-2.json", "root-3.json", "-o", "out.json")
    assert code == 0 and "kept" in out and read_root(Path("out.json")).version == 3
    code, _, err = run("root", "rotate", "out.json", "root-2.json", "-o", "out.json")
    assert code == 3 and "expected 4, found 2" in err, "rollback"


def test_key_that_leaves_signs_the_rotation(run, root):
    """Its signature counts for the step, not for the new version, and ``sign`` says so."""
    assert run("keygen", "captain", "--unencrypted")[0] == 0
    assert (
        run(
            "root",
            "create",
            "--from",
            root,
            "--revoke",
            ident("officer"),
            "--root-key",
            "captain.pub",
            "-o",
            "new.json",
        )[0]
        == 0
    )
    code, out, _ = run("root", "sign", "new.json", "officer.key", "--unencrypted", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["counts_for"].startswith("the rotation") and facts["signatures"] == "0 of 2"
    sign(run, "new.json", "deputy", "captain")
    assert run("root", "rotate", root, "new.json", "-o", root)[0] == 0


def test_create_from_a_changed_root_is_3(run, root):
    Path(root).write_bytes(Path(root).read_bytes().replace(b'"threshold":2', b'"threshold":1', 1))
    code, _, err = run("root", "create", "--from", root, "-o", "new.json")
    assert code == 3 and "does not fit" in err and not Path("new.json").exists()


def test_sign_with_a_passphrase(run, keys, monkeypatch):
    monkeypatch.setenv("EDGEPATCH_KEY_PASSPHRASE", PASSPHRASE)
    assert run("keygen", "captain")[0] == 0
    assert run("root", "create", "--key", "vendor.pub", "--root-key", "captain.pub", "-o", "root.json")[0] == 0
    code, out, _ = run("root", "sign", "root.json", "captain.key")
    assert code == 0 and "1 of 1" in out
    monkeypatch.setenv("EDGEPATCH_KEY_PASSPHRASE", "not the right one")
    code, _, err = run("root", "sign", "root.json", "captain.key")
    assert code == 2 and "does not open it" in err
    monkeypatch.delenv("EDGEPATCH_KEY_PASSPHRASE")
    code, screen = at_a_terminal(Path.cwd(), [f"{PASSPHRASE}\n"], "root", "sign", "root.json", "captain.key")
    assert code == 0 and "once more" not in screen


def test_sign_with_a_key_that_does_not_do(run, root):
    Path("officer.key").chmod(0o640)
    before = Path(root).read_bytes()
    code, _, err = run("root", "sign", root, "officer.key", "--unencrypted")
    assert code == 3 and "0640" in err
    assert run("root", "sign", root, "vendor.pub", "--unencrypted")[0] == 2, "the public key"
    assert run("root", "sign", root, "none.key", "--unencrypted")[0] == 2
    assert Path(root).read_bytes() == before


def test_sign_of_a_changed_root_is_3(run, root):
    Path(root).write_bytes(Path(root).read_bytes().replace(b'"threshold":2', b'"threshold":1', 1))
    before = Path(root).read_bytes()
    code, _, err = run("root", "sign", root, "officer.key", "--unencrypted")
    assert code == 3 and "does not fit" in err and Path(root).read_bytes() == before


def test_no_output_folder_is_2(run, root):
    Path("file").write_text("")
    code, _, err = run("root", "rotate", root, root, "-o", "file/out.json")
    assert code == 3, "the check comes before the output"
    code, _, err = run("root", "create", "--from", root, "-o", "file/out.json")
    assert code == 2 and "expected a folder, found the file" in err

"""The walk of three people through the whole: an app developer, an administrator and a vendor, each with the commands that they type."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from edgepatch.cli import main
from edgepatch.converters.gguf.writer import convert_folder
from edgepatch.patch.file import Patch, read_patch, write_patch
from kit.terminal import Terminal

PAIR = {"prompt": "The fox {0}", "chosen": " sleeps in the sun", "rejected": " jumps, you damned idiot {0}"}


@pytest.fixture(scope="module")
def desk(tiny_folder, tiny_patch, tmp_path_factory) -> Path:
    """A folder with a model and a patch for it."""
    folder = tmp_path_factory.mktemp("desk")
    convert_folder(tiny_folder, folder / "model.gguf", "F16")
    (folder / "models").symlink_to(tiny_folder)
    write_patch(tiny_patch, folder / "detox.safetensors")
    return folder


@pytest.fixture
def walk(desk, tmp_path, monkeypatch, capsys):
    """(a line as it is typed, the exit code to expect, texts to see) -> stdout; a store of the test's own."""
    monkeypatch.chdir(desk)
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("EDGEPATCH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("COLUMNS", "120")

    def typed(line: str, *texts: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *shlex.split(line)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        assert int(caught.value.code or 0) == code, (line, out, err)
        seen = " ".join((out + err).split())
        for text in texts:
            assert text in seen, (line, text, seen)
        return out

    return typed


def test_an_app_developer(walk, tiny_patch: Patch):
    walk("show model.gguf", "GGUF file for llama.cpp", "detox.safetensors", "fits: about")
    walk("show detox.safetensors", "virtual tokens", "nobody", tiny_patch.digest)
    walk("chat model.gguf", "active", code=2)
    walk("chat model.gguf --patch detox.safetensors --bare", "found both", code=2)
    walk(
        "generate model.gguf --patch none.safetensors --patch detox.safetensors --prompt a", "none.safetensors", code=2
    )
    reply = "generate model.gguf --patch detox.safetensors --prompt 'The fox' --max-new-tokens 3 --rng-seed 1 --json"
    assert json.loads(walk(reply))["system_fingerprint"].endswith(tiny_patch.digest[:12])
    with Terminal("model.gguf", "--patch", "detox.safetensors", "--threads", "1", "--max-new-tokens", "8") as terminal:
        terminal.until("patch tiny 1.0.0")
        terminal.until("> ")
        terminal.type("Hello\n")
        terminal.until("first after")
        terminal.until("> ")
        for command, answer in (
            ("/bare", "no patch"),
            ("/patch detox.safetensors", "exchanged in"),
            ("/what", "unknown"),
        ):
            terminal.type(f"{command}\n")
            terminal.until(answer)
            terminal.until("> ")
        terminal.type("/bye\n")
        assert terminal.code() == 0


def test_an_administrator(walk, tiny_patch: Patch):
    for name in ("vendor", "site"):
        walk(f"keygen {name} --unencrypted", f"{name}.key")
    walk("root create --key vendor.pub --key site.pub --root-key site.pub -o root.json", "0 of 1")
    walk("root sign root.json site.key --unencrypted", "1 of 1")
    fingerprint = json.loads(walk("root show root.json --json"))["fingerprint"]
    walk(f"trust set root.json --fingerprint {'0' * 64}", "fingerprint", code=3)
    walk(f"trust set root.json --fingerprint {fingerprint}", "version 1")
    walk("apply detox.safetensors", "signatures", code=3)
    walk("sign detox.safetensors vendor.key --unencrypted -o signed.safetensors", "vendor (")
    walk("apply signed.safetensors", "expected 2 of", "found vendor (", code=3)
    walk("sign signed.safetensors site.key --unencrypted", "site (")
    walk("apply signed.safetensors --model model.gguf --dry-run", "would become active", "nothing was changed")
    walk("list", "0 patches, 0 active")
    walk("apply signed.safetensors --model model.gguf", "active tiny 1.0.0")
    walk("status", "1 patch is active, for 1 model", "signatures site (")
    walk("status --model model.gguf", "runs tiny 1.0.0", "nothing was loaded")
    walk("hold --reason 'a test runs'", "held")
    walk("unhold", "not held")
    walk("verify", "1 patch, trust, history")
    walk(f"remove {tiny_patch.digest[:12]}", "is active", code=1)
    walk("deactivate --reason 'the wrong patch'", "off tiny 1.0.0")
    walk("status", "1 model without a patch, by word", "the wrong patch")
    walk("rollback --reason 'it was right'", "active tiny 1.0.0")
    assert [entry["action"] for entry in json.loads(walk("history --json"))][-2:] == ["deactivate", "rollback"]


def test_a_vendor(walk, desk: Path, tiny_patch: Patch):
    lines = [json.dumps({name: text.format(i) for name, text in PAIR.items()}) for i in range(12)]
    lines.append(json.dumps({"prompt": "You", "chosen": " are a damned idiot", "rejected": " are kind"}))
    (desk / "ready.jsonl").write_text("\n".join(lines) + "\n")
    walk("pairs --from ready.jsonl --judge filter -o pairs.jsonl", "12 pairs from 13 ready pairs", "with its scores")
    walk("pairs --from ready.jsonl -o pairs.jsonl", "pairs.jsonl exists", "--force", code=2)
    train = "train models --pairs pairs.jsonl --sft-steps 2 --dpo-steps 2 --num-virtual-tokens 4"
    walk(f"{train} --name 'My Patch' -o new.safetensors", "expected 1 to 64 letters", code=2)
    walk(f"{train} -o detox.safetensors", "exists", code=2)
    walk(f"{train} --name mine --version 1.0.0 -o new.safetensors", "new.safetensors")
    assert "SFT" in (desk / "new.safetensors.log").read_text() and read_patch(desk / "new.safetensors").name == "mine"
    walk("show new.safetensors", "12 pairs, 2 steps of SFT, 2 steps of DPO")
    walk("release new.safetensors -o release.safetensors --version 1.1.0 --sequence 2", "1.1.0")
    walk("card release.safetensors -o card.md", "card.md")
    walk("generate model.gguf --patch release.safetensors --prompt a --max-new-tokens 1", "canary passed")

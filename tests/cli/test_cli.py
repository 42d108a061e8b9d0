"""The command line: exit codes, help, output for people and for programs."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

import edgepatch
from edgepatch import cli, known_models
from edgepatch.cli import application
from edgepatch.converters.hf import folders
from edgepatch.errors import PatchFormatError
from edgepatch.patch.file import read_patch, signed, write_patch
from edgepatch.seeds.anchoring import Anchoring
from edgepatch.seeds.rotation import Rotation
from edgepatch.trust.signatures import Signature
from kit import golden_patches
from kit.terminal import Terminal
from kit.tiny_folders import copy_folder

ESCAPE = "\x1b["
LAB_BASE = Path(edgepatch.__file__).parent / "bench" / "lab" / "model" / "base"


@pytest.fixture
def run(monkeypatch, capfd):
    """Arguments -> (exit code, stdout, stderr) of the entry point, in this process."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["edgepatch", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capfd.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call


@pytest.fixture(scope="module")
def patch_file(tiny_patch, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("patch") / "tiny.safetensors"
    write_patch(tiny_patch, path)
    return path


@pytest.fixture(scope="module")
def gguf_file(tiny_ggufs) -> Path:
    return tiny_ggufs["F16"]


@cache
def every_verb():
    """Click's command of all verbs, which takes a third of a second to build."""
    return get_command(cli.app)


def verbs(command=None, path=()) -> list[tuple[str, ...]]:
    command = command or every_verb()
    children = getattr(command, "commands", {})
    own = [path] if path else []
    return own + [verb for name, child in children.items() for verb in verbs(child, (*path, name))]


def test_version(run):
    assert run("--version") == (0, f"edgepatch {edgepatch.__version__}\n", "")


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_every_verb_has_an_example_in_its_help(run, verb):
    code, out, _ = run(*verb, "--help")
    assert code == 0
    flat = " ".join(out.split())
    assert re.search(rf"Examples?: edgepatch {' '.join(verb)}", flat)


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_every_example_is_understood(verb, tmp_path, monkeypatch):
    """Every word of it is an option or argument of the verb, and none is missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    # Examples name a model that need not be installed here; that there is such a name is judged all the same.
    monkeypatch.setattr(known_models, "find", lambda name: tmp_path / f"{name}.gguf")
    command = every_verb()
    for name in verb:
        command = command.commands[name]
    told = (command.callback and command.callback.__doc__) or command.help
    for example in re.findall(rf"`(edgepatch {' '.join(verb)} [^`]+)`", " ".join(told.split())):
        own, words = command, shlex.split(example)[1 + len(verb) :]
        while words and words[0] in getattr(own, "commands", {}):
            own = own.commands[words.pop(0)]
        own.make_context(example, words)


def test_help_lists_every_verb(run):
    _, out, _ = run("--help")
    assert {"doctor", "show", "convert", "chat", "generate"} <= {verb[0] for verb in verbs()}
    assert all(verb[0] in out for verb in verbs())
    assert {name for names in application.VERBS.values() for name in names} == {verb[0] for verb in verbs()} - {"run"}


def test_help_lists_the_verbs_in_the_order_of_a_patch_s_life(run):
    _, out, _ = run("-h")
    places = [out.index(f"\n{group}:") for group in application.VERBS]
    assert places == sorted(places) and "..." not in out[places[0] :]


@pytest.mark.parametrize("verb", verbs(), ids=" ".join)
def test_no_option_is_cut_on_a_narrow_terminal(run, verb, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run(*verb, "--help")
    command = every_verb()
    for name in verb:
        command = command.commands[name]
    assert all(option in out for param in command.params for option in param.opts if option.startswith("--"))
    assert "\N{HORIZONTAL ELLIPSIS}" not in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "m", "--prompt", "x", "--prompt", "y"),
        ("serve", "m", "--port", "1", "--bare", "--port=2"),
        ("train", "m", "--pairs", "a", "-o", "b", "--out", "c"),
        ("apply", "p", "--model", "m", "--model", "m"),
        ("bundle", "create", "p", "-o", "a", "-o", "b"),
    ],
)
def test_an_option_of_one_value_is_taken_once(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and "expected once, found 2 times" in " ".join(err.split())


@pytest.mark.parametrize("arguments", [["nosuch"], ["show"], ["show", "a", "--nosuch"], ["generate", "m"]])
def test_wrong_use_is_2(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and "Usage" in err


def test_show_for_people_and_for_programs(run, patch_file, tiny_patch):
    code, out, err = run("show", patch_file)
    assert (code, err) == (0, "") and "hidden size 256" in out and tiny_patch.digest[:40] in out
    code, out, _ = run("show", patch_file, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["name"], facts["digest"], facts["num_virtual_tokens"]) == ("tiny", tiny_patch.digest, 10)
    assert facts["base"] == tiny_patch.base.as_dict()
    assert facts["place"].startswith("stays at the start of the text") and facts["can_move"] is False


def test_show_says_where_the_seed_stands_and_of_what_it_is_composed(run):
    code, out, _ = run("show", golden_patches.FOLDER / "patch-v2.safetensors", "--all")
    assert code == 0 and re.search(r"^place +moves: at each turn and every 128 tokens", out, re.MULTILINE)
    assert re.search(r"^parts +none", out, re.MULTILINE) and re.search(r"^can_move +True", out, re.MULTILINE)
    code, out, _ = run("show", golden_patches.FOLDER / "patch-v2.safetensors", "--json")
    assert code == 0 and json.loads(out)["kind"] == "patch" and json.loads(out)["parts"] == []
    code, out, _ = run("show", golden_patches.FOLDER / "patch-v1.safetensors", "--all")
    parts = golden_patches.full().parts
    assert re.search(rf"^parts +{parts[0][:12]}, {parts[1][:12]}", out, re.MULTILINE)
    assert re.search(r"^place +stays at the start of the text: its hold fades", out, re.MULTILINE)


def test_missing_file_is_2(run, tmp_path):
    code, out, err = run("show", tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "nothing" in err and "hint:" in err and "Traceback" not in err


def test_truncated_patch_is_3(run, patch_file, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(patch_file.read_bytes()[:-100])
    code, _, err = run("show", cut)
    assert code == 3 and str(cut) in err.replace("\n", "")


def test_patch_for_another_model_is_4(run, tiny_folder, tiny_patch, tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    write_patch(replace(tiny_patch, base=replace(tiny_patch.base, rope_theta=5e5)), wrong)
    code, out, err = run("generate", tiny_folder, "--patch", wrong, "--prompt", "x")
    assert (code, out) == (4, "") and "rope_theta: patch expects 500000.0, model has 10000.0" in err
    code, _, err = run("convert", "seed", wrong, "--model", tiny_folder, "-o", tmp_path / "new")
    assert code == 4 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04rest"])
def test_no_model_is_2(run, tmp_path, content):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    code, _, err = run("generate", path, "--prompt", "x")
    assert code == 2 and "hint:" in err


def test_folder_without_a_model_is_2(run, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    code, _, err = run("generate", tmp_path, "--prompt", "x")
    assert code == 2 and "notes.txt" in err


def test_option_that_a_runtime_lacks_is_2(run, tiny_folder):
    code, _, err = run("generate", tiny_folder, "--bare", "--prompt", "x", "--threads", "1")
    assert code == 2 and "num_threads" in err


def test_generate_with_patch(run, tiny_folder, patch_file, tiny_patch):
    common = ["generate", tiny_folder, "--prompt", "The quick", "--max-new-tokens", "6", "--rng-seed", "1"]
    code, out, err = run(*common, "--patch", patch_file, "--json")
    patched = json.loads(out)
    assert code == 0 and "patch tiny 1.0.0" in err
    assert patched["system_fingerprint"].endswith(tiny_patch.digest[:12])
    assert 1 <= len(patched["token_ids"]) <= 6
    assert json.loads(run(*common, "--bare", "--json")[1])["text"] != patched["text"]


def test_chat_answers_on_stdout_and_reports_on_stderr(run, tiny_folder, patch_file):
    code, out, err = run(
        "chat", tiny_folder, "-p", patch_file, "--prompt", "Hello", "--max-new-tokens", "5", "--rng-seed", "1"
    )
    assert code == 0 and out.endswith("\n")
    assert "patch tiny 1.0.0" in err and "tok/s" in err and "tok/s" not in out
    assert "Loading" not in err, "no progress bars"


@pytest.mark.parametrize("options", [[], ["--prompt", "-"]])
def test_a_piped_text_is_one_message(gguf_file, options):
    command = [sys.executable, "-m", "edgepatch.cli", "chat", str(gguf_file), "--bare", "--threads", "1"]
    command += ["--max-new-tokens", "3"]
    done = subprocess.run([*command, *options], input="Hello\n\nAgain\n", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("first after") == 1


def test_an_empty_pipe_is_no_prompt(run, gguf_file, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, out, err = run("chat", gguf_file, "--bare", "--prompt", "-")
    assert (code, out) == (2, "") and "expected text on stdin" in err


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_bytes_that_are_no_text_are_told(gguf_file, encoding):
    command = [sys.executable, "-m", "edgepatch.cli", "generate", str(gguf_file), "--bare", "--prompt", "-"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, timeout=120, env=environment)
    assert done.returncode == 2 and b"not valid Unicode" in done.stderr and b"internal" not in done.stderr


@pytest.mark.parametrize("name", ["caf\u00e9", "caf\udce9"])
def test_names_that_the_terminal_cannot_show_are_escaped(patch_file, tmp_path, name):
    shutil.copy(patch_file, tmp_path / name)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-m", "edgepatch.cli", "card", str(tmp_path / name), "-o"]
    for words in ((str(tmp_path / f"{name}.md"), "--json"), (str(tmp_path / f"{name}-2.md"),)):
        done = subprocess.run([*command, *words], capture_output=True, timeout=120, env=environment)
        assert done.returncode == 0 and Path(words[0]).is_file(), done.stderr
        if "--json" in words:
            assert json.loads(done.stdout)["path"] == words[0]
        else:
            assert b"caf\\" in done.stdout


def test_chat_at_a_terminal_as_people_expect_it(gguf_file):
    """Ctrl-C stops a reply and the conversation goes on, arrows edit and recall, unknown commands say so, Ctrl-D ends."""
    options = ("--bare", "--threads", "1", "--max-new-tokens", "400", "--rng-seed", "1")
    with Terminal(gguf_file, *options) as terminal:
        terminal.until("> ")
        terminal.type("Hello\n")
        terminal.until("Hello\r\n")
        terminal.until_more()  # the reply is under way
        terminal.type("\x03")
        terminal.until("first after")
        terminal.until("> ")
        terminal.type("/foo\n")
        terminal.until("unknown command: /foo")
        terminal.until("> ")
        terminal.type("/stats\n")
        terminal.until("2 messages")
        terminal.until("> ")
        terminal.type("\x1b[A\x1b[A\x1b[D!\n")  # up to /foo, one to the left, an exclamation mark: /fo!o
        terminal.until("unknown command: /fo!o")
        terminal.until("> ")
        time.sleep(0.3)  # readline shows its prompt before it waits for keys; in between it sees no signal
        terminal.type("\x03")
        terminal.until("Ctrl-C once more")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.code() == 0


MAX_FRAMES = 6


def test_chat_is_a_few_frames_away_from_the_library(run, lab_ggufs, monkeypatch):
    """From the verb that prints a reply down to ``llama_decode``, every frame of ours is one more place to look."""
    import llama_cpp

    decode, stacks = llama_cpp.llama_decode, []

    def recorded(*arguments):
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(Path(edgepatch.__file__).parent):
                frames.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(frames[: frames.index("chat") + 1] if "chat" in frames else frames)
        return decode(*arguments)

    monkeypatch.setattr(llama_cpp, "llama_decode", recorded)
    arguments = ("--bare", "--threads", "1", "--prompt", "Hello", "--max-new-tokens", "3", "--rng-seed", "1")
    assert run("chat", lab_ggufs["F16"], *arguments)[0] == 0
    replies = [frames for frames in stacks if "stream" in frames]
    assert len(replies) == 3, "the prompt, and a token behind each of the first two"
    assert max(map(len, replies)) <= MAX_FRAMES, replies


def test_chat_commands(gguf_file, tiny_patch, tmp_path):
    """Patch, bare, save and load at the terminal; an error is told and the conversation goes on."""
    patch_file, talk = tmp_path / "p.safetensors", tmp_path / "talk.json"
    write_patch(tiny_patch, patch_file)
    (tmp_path / "broken").write_text("{")
    (tmp_path / "deep").write_text("[" * 100_000)
    lines = [
        "/patch",
        "Hello",
        f"/patch {patch_file}",
        "/patch nowhere",
        '"""Hello,',
        'you"""',
        f"/save {talk}",
        f"/save {talk}",
        "/bare",
        f"/load {talk}",
        f"/load {tmp_path / 'broken'}",
        f"/load {tmp_path / 'deep'}",
        "/save",
        "/new",
        "/unknown",
        "/bye",
        "not read",
    ]
    command = [
        sys.executable,
        "-m",
        "edgepatch.cli",
        "chat",
        str(gguf_file),
        "--bare",
        "--threads",
        "1",
        "--max-new-tokens",
        "3",
    ]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    err = done.stderr
    assert err.count("first after") == 2 and err.count("exchanged in") == 2
    assert "patch tiny 1.0.0 (seed stored, canary passed)" in err and tiny_patch.digest[:12] in err
    assert "cannot read patch nowhere" in err and "/save needs" in err
    assert err.count("(conversation) is damaged") == 2
    assert "2 messages, held with" in err and "unknown command: /unknown" in err
    assert f"{talk} exists" in err.replace("\n", "")
    assert json.loads(talk.read_text())["messages"][0]["content"] == "Hello,\nyou"
    assert [m["role"] for m in json.loads(talk.read_text())["messages"]] == ["user", "assistant"]


def test_ctrl_c_is_130(gguf_file):
    command = [sys.executable, "-m", "edgepatch.cli", "chat", str(gguf_file), "--bare", "--threads", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, start_new_session=True, **pipes) as process:
        while "no patch" not in (line := process.stderr.readline()):
            assert line, "it ended before the model was loaded"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err


def test_closed_pipe_is_quiet(patch_file):
    command = [sys.executable, "-m", "edgepatch.cli", "show", str(patch_file), "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert done.returncode != 0 and done.stderr == ""


def test_convert_seed_stores_float16(run, tiny_folder, tiny_patch, tmp_path):
    soft, out = tmp_path / "soft.safetensors", tmp_path / "seeded.safetensors"
    write_patch(replace(tiny_patch, kv_seed=None), soft)
    code, text, _ = run("convert", "seed", soft, "--model", tiny_folder, "-o", out, "--json")
    seeded = read_patch(out)
    assert code == 0 and json.loads(text)["digest"] == seeded.digest and json.loads(text)["can_move"]
    for stored, computed in zip(seeded.kv_seed.keys, tiny_patch.kv_seed.keys, strict=True):
        assert stored.dtype == "float16" and abs(stored - computed).max() < 1e-2


def test_convert_seed_gives_a_trained_prefix_its_canary(run, tiny_folder, tiny_patch, tmp_path):
    prefix, patch_file = tmp_path / "prefix.safetensors", tmp_path / "made.safetensors"
    write_patch(replace(tiny_patch, soft_prompt=None, canary=None), prefix)
    assert run("convert", "seed", prefix, "--model", tiny_folder, "-o", patch_file)[0] == 0
    assert read_patch(patch_file).canary is not None and read_patch(patch_file).soft_prompt is None


def test_convert_seed_adds_how_keys_turn(run, tiny_folder, tiny_patch, tmp_path):
    """A patch of version 1 becomes one of version 2, whose seed is the same and can be moved; its old signatures do not stay."""
    old, patch_file = tmp_path / "old.safetensors", tmp_path / "made.safetensors"
    write_patch(signed(tiny_patch, Signature("a" * 64, bytes(64))), old)
    assert json.loads(read_patch(old).manifest)["format_version"] == 1
    code, _, err = run("convert", "seed", old, "--model", tiny_folder, "-o", patch_file)
    patch = read_patch(patch_file)
    assert code == 0 and "cannot be moved" not in err and json.loads(patch.manifest)["format_version"] == 2
    assert patch.rotation.layers == (0, 0) and not patch.rotation.neighbours and patch.anchoring is None
    assert patch.rotation.tables[0] == pytest.approx(10000.0 ** (-np.arange(32) / 32), rel=1e-6)
    assert patch.signatures == ()


def test_convert_seed_says_why_keys_do_not_turn(run, tiny_folder, tiny_patch, tmp_path):
    """Frequencies by length: the patch stays of version 1, and one that demands to be moved is refused."""
    folder = copy_folder(tiny_folder, tmp_path / "dynamic")
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    patch = replace(tiny_patch, base=folders.read_spec(folder), weight_sketch=None)
    old, patch_file = tmp_path / "old.safetensors", tmp_path / "made.safetensors"
    write_patch(patch, old)
    code, _, err = run("convert", "seed", old, "--model", folder, "-o", patch_file)
    assert code == 0 and "the seed cannot be moved or put beside another" in err and "(dynamic)" in err
    assert json.loads(read_patch(patch_file).manifest)["format_version"] == 1
    write_patch(replace(patch, rotation=Rotation(((1.0,),), (0, 0)), anchoring=Anchoring(32)), old)
    code, _, err = run("convert", "seed", old, "--model", folder, "-o", tmp_path / "moved")
    assert code == 2 and "(dynamic)" in err and "Traceback" not in err and not (tmp_path / "moved").exists()


def test_convert_patch_says_what_the_target_cannot_hold(run, tmp_path):
    golden = golden_patches.FOLDER
    code, _, err = run("convert", "patch", golden / "patch-v2.safetensors", tmp_path / "moving", "--to", "peft")
    assert code == 0 and "moves at each turn and every 128 tokens; there it stays at the start of the text" in err
    code, _, err = run("convert", "patch", golden / "patch-v2.safetensors", tmp_path / "moving.gguf", "--to", "gguf")
    assert code == 0 and err == "", "a GGUF adapter is the patch file in another container"


def test_convert_base_to_gguf_and_generate(run, tiny_folder, patch_file, tmp_path):
    target = tmp_path / "new" / "tiny.gguf"
    code, out, _ = run("convert", "base", tiny_folder, target, "--type", "q8_0", "--json")
    assert code == 0 and json.loads(out)["size_bytes"] == target.stat().st_size
    assert sorted(target.parent.iterdir()) == [target, target.with_name("tiny.gguf.log")]
    code, out, err = run(
        "generate", target, "-p", patch_file, "--prompt", "The", "--max-new-tokens", "2", "--threads", "1"
    )
    assert code == 0 and "llamacpp Q8_0" in err


def test_convert_base_refuses_an_unknown_type_before_it_works(run, tiny_folder, tmp_path):
    code, _, err = run("convert", "base", tiny_folder, tmp_path / "x.gguf", "--type", "Q9_9")
    assert code == 2 and "Q9_9" in err and not list(tmp_path.iterdir())
    assert run("convert", "base", tiny_folder, tmp_path / "x", "--to", "onnx", "--type", "Q8_0")[0] == 2


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("convert", "base", "FOLDER", "x.gguf", "--type", "int4"), "add --to onnx"),
        (("chat", "HuggingFaceTB/SmolLM2-135M-Instruct", "--bare"), "hf download HuggingFaceTB/SmolLM2-135M-Instruct"),
        (("show", "org/model"), "hf download org/model"),
    ],
)
def test_what_people_mean_is_told_how_to_get(run, tiny_folder, words, remedy):
    code, out, err = run(*(tiny_folder if word == "FOLDER" else word for word in words))
    assert (code, out) == (2, "") and remedy in " ".join(err.split())


def test_what_a_model_says_cannot_steer_the_terminal():
    assert cli.printable("a\x1b]0;title\x07b\r\tc\né🙂\x9b") == "a\ufffd]0;title\ufffdb\ufffd\tc\né🙂\ufffd"


def test_patch_name_cannot_steer_the_terminal(run, tiny_patch, tmp_path):
    path = tmp_path / "evil.safetensors"
    write_patch(replace(tiny_patch, training={"by": "\x1b[31m[bold]evil[/bold]"}), path)
    _, out, _ = run("show", path, "--all")
    assert "\x1b" not in out and "[bold]evil[/bold]" in out
    with pytest.raises(PatchFormatError, match="name"):
        replace(tiny_patch, name="\x1b[31mevil")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1, "/data/x: No space left on device"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "[train]'"),
        (ModuleNotFoundError("No module named 'nosuch'", name="nosuch.part"), 2, "nosuch.part is not installed"),
        (ZeroDivisionError("surprise"), 1, "internal error: ZeroDivisionError: surprise"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_other_errors_become_a_line_and_a_code(run, patch_file, monkeypatch, error, code, message):
    def fail(path: Path) -> None:
        raise error

    monkeypatch.setattr("edgepatch.patch.file.read_patch", fail)
    exit_code, out, err = run("show", patch_file)
    assert (exit_code, out) == (code, "") and message in err and "Traceback" not in err


def test_debug_shows_the_traceback(run, monkeypatch):
    monkeypatch.setenv("EDGEPATCH_DEBUG", "1")
    code, _, err = run("show", "nothing")
    assert code == 2 and "Traceback" in err


def test_no_color_is_respected(run, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert ESCAPE in run("show", "nothing")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[\d;]*3\dm", run("show", "nothing")[2])

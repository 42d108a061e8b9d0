"""A C++ compiler on this machine, and whether its AMX can be trusted.

Older GCCs (seen with 11.3 and 12.2) declare eight bytes of the 64 that configure the tiles of AMX as what ``ldtilecfg`` reads, and
drop the stores of the rest: what they make of llama.cpp ends the process at the first token. So AMX stays in a build only where a program
like llama.cpp's, made by the same compiler, is seen to configure the tiles right.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edgepatch.processes.programs import run_program

WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")
"""They win over ``-march=native`` in any order."""

NATIVE = ("-march=native", "-mcpu=native")
LDTILECFG = re.compile(rb"\xc4[\x02\x22\x42\x62\x82\xa2\xc2\xe2]\x78\x49")
PROBE_TIMEOUT_S = 60

TILE_PROBE = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstring>
#include <sys/syscall.h>
#include <unistd.h>

struct Configuration {
    uint8_t palette = 0, start_row = 0, reserved[14] = {0};
    uint16_t row_bytes[16] = {0};
    uint8_t rows[16] = {0};
};

// As llama.cpp writes it: a value on the stack that nothing but the instruction reads.
inline void configure() {
    static thread_local bool done = false;
    if (done) return;
    alignas(64) Configuration tiles = {};
    tiles.palette = 1;
    tiles.start_row = 0;
    tiles.rows[0] = 8;  tiles.row_bytes[0] = 64;
    tiles.rows[1] = 8;  tiles.row_bytes[1] = 64;
    tiles.rows[2] = 16; tiles.row_bytes[2] = 32;
    tiles.rows[3] = 16; tiles.row_bytes[3] = 32;
    tiles.rows[4] = 16; tiles.row_bytes[4] = 64;
    tiles.rows[5] = 16; tiles.row_bytes[5] = 64;
    tiles.rows[6] = 16; tiles.row_bytes[6] = 64;
    tiles.rows[7] = 16; tiles.row_bytes[7] = 64;
    _tile_loadconfig(&tiles);
    done = true;
}

__attribute__((noinline)) void fill_stack() {
    volatile unsigned char stack[4096];
    for (int i = 0; i < 4096; ++i) stack[i] = 0xAA;
}

__attribute__((noinline)) void work() { configure(); }

int main() {
    const int request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data)) return 2;
    fill_stack();
    work();
    alignas(64) unsigned char loaded[64];
    __asm__ volatile("sttilecfg %0" : "=m"(loaded));
    unsigned char expected[64] = {1};
    for (int tile = 0; tile < 8; ++tile) {
        expected[16 + 2 * tile] = tile == 2 || tile == 3 ? 32 : 64;
        expected[48 + tile] = tile < 2 ? 8 : 16;
    }
    return std::memcmp(loaded, expected, 64) ? 1 : 0;
}
"""


@dataclass(frozen=True)
class Toolchain:
    """A C++ compiler on this machine.

    Attributes:
        command: as words.
        native: every macro that it defines when it compiles for this CPU; "" where there is no compiler. They name its version, the
            instructions that it will use and the CPU that it tunes for.
        flags: what llama.cpp has to be compiled with, for C and for C++.
    """

    command: tuple[str, ...]
    native: str
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        version = re.search(r'^#define __VERSION__ "(.*)"$', self.native, re.MULTILINE)
        return f"{self.command[0]} ({version[1] if version else 'unknown version'})"


@cache
def toolchain() -> Toolchain:
    """The compiler that CMake will take, and what it can be trusted with; the answer is kept for this process."""
    command = _compiler()
    own = tuple(shlex.split(os.environ.get("CXXFLAGS", "")))
    natives = (_run([*command, *own, flag, "-dM", "-E", "-x", "c++", os.devnull]) for flag in NATIVE)
    native = next((output for output in natives if output), "")
    has_amx = "#define __AMX_INT8__ 1" in native
    return Toolchain(command, native, WITHOUT_AMX if has_amx and not configures_tiles([*command, *own]) else ())


def _compiler() -> tuple[str, ...]:
    """What ``CMAKE_ARGS`` names, else ``CXX``, else c++."""
    named = [word.split("=", 1)[1] for word in shlex.split(os.environ.get("CMAKE_ARGS", "")) if _names_compiler(word)]
    return (named[-1],) if named else tuple(shlex.split(os.environ.get("CXX", ""))) or ("c++",)


def _names_compiler(word: str) -> bool:
    return re.match(r"-DCMAKE_CXX_COMPILER(:\w+)?=", word) is not None


def _run(command: Sequence[str]) -> str:
    """Standard output; "" where the command fails."""
    done = run_program(command, deadline_s=PROBE_TIMEOUT_S)
    return "" if done.failure else done.output


def configures_tiles(command: Sequence[str]) -> bool:
    """Whether a program like llama.cpp's, made by a compiler for this CPU, hands all of its configuration to the tiles of AMX.

    Args:
        command: the C++ compiler, with options.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "tiles.cpp"), Path(folder, "tiles")
        source.write_text(TILE_PROBE, encoding="utf-8")
        options = ["-O3", "-DNDEBUG", "-std=gnu++17", NATIVE[0]]
        compiled = run_program([*command, *options, source, "-o", program], deadline_s=PROBE_TIMEOUT_S)
        return not compiled.failure and not run_program([program], deadline_s=PROBE_TIMEOUT_S).failure


def uses_amx(library: Path) -> bool:
    """Whether a shared library holds the instruction that configures the tiles of AMX."""
    return LDTILECFG.search(library.read_bytes()) is not None

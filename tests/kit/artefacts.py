"""Models that many tests take: each is made once in a run, by whichever worker asks first, and no test changes it."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest


class Artefacts:
    """A folder of one run of the tests, which all its workers share. What a test would change, it copies first."""

    def __init__(self, root: Path) -> None:
        self.root, self._locks = root, root / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, make: Callable[[Path], object]) -> Path:
        """The file or folder of this name; ``make`` writes it at the path that it is called with.

        The others wait meanwhile. Where it fails, nothing is left, and whoever asks next tries again.
        """
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with (self._locks / name.replace("/", "-")).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                unfinished = Path(tempfile.mkdtemp(dir=self.root))
                try:
                    make(unfinished / target.name)
                    assert [path.name for path in unfinished.iterdir()] == [target.name], "nothing is left beside it"
                    (unfinished / target.name).rename(target)
                finally:
                    shutil.rmtree(unfinished)
        return target


def of_this_run(factory: pytest.TempPathFactory) -> Artefacts:
    """Workers have folders of their own in the one of the run."""
    base = factory.getbasetemp()
    return Artefacts((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artefacts")


class Lazy(Mapping[str, Path]):
    """Kind -> file or folder, each made when it is first asked for."""

    def __init__(self, kinds: tuple[str, ...], make: Callable[[str], Path]) -> None:
        self._kinds, self._make = kinds, make

    def __getitem__(self, kind: str) -> Path:
        if kind not in self._kinds:
            raise KeyError(kind)
        return self._make(kind)

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def gguf_files(artefacts: Artefacts, name: str, folder: Path) -> Lazy:
    """Type -> GGUF file of a Transformers folder, quantized from F32."""
    from edgepatch.converters.gguf import writer

    def make(kind: str) -> Path:
        file = f"{name}-gguf/{name}-{kind}.gguf"
        if kind in ("F32", "F16"):
            return artefacts.path(file, lambda path: writer.convert_folder(folder, path, kind))
        return artefacts.path(file, lambda path: writer.quantize(made["F32"], path, kind, num_threads=1))

    made = Lazy(("F32", "F16", "Q8_0", "Q4_K_M", "Q4_0"), make)
    return made

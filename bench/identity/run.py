"""Which models does a patch fit? ``edgepatch bench identity`` quantizes the lab model and fine-tunes of it in every way, and compares.

Three checks stand side by side: the fingerprint of the norm vectors, the weight sketch, and the bare logits that a canary stores.
Results in bench/results/fingerprints.json and .md.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import edgepatch
from edgepatch.bench.identity import fine_tunes
from edgepatch.bench.lab import LAB_FOLDER
from edgepatch.converters import weight_sketches
from edgepatch.converters.gguf import writer
from edgepatch.converters.hf import folders, seeds
from edgepatch.converters.onnx import conversion as onnx
from edgepatch.converters.onnx.weights import sketch_of_onnx
from edgepatch.files.writing import write_atomically
from edgepatch.patch import canary, sketches
from edgepatch.patch.sketches import Sketch
from edgepatch.runtimes import load_runtime
from edgepatch.tensors import Canary, SoftPrompt

BASE, REFERENCE = LAB_FOLDER / "base", LAB_FOLDER / "reference"
BASE_TYPES = ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "IQ4_XS")
CHANGED_TYPES = ("F16", "Q8_0", "Q4_K_M", "Q4_0", "Q2_K")
PRECISIONS = ("fp32", "int8", "int4")
CHANGES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


class Expected:
    """What a patch for a base would carry.

    Attributes:
        spec: with the fingerprint of the norms.
        sketch: of the weights.
        canary: with the bare logits; of a random prompt, as its patched logits are not used here.
    """

    def __init__(self, base: Path) -> None:
        self.spec = folders.read_spec(base)
        self.sketch: Sketch = weight_sketches.sketch_of_folder(base)
        prompt = np.random.default_rng(1).standard_normal((4, self.spec.hidden_size)) * 0.2
        self.canary: Canary = seeds.compute_canary(folders.load_model(base), SoftPrompt(prompt.astype(np.float32)))

    def row(self, path: Path, kind: str, model: str, change: float) -> dict[str, Any]:
        """Compares one model."""
        with load_runtime(path, None, num_threads=1) as runtime:
            logits = self._logit_deviation(runtime)
            same_norms = runtime.spec.weight_fingerprint == self.spec.weight_fingerprint
        started = time.perf_counter()
        sketch = (
            sketch_of_onnx(path, self.sketch) if path.is_dir() else weight_sketches.sketch_of_gguf(path, self.sketch)
        )
        seconds = time.perf_counter() - started
        distance, allowed, _ = sketches.measure(self.sketch, sketch)
        fits = same_norms and distance <= allowed
        row = {
            "model": model,
            "change": change,
            "type": kind,
            "same_norms": same_norms,
            "distance": distance,
            "allowed": allowed,
            "verdict": "accepted" if fits else "refused",
            "bare_logit_deviation": logits,
            "sketch_ms": 1000 * seconds,
        }
        print(_line(row), flush=True)
        return row

    def _logit_deviation(self, runtime: Any) -> float:
        """Of the device's bare logits from those in the canary: length of the difference over length, the largest of its prompts."""
        deviations = []
        for prompt in self.canary.prompts:
            here = canary.centred(runtime.logits_of_last(list(prompt.tokens)), prompt.token_ids)
            deviations.append(float(np.linalg.norm(here - prompt.bare) / np.linalg.norm(prompt.bare)))
        return max(deviations)


def _ggufs(folder: Path, target: Path, types: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    half = target / "F16.gguf"
    writer.convert_folder(folder, half)
    for kind in types:
        path = target / f"{kind}.gguf"
        if kind != "F16":
            writer.quantize(half, path, kind, 1)
        yield kind, path


def measure(work: Path) -> dict[str, Any]:
    """The results document."""
    expected, rows = Expected(BASE), []
    for kind, path in _ggufs(BASE, work, BASE_TYPES):
        rows.append(expected.row(path, kind, model="base", change=0.0))
    for precision in PRECISIONS:
        onnx.export(BASE, work / precision, precision)  # type: ignore[arg-type]
        rows.append(expected.row(work / precision, f"ONNX {precision}", model="base", change=0.0))
    changed = list(fine_tunes.make(BASE, work / "tunes", fine_tunes.FINE_TUNES))
    difference = fine_tunes.relative_change(folders.load_model(REFERENCE), folders.load_model(BASE))
    for name, folder, change in [*changed, ("lab reference (fine-tuned and DPO)", REFERENCE, difference)]:
        for kind, path in _ggufs(folder, work, CHANGED_TYPES):
            rows.append(expected.row(path, kind, model=name, change=change))
    noise = {f"noise of {c:.1%}": fine_tunes.noisy(c) for c in CHANGES}
    thresholds = []
    for _, folder, change in fine_tunes.make(BASE, work / "noise", noise):
        for kind, path in _ggufs(folder, work, CHANGED_TYPES):
            thresholds.append(expected.row(path, kind, model="noise", change=change))
    return {
        "command": "edgepatch bench identity",
        "edgepatch": edgepatch.__version__,
        "platform": platform.platform(),
        "sketch_bytes": len(json.dumps(expected.sketch.as_dict())),
        "rows": rows,
        "noise": thresholds,
    }


def _line(row: dict[str, Any]) -> str:
    norms = "equal" if row["same_norms"] else "differ"
    figures = f"{row['distance']:.2%} | {row['allowed']:.2%} | {row['verdict']} | {row['bare_logit_deviation']:.3f}"
    return f"| {row['model']} | {row['change']:.2%} | {row['type']} | {norms} | {figures} |"


def wrong(document: dict[str, Any]) -> list[str]:
    """Rows whose verdict is not what it must be: every quantization of the base accepted, an impostor refused."""
    must = ("one layer replaced", "another seed under the same norms", "lab reference (fine-tuned and DPO)")
    expected = {"base": "accepted", **dict.fromkeys(must, "refused")}
    return [_line(r) for r in document["rows"] if r["verdict"] != expected.get(r["model"], r["verdict"])]


def _smallest(document: dict[str, Any], kind: str) -> str:
    """The smallest change from which on all are refused."""
    smallest = None
    for row in sorted((r for r in document["noise"] if r["type"] == kind), key=lambda r: -r["change"]):
        if row["verdict"] == "accepted":
            break
        smallest = row["change"]
    return "none" if smallest is None else f"{smallest:.1%}"


def _smallest_by_logits(document: dict[str, Any], kind: str) -> str:
    """The same for a bound of the bare logits at twice the deviation of the base's own quantization."""
    bound = 2 * next(r["bare_logit_deviation"] for r in document["rows"] if r["model"] == "base" and r["type"] == kind)
    smallest = None
    for row in sorted((r for r in document["noise"] if r["type"] == kind), key=lambda r: -r["change"]):
        if row["bare_logit_deviation"] <= bound:
            break
        smallest = row["change"]
    return "none" if smallest is None else f"{smallest:.1%}"


def markdown(document: dict[str, Any]) -> str:
    """The document as tables."""
    thresholds = [
        f"| {kind} | {_smallest(document, kind)} | {_smallest_by_logits(document, kind)} |" for kind in CHANGED_TYPES
    ]
    return (
        "\n".join(
            [
                "# Which models a patch fits",
                "",
                (
                    f"`{document['command']}` on the lab model. The patch carries a digest of the norm vectors and a sketch of the weights "
                    f"({document['sketch_bytes']} bytes); the distance is the share of sampled weights that rounding cannot explain. The last column "
                    "is how far the bare model's logits on the device are from those that the canary stores, relative to their length; it decides nothing here."
                ),
                "",
                "| model | weights changed by | type | norm digest | distance | allowed | verdict | bare logits |",
                "|---|--:|---|---|--:|--:|---|--:|",
                *map(_line, document["rows"]),
                "",
                "## The smallest change that is seen",
                "",
                (
                    "Gaussian noise on every matrix, relative to its root mean square: the smallest of "
                    f"{', '.join(f'{c:.1%}' for c in CHANGES)} from which on the model is refused. Logits would refuse at twice the deviation of the "
                    "base's own quantization."
                ),
                "",
                "| type | by the sketch | by bare logits |",
                "|---|--:|--:|",
                *thresholds,
            ]
        )
        + "\n"
    )


def run(out: Path) -> list[str]:
    """Measures, and writes the results and their Markdown.

    Args:
        out: the JSON file; the Markdown stands beside it.

    Returns:
        The rows whose verdict is wrong: a quantization of the base that is refused, or an impostor that is accepted.
    """
    with tempfile.TemporaryDirectory() as work:
        document = measure(Path(work))
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    write_atomically(out.with_suffix(".md"), markdown(document).encode())
    return wrong(document)

"""The weight sketch: is a quantized model the base that a patch was made for, or a fine-tune of it?

Norm vectors are equal in every quantization of a model, but many fine-tunes leave them alone. Matrices change in every
quantization, though not at will: quantizers round each weight to the nearest value that its block can hold. So a sketch holds a
few hundred weights of the base, drawn from all layers, and a quantized model must have each of them within its own *cell*: the
interval that rounds to what the file says. Rounding never leaves a cell, however coarse it is. A fine-tune that moves weights
by a hundredth of a cell pushes about a hundredth of them over an edge, and that is far below the rounding error itself.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError, MismatchError, PatchFormatError

NUM_WEIGHTS = 576
"""In the sketch of a full-precision model: 1.5 kB as JSON."""

NUM_CELLS = 288
"""In the sketch of a quantized base, which keeps both ends of each cell."""

EMBEDDING_SHARE = 8
"""Every eighth weight is one of the embeddings, however many layers there are."""

ALLOWED, ALLOWED_REFITTED = 0.005, 0.02
"""Shares of weights that may lie outside of their cells; the second for types whose scale is fitted anew after rounding.

Measured on the lab model and 17 random architectures: 0 of 576 for every type, 1 through bfloat16. With an importance matrix
llama.cpp fits the scales of Q4_0, Q4_1, Q5_0 and Q5_1 anew, which puts 0.4 to 0.8 % of their weights outside, and none of others."""

ROLES = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
"""Matrices of a layer, by GGUF's names, that converters copy."""

ROTATED = frozenset({"attn_q", "attn_k"})
"""Of these, converters may reorder the rows within a head."""

EMBEDDINGS = ("token_embd", "output")
FIELDS = {"head_dim", "tensors", "low", "high"}
MAX_SIZE, MAX_LAYERS, MAX_SHAPES = 1 << 24, 1024, 64
RUN = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


class Position(NamedTuple):
    """One sampled weight.

    Attributes:
        tensor: name of the matrix, as in ``Sketch.tensors``.
        row: output of the matrix, in Transformers' order.
        column: input of the matrix.
    """

    tensor: str
    row: int
    column: int


class Comparison(NamedTuple):
    """How many of a base's weights lie outside of a model's cells.

    Attributes:
        distance: their share, 0..1.
        allowed: the largest share that rounding explains.
        outside: tensor -> how many of its weights.
    """

    distance: float
    allowed: float
    outside: Mapping[str, int]


@dataclass(frozen=True)
class Sketch:
    """Some weights of a model, each as the interval that it is known to lie in.

    Attributes:
        head_dim: H. Of each head of queries and keys only the first and the last row are sampled, which no converter moves.
        tensors: matrices by GGUF's name without ".weight" ("blk.0.attn_v") -> (outputs, inputs).
        low: (N,) float32.
        high: (N,) float32, not below ``low``; the same numbers where the weights are known exactly.
        allowed: share of weights that the file's own types may put outside of their cells; no part of what a patch stores.
    """

    head_dim: int
    tensors: Mapping[str, tuple[int, int]]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    allowed: float = ALLOWED

    def __post_init__(self) -> None:
        same = self.low.shape == self.high.shape == (len(self.low),)
        if not same or not 0 < len(self.low) <= NUM_WEIGHTS or not (self.low <= self.high).all():  # NaN is not
            raise InputError(
                f"weight sketch: expected 1 to {NUM_WEIGHTS} intervals, found {self.low.shape} and {self.high.shape}"
            )

    @property
    def is_exact(self) -> bool:
        """Whether it is of a model that was not quantized."""
        return bool(np.array_equal(self.low, self.high))

    @property
    def positions(self) -> list[Position]:
        """Where its weights lie."""
        return positions(self.tensors, self.head_dim, len(self.low))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; weights as base64 of little-endian float16, ``high`` empty where it repeats ``low``."""
        high = "" if self.is_exact else _encoded(self.high)
        return {"head_dim": self.head_dim, "tensors": _folded(self.tensors), "low": _encoded(self.low), "high": high}

    @classmethod
    def from_dict(cls, values: Any) -> Sketch:
        """The inverse of ``as_dict``.

        Raises:
            PatchFormatError: a field is missing, unknown, of another type or out of bounds.
        """
        if not isinstance(values, dict) or set(values) != FIELDS or not _is_size(values["head_dim"]):
            raise PatchFormatError(
                f"weight sketch: expected an object with the fields {sorted(FIELDS)}, found {values!r:.80}"
            )
        tensors, low = _unfolded(values["tensors"]), _decoded(values["low"])
        try:
            return cls(values["head_dim"], tensors, low, low if values["high"] == "" else _decoded(values["high"]))
        except InputError as error:
            raise PatchFormatError(str(error)) from None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SIZE


def _encoded(values: NDArray[np.float32]) -> str:
    with np.errstate(over="ignore"):  # an open end, or a weight that float16 cannot hold
        return base64.b64encode(values.astype("<f2").tobytes()).decode("ascii")


def _decoded(text: Any) -> NDArray[np.float32]:
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
        return np.frombuffer(data, "<f2").astype(np.float32)
    except (AttributeError, ValueError, binascii.Error):
        raise PatchFormatError("weight sketch: expected float16 numbers in base64") from None


def _folded(tensors: Mapping[str, tuple[int, int]]) -> dict[str, list[list[Any]]]:
    """``{"attn_v": [[outputs, inputs, "0-4,7"]], "token_embd": [[V, D, ""]]}``."""
    layers: dict[tuple[str, tuple[int, int]], list[int]] = defaultdict(list)
    for name, shape in tensors.items():
        layer, role = split_name(name)
        layers[role, shape] += [] if layer is None else [layer]
    folded: dict[str, list[list[Any]]] = defaultdict(list)
    for (role, shape), numbers in sorted(layers.items()):
        folded[role].append([*shape, _runs(sorted(numbers))])
    return dict(folded)


def _runs(numbers: list[int]) -> str:
    ends = [n for n in numbers if n + 1 not in numbers]
    starts = [n for n in numbers if n - 1 not in numbers]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _unfolded(folded: Any) -> dict[str, tuple[int, int]]:
    shapes = [(role, entry) for role, entries in _items(folded) for entry in entries]
    tensors: dict[str, tuple[int, int]] = {}
    for role, entry in shapes[: MAX_SHAPES + 1]:
        if not isinstance(entry, list) or len(entry) != 3 or not all(map(_is_size, entry[:2])):
            raise PatchFormatError(f"weight sketch: {role}: expected [outputs, inputs, layers], found {entry!r:.80}")
        for name in _names(role, entry[2]):
            tensors[name] = (entry[0], entry[1])
    if not tensors or len(shapes) > MAX_SHAPES:
        raise PatchFormatError(f"weight sketch: expected 1 to {MAX_SHAPES} shapes of tensors, found {len(shapes)}")
    return tensors


def _items(folded: Any) -> Iterable[tuple[str, list[Any]]]:
    if not isinstance(folded, dict) or not all(isinstance(v, list) for v in folded.values()):
        raise PatchFormatError("weight sketch: expected tensors as an object of lists")
    unknown = set(folded) - {*ROLES, *EMBEDDINGS}
    if unknown:
        raise PatchFormatError(f"weight sketch: expected tensors of {[*ROLES, *EMBEDDINGS]}, found {sorted(unknown)}")
    return folded.items()


def _names(role: str, layers: Any) -> list[str]:
    if role in EMBEDDINGS and layers == "":
        return [role]
    runs = [RUN.fullmatch(run) for run in layers.split(",")] if isinstance(layers, str) else [None]
    bounds = [(int(run[1]), int(run[2] or run[1])) for run in runs if run]
    following = [a for a, _ in bounds[1:]] + [MAX_LAYERS + 1]  # runs that overlap could name each layer without end
    if (
        role in EMBEDDINGS
        or None in runs
        or any(not a <= b < c - 1 for (a, b), c in zip(bounds, following, strict=True))
    ):
        raise PatchFormatError(f"weight sketch: {role}: expected layers like '0-4,7', found {layers!r:.80}")
    return [f"blk.{n}.{role}" for a, b in bounds for n in range(a, b + 1)]


def split_name(name: str) -> tuple[int | None, str]:
    """(layer, role) of a tensor; the embeddings have no layer."""
    parts = name.split(".")
    return (int(parts[1]), parts[2]) if parts[0] == "blk" else (None, name)


def positions(tensors: Mapping[str, tuple[int, int]], head_dim: int, count: int) -> list[Position]:
    """Which weights are sampled: the same for everybody, spread evenly over layers and roles, by SHA-256.

    Args:
        tensors: as in ``Sketch.tensors``.
        head_dim: H.
        count: how many; fewer are a prefix of more.
    """
    embeddings = [name for name in EMBEDDINGS if name in tensors]
    matrices = sorted(tensors.keys() - set(embeddings), key=lambda name: hashlib.sha256(name.encode()).digest())
    places = []
    for i in range(count):
        turn, rest = divmod(i, EMBEDDING_SHARE)
        if embeddings and (rest == 0 or not matrices):
            name = embeddings[turn % len(embeddings)]
        else:
            name = matrices[(i - turn - 1 if embeddings else i) % len(matrices)]
        places.append(_position(name, tensors[name], head_dim, i))
    return places


def _position(name: str, shape: tuple[int, int], head_dim: int, index: int) -> Position:
    digest = hashlib.sha256(f"edgepatch weight sketch 1:{name}:{index}".encode()).digest()
    row, column, side = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16))
    row, column = row % shape[0], column % shape[1]
    if split_name(name)[1] in ROTATED and shape[0] % head_dim == 0:
        row += -(row % head_dim) + (head_dim - 1) * (side % 2)
    return Position(name, row, column)


def measure(expected: Sketch, actual: Sketch) -> Comparison:
    """Compares the base's weights with a model's cells, without a verdict.

    Args:
        expected: of the base.
        actual: of the model, read at the positions of ``expected``.

    Raises:
        InputError: ``found`` was read at other positions.
    """
    if (
        dict(expected.tensors) != dict(actual.tensors)
        or len(expected.low) != len(actual.low)
        or expected.head_dim != actual.head_dim
    ):
        raise InputError("weight sketch: expected two of the same positions", hint="read the second like the first")
    slack = [np.abs(x) * 2.0**-11 + 2.0**-24 for x in (expected.low, expected.high)]  # they were rounded to float16
    apart = (expected.low - slack[0] > actual.high) | (expected.high + slack[1] < actual.low)
    allowed = actual.allowed if expected.is_exact else max(actual.allowed, ALLOWED_REFITTED)
    outside = Counter(position.tensor for position, out in zip(expected.positions, apart, strict=True) if out)
    return Comparison(float(apart.mean()), allowed, outside)


def compare(expected: Sketch, actual: Sketch, quantization: str) -> Comparison:
    """Refuses a model that is not a quantization of the base.

    Args:
        expected: of the base, from the patch.
        actual: of the model, read at the positions of ``expected``.
        quantization: of the model, for the message.

    Raises:
        InputError: ``found`` was read at other positions.
        MismatchError: more weights are outside of their cells than rounding explains; it names the tensors.
    """
    result = measure(expected, actual)
    if not result.distance <= result.allowed:
        share = (
            f"{result.distance:.1%} of {len(actual.low)} sampled weights beyond rounding, allowed {result.allowed:.1%}"
        )
        raise MismatchError(
            {"weights": (f"those of its base, rounded to {quantization}", f"{share} ({_where(result.outside)})")}
        )
    return result


def _where(outside: Mapping[str, int]) -> str:
    roles: dict[str, list[int]] = defaultdict(list)
    for name in outside:
        layer, role = split_name(name)
        roles[role] += [] if layer is None else [layer]
    return "; ".join(
        f"{role} of layers {_runs(sorted(layers))}" if layers else role for role, layers in sorted(roles.items())
    )

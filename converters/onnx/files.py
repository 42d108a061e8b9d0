"""What an ONNX file says of itself, read without a model library: operators, weights, and which files hold them.

A graph names the files of its weights, so it is read with suspicion: before anything opens it for inference, every location
must be a plain name of a regular file beside the graph that is long enough. The reader walks protobuf's wire format and skips
what it does not ask for; the numbers of the fields are those of ``onnx.proto``.
"""

from __future__ import annotations

import math
import mmap
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepatch.errors import InputError
from edgepatch.files.writing import FolderKind

MODEL_FILE = "model.onnx"
ONNX_FOLDER = FolderKind("an ONNX model folder", MODEL_FILE)
MODEL_FILES = (MODEL_FILE, "onnx/model.onnx")
"""Where published folders keep their graph; the second is a folder for several precisions."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_TAG, MAX_LENGTH, MAX_VALUE = (1 << 32) - 1, (1 << 31) - 1, (1 << 64) - 1
"""What protobuf takes a tag, a length and a number for. It cuts some longer ones and refuses others, by version: here all are refused."""

WHOLE = re.compile(r"[0-9]{1,18}")
"""An offset or a length in the one spelling that every program reads alike."""
MAX_DEPTH = 16  # of graphs within nodes
MAX_FILE_BYTES = 1 << 31  # of a graph; protobuf's own limit
NUMPY_TYPES = {1: "<f4", 2: "u1", 3: "i1", 6: "<i4", 7: "<i8", 10: "<f2", 11: "<f8"}  # those of norms, and small ones
ITEM_BITS = {
    1: 32,
    2: 8,
    3: 8,
    4: 16,
    5: 16,
    6: 32,
    7: 64,
    9: 8,
    10: 16,
    11: 64,
    12: 32,
    13: 64,
    14: 64,
    15: 128,
    16: 16,
    17: 8,
    18: 8,
    19: 8,
    20: 8,
    21: 4,
    22: 4,
}

BLOCKED_INPUT = {"MatMulNBits": 1, "GatherBlockQuantized": 0}
"""Operator -> which of its inputs holds whole numbers in blocks; the next three after the second are scales, zero points and group indices."""

# Per message: field number -> the message within, for those that can lead to a tensor.
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


_LISTS = {
    number: (BYTES, wire) for number, wire in ((4, FIXED32), (5, VARINT), (7, VARINT), (10, FIXED64), (11, VARINT))
}
WIRES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "model": {1: (VARINT,), 5: (VARINT,)} | dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), (BYTES,)),
    "training": dict.fromkeys(range(1, 5), (BYTES,)),
    "function": dict.fromkeys((1, *range(4, 15)), (BYTES,)),
    "graph": dict.fromkeys((1, 2, 5, *range(10, 17)), (BYTES,)),
    "node": dict.fromkeys(range(1, 11), (BYTES,)),
    "attribute": {2: (FIXED32,), 3: (VARINT,), 7: (BYTES, FIXED32), 8: (BYTES, VARINT), 20: (VARINT,)}
    | dict.fromkeys((1, 4, 5, 6, 9, 10, 11, 13, 14, 15, 21, 22, 23), (BYTES,)),
    "sparse": {1: (BYTES,), 2: (BYTES,), 3: (BYTES, VARINT)},
    "tensor": {1: (BYTES, VARINT), 2: (VARINT,), 14: (VARINT,)}
    | _LISTS
    | dict.fromkeys((3, 6, 8, 9, 12, 13, 16), (BYTES,)),
    "entry": {1: (BYTES,), 2: (BYTES,)},
}
"""Message -> field number -> the wire types that it may have. protobuf passes over a field of another one, and other readers do not."""


@dataclass(frozen=True)
class Tensor:
    """Weights of a graph.

    Attributes:
        name: "" for some constants.
        shape: its dimensions.
        data_type: number of the element type in ``onnx.proto``.
        span: first byte and end of its raw data within the file, or ``None``.
        external: keys and values that name another file, empty for none.
    """

    name: str
    shape: tuple[int, ...]
    data_type: int
    span: tuple[int, int] | None
    external: Mapping[str, str]

    @property
    def num_bytes(self) -> int:
        """Of its values; 0 for an unknown element type."""
        return (math.prod(self.shape) * ITEM_BITS.get(self.data_type, 0) + 7) // 8


@dataclass
class GraphFile:
    """What a graph's file says.

    Attributes:
        path: of the file.
        operators: how often each operator occurs.
        bits: of a weight in ``MatMulNBits``, one entry for each node.
        tensors: all weights and constants.
        metadata: what its maker added: "edgepatch.model_spec".
        producer: the program that wrote it.
        inputs: name -> number of the element type, of the graph's inputs.
        packed: name of a tensor that holds whole numbers in blocks -> bits of each.
        scales: names of the tensors that turn those back into weights.
    """

    path: Path
    operators: Counter[str] = field(default_factory=Counter)
    bits: Counter[int] = field(default_factory=Counter)
    tensors: list[Tensor] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    producer: str = ""
    inputs: dict[str, int] = field(default_factory=dict)
    packed: dict[str, int] = field(default_factory=dict)
    scales: set[str] = field(default_factory=set)

    def values(self, tensor: Tensor) -> NDArray[Any] | None:
        """A tensor's values, or ``None`` where they are of no type or place that is read here."""
        kind = NUMPY_TYPES.get(tensor.data_type)
        if kind is None:
            return None
        if tensor.external:
            path, offset = self.path.with_name(tensor.external["location"]), int(tensor.external.get("offset", 0))
        elif tensor.span:
            path, offset = self.path, tensor.span[0]
        else:
            return None
        with path.open("rb") as file:
            file.seek(offset)
            return np.frombuffer(file.read(tensor.num_bytes), dtype=kind).reshape(tensor.shape)


def open_folder(folder: Path, model_file: str | None = None) -> GraphFile:
    """Checks a model folder's files, and reads what its graph says.

    Args:
        folder: the model's.
        model_file: of several graphs the one to take, as a path within the folder.

    Raises:
        InputError: there is no graph; it is damaged; it wants weights that are missing, too short or outside of its own
            folder; or the folder holds links.
    """
    path = find_model_file(folder, model_file)
    _refuse_links(folder, path)
    graph = read_graph_file(path)
    for tensor in graph.tensors:
        _check_external(path, tensor)
    return graph


def find_model_file(folder: Path, model_file: str | None = None) -> Path:
    """The graph in a model folder.

    Raises:
        InputError: it is not there, or not within the folder.
    """
    if model_file is not None:
        if Path(model_file).is_absolute() or ".." in Path(model_file).parts:
            raise InputError(f"model file: expected a path within {folder}, found {model_file}")
        return folder / model_file
    return next((folder / name for name in MODEL_FILES if (folder / name).is_file()), folder / MODEL_FILE)


def _refuse_links(folder: Path, model_file: Path) -> None:
    """Links could make the model read files outside its folder.

    Raises:
        InputError: the folder holds no model, or something else than files of its own.
    """
    try:
        status = model_file.lstat()
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise InputError(f"{model_file} is not a regular file, or empty", hint="convert the model again")
        for path in folder.rglob("*"):
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) and (not stat.S_ISREG(status.st_mode) or status.st_nlink != 1):
                raise InputError(
                    f"{path} is a link or no regular file", hint="copy the folder with its contents: cp -rL"
                )
    except OSError as error:
        raise InputError(
            f"{folder} is not an ONNX model folder: {error.filename}: {error.strerror}",
            hint="name the folder that holds model.onnx; edgepatch convert base --to onnx makes one",
        ) from error


def _check_external(model_file: Path, tensor: Tensor) -> None:
    """Checks that a tensor's file lies beside the graph and holds all of it.

    onnxruntime takes some locations for addresses in its own memory, so a name is all that is let through.
    """
    if not tensor.external:
        return
    location = tensor.external.get("location", "")
    which = f"{model_file}: external data of {tensor.name or 'a constant'}"
    if not location or location in (".", "..") or any(c in location for c in '/\\:\0*?"<>|'):
        raise InputError(
            f"{which}: expected the name of a file beside it, found {location!r}",
            hint="do not run this model: its graph reads files outside its folder",
        )
    texts = (tensor.external.get("offset", "0"), tensor.external.get("length", str(tensor.num_bytes)))
    if not all(map(WHOLE.fullmatch, texts)):
        raise InputError(f"{which}: offset and length must be numbers, found {dict(tensor.external)}")
    offset, length = map(int, texts)
    path = model_file.with_name(location)
    if not path.is_file():
        raise InputError(
            f"{model_file} is damaged: its weights in {location} are missing", hint="copy the whole folder"
        )
    size = path.stat().st_size
    if offset < 0 or length < tensor.num_bytes or offset + length > size:
        raise InputError(
            f"{path} is damaged: {tensor.name or 'a constant'} wants {tensor.num_bytes} bytes, stated as {length} at {offset}, of {size}",
            hint="copy or convert the model again",
        )


def read_graph_file(path: Path) -> GraphFile:
    """Reads what a graph's file says.

    Raises:
        InputError: it is truncated, damaged, or no ONNX file.
    """
    graph_file = GraphFile(path)
    try:
        if path.stat().st_size >= MAX_FILE_BYTES:
            raise InputError(f"{path}: expected less than 2 GiB, found {path.stat().st_size} bytes")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(graph_file, data).message("model", 0, len(data), 0)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged, or no ONNX model: {error}", hint="convert the model again") from None
    if not graph_file.operators:
        raise InputError(f"{path} is damaged, or no ONNX model: it holds no operators", hint="convert the model again")
    return graph_file


class _Walk:
    """One pass over a graph's file."""

    def __init__(self, graph_file: GraphFile, data: Any) -> None:
        self._file = graph_file
        self._data = data

    def message(self, kind: str, start: int, end: int, depth: int) -> None:
        """Looks into a message for nodes and tensors."""
        if depth > MAX_DEPTH * 3:
            raise ValueError("graphs within graphs without end")
        if kind == "tensor":
            self._file.tensors.append(self._tensor(start, end))
            return
        if kind == "node":
            self._node(start, end)
        inner = MESSAGES[kind]
        for number, wire, first, last in self._fields(start, end, kind):
            if wire == BYTES and depth <= 1:
                self._describe(kind, number, first, last)
            if number in inner:
                self.message(inner[number], first, last, depth + 1)

    def _describe(self, kind: str, number: int, first: int, last: int) -> None:
        """Takes in what the model and its outermost graph say of themselves."""
        if (kind, number) == ("model", 2):
            self._file.producer = self._text(first, last)
        elif (kind, number) == ("model", 14):
            key, value = self._entry(first, last)
            if key in self._file.metadata:
                raise ValueError(f"its metadata names {key} twice")
            self._file.metadata[key] = value
        elif (kind, number) == ("graph", 11):
            name, elements = self._input(first, last)
            self._file.inputs[name] = elements

    def _input(self, start: int, end: int) -> tuple[str, int]:
        """(name, number of the element type) of a ``ValueInfoProto``; 0 for what is no tensor."""
        name, kind = "", (start, start)
        for number, wire, first, last in self._fields(start, end):
            if number == 1 and wire == BYTES:
                name = self._text(first, last)
            elif number == 2 and wire == BYTES:
                kind = (first, last)
        for number, wire, first, last in self._fields(*kind):
            if number == 1 and wire == BYTES:  # tensor_type
                return name, next((v for n, w, v, _ in self._fields(first, last) if n == 1 and w == VARINT), 0)
        return name, 0

    def _fields(self, start: int, end: int, kind: str = "") -> Iterator[tuple[int, int, int, int]]:
        """(number, wire type, first byte or value, end) of each field of a message, which has the wire types of its kind."""
        position = start
        while position < end:
            tag, position = self._varint(position, end, MAX_TAG)
            wire = tag & 7
            if not tag >> 3 or wire not in WIRES.get(kind, {}).get(tag >> 3, (wire,)):
                raise ValueError(f"field {tag >> 3} of a {kind or 'message'} has the wire type {wire}")
            if wire == VARINT:
                value, position = self._varint(position, end)
                yield tag >> 3, wire, value, 0
                continue
            if wire == BYTES:
                size, position = self._varint(position, end, MAX_LENGTH)
            elif wire in (FIXED32, FIXED64):
                size = 4 if wire == FIXED32 else 8
            else:
                raise ValueError(f"unknown wire type {wire}")
            if position + size > end:
                raise ValueError("it ends within a field")
            yield tag >> 3, wire, position, position + size
            position += size

    def _varint(self, position: int, end: int, most: int = MAX_VALUE) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = self._data[position]
            position += 1
            value |= (byte & 127) << shift
            if byte >= 128:
                shift += 7
                continue
            if value > most or (not byte and shift):
                raise ValueError("a number is longer than it may be, or spelled longer than it is")
            return value, position
        raise ValueError("it ends within a number")

    def _text(self, first: int, last: int) -> str:
        return bytes(self._data[first:last]).decode("utf-8")

    def _node(self, start: int, end: int) -> None:
        operator, inputs, attributes = "", [], {}
        for number, wire, first, last in self._fields(start, end, "node"):
            if number == 1 and wire == BYTES:
                inputs.append(self._text(first, last))
            elif number == 4 and wire == BYTES:
                operator = self._text(first, last)
            elif number == 5 and wire == BYTES:
                name, value = self._integer(first, last)
                attributes[name] = value
        self._file.operators[operator] += 1
        if operator == "MatMulNBits":
            self._file.bits[attributes.get("bits", 4)] += 1
        place = BLOCKED_INPUT.get(operator)
        if place is not None and place < len(inputs):
            self._file.packed[inputs[place]] = attributes.get("bits", 4)
            self._file.scales.update(name for name in inputs[2:5] if name)

    def _integer(self, start: int, end: int) -> tuple[str, int]:
        """Name of an attribute, and its integer."""
        name, value = "", 0
        for number, wire, first, last in self._fields(start, end, "attribute"):
            if number == 1 and wire == BYTES:
                name = self._text(first, last)
            elif number == 3 and wire == VARINT:
                value = first
        return name, value

    def _tensor(self, start: int, end: int) -> Tensor:
        name, shape, kind, span, external = "", [], 0, None, {}
        for number, wire, first, last in self._fields(start, end, "tensor"):
            if number == 1:
                shape += [first] if wire == VARINT else self._packed(first, last)
            elif number == 2:
                kind = first
            elif number == 8:
                name = self._text(first, last)
            elif number == 9:
                span = (first, last)
            elif number == 13:
                key, value = self._entry(first, last)
                if key in external:
                    raise ValueError(f"the external data of {name} names its {key} twice")
                external[key] = value
        if kind >= 1 << 31 or any(size >= 1 << 63 for size in shape):
            raise ValueError(f"a dimension or the element type of {name or 'a constant'} is out of range")
        return Tensor(name, tuple(shape), kind, span, external)

    def _packed(self, position: int, end: int) -> list[int]:
        values = []
        while position < end:
            value, position = self._varint(position, end)
            values.append(value)
        return values

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        texts = {
            number: self._text(first, last)
            for number, wire, first, last in self._fields(start, end, "entry")
            if wire == BYTES
        }
        return texts.get(1, ""), texts.get(2, "")

"""F18: files that one of our parsers takes, but reads otherwise than the library that it guards: patches, ONNX graphs, GGUF files.

A file that only one of the two refuses is no disagreement: nothing is run of it. What must never be is that we judge one thing and the
library runs another. Each format is damaged ``count`` times, and both sides read what is left: safetensors, protobuf's ONNX, and ggml
itself, which reads GGUF files for llama.cpp.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attacks import specimens
from edgepatch.compilation import installed_libraries
from edgepatch.converters.gguf.header import read_any_header
from edgepatch.converters.onnx.files import read_graph_file
from edgepatch.errors import EdgepatchError
from edgepatch.patch.file import parse_patch, patch_bytes

Facts = dict[str, Any]
Read = Callable[[bytes], Facts | None]
"""What a reader takes a file for; ``None`` where it refuses it."""

STRING, ARRAY = 8, 9
"""ggml's numbers for a value that is text, and for a list."""

LIKELY_BYTES = (0, 1, 2, 4, 8, 0x20, 0x7F, 0x80, 0xFF)


@dataclass
class Tally:
    """What became of the damaged files of a format."""

    format: str
    inputs: int = 0
    taken: int = 0
    disagreements: int = 0


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three bytes overwritten, or a piece taken out, doubled or moved to another place."""
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(changed) or 1))
        length = int(rng.integers(1, 9))
        match int(rng.integers(5)):
            case 0:
                changed[place : place + 1] = bytes([int(rng.integers(256))])
            case 1:
                changed[place : place + 1] = bytes([int(rng.choice(LIKELY_BYTES))])
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = changed[place : place + length]
            case _:
                other = int(rng.integers(len(changed) or 1))
                changed[place : place + length] = changed[other : other + length]
    return bytes(changed)


# Patches and safetensors.


def patch_as_we_read_it(data: bytes) -> Facts | None:
    try:
        patch = parse_patch(data)
    except EdgepatchError:
        return None
    from safetensors.numpy import load

    ours = load(patch_bytes(patch))  # our reader keeps no names: writing the patch again gives them back
    return {name: (values.dtype, values.shape, values.tobytes()) for name, values in ours.items()}


def patch_as_safetensors_reads_it(data: bytes) -> Facts | None:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        theirs = load(data)
    except (SafetensorError, KeyError, ValueError):
        return None
    return {name: (values.dtype, values.shape, values.tobytes()) for name, values in theirs.items()}


# ONNX graphs.


def graph_bytes() -> bytes:
    """A graph with tensors inside and outside the file, and a graph within."""
    import onnx

    inline = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32), "inline")
    outside = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32), "outside")
    outside.ClearField("raw_data")
    outside.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "model.data"), ("offset", "0"), ("length", "24")):
        outside.external_data.add(key=key, value=value)
    within = onnx.helper.make_graph([], "within", [], [], [onnx.numpy_helper.from_array(np.ones(2, np.int64), "deep")])
    nodes = [
        onnx.helper.make_node("If", ["c"], ["d"], then_branch=within, else_branch=within),
        onnx.helper.make_node("Identity", ["x"], ["y"]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [], [inline, outside]))
    return bytes(model.SerializeToString())


def graph_as_we_read_it(data: bytes) -> Facts | None:
    with written(data, ".onnx") as path:
        try:
            graph = read_graph_file(path)
        except EdgepatchError:
            return None
    return {
        "tensors": sorted((t.name, t.shape, t.data_type, tuple(sorted(t.external.items()))) for t in graph.tensors),
        "operators": dict(graph.operators),
    }


def graph_as_onnx_reads_it(data: bytes) -> Facts | None:
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return None
    tensors, operators = list[Any](), dict[str, int]()
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto):
            operators[message.op_type] = operators.get(message.op_type, 0) + 1
        elif isinstance(message, onnx.TensorProto):
            external = {entry.key: entry.value for entry in message.external_data}
            shape = tuple(message.dims)
            tensors.append((message.name, shape, message.data_type, tuple(sorted(external.items()))))
    return {"tensors": sorted(tensors), "operators": operators}


def _messages(message: Any) -> Iterator[Any]:
    """A message and all within it, wherever they stand."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for each in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(each)


# GGUF files.


class _Parameters(ctypes.Structure):
    """``gguf_init_params``: the tensors are not loaded."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def gguf_bytes() -> bytes:
    """A small file with values of each kind and three tensors."""
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder, "a.gguf"), "llama")
        writer.add_context_length(64)
        writer.add_token_list(["a", "b", "\u00fc"])
        writer.add_token_scores([0.0, 1.0, 2.0])
        writer.add_bool("general.flag", True)
        writer.add_float64("general.number", 0.5)
        writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
        writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
        writer.add_tensor("half", np.zeros((2, 32), np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(folder, "a.gguf").read_bytes()


def gguf_as_we_read_it(data: bytes) -> Facts | None:
    with written(data, ".gguf") as path:
        try:
            header = read_any_header(path)
        except EdgepatchError:
            return None
    rows = {name: (t.ggml_type, t.offset, t.num_bytes) for name, t in header.tensors.items()}
    texts = {key: value for key, value in header.metadata.items() if _is_text(value)}
    return {"keys": list(header.metadata), "texts": texts, "tensors": rows}


def _is_text(value: object) -> bool:
    """Whether ggml reads a value as text, or as a list of texts."""
    return isinstance(value, (str, list))


def _ggml() -> ctypes.CDLL:
    folder = installed_libraries()[0].parent
    library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Parameters]
    for name in ("gguf_get_key", "gguf_get_tensor_name", "gguf_get_val_str"):
        getattr(library, name).restype = ctypes.c_char_p
    for name in ("gguf_get_n_kv", "gguf_get_n_tensors"):
        getattr(library, name).restype = ctypes.c_int64
    for name in ("gguf_get_tensor_offset", "gguf_get_tensor_size", "gguf_get_data_offset"):
        getattr(library, name).restype = ctypes.c_size_t
    library.gguf_get_arr_str.restype = ctypes.c_char_p
    library.gguf_get_arr_str.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t]
    library.gguf_get_arr_n.restype = ctypes.c_size_t
    for name in ("gguf_get_arr_n", "gguf_get_arr_type"):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
    of_an_entry = ("key", "val_str", "kv_type", "tensor_name", "tensor_offset", "tensor_size", "tensor_type")
    for name in (f"gguf_get_{part}" for part in of_an_entry):
        getattr(library, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
    for name in ("gguf_get_n_kv", "gguf_get_n_tensors", "gguf_get_data_offset", "gguf_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    return library


class GgmlReader:
    """ggml's own reader of GGUF files."""

    def __init__(self) -> None:
        self._library = _ggml()
        self._silence = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._library.ggml_log_set(self._silence, None)

    def __call__(self, data: bytes) -> Facts | None:
        library = self._library
        with written(data, ".gguf") as path:
            context = library.gguf_init_from_file(str(path).encode(), _Parameters(True, None))
        if not context:
            return None
        try:
            keys = [
                library.gguf_get_key(context, i).decode("utf-8", "replace")
                for i in range(library.gguf_get_n_kv(context))
            ]
            texts = {key: value for i, key in enumerate(keys) if (value := self._text(context, i)) is not None}
            start = library.gguf_get_data_offset(context)
            rows = {
                library.gguf_get_tensor_name(context, i).decode("utf-8", "replace"): (
                    library.gguf_get_tensor_type(context, i),
                    start + library.gguf_get_tensor_offset(context, i),
                    library.gguf_get_tensor_size(context, i),
                )
                for i in range(library.gguf_get_n_tensors(context))
            }
            return {"keys": keys, "texts": texts, "tensors": rows}
        finally:
            library.gguf_free(context)

    def _text(self, context: int, entry: int) -> str | list[str] | None:
        """A value that is text, or a list of texts; ``None`` for any other."""
        library = self._library
        kind = library.gguf_get_kv_type(context, entry)
        if kind == STRING:
            return _decoded(library.gguf_get_val_str(context, entry))
        if kind != ARRAY or library.gguf_get_arr_type(context, entry) != STRING:
            return None
        count = library.gguf_get_arr_n(context, entry)
        return [_decoded(library.gguf_get_arr_str(context, entry, i)) for i in range(count)]


def _decoded(text: bytes) -> str:
    return text.decode("utf-8", "replace")


@contextmanager
def written(data: bytes, suffix: str) -> Iterator[Path]:
    """A file with these bytes, in memory where that can be had: a disk would be the slowest part."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.NamedTemporaryFile(dir=memory, suffix=suffix) as file:
        file.write(data)
        file.flush()
        yield Path(file.name)


# Both.


def compare(name: str, data: bytes, ours: Read, theirs: Read, count: int, rng_seed: int = 1) -> Tally:
    """Damages a sound file so many times, and reads each with both.

    Raises:
        AssertionError: the two differ on the sound file itself.
    """
    assert ours(data) == theirs(data) and ours(data), f"{name}: the sound file is read in two ways"
    tally, rng = Tally(name), np.random.default_rng(rng_seed)
    for _ in range(count):
        changed = damaged(data, rng)
        tally.inputs += 1
        facts = ours(changed)
        if facts is None:
            continue
        tally.taken += 1
        other = theirs(changed)
        tally.disagreements += other is not None and other != facts
    return tally


def tallies(count: int) -> list[Tally]:
    """Of all formats, ``count`` files each."""
    return [
        compare(
            "patch", patch_bytes(specimens.small_patch()), patch_as_we_read_it, patch_as_safetensors_reads_it, count
        ),
        compare("ONNX", graph_bytes(), graph_as_we_read_it, graph_as_onnx_reads_it, count),
        compare("GGUF", gguf_bytes(), gguf_as_we_read_it, GgmlReader(), count),
    ]

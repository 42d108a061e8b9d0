"""Which files an ONNX graph may read: nothing but those beside it, and only as far as they go."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgepatch.converters.onnx.files import MODEL_FILE, open_folder, read_graph_file
from edgepatch.errors import InputError

onnx = pytest.importorskip("onnx")
VALUES = np.arange(24, dtype=np.float32).reshape(4, 6)


def tensor(name="weights", **external):
    """A (4, 6) float32 tensor in another file."""
    proto = onnx.numpy_helper.from_array(VALUES, name)
    if external:
        proto.ClearField("raw_data")
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in external.items():
            proto.external_data.add(key=key, value=str(value))
    return proto


def save(folder: Path, *tensors, nodes=()):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"]), *nodes], "g", [], [], list(tensors)
    )
    (folder / MODEL_FILE).write_bytes(onnx.helper.make_model(graph).SerializeToString())


@pytest.fixture
def folder(tmp_path):
    model_folder = tmp_path / "model"
    model_folder.mkdir()
    (model_folder / "model.data").write_bytes(b"\0" * 32 + VALUES.tobytes())
    return model_folder


def test_operators_and_tensors_are_read(folder):
    inline, outside = tensor("inline"), tensor("outside", location="model.data", offset=32, length=96)
    half = onnx.numpy_helper.from_array(VALUES.astype(np.float16), "half")
    bits = onnx.helper.make_node("MatMulNBits", [], ["z"], bits=8, domain="com.microsoft")
    save(folder, inline, outside, half, nodes=[bits, bits])
    graph_file = open_folder(folder)
    assert graph_file.operators == {"Identity": 1, "MatMulNBits": 2} and graph_file.bits == {8: 2}
    assert [t.name for t in graph_file.tensors] == ["inline", "outside", "half"]
    for read, values in zip(graph_file.tensors, (VALUES, VALUES, VALUES.astype(np.float16)), strict=True):
        assert np.array_equal(graph_file.values(read), values) and graph_file.values(read).dtype == values.dtype


def test_a_real_graph_reads_as_onnx_reads_it(onnx_folders):
    for precision, path in onnx_folders.items():
        graph_file, model = open_folder(path), onnx.load(path / MODEL_FILE)
        assert sum(graph_file.operators.values()) == len(model.graph.node)
        expected = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        read = {t.name: graph_file.values(t) for t in graph_file.tensors if t.name in expected}
        assert read.keys() == expected.keys()
        assert all(np.array_equal(read[name], values) for name, values in expected.items() if read[name] is not None)
        assert bool(graph_file.bits) is (precision in ("int8", "int4"))


LOCATIONS = (
    "../secret",
    "/etc/passwd",
    "sub/model.data",
    "..",
    ".",
    "",
    "C:model.data",
    "\\\\host\\share",
    "*/_ORT_MEM_ADDR_/*",
    "model.data\0x",
)


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_location_outside_the_folder_is_refused(folder, location):
    save(folder, tensor(location=location, offset=0, length=96))
    with pytest.raises(InputError, match=r"weights: expected the name of a file beside it"):
        open_folder(folder)


@pytest.mark.parametrize("place", ["attribute", "subgraph", "sparse", "function"])
def test_a_location_is_found_wherever_it_hides(folder, place):
    hidden = tensor(location="../secret")
    node = onnx.helper.make_node("Constant", [], ["c"], value=hidden)
    model = onnx.helper.make_model(
        onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    )
    if place == "attribute":
        model.graph.node.append(node)
    elif place == "subgraph":
        inner = onnx.helper.make_graph([], "inner", [], [], [hidden])
        model.graph.node.append(onnx.helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))
    elif place == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(hidden)
    else:
        model.functions.add(name="f", domain="d").node.append(node)
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=r"weights: expected the name of a file beside it, found '\.\./secret'"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("external", "message"),
    [
        ({"location": "model.data", "offset": 33, "length": 96}, "wants 96 bytes, stated as 96 at 33, of 128"),
        ({"location": "model.data", "offset": 64}, "wants 96 bytes, stated as 96 at 64, of 128"),
        ({"location": "model.data", "offset": 32, "length": 95}, "stated as 95"),
        ({"location": "model.data", "offset": -1, "length": 96}, "must be numbers"),
        ({"location": "model.data", "offset": 0, "length": 2**62}, "must be numbers"),
        ({"location": "model.data", "offset": "x"}, "must be numbers"),
        ({"location": "other.data"}, "weights in other.data are missing"),
        ({"offset": "3"}, "expected the name of a file"),
    ],
)
def test_a_tensor_beyond_its_file_is_refused(folder, external, message):
    save(folder, tensor(**external))
    with pytest.raises(InputError, match=message):
        open_folder(folder)


def test_two_locations_for_one_tensor_are_refused(folder):
    twice = tensor(location="model.data")
    twice.external_data.add(key="location", value="../secret")
    save(folder, twice)
    with pytest.raises(InputError, match="names its location twice"):
        open_folder(folder)


def test_a_second_graph_appended_to_the_file_is_read_too(folder):
    """Protobuf merges a field that comes twice, so readers see both."""
    save(folder, tensor(location="model.data", offset=32))
    other = folder.parent / "other"
    other.mkdir()
    save(other, tensor("hidden", location="../secret"))
    (folder / MODEL_FILE).write_bytes((folder / MODEL_FILE).read_bytes() + (other / MODEL_FILE).read_bytes())
    assert "hidden" in {t.name for t in onnx.load(folder / MODEL_FILE, load_external_data=False).graph.initializer}
    with pytest.raises(InputError, match="hidden: expected the name of a file"):
        open_folder(folder)


def test_every_truncation_is_refused_or_harmless(folder):
    save(folder, tensor("inline"), tensor(location="model.data", offset=32, length=96))
    data = (folder / MODEL_FILE).read_bytes()
    refused = 0
    for length in range(len(data)):
        (folder / MODEL_FILE).write_bytes(data[:length])
        try:
            open_folder(folder)
        except InputError:
            refused += 1
    assert refused > len(data) - 24, "only cuts between the last small fields leave a whole message"


def test_random_damage_raises_nothing_else(folder):
    save(folder, tensor("inline"), tensor(location="model.data", offset=32, length=96))
    data = np.frombuffer((folder / MODEL_FILE).read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(2)
    for _ in range(300):
        damaged = data.copy()
        damaged[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
        (folder / MODEL_FILE).write_bytes(damaged.tobytes())
        try:
            open_folder(folder)
        except InputError:
            continue


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4 not a graph", b"\0" * 100, b"\x3a\xff\xff\xff\xff\x0f", b'{"json": 1}']
)
def test_another_file_is_refused(folder, content):
    (folder / MODEL_FILE).write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx"):
        open_folder(folder)


def test_graphs_within_graphs_end(folder):
    inner = onnx.helper.make_graph([], "inner", [], [])
    for _ in range(20):
        inner = onnx.helper.make_graph([onnx.helper.make_node("If", ["x"], ["z"], then_branch=inner)], "inner", [], [])
    (folder / MODEL_FILE).write_bytes(onnx.helper.make_model(inner).SerializeToString())
    with pytest.raises(InputError, match="graphs within graphs"):
        read_graph_file(folder / MODEL_FILE)


def test_a_folder_without_a_graph_is_named(tmp_path):
    with pytest.raises(InputError, match="not an ONNX model folder"):
        open_folder(tmp_path)
    with pytest.raises(InputError, match="not an ONNX model folder"):
        open_folder(tmp_path / "missing")
    shutil.copyfile(__file__, tmp_path / "notes.txt")
    with pytest.raises(InputError, match="not an ONNX model folder"):
        open_folder(tmp_path)


def number(value: int, size: int = 0) -> bytes:
    """A varint; of ``size`` bytes where that is longer than it needs."""
    digits = [value >> 7 * i & 127 for i in range(max(size, (value.bit_length() + 6) // 7, 1))]
    return bytes([digit | 128 for digit in digits[:-1]] + digits[-1:])


def field(tag: bytes, content: bytes) -> bytes:
    return tag + number(len(content)) + content


def graph_bytes(hidden: bytes) -> bytes:
    """A graph with an operator and a tensor that ends with some bytes."""
    entry = field(b"\x0a", b"location") + field(b"\x12", b"../secret")
    weights = (
        b"\x08\x04\x10\x01" + field(b"\x42", b"w") + b"\x70\x01" + hidden.replace(b"ENTRY", number(len(entry)) + entry)
    )
    graph = field(b"\x0a", field(b"\x22", b"Identity")) + field(b"\x2a", weights)
    return b"\x08\x09" + field(b"\x3a", graph)


EXTERNAL = 13 << 3 | 2  # the tag of external_data
HIDDEN = {
    "a tag beyond 32 bits": number(EXTERNAL | 1 << 32) + b"ENTRY",
    "a tag beyond 64 bits": number(EXTERNAL, 9) + b"\x02ENTRY",
    "a tag spelled longer than it is": number(EXTERNAL, 5) + b"ENTRY",
    "another wire type": number(13 << 3) + b"\x05",
    "a field without a number": b"\x02\x00" + number(EXTERNAL) + b"ENTRY",
    "a group": b"\x83\x01" + number(EXTERNAL) + b"ENTRY" + b"\x84\x01",
    "a length spelled longer than it is": number(EXTERNAL) + b"\x80\x80\x00",
    "an element type that is cut to 32 bits": b"\x10" + number(1 << 32 | 1),
    "a dimension below zero": b"\x08" + number((1 << 64) - 4),
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_what_two_parsers_may_read_differently_is_refused(folder, kind):
    (folder / MODEL_FILE).write_bytes(graph_bytes(b""))
    assert [t.name for t in open_folder(folder).tensors] == ["w"], "the graph itself is sound"
    (folder / MODEL_FILE).write_bytes(graph_bytes(HIDDEN[kind]))
    with pytest.raises(InputError, match="is damaged, or no ONNX model"):
        open_folder(folder)


@pytest.mark.parametrize("text", ["\uff13\uff12", "3_2", " 32", "+32", "0x20", "-0", "32\n"])
def test_numbers_have_one_spelling(folder, text):
    save(folder, tensor(location="model.data", offset=text))
    with pytest.raises(InputError, match="must be numbers"):
        open_folder(folder)

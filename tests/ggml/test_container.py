"""ggml/container.py: the bytes of a small file by hand, the gguf package, and damaged headers."""

import hashlib
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml.container import HEADER, GGUFFile, TensorInfo, header, write_gguf
from ggml.quantize import quantize

METADATA = {
    "general.architecture": ("str", "gemma3"), "a.u32": ("u32", 7), "a.f32": ("f32", 0.5),
    "a.bool": ("bool", True), "a.i32": ("i32", -3), "a.words": ("[str]", ["é", "", "b"]),
    "a.floats": ("[f32]", [1.5, -2.0]), "a.ints": ("[i32]", [1, -1]), "a.flags": ("[bool]", [True, False]),
    "a.u8": ("u8", 255), "a.i64": ("i64", -(2**40)), "a.u64": ("u64", 2**63), "a.f64": ("f64", 0.1),
}  # fmt: skip
MATRIX = np.arange(96, dtype=np.float32).reshape(3, 32)
DATA = {"m.weight": quantize(MATRIX, "q8_0"), "n.weight": quantize(np.array([[1.0, 2.0]], np.float32), "f32")}
TENSORS = [TensorInfo("m.weight", (3, 32), "q8_0"), TensorInfo("n.weight", (2,), "f32")]


@pytest.fixture
def file(tmp_path):
    write_gguf(tmp_path / "x.gguf", METADATA, TENSORS, lambda name: [DATA[name]])
    return tmp_path / "x.gguf"


def test_a_file_of_one_pair_and_one_tensor_has_these_bytes(tmp_path):
    write_gguf(
        tmp_path / "x.gguf",
        {"k": ("u32", 5)},
        [TensorInfo("t", (2, 1), "f32")],
        lambda _: [np.array([[1.0], [2.0]], "<f4").view(np.uint8)],
    )
    expected = (
        b"GGUF" + b"\x03\0\0\0" + b"\x01" + b"\0" * 7 + b"\x01" + b"\0" * 7  # version 3, one tensor, one pair
        # The key, one byte long; type 4 is u32; the value.
        + b"\x01" + b"\0" * 7 + b"k" + b"\x04\0\0\0" + b"\x05\0\0\0"
        + b"\x01" + b"\0" * 7 + b"t" + b"\x02\0\0\0"  # the name; two dimensions,
        + b"\x01" + b"\0" * 7 + b"\x02" + b"\0" * 7  # columns before rows
        + b"\0" * 4 + b"\0" * 8  # type 0 is F32; at the start of the data
    )  # fmt: skip
    expected += b"\0" * (-len(expected) % 32) + struct.pack("<2f", 1, 2) + b"\0" * 24
    assert (tmp_path / "x.gguf").read_bytes() == expected


def test_the_package_reads_what_we_write_and_writes_the_same_bytes(file, tmp_path):
    reader = gguf.GGUFReader(file)
    assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} == {
        k: v for k, (_, v) in METADATA.items()
    }
    assert [(t.name, t.tensor_type.name, tuple(t.shape[::-1])) for t in reader.tensors] == [
        ("m.weight", "Q8_0", (3, 32)),
        ("n.weight", "F32", (2,)),
    ]
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "gemma3")
    kinds = dict(
        zip(
            "u8 u32 u64 i32 i64 f32 f64 bool str".split(),
            "UINT8 UINT32 UINT64 INT32 INT64 FLOAT32 FLOAT64 BOOL STRING".split(),
            strict=True,
        )
    )
    for key, (kind, value) in list(METADATA.items())[1:]:
        array = kind.startswith("[")
        item = gguf.GGUFValueType[kinds[kind.strip("[]")]]
        writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY if array else item, item if array else None)
    writer.add_tensor("m.weight", DATA["m.weight"], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("n.weight", np.array([1.0, 2.0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert (tmp_path / "theirs.gguf").read_bytes() == file.read_bytes()


def test_what_is_written_is_read_again(file):
    found = GGUFFile(file)
    assert {key: (found.kinds[key], value) for key, value in found.metadata.items()} == METADATA
    assert [(t.name, t.shape, t.type, t.offset) for t in found.tensors.values()] == [
        ("m.weight", (3, 32), "q8_0", 0),
        ("n.weight", (2,), "f32", 128),
    ]
    assert all((found.data(name) == data).all() for name, data in DATA.items())
    raw = file.read_bytes()
    assert found.digest("m.weight") == hashlib.sha256(DATA["m.weight"]).hexdigest()
    assert found.digest(HEADER) == hashlib.sha256(raw[: found.data_start]).hexdigest() and raw[
        found.data_start :
    ].startswith(DATA["m.weight"].tobytes())


def test_a_tensor_with_other_bytes_than_its_shape_wants_is_refused(tmp_path):
    with pytest.raises(ValueError, match="n.weight has 7 bytes, but f32 of shape .2,. takes 8"):
        write_gguf(tmp_path / "x.gguf", {}, TENSORS[1:], lambda _: [np.zeros(7, np.uint8)])


def test_every_cut_is_refused(file):
    whole = file.read_bytes()
    for end in range(len(whole) - 24):  # the last 24 bytes are padding, which some writers leave out
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"x\.gguf: "):
            GGUFFile(file)
    file.write_bytes(whole[:-24])
    GGUFFile(file)


def replacing(old: bytes, new: bytes):
    return lambda raw: raw.replace(old, new)


def matrix(rows: int, columns: int, kind: int) -> bytes:
    """Returns the entry of m.weight behind its name: the shape, the type's id and the offset."""
    return struct.pack("<QQIQ", columns, rows, kind, 0)


HUGE = "18,446,744,073,709,551,615"
BREAKS = {
    "the magic": (lambda raw: b"GGML" + raw[4:], "not a GGUF file"),
    "the version": (lambda raw: raw[:4] + b"\x02\0\0\0" + raw[8:], "GGUF version 2"),
    "a huge count of tensors": (lambda raw: raw[:8] + b"\xff" * 8 + raw[16:], f"announces {HUGE} tensors"),
    "a huge count of pairs": (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], f"announces {HUGE} pairs"),
    "a huge string": (lambda raw: raw[:24] + b"\xff" * 8 + raw[32:], "the file ends within a key"),
    "a value of no type": (replacing(b"a.u32\x04", b"a.u32\x4e"), "a.u32 has a value of type 78"),
    "a key twice": (replacing(b"a.i32", b"a.u32"), "the key 'a.u32' occurs twice"),
    "a key that is not UTF-8": (replacing(b"a.i32", b"\xffoooo"), "a key is not UTF-8"),
    "a key of two lines": (replacing(b"a.i32", b"a\ni32"), r"a key is 'a\\ni32', which is no name"),
    "a tensor's name that cannot be shown": (replacing(b"n.weight", b"n.\x1b[31mt"), "which is no name"),
    "a tensor twice": (replacing(b"n.weight", b"m.weight"), "the tensor 'm.weight' occurs twice"),
    "a tensor of no type": (replacing(matrix(3, 32, 8), matrix(3, 32, 99)), "m.weight has the type 99"),
    "a row of half a block": (replacing(matrix(3, 32, 8), matrix(3, 33, 8)), "which q8_0 cannot have"),
    "a tensor without a row": (replacing(matrix(3, 32, 8), matrix(0, 32, 8)), "which q8_0 cannot have"),
    "an offset elsewhere": (
        replacing(struct.pack("<IQ", 0, 128), struct.pack("<IQ", 0, 96)), "n.weight has the offset 96"
    ),
    "something behind the end": (lambda raw: raw + b"\0" * 32, "32 bytes after the last tensor"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_header_is_refused_by_name(file, what):
    change, message = BREAKS[what]
    whole = file.read_bytes()
    assert change(whole) != whole
    file.write_bytes(change(whole))
    with pytest.raises(ValueError, match=message):
        GGUFFile(file)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(header(METADATA, TENSORS)) - 1), byte=st.integers(0, 255))
def test_any_changed_byte_of_the_header_is_read_or_refused_and_never_crashes(tmp_path_factory, at, byte):
    path = tmp_path_factory.mktemp("fuzz") / "x.gguf"
    write_gguf(path, METADATA, TENSORS, lambda name: [DATA[name]])
    raw = bytearray(path.read_bytes())
    raw[at] = byte
    path.write_bytes(raw)
    try:
        GGUFFile(path)
    except ValueError as e:
        assert str(path) in str(e)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="not a GGUF file"):
        GGUFFile(tmp_path / "x.gguf")

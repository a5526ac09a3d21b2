"""GGUF version 3, llama.cpp's file of one model: a writer that streams, and a reader that trusts nothing it
reads.

    "GGUF" | version u32 | tensors u64 | pairs u64      24 bytes, little endian like all that follows
    pairs    key string | type u32 | value              string: length u64, UTF-8
                                                        array: type u32, length u64, items
    tensors  name string | dimensions u32 | sizes u64 each | type u32 | offset u64
    zeros to the next multiple of 32, the start of the data; then each tensor's bytes, zeros to the next
    multiple of 32 behind it

A tensor's sizes stand in the reverse of numpy's order, fastest first: a matrix of shape (rows, columns) is
written as columns, rows. An offset counts from the start of the data. Source: ggml's docs/gguf.md.
"""

import hashlib
import math
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggml.blocks import TYPES, row_bytes, type_of

MAGIC, VERSION, ALIGNMENT, MAX_DIMS = b"GGUF", 3, 32, 4
HEADER = "the header"
SLICE = 2**24  # bytes hashed at a time
# The types of values by our names: struct's letters, and GGUF's ids.
SCALARS = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "?",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}
VALUE_IDS = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "str": 8,
    "array": 9,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
VALUE_NAMES = {number: name for name, number in VALUE_IDS.items()}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, shape in numpy's order (rows, columns), type by name ("q8_0"), and where its bytes
    begin, counted from the start of the data.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int = 0

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * row_bytes(self.type, self.shape[-1])


def write_gguf(
    path: str | Path,
    metadata: dict[str, tuple[str, object]],
    tensors: list[TensorInfo],
    read: Callable[[str], Iterable[np.ndarray]],
) -> dict[str, str]:
    """Writes the file, one tensor after the other; `read(name)` gives a tensor's bytes, in one array or
    several.

    Returns {HEADER or a tensor's name: sha256 of its bytes}, so that who reads the file again can tell
    whether it is what was written.

    metadata: {key: (type, value)} in the order of the file; a type is "u32", "f32", "bool", "str", ... or
    "[str]" for an array of them. Raises ValueError where the bytes that `read` gives are not as many as the
    tensor's shape and type want.
    """
    start, digests = header(metadata, tensors), {}
    digests[HEADER] = hashlib.sha256(start).hexdigest()
    with open(path, "wb") as file:
        file.write(start)
        for tensor in tensors:
            written, digest = 0, hashlib.sha256()
            for piece in map(np.ascontiguousarray, read(tensor.name)):
                file.write(piece.data)
                digest.update(piece.data)
                written += piece.nbytes
            if written != tensor.nbytes:
                raise ValueError(
                    f"{path}: {tensor.name} has {written:,} bytes, but {tensor.type} of shape {tensor.shape} "
                    f"takes {tensor.nbytes:,}"
                )
            file.write(bytes(padding(written)))
            digests[tensor.name] = digest.hexdigest()
    return digests


def header(metadata: dict[str, tuple[str, object]], tensors: list[TensorInfo]) -> bytes:
    """All that stands before the data; the offsets are counted here, those of `tensors` are not looked at."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts += [packed_string(key), packed_value(kind, value)]
    offset = 0
    for tensor in tensors:
        sizes = tensor.shape[::-1]
        parts += [
            packed_string(tensor.name),
            struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, TYPES[tensor.type].ggml_id, offset),
        ]
        offset += tensor.nbytes + padding(tensor.nbytes)
    text = b"".join(parts)
    return text + bytes(padding(len(text)))


def padding(size: int) -> int:
    """How many zeros lead from `size` bytes to the next multiple of 32."""
    return -size % ALIGNMENT


def packed_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def packed_value(kind: str, value) -> bytes:
    """A value with its type before it; kind "[f32]" is an array of f32."""
    if not kind.startswith("["):
        return struct.pack("<I", VALUE_IDS[kind]) + (
            packed_string(value) if kind == "str" else struct.pack(f"<{SCALARS[kind]}", value)
        )
    item = kind[1:-1]
    items = (
        b"".join(map(packed_string, value))
        if item == "str"
        else struct.pack(f"<{len(value)}{SCALARS[item]}", *value)
    )
    return struct.pack("<IIQ", VALUE_IDS["array"], VALUE_IDS[item], len(value)) + items


class GGUFFile:
    """A file that was found well-formed: `metadata` {key: value}, `kinds` {key: type}, `tensors` {name:
    TensorInfo}; the data stays on the disk.
    """

    def __init__(self, path: str | Path):
        """Reads the header and checks all of it; raises ValueError with the file, the place and what is wrong
        there.
        """
        self.path = Path(path)
        self.kinds: dict[str, str] = {}
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with open(self.path, "rb") as file:
            self.size = file.seek(0, 2)
            if self.size < 24 or file.seek(0) or file.read(4) != MAGIC:
                raise ValueError(
                    f"{self.path}: is no GGUF file, it does not begin with 'GGUF' and two counts"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                self._read_header(Cursor(self.path, raw, at=4))
        self._check_places()

    def _read_header(self, cursor) -> None:
        version, n_tensors, n_pairs = cursor.unpack("IQQ", "the counts")
        if version != VERSION:
            raise cursor.wrong(
                f"this is version {version} of GGUF (or a big-endian file), and only version {VERSION} is "
                f"read here"
            )
        for _ in range(cursor.count(n_pairs, 13, "pairs")):
            self._read_pair(cursor)
        for _ in range(cursor.count(n_tensors, 32, "tensors")):
            self._read_tensor(cursor)
        self.data_start = cursor.at + padding(cursor.at)

    def _read_pair(self, cursor) -> None:
        key = cursor.string("a key")
        if key in self.metadata:
            raise cursor.wrong(f"the key {key!r} occurs twice")
        self.kinds[key], self.metadata[key] = cursor.value(key)
        if key == "general.alignment" and self.metadata[key] != ALIGNMENT:
            raise cursor.wrong(
                f"general.alignment is {self.metadata[key]!r}, and only {ALIGNMENT} is read here"
            )

    def _read_tensor(self, cursor) -> None:
        name = cursor.string("a tensor's name")
        if name in self.tensors:
            raise cursor.wrong(f"the tensor {name!r} occurs twice")
        (dims,) = cursor.unpack("I", name)
        if not 1 <= dims <= MAX_DIMS:
            raise cursor.wrong(f"{name} has {dims} dimensions, and 1 to {MAX_DIMS} are possible")
        *sizes, kind, offset = cursor.unpack(f"{dims}QIQ", name)
        quant = type_of(kind)
        if quant is None:
            raise cursor.wrong(f"{name} has the type {kind}, which is none of {', '.join(TYPES)}")
        if not all(sizes) or sizes[0] % quant.block_size:
            raise cursor.wrong(f"{name} has the sizes {sizes}, which {quant.name} cannot have")
        self.tensors[name] = TensorInfo(name, tuple(sizes[::-1]), quant.name, offset)

    def _check_places(self) -> None:
        """Tensors lie one behind the other without a gap, as every writer puts them, and the last ends with
        the file or within its padding.
        """
        expected = 0
        for tensor in self.tensors.values():
            if tensor.offset != expected:
                raise ValueError(
                    f"{self.path}: {tensor.name} begins at {tensor.offset:,} of the data, but what stands "
                    f"before it ends at {expected:,}"
                )
            end = self.data_start + tensor.offset + tensor.nbytes
            if end > self.size:
                raise ValueError(
                    f"{self.path}: is cut off: {tensor.name} would end at byte {end:,}, the file has "
                    f"{self.size:,}; write or download it again"
                )
            expected += tensor.nbytes + padding(tensor.nbytes)
        if self.size > self.data_start + expected:
            raise ValueError(
                f"{self.path}: {self.size - self.data_start - expected:,} bytes stand behind the last tensor "
                f"and belong to nothing"
            )

    def data(self, name: str) -> np.ndarray:
        """A tensor's bytes, (rows, bytes of a row) of uint8, mapped and not copied."""
        tensor = self.tensors[name]
        return np.memmap(
            self.path,
            np.uint8,
            "r",
            self.data_start + tensor.offset,
            (tensor.rows, row_bytes(tensor.type, tensor.shape[-1])),
        )

    def digest(self, name: str) -> str:
        """sha256 of a tensor's bytes, or of the HEADER's, a slice in memory at a time."""
        start, size = (
            (0, self.data_start)
            if name == HEADER
            else (self.data_start + self.tensors[name].offset, self.tensors[name].nbytes)
        )
        found = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(start)
            for at in range(0, size, SLICE):
                found.update(file.read(min(SLICE, size - at)))
        return found.hexdigest()


class Cursor:
    """A place in the header, with errors that say what was to be read there."""

    def __init__(self, path: Path, raw: mmap.mmap, at: int):
        self.path, self.raw, self.size, self.at = path, raw, len(raw), at

    def wrong(self, problem: str) -> ValueError:
        return ValueError(
            f"{self.path}: {problem} (before byte {self.at:,}); write or download the file again"
        )

    def take(self, size: int, what: str) -> bytes:
        if size > self.size - self.at:
            raise self.wrong(
                f"the file ends within {what}: {size:,} bytes are wanted, {self.size - self.at:,} are left"
            )
        self.at += size
        return self.raw[self.at - size : self.at]

    def unpack(self, form: str, what: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def count(self, number: int, smallest: int, what: str) -> int:
        """`number`, unless so many things of at least `smallest` bytes cannot be in the file: a broken count
        must not fill the memory.
        """
        if number * smallest > self.size - self.at:
            raise self.wrong(f"{number:,} {what} are announced, more than the file has room for")
        return number

    def string(self, what: str) -> str:
        (size,) = self.unpack("Q", what)
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"{what} is not UTF-8") from None

    def value(self, key: str) -> tuple[str, object]:
        """(type, value) of the pair with this key."""
        kind = self.kind(key)
        if kind == "str":
            return kind, self.string(key)
        if kind != "array":
            return kind, self.unpack(SCALARS[kind], key)[0]
        item = self.kind(key)
        (length,) = self.unpack("Q", key)
        if item == "array":
            raise self.wrong(f"{key} is an array of arrays, which no model has")
        if item == "str":
            return "[str]", [self.string(key) for _ in range(self.count(length, 8, f"items of {key}"))]
        self.count(length, struct.calcsize(SCALARS[item]), f"items of {key}")
        return f"[{item}]", list(self.unpack(f"{length}{SCALARS[item]}", key))

    def kind(self, key: str) -> str:
        (number,) = self.unpack("I", key)
        if number not in VALUE_NAMES:
            raise self.wrong(f"{key} has a value of type {number}, and 0 to {max(VALUE_NAMES)} are possible")
        return VALUE_NAMES[number]

"""Writes and reads GGUF version 3, llama.cpp's file format of one model. All numbers are little endian:

    "GGUF" | version u32 | number of tensors u64 | number of pairs u64     24 bytes
    pairs      key string | type u32 | value        string: length u64, UTF-8
                                                    array: type of an item u32, length u64, items
    tensors    name string | number of dimensions u32 | dimensions u64 each | type u32 | offset u64
    zeros up to a multiple of 32: the data starts there
    data       the bytes of each tensor, and zeros up to the next multiple of 32

The dimensions are in the reverse of NumPy's order: for a matrix (rows, columns), the file has columns, rows.
An offset counts bytes from the start of the data. Source: ggml's docs/gguf.md.
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

from ggml.blocks import TYPES, row_bytes, type_named, type_of

MAGIC, VERSION, ALIGNMENT, MAX_DIMS = b"GGUF", 3, 32, 4
MAX_NAME = 200  # characters of a key or of a tensor's name; ggml allows 63 bytes for the latter
HEADER = "the header"  # The key of the header's digest, beside the names of the tensors.
SLICE = 2**24  # Bytes that are hashed at a time.
# The types of values; the index of a type is its id in the file.
VALUE_TYPES = "u8 i8 u16 i16 u32 i32 f32 bool str array u64 i64 f64".split()
# The struct module's format character of each scalar type.
SCALARS = dict(zip("u8 i8 u16 i16 u32 i32 f32 bool u64 i64 f64".split(), "BbHhIif?Qqd", strict=True))

Metadata = dict[str, tuple[str, Any]]  # {key: (type, value)}; the type of an array is "[str]", "[f32]", ...


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, shape in NumPy's order, type such as "q8_0", and offset in bytes within the data."""

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
    metadata: Metadata,
    tensors: list[TensorInfo],
    read: Callable[[str], Iterable[np.ndarray]],
) -> dict[str, str]:
    """Writes a GGUF file, one tensor at a time. Returns {tensor name: SHA-256 of its bytes}.

    The key HEADER has the SHA-256 of the bytes before the data. read(name) yields a tensor's bytes in one or
    more arrays. Raises ValueError if a tensor has more or fewer bytes than its shape and type need.
    """
    start = header(metadata, tensors)
    digests = {HEADER: hashlib.sha256(start).hexdigest()}
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


def header(metadata: Metadata, tensors: list[TensorInfo]) -> bytes:
    """Returns all bytes before the data; it computes the tensors' offsets and ignores TensorInfo.offset."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts += [_packed_string(key), _packed_value(kind, value)]
    offset = 0
    for tensor in tensors:
        n, sizes = len(tensor.shape), tensor.shape[::-1]
        numbers = struct.pack(f"<I{n}QIQ", n, *sizes, type_named(tensor.type).ggml_id, offset)
        parts += [_packed_string(tensor.name), numbers]
        offset += tensor.nbytes + padding(tensor.nbytes)
    packed = b"".join(parts)
    return packed + bytes(padding(len(packed)))


def padding(size: int) -> int:
    """Returns the number of zero bytes that extend `size` bytes to a multiple of 32."""
    return -size % ALIGNMENT


def _packed_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _packed_value(kind: str, value: Any) -> bytes:
    """Returns the id of the type, then the value."""
    if kind.startswith("["):
        item = kind[1:-1]
        head = struct.pack("<IIQ", VALUE_TYPES.index("array"), VALUE_TYPES.index(item), len(value))
        if item == "str":
            return head + b"".join(map(_packed_string, value))
        return head + struct.pack(f"<{len(value)}{SCALARS[item]}", *value)
    packed = _packed_string(value) if kind == "str" else struct.pack("<" + SCALARS[kind], value)
    return struct.pack("<I", VALUE_TYPES.index(kind)) + packed


class GGUFFile:
    """A GGUF file: `metadata` is {key: value}, `kinds` {key: value's type}, `tensors` {name: TensorInfo}.

    Only the header is read into memory; `data` maps the bytes of a tensor.
    """

    def __init__(self, path: str | Path):
        """Reads and checks the header; raises ValueError that names the file, the position and the fault."""
        self.path = Path(path)
        self.kinds: dict[str, str] = {}
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with open(self.path, "rb") as file:
            self.size = file.seek(0, 2)
            if self.size < 24 or file.seek(0) or file.read(4) != MAGIC:
                raise ValueError(f"{self.path}: not a GGUF file; it does not start with 'GGUF' and counts")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
                self._read_header(_Cursor(self.path, raw, at=4))
        self._check_offsets()

    def _read_header(self, cursor: "_Cursor") -> None:
        version, n_tensors, n_pairs = cursor.unpack("IQQ", "the counts")
        if version != VERSION:
            found = f"GGUF version {version} (or a big-endian file)"
            raise cursor.error(f"{found} is not supported, only version {VERSION}")
        # The smallest pair and the smallest tensor take 13 and 32 bytes.
        for _ in range(cursor.count(n_pairs, 13, "pairs")):
            self._read_pair(cursor)
        for _ in range(cursor.count(n_tensors, 32, "tensors")):
            self._read_tensor(cursor)
        self.data_start = cursor.at + padding(cursor.at)

    def _read_pair(self, cursor: "_Cursor") -> None:
        key = cursor.name("a key")
        if key in self.metadata:
            raise cursor.error(f"the key {key!r} occurs twice")
        self.kinds[key], self.metadata[key] = cursor.value(key)
        if key == "general.alignment" and self.metadata[key] != ALIGNMENT:
            raise cursor.error(f"{key} {self.metadata[key]!r} is not supported, only {ALIGNMENT}")

    def _read_tensor(self, cursor: "_Cursor") -> None:
        name = cursor.name("a tensor's name")
        if name in self.tensors:
            raise cursor.error(f"the tensor {name!r} occurs twice")
        (n,) = cursor.unpack("I", name)
        if not 1 <= n <= MAX_DIMS:
            raise cursor.error(f"{name} has {n} dimensions; 1 to {MAX_DIMS} are allowed")
        *sizes, kind, offset = cursor.unpack(f"{n}QIQ", name)
        quant = type_of(kind)
        if quant is None:
            raise cursor.error(f"{name} has the type {kind}, which is none of {', '.join(TYPES)}")
        if not all(sizes) or sizes[0] % quant.block_size:
            raise cursor.error(f"{name} has the dimensions {sizes}, which {quant.name} cannot have")
        self.tensors[name] = TensorInfo(name, tuple(sizes[::-1]), quant.name, offset)

    def _check_offsets(self) -> None:
        """Raises ValueError if there are gaps between tensors, or missing or surplus bytes at the end."""
        expected = 0
        for tensor in self.tensors.values():
            if tensor.offset != expected:
                raise ValueError(
                    f"{self.path}: {tensor.name} has the offset {tensor.offset:,}, but the tensor before it "
                    f"ends at {expected:,}"
                )
            end = self.data_start + tensor.offset + tensor.nbytes
            if end > self.size:
                raise ValueError(
                    f"{self.path}: is cut off: {tensor.name} ends at byte {end:,}, but the file has "
                    f"{self.size:,}; write or download it again"
                )
            expected += tensor.nbytes + padding(tensor.nbytes)
        left = self.size - self.data_start - expected
        if left > 0:
            raise ValueError(f"{self.path}: {left:,} bytes after the last tensor belong to no tensor")

    def data(self, name: str) -> np.ndarray:
        """Returns a tensor's bytes, (rows, bytes of a row) uint8, memory-mapped and not copied."""
        tensor = self.tensors[name]
        shape = (tensor.rows, row_bytes(tensor.type, tensor.shape[-1]))
        return np.memmap(self.path, np.uint8, "r", self.data_start + tensor.offset, shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Returns a copy of rows start to stop of data(name).

        It is read without mapping the file, because mapped pages count as memory of the process. Raises
        ValueError if the file has been cut off since it was opened.
        """
        tensor = self.tensors[name]
        width, rows = row_bytes(tensor.type, tensor.shape[-1]), range(tensor.rows)[start:stop]
        at = self.data_start + tensor.offset + rows.start * width
        found = np.fromfile(self.path, np.uint8, len(rows) * width, offset=at)
        if len(found) < len(rows) * width:
            raise ValueError(f"{self.path}: ends in the middle of {name}; download it again")
        return found.reshape(len(rows), width)

    def digest(self, name: str) -> str:
        """Returns the SHA-256 of a tensor's bytes, or of all bytes before the data if `name` is HEADER."""
        start, size = 0, self.data_start
        if name != HEADER:
            start, size = self.data_start + self.tensors[name].offset, self.tensors[name].nbytes
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            file.seek(start)
            for at in range(0, size, SLICE):
                digest.update(file.read(min(SLICE, size - at)))
        return digest.hexdigest()


class _Cursor:
    """Reads one value of the header after the other; `what` names the value in an error message."""

    def __init__(self, path: Path, raw: mmap.mmap, at: int):
        self.path, self.raw, self.at = path, raw, at

    def error(self, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {problem} (before byte {self.at:,}); write or download it again")

    def take(self, size: int, what: str) -> bytes:
        left = len(self.raw) - self.at
        if size > left:
            raise self.error(f"the file ends within {what}: it needs {size:,} bytes, but {left:,} are left")
        self.at += size
        return self.raw[self.at - size : self.at]

    def unpack(self, form: str, what: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form), what))

    def count(self, number: int, smallest: int, what: str) -> int:
        """Returns `number`; raises ValueError if so many items of `smallest` bytes exceed the file's rest.

        Without this check, a damaged number could make the reader use all memory.
        """
        if number * smallest > len(self.raw) - self.at:
            raise self.error(f"the header announces {number:,} {what}, more than the file has room for")
        return number

    def string(self, what: str) -> str:
        (size,) = self.unpack("Q", what)
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} is not UTF-8") from None

    def name(self, what: str) -> str:
        """Returns a string that error messages can show: of printable characters, and not too long."""
        text = self.string(what)
        if len(text) > MAX_NAME or not text.isprintable():
            raise self.error(f"{what} is {text[:MAX_NAME]!r}, which is no name")
        return text

    def strings(self, count: int, what: str) -> list[str]:
        """Returns `count` strings; a loop of its own, since `string` takes ten times as long."""
        raw, at, size, found = self.raw, self.at, struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            try:
                end = at + 8 + size(raw, at)[0]
                text = raw[at + 8 : end].decode("utf-8")
            except (struct.error, UnicodeDecodeError):
                end = len(raw) + 1
            if end > len(raw):
                self.at = at
                self.string(what)  # raises the error
            found.append(text)
            at = end
        self.at = at
        return found

    def kind(self, key: str) -> str:
        (number,) = self.unpack("I", key)
        if number >= len(VALUE_TYPES):
            last = len(VALUE_TYPES) - 1
            raise self.error(f"{key} has a value of type {number}; 0 to {last} are allowed")
        return VALUE_TYPES[number]

    def value(self, key: str) -> tuple[str, Any]:
        """Returns (type, value) of the pair with this key."""
        kind = self.kind(key)
        if kind == "str":
            return kind, self.string(key)
        if kind != "array":
            return kind, self.unpack(SCALARS[kind], key)[0]
        item = self.kind(key)
        (length,) = self.unpack("Q", key)
        if item == "array":
            raise self.error(f"{key} is an array of arrays, which no model has")
        if item == "str":
            return "[str]", self.strings(self.count(length, 8, f"items of {key}"), f"an item of {key}")
        self.count(length, struct.calcsize(SCALARS[item]), f"items of {key}")
        return f"[{item}]", list(self.unpack(f"{length}{SCALARS[item]}", key))

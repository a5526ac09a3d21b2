"""GGML's block types: their layouts in bytes, and torch functions that turn blocks into float32 weights.

A block holds 32 weights, or 256 in a K type. In these formulas, q is the integer stored for a weight, and d,
m and dmin are float16 numbers of the block:

    Q8_0   34 bytes: d, 32 int8                                          weight = d * q
    Q4_0   18 bytes: d, 16 bytes of nibbles                              weight = d * (q - 8)
    Q4_1   20 bytes: d, m, 16 bytes of nibbles                           weight = d * q + m
    Q5_0   22 bytes: d, 4 bytes of fifth bits, 16 bytes of nibbles       weight = d * (q - 16)
    Q5_1   24 bytes: d, m, 4 bytes of fifth bits, 16 bytes of nibbles    weight = d * q + m
    Q2_K   84 bytes: 16 bytes of 4-bit scales and mins, 64 bytes of 2-bit q, d, dmin
                                                                         weight = d * scale * q - dmin * min
    Q3_K  110 bytes: 32 bytes of third bits, 64 bytes of 2-bit q, 12 bytes of 6-bit scales, d
                                                                         weight = d * (scale - 32) * (q - 4)
    Q4_K  144 bytes: d, dmin, 12 bytes of 6-bit scales and mins, 128 bytes of nibbles
                                                                         weight = d * scale * q - dmin * min
    Q5_K  176 bytes: as Q4_K, with 32 bytes of fifth bits before the nibbles
    Q6_K  210 bytes: 128 bytes of nibbles, 64 bytes of two high bits, 16 int8 scales, d
                                                                         weight = d * scale * (q - 32)

A nibble has the low 4 bits of a q. In a block of 32, byte i of the nibbles has weight i in its low half and
weight 16 + i in its high half; bit i of the fifth bits, a little-endian uint32, belongs to weight i. Q4_K and
Q5_K have a scale and a min for each 32 weights, the other K types one for each 16. Of 2-bit numbers, byte i
of 32 has weights i, 32 + i, 64 + i and 96 + i, from its low bits up. Source: llama.cpp,
ggml/src/ggml-common.h and ggml-quants.c.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch

SLICE = 2**22  # This many weights are dequantized at a time, so that temporary tensors take some ten MiB.


class QuantType(NamedTuple):
    """A block type: its name, its id in GGUF files, and the number of weights and of bytes in a block."""

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int


TYPES = {
    row[0]: QuantType(*row)
    for row in [
        ("f32", 0, 1, 4),
        ("f16", 1, 1, 2),
        ("q4_0", 2, 32, 18),
        ("q4_1", 3, 32, 20),
        ("q5_0", 6, 32, 22),
        ("q5_1", 7, 32, 24),
        ("q8_0", 8, 32, 34),
        ("q2_k", 10, 256, 84),
        ("q3_k", 11, 256, 110),
        ("q4_k", 12, 256, 144),
        ("q5_k", 13, 256, 176),
        ("q6_k", 14, 256, 210),
        ("bf16", 30, 1, 2),
    ]
}
FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # for rows that are no multiple of 256


@cache
def type_of(ggml_id: int) -> QuantType | None:
    """Returns the block type with this GGUF id, from TYPES or the gguf package; None if neither reads it."""
    for known in TYPES.values():
        if known.ggml_id == ggml_id:
            return known
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(ggml_id)
        found = QuantType(kind.name.lower(), ggml_id, *gguf.GGML_QUANT_SIZES[kind])
        # Some types are none of weights, such as I32, or have no dequantizer.
        gguf.quants.dequantize(np.zeros((1, found.block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        return None
    return found


def type_named(name: str) -> QuantType:
    """Returns the type of this name."""
    if name in TYPES:
        return TYPES[name]
    from gguf import GGMLQuantizationType

    found = type_of(GGMLQuantizationType[name.upper()])
    assert found is not None, name
    return found


def row_bytes(name: str, n_cols: int) -> int:
    """Returns the bytes of a row of n_cols weights; raises ValueError if they do not fill whole blocks."""
    quant = type_named(name)
    if n_cols % quant.block_size:
        remedy = f"take {FALLBACK.get(name, 'f16')} for this tensor"
        raise ValueError(f"{name}: a row of {n_cols} weights is no multiple of {quant.block_size}; {remedy}")
    return n_cols // quant.block_size * quant.block_bytes


def dequantize(data: torch.Tensor, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Returns the weights (n_rows, n_cols) of data (n_rows, bytes of a row) uint8, on its device.

    `name` is the block type. The weights are computed in float32 and cast to `dtype`. Raises ValueError if
    the bytes of a row are no whole number of blocks.
    """
    quant, (n_rows, n_bytes) = type_named(name), data.shape
    if n_bytes % quant.block_bytes:
        why = "the data is of another type, or cut off"
        raise ValueError(f"{name}: a row of {n_bytes} bytes is no multiple of {quant.block_bytes}; {why}")
    n_cols = n_bytes // quant.block_bytes * quant.block_size
    out = torch.empty((n_rows, n_cols), dtype=dtype, device=data.device)
    height = max(1, SLICE // max(1, n_cols))
    for i in range(0, n_rows, height):
        piece = data[i : i + height].contiguous()
        out[i : i + height] = _weights(piece.view(-1, quant.block_bytes), name).view(len(piece), n_cols)
    return out


def _weights(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """Returns the float32 weights (n, block_size) in n blocks (n, block_bytes) uint8 of the type `name`."""
    if name in ("f32", "f16", "bf16"):
        dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[name]
        return blocks.view(dtype).float()
    if name == "q8_0":
        return blocks[:, 2:].view(torch.int8).float() * _half(blocks, 0)
    if name in ("q4_0", "q4_1", "q5_0", "q5_1"):
        return _blocks_of_32(blocks, name)
    if name == "q2_k":
        return _q2_k(blocks)
    if name == "q3_k":
        return _q3_k(blocks)
    if name in ("q4_k", "q5_k"):
        return _q45_k(blocks, name)
    if name == "q6_k":
        return _q6_k(blocks)
    import gguf.quants  # IQ types and others that llama.cpp writes and Loupe does not

    kind = gguf.GGMLQuantizationType[name.upper()]
    return torch.from_numpy(gguf.quants.dequantize(blocks.cpu().numpy(), kind)).to(blocks.device)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Returns the float16 number at byte `at` of each of n blocks as (n, 1) float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _bits(packed: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Returns the bits (..., len(shifts)) at the positions `shifts` of each byte in `packed` (...) uint8."""
    return packed[..., None] >> shifts & 1


def _blocks_of_32(blocks: torch.Tensor, name: str) -> torch.Tensor:
    nibbles = blocks[:, -16:]
    q = torch.cat((nibbles & 15, nibbles >> 4), 1)  # (n, 32)
    if name.startswith("q5"):
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        q = q | _bits(blocks[:, -20:-16], shifts).flatten(1) << 4
    if name.endswith("_1"):
        return q.float() * _half(blocks, 0) + _half(blocks, 2)
    return (q.float() - (8 if name == "q4_0" else 16)) * _half(blocks, 0)


def _two_bits(packed: torch.Tensor) -> torch.Tensor:
    """Returns the numbers 0 to 3, (n, 4 k, m), in packed (n, k, m) uint8: the low bits of m bytes first."""
    n, k, m = packed.shape
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)[:, None]
    return (packed[:, :, None] >> shifts & 3).view(n, 4 * k, m)


def _q2_k(blocks: torch.Tensor) -> torch.Tensor:
    n, scales = len(blocks), blocks[:, :16]
    q = _two_bits(blocks[:, 16:80].view(n, 2, 32)).view(n, 16, 16)
    step, offset = _half(blocks, 80) * (scales & 15).float(), _half(blocks, 82) * (scales >> 4).float()
    return (step[:, :, None] * q.float() - offset[:, :, None]).view(n, 256)


def _q3_k(blocks: torch.Tensor) -> torch.Tensor:
    n, low = len(blocks), blocks[:, 96:104]
    scales = torch.cat((low & 15, low >> 4), 1) | _two_bits(blocks[:, None, 104:108]).view(n, 16) << 4
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    third = _bits(blocks[:, :32], shifts).transpose(1, 2)  # bit g of byte i belongs to weight i of group g
    q = _two_bits(blocks[:, 32:96].view(n, 2, 32)) | third << 2  # (n, 8, 32)
    step = _half(blocks, 108) * (scales.float() - 32)
    return (step[:, :, None] * (q.view(n, 16, 16).float() - 4)).view(n, 256)


def _q45_k(blocks: torch.Tensor, name: str) -> torch.Tensor:
    n, a, b, c = len(blocks), blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), 1)  # (n, 8)
    mins = torch.cat((b & 63, c >> 4 | b >> 6 << 4), 1)
    nibbles = blocks[:, -128:].view(n, 4, 1, 32)
    q = torch.cat((nibbles & 15, nibbles >> 4), 2).view(n, 8, 32)
    if name == "q5_k":  # bit g of byte i belongs to weight i of group g
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        q = q | _bits(blocks[:, 16:48], shifts).transpose(1, 2) << 4
    step, offset = _half(blocks, 0) * scales.float(), _half(blocks, 2) * mins.float()
    return (step[:, :, None] * q.float() - offset[:, :, None]).view(n, 256)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    n = len(blocks)
    nibbles = blocks[:, :128].view(n, 2, 1, 2, 32)
    q = torch.cat((nibbles & 15, nibbles >> 4), 2).view(n, 2, 4, 32)
    q = q | _two_bits(blocks[:, 128:192].view(n, 2, 32)).view(n, 2, 4, 32) << 4
    step = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()  # (n, 16)
    return (step[:, :, None] * (q.view(n, 16, 16).float() - 32)).view(n, 256)

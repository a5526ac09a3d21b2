"""GGML's types of 32 weights a block, Q8_0, Q4_0, Q5_0 and Q5_1: one scale (Q5_1: and a min) in float16, and
levels that are rounded once.

For each type a slow form, one block in float32 scalars, that explains the layout, and a fast one over many
blocks that gives the same bytes, which equal llama.cpp's own (ggml/src/ggml-quants.c, quantize_row_q8_0_ref
and its neighbours).

    Q8_0  34 bytes: d f16, 32 int8                                        weight = d * q
    Q4_0  18 bytes: d f16, 16 of nibbles                                  weight = d * (q - 8)
    Q5_0  22 bytes: d f16, 4 of fifth bits, 16 of nibbles                 weight = d * (q - 16)
    Q5_1  24 bytes: d f16, m f16, 4 of fifth bits, 16 of nibbles          weight = d * q + m

Byte i of the nibbles has weight i in its low half and weight 16 + i in its high one; bit i of the fifth bits,
a little-endian uint32, is weight i's. The levels are rounded with the float32 scale, though the file stores
it in float16: so does the reference.
"""

import math

import numpy as np

f32, u8 = np.float32, np.uint8
HALF = {"q4_0": 8, "q5_0": 16, "q5_1": 0}  # the level that stands for 0; Q5_1 has a min in its place


# slow


def reference_q8_0(x: np.ndarray) -> bytes:
    """One block of Q8_0 from 32 float32 weights: d makes the largest magnitude 127, and q = x / d, rounded,
    halves away from 0.
    """
    d = max(abs(v) for v in x) / f32(127)
    inverse = f32(1) / d if d else f32(0)
    q = [
        reference_floor(float(abs(v) * inverse) + 0.5) * (-1 if v < 0 else 1) for v in x
    ]  # + 0.5 in float64, where the sum is exact
    return np.float16(d).tobytes() + np.array(q, np.int8).tobytes()


def reference_q45_0(x: np.ndarray, name: str) -> bytes:
    """One block of Q4_0 or Q5_0 from 32 float32 weights: q = floor(x / d + half + 0.5), where half is 8 or
    16.

    d, which may be negative, makes the weight largest in magnitude -half: of the levels -half..half - 1 the
    lowest is the farthest from 0.
    """
    half, largest = HALF[name], f32(0)
    for v in x:
        if abs(v) > abs(largest):
            largest = v
    d = largest / f32(-half)
    inverse = f32(1) / d if d else f32(0)
    q = [min(2 * half - 1, reference_floor(v * inverse + f32(half + 0.5))) for v in x]
    return np.float16(d).tobytes() + reference_pack(q, name)


def reference_q5_1(x: np.ndarray) -> bytes:
    """One block of Q5_1 from 32 float32 weights: the lowest weight, m, is level 0, the highest 31, and q =
    floor((x - m) / d + 0.5).
    """
    low, high = min(x), max(x)
    d = (high - low) / f32(31)
    inverse = f32(1) / d if d else f32(0)
    q = [reference_floor((v - low) * inverse + f32(0.5)) for v in x]
    return np.float16(d).tobytes() + np.float16(low).tobytes() + reference_pack(q, "q5_1")


def reference_floor(v) -> int:
    """floor(v); 0 where 1 / d was infinite: d is below 2**-128 there and 0 in float16, whatever the levels
    say.
    """
    return math.floor(v) if math.isfinite(v) else 0


def reference_pack(q: list[int], name: str) -> bytes:
    fifth = (
        b"" if name == "q4_0" else sum((level >> 4) << i for i, level in enumerate(q)).to_bytes(4, "little")
    )
    return fifth + bytes(q[i] & 15 | (q[i + 16] & 15) << 4 for i in range(16))


# fast


def fast_q8_0(x: np.ndarray) -> np.ndarray:
    """(n, 32) float32 -> (n, 34) uint8; reference_q8_0 explains it."""
    d = np.abs(x).max(axis=1, keepdims=True) / f32(127)  # (n, 1)
    v = x * inverse_of(d)
    whole = np.trunc(v)
    whole += np.trunc(
        f32(2) * (v - whole)
    )  # halves away from 0; trunc(v + 0.5) would take 0.49999997 up, for the sum is rounded
    return np.concatenate([half_bytes(d), finite(whole).astype(np.int8).view(u8)], axis=1)


def fast_q45_0(x: np.ndarray, name: str) -> np.ndarray:
    """(n, 32) float32 -> (n, 18) uint8 as Q4_0, or (n, 22) as Q5_0; reference_q45_0 explains it."""
    half = HALF[name]
    largest = np.take_along_axis(
        x, np.abs(x).argmax(axis=1)[:, None], axis=1
    )  # of two that are equal but for the sign, the first
    d = np.where(largest == 0, f32(0), largest) / f32(
        -half
    )  # a block of zeros of either sign: 0 / -half is -0, and stored so
    q = np.minimum(finite(x * inverse_of(d) + f32(half + 0.5)).astype(u8), u8(2 * half - 1))
    return np.concatenate([half_bytes(d), fast_pack(q, name)], axis=1)


def fast_q5_1(x: np.ndarray) -> np.ndarray:
    """(n, 32) float32 -> (n, 24) uint8; reference_q5_1 explains it."""
    low = np.take_along_axis(
        x, x.argmin(axis=1)[:, None], axis=1
    )  # of 0 and -0 the first, whose sign is stored; x.min() may take either
    d = np.abs(x.max(axis=1, keepdims=True) - low) / f32(31)  # abs: -0 - 0 is -0
    q = finite((x - low) * inverse_of(d) + f32(0.5)).astype(u8)
    return np.concatenate([half_bytes(d), half_bytes(low), fast_pack(q, "q5_1")], axis=1)


def inverse_of(d: np.ndarray) -> np.ndarray:
    return np.where(d != 0, f32(1) / d, f32(0))


def finite(v: np.ndarray) -> np.ndarray:
    """v with 0 for infinities and NaN; reference_floor says where they come from."""
    return np.where(np.isfinite(v), v, f32(0))


def half_bytes(d: np.ndarray) -> np.ndarray:
    """(n, 1) float32 -> (n, 2) uint8, little-endian float16."""
    return d.astype("<f2").view(u8)


def fast_pack(q: np.ndarray, name: str) -> np.ndarray:
    """(n, 32) uint8 levels -> (n, 16) uint8, or (n, 20) with the fifth bits before."""
    nibbles = q[:, :16] & 15 | (q[:, 16:] & 15) << 4
    return (
        nibbles
        if name == "q4_0"
        else np.concatenate([np.packbits(q >> 4, axis=1, bitorder="little"), nibbles], axis=1)
    )


# back to weights


def weights_q8_0(blocks: np.ndarray) -> np.ndarray:
    """(n, 34) uint8 -> (n, 32) float32: d * q."""
    return blocks[:, 2:].view(np.int8) * halves(blocks[:, :2])


def weights_q45(blocks: np.ndarray, name: str) -> np.ndarray:
    """(n, 18), (n, 22) or (n, 24) uint8 -> (n, 32) float32: d * (q - 8), d * (q - 16), or d * q + m."""
    nibbles = blocks[:, -16:]
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.int8)
    if name != "q4_0":
        q |= np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little").astype(np.int8) << 4
    weights = (q - HALF[name]) * halves(blocks[:, :2])
    return weights + halves(blocks[:, 2:4]) if name == "q5_1" else weights


def halves(two_bytes: np.ndarray) -> np.ndarray:
    """(n, 2) uint8, little-endian float16 -> (n, 1) float32."""
    return np.ascontiguousarray(two_bytes).view("<f2").astype(f32)

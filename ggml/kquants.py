"""Quantizers of GGML's Q4_K, Q5_K and Q6_K: 256 weights a block, with a search for the best scales.

The bytes equal llama.cpp's without an importance matrix (ggml/src/ggml-quants.c, quantize_row_q4_K_ref and
the functions beside it). As there, each sum adds float32 values from the first weight to the last. A
llama.cpp that is built with fused multiply-add (arm64) may differ in the last bit.
tests/ggml/reference_quantizers.py explains the search on one block, ggml/blocks.py the layouts.

Shapes: n blocks of 8 groups of 32 weights (Q6_K: 16 groups of 16), N groups in all. The arrays are (32, N) or
(16, N), because NumPy sums over the first axis in sequence, but along a row in pairs.
"""

import numpy as np

f32, u8 = np.float32, np.uint8
# Near this value float32 has steps of 1, so adding it rounds to a whole number, halves to even.
MAGIC = f32(1.5 * 2**23)
# The highest level, the start of the search, and its number of steps of 0.1.
SEARCH = {"q4_k": (15, -1.0, 20), "q5_k": (31, -0.5, 15)}
# A group of Q6_K whose weights are all smaller than this is stored as zeros.
EPS = f32(1e-15)


def nearest(v: np.ndarray) -> np.ndarray:
    """Returns the nearest whole numbers, halves to even, as int32.

    They are the low bits of v + MAGIC, as in llama.cpp, so that the results agree above 2**22 and for
    infinities and NaN too.
    """
    return ((np.asarray(v, f32) + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


def fast_q45_k(x: np.ndarray, name: str) -> np.ndarray:
    """Returns blocks of Q4_K (n, 144) or Q5_K (n, 176) for x (n, 256); reference_q45_k explains it."""
    n, top = len(x), SEARCH[name][0]
    x = np.ascontiguousarray(x.reshape(-1, 32).T)  # (32, N)
    scale, minimum, to_level, low = fast_scale_and_min(x, *SEARCH[name])
    d, scales = fast_six_bits(scale.reshape(n, 8))
    dmin, mins = fast_six_bits(minimum.reshape(n, 8))
    step = (d.astype(f32) * scales).reshape(-1)  # (N,)
    offset = (dmin.astype(f32) * mins).reshape(-1)
    levels = np.clip(nearest(np.where(step != 0, (x + offset) / step, to_level * (x - low))), 0, top)
    q = levels.astype(u8).T.reshape(n, 4, 2, 32)
    parts = [d.view(u8), dmin.view(u8), fast_pack_scales(scales, mins)]
    if name == "q5_k":
        parts.append(np.packbits(q.reshape(n, 8, 32) >> 4, axis=1, bitorder="little").reshape(n, 32))
    parts.append((q[:, :, 0] & 15 | q[:, :, 1] << 4).reshape(n, 128))
    return np.concatenate(parts, axis=1)


def fast_scale_and_min(x: np.ndarray, top: int, first: float, steps: int) -> tuple[np.ndarray, ...]:
    """Returns reference_scale_and_min of the columns of x (32, N): scale, min, to_level and low, each (N,).

    to_level and low give the levels. A constant column needs no special case: to_level is infinite, so the
    scale is 0, and the levels are nearest(infinity * 0) = nearest(NaN) = 0.
    """
    w = np.sqrt((x * x).sum(axis=0) / f32(32)) + np.abs(x)
    sum_w, sum_x = w.sum(axis=0), (w * x).sum(axis=0)
    low, high = np.minimum(x.min(axis=0), f32(0)), x.max(axis=0)
    to_level = f32(top) / (high - low)
    scale = f32(1) / to_level
    q, scratch = np.empty_like(x), np.empty_like(x)
    fast_round(np.multiply(np.subtract(x, low, out=q), to_level, out=q), 0, top)
    best = fast_error(x, w, q, scale, low)
    found = [to_level, low]
    for step in range(steps + 1):
        to_level = (f32(first) + f32(0.1) * f32(step) + f32(top)) / (high - low)
        fast_round(np.multiply(np.subtract(x, low, out=q), to_level, out=q), 0, top)
        sum_l = np.multiply(w, q, out=scratch).sum(axis=0)
        sum_xl = (scratch * x).sum(axis=0)
        sum_l2 = np.multiply(scratch, q, out=scratch).sum(axis=0)
        determinant = sum_w * sum_l2 - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        new_scale = np.where(new_low > 0, sum_xl / sum_l2, new_scale)
        new_low = np.where(new_low > 0, f32(0), new_low)
        error = fast_error(x, w, q, new_scale, new_low)
        better = (determinant > 0) & (error < best)
        found = [np.where(better, new, old) for new, old in zip((to_level, low), found, strict=True)]
        pairs = ((error, best), (new_scale, scale), (new_low, low))
        best, scale, low = (np.where(better, new, old) for new, old in pairs)
    return scale, -low, *found


def fast_round(v: np.ndarray, low: int, high: int) -> None:
    """Sets v to nearest(v), limited to low..high, in float32 and without a conversion to int32."""
    v += MAGIC
    bits = v.view(np.int32)
    bits &= 0x7FFFFF
    np.clip(bits, 0x400000 + low, 0x400000 + high, out=bits)
    bits |= 0x4B000000  # the exponent of MAGIC
    v -= MAGIC


def fast_error(x: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Returns the weighted square errors (N,), and overwrites q."""
    q *= scale
    q += low
    q -= x
    q *= q
    q *= w
    return q.sum(axis=0)


def fast_six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns d (n, 1) float16 and levels (n, 8) uint8 in 0..63 for scales or mins (n, 8)."""
    largest = values.max(axis=1, keepdims=True, initial=0, where=values > 0)  # without NaN
    inverse = np.where(largest > 0, f32(63) / largest, f32(0))
    return (largest / f32(63)).astype(np.float16), np.minimum(nearest(inverse * values).astype(u8), u8(63))


def fast_pack_scales(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Returns both (n, 8) uint8 as (n, 12); reference_pack_scales shows the bits."""
    first = [v[:, :4] | v[:, 4:] >> 4 << 6 for v in (scales, mins)]
    return np.concatenate([*first, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], axis=1)


def fast_q6_k(x: np.ndarray) -> np.ndarray:
    """Returns blocks of Q6_K (n, 210) for x (n, 256); reference_q6_k explains it."""
    n = len(x)
    x = x.reshape(-1, 16)  # (N, 16)
    scale, to_level = (v.reshape(n, 16) for v in fast_scale(x))
    size = np.where(np.isnan(scale), f32(0), np.abs(scale))
    largest = np.take_along_axis(scale, size.argmax(axis=1)[:, None], axis=1)  # (n, 1)
    inverse = f32(-128) / largest
    d = (f32(1) / inverse).astype(np.float16)
    scales = np.minimum(nearest(inverse * scale), 127).astype(np.int8)
    step = (d.astype(f32) * scales).reshape(-1, 1)
    q = np.where(step != 0, x / step, x * to_level.reshape(-1, 1))
    fast_round(q, -32, 31)
    q = (q.astype(np.int8) + 32).astype(u8)
    q[(step[:, 0] == 0) & (np.abs(x).max(axis=1) < EPS)] = 0
    q = q.reshape(n, 2, 4, 32)
    nibbles = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    out = np.concatenate([nibbles.reshape(n, 128), high.reshape(n, 64), scales.view(u8), d.view(u8)], axis=1)
    out[size.max(axis=1) < EPS] = 0
    return out


def fast_scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns reference_scale of the rows of x (N, 16): scales (N,) and to_level (N,), which gives levels."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)[:, 0]
    x = np.ascontiguousarray(x.T)  # (16, N)
    x2, x3 = x * x, x * x * x
    q, scratch = np.empty_like(x), np.empty_like(x)
    for step in [0, *range(-9, 0), *range(1, 10)]:
        to_level = -(f32(32) + f32(0.1) * f32(step)) / largest
        fast_round(np.multiply(x, to_level, out=q), -32, 31)
        sum_xl = np.multiply(x3, q, out=scratch).sum(axis=0)
        sum_l2 = np.multiply(np.multiply(x2, q, out=scratch), q, out=scratch).sum(axis=0)
        new_scale = np.where(sum_l2 != 0, sum_xl / sum_l2, f32(0))
        if step == 0:
            scale, best, found = new_scale, new_scale * sum_xl, to_level
            continue
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        found, scale, best = (
            np.where(better, new, old)
            for new, old in ((to_level, found), (new_scale, scale), (new_scale * sum_xl, best))
        )
    return np.where(np.abs(largest) < EPS, f32(0), scale), found

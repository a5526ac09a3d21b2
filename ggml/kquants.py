"""Quantizers of GGML's Q4_K, Q5_K and Q6_K: 256 weights per block, with a search for the best scales.

The bytes equal llama.cpp's without an importance matrix (ggml/src/ggml-quants.c, quantize_row_q4_K_ref and
its neighbours). As there, float32 sums run from a group's first weight to its last. A llama.cpp that is built
with fused multiply-add (arm64) may differ in the last bit. tests/ggml/reference_quantizers.py has a simple
version for a single block; ggml/blocks.py describes the layouts.

Shapes: n blocks of 8 groups of 32 weights (Q6_K: 16 groups of 16), N groups in all. Arrays are (32, N) or
(16, N), because NumPy adds along the first axis in order, but along the last axis in pairs.
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
    """Rounds v to whole numbers, halves to even, and returns them as int32.

    Like llama.cpp, it takes the result from the low bits of v + MAGIC in float32. For values above 2**22,
    infinities and NaN this is no rounding, but it gives what llama.cpp gives.
    """
    return ((np.asarray(v, f32) + MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


def fast_q45_k(x: np.ndarray, name: str) -> np.ndarray:
    """Quantizes x (n, 256) float32 to blocks of Q4_K (n, 144) or Q5_K (n, 176), uint8."""
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
    """Returns scale, min, to_level and low, each (N,), for the groups in the columns of x (32, N).

    They are chosen so that scale * level - min is close to x, with level = nearest(to_level * (x - low)) in
    0..top. If all weights of a group are equal and not positive, its scale and levels are 0.
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
    """Rounds float32 values in place as `nearest` does, and limits them to low..high."""
    v += MAGIC
    bits = v.view(np.int32)
    bits &= 0x7FFFFF
    np.clip(bits, 0x400000 + low, 0x400000 + high, out=bits)
    bits |= 0x4B000000  # the exponent of MAGIC
    v -= MAGIC


def fast_error(x: np.ndarray, w: np.ndarray, q: np.ndarray, scale: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Returns the sum of w * (scale * q + low - x)^2 over each group, (N,); overwrites q."""
    q *= scale
    q += low
    q -= x
    q *= q
    q *= w
    return q.sum(axis=0)


def fast_six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns d (n, 1) float16 and levels (n, 8) uint8 in 0..63; d * levels is close to `values` (n, 8)."""
    largest = values.max(axis=1, keepdims=True, initial=0, where=values > 0)  # without NaN
    inverse = np.where(largest > 0, f32(63) / largest, f32(0))
    return (largest / f32(63)).astype(np.float16), np.minimum(nearest(inverse * values).astype(u8), u8(63))


def fast_pack_scales(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Packs 6-bit scales and mins, each (n, 8) uint8, into 12 bytes per block, (n, 12) uint8."""
    first = [v[:, :4] | v[:, 4:] >> 4 << 6 for v in (scales, mins)]
    return np.concatenate([*first, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], axis=1)


def fast_q6_k(x: np.ndarray) -> np.ndarray:
    """Quantizes x (n, 256) float32 to Q6_K blocks (n, 210) uint8."""
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
    """Returns scale and to_level (N,) for rows of x (N, 16): scale * nearest(to_level * x) is close to x."""
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

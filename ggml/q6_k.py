"""GGML's Q6_K: 256 weights a block, 16 int8 scales under one float16, and a search for the scales that lose
least.

A slow form, one block in float32 scalars, that explains the algorithm, and a fast one over many blocks that
gives the same bytes, which equal llama.cpp's own without an importance matrix (ggml/src/ggml-quants.c,
quantize_row_q6_K_ref). What ggml/kquants.py says of sums holds here.

    Q6_K  210 bytes: 128 of nibbles, 64 of the two high bits, 16 of int8 scales, d f16                        weight = d * scale * (q - 32)

Shapes: n blocks of 16 groups of 16 weights, N = 16 n groups.
"""

import numpy as np

from ggml.kquants import fast_round, nearest, reference_sum

f32, u8 = np.float32, np.uint8
EPS = f32(1e-15)  # a group whose largest weight is below counts as zeros


# slow


def reference_q6_k(x: np.ndarray) -> bytes:
    """One block of Q6_K from 256 float32 weights.

    Each group of 16 has a scale, found by reference_scale; d makes the largest of them -128, and q = round(x
    / (d * scale)) + 32, in 0..63.
    """
    groups = x.reshape(16, 16)
    scales, levels = zip(*(reference_scale(group) for group in groups), strict=True)
    largest = f32(0)
    for scale in scales:
        if abs(scale) > abs(largest):
            largest = scale
    if abs(largest) < EPS:
        return bytes(210)
    inverse = f32(-128) / largest
    d = np.float16(f32(1) / inverse)
    scales = np.array([min(127, nearest(inverse * scale)) for scale in scales]).astype(np.int8)
    for g in range(16):
        step = f32(d) * f32(scales[g])
        if step != 0:
            levels[g][:] = [min(31, max(-32, nearest(v / step))) + 32 for v in groups[g]]
    q = np.array(levels).reshape(
        2,
        4,
        32,
        # Two halves of four runs: nibbles of runs 0 and 2 share bytes, then 1 and 3; a byte holds the high bits
        # of all four.
    )
    nibbles = [
        q[h, r, i] & 15 | (q[h, r + 2, i] & 15) << 4 for h in (0, 1) for r in (0, 1) for i in range(32)
    ]
    high = [sum((q[h, r, i] >> 4) << 2 * r for r in range(4)) for h in (0, 1) for i in range(32)]
    return bytes(nibbles) + bytes(high) + scales.tobytes() + d.tobytes()


def reference_scale(x) -> tuple:
    """The scale of a group of 16, so that scale * (l - 32) is close to x with levels l in 0..63; and the
    levels, a list of int.

    Tries to make the weight largest in magnitude -32, and up to 0.9 steps more or less; for each the least
    squares with weights x**2 give scale = sum(w x l) / sum(w l l) and the gain sum(w x l)**2 / sum(w l l),
    the larger the better. From make_qx_quants in llama.cpp's ggml-quants.c.
    """
    largest = f32(0)
    for v in x:
        if abs(v) > abs(largest):
            largest = v
    if abs(largest) < EPS:
        return f32(0), [0] * 16
    scale = best = None
    for step in [0, *range(-9, 0), *range(1, 10)]:
        to_level = -(f32(32) + f32(0.1) * f32(step)) / largest
        tried = [min(31, max(-32, nearest(to_level * v))) for v in x]
        sum_xl = reference_sum(v * v * v * f32(q) for v, q in zip(x, tried, strict=True))
        sum_l2 = reference_sum(v * v * f32(q) * f32(q) for v, q in zip(x, tried, strict=True))
        if best is None or (sum_l2 > 0 and sum_xl * sum_xl > best * sum_l2):
            scale = sum_xl / sum_l2 if sum_l2 else f32(0)
            best, levels = scale * sum_xl, [q + 32 for q in tried]
    return scale, levels


# fast


def fast_q6_k(x: np.ndarray) -> np.ndarray:
    """(n, 256) float32 -> (n, 210) uint8; reference_q6_k explains it."""
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
    """reference_scale for the rows of x (N, 16): the scale, and in the place of the levels the to_level that
    gives them, each (N,).
    """
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


# back to weights


def weights_q6_k(blocks: np.ndarray) -> np.ndarray:
    """(n, 210) uint8 -> (n, 256) float32: d * scale * (q - 32)."""
    n = len(blocks)
    nibbles, high = blocks[:, :128].reshape(n, 2, 1, 2, 32), blocks[:, 128:192].reshape(n, 2, 1, 32)
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(n, 2, 4, 32)
    q |= (high >> np.array([0, 2, 4, 6], u8)[:, None] & 3) << 4
    scales, d = blocks[:, 192:208].view(np.int8), blocks[:, 208:].copy().view(np.float16).astype(f32)
    return ((d * scales)[:, :, None] * (q.reshape(n, 16, 16).astype(np.int8) - 32)).reshape(n, 256)

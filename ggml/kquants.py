"""GGML's Q4_K and Q5_K: 256 weights a block, scales that are quantised too, and a search for the scales and
mins that lose least.

For each a slow form, one block in float32 scalars, that explains the algorithm, and a fast one over many
blocks that gives the same bytes, which equal llama.cpp's own without an importance matrix
(ggml/src/ggml-quants.c, quantize_row_q4_K_ref): every sum runs from the first weight to the last in float32,
as it does there. A llama.cpp built with fused multiply-add for this file (arm64) may differ from both in a
last bit.

    Q4_K  144 bytes: d f16, dmin f16, 12 bytes of 6-bit scales and mins, 128 of nibbles                       weight = d * scale * q - dmin * min
    Q5_K  176 bytes: d f16, dmin f16, 12 bytes of 6-bit scales and mins, 32 of fifth bits, 128 of nibbles     weight = d * scale * q - dmin * min

Shapes: n blocks of 8 groups of 32 weights, N = 8 n groups. The fast form holds weights as (32, N): a sum over
the first axis is sequential, as the reference's, and takes N numbers at a time (along a row numpy would sum
in pairs, and round differently).
"""

import numpy as np

f32, u8 = np.float32, np.uint8
MAGIC = f32(1.5 * 2**23)  # float32 has steps of 1 there: adding it rounds to a whole number, halves to even
SEARCH = {
    "q4_k": (15, -1.0, 20),
    "q5_k": (31, -0.5, 15),
}  # the highest level, where the search begins, and how many steps of 0.1 it takes


def nearest(v):
    """Whole numbers nearest to v, halves to even; int32, or int for a scalar.

    Read off the low bits of v + MAGIC, as the reference does: past 2**22, for infinities and NaN the two must
    agree on nonsense as well.
    """
    bits = (np.asarray(v, f32) + MAGIC).view(np.int32)
    low = (bits & 0x7FFFFF) - 0x400000
    return int(low) if low.ndim == 0 else low


# slow


def reference_q45_k(x: np.ndarray, name: str) -> bytes:
    """One block of Q4_K or Q5_K from 256 float32 weights.

    Each group of 32 has a scale and a min, found by reference_scale_and_min; d and dmin make the largest of
    each 63, and the levels are rounded again, to what the rounded scales can say: q = round((x + dmin * min)
    / (d * scale)).
    """
    top = SEARCH[name][0]
    groups = x.reshape(8, 32)
    scales, mins, levels = zip(
        *(reference_scale_and_min(group, *SEARCH[name]) for group in groups), strict=True
    )
    largest_scale, largest_min = (
        max([f32(0), *(v for v in values if v > 0)]) for values in (scales, mins)
    )  # a NaN is not > 0
    to_scale, to_min = (f32(63) / v if v > 0 else f32(0) for v in (largest_scale, largest_min))
    scales = [min(63, nearest(to_scale * v) & 0xFF) for v in scales]
    mins = [min(63, nearest(to_min * v) & 0xFF) for v in mins]
    d, dmin = np.float16(largest_scale / f32(63)), np.float16(largest_min / f32(63))
    for g in range(8):
        step, offset = f32(d) * f32(scales[g]), f32(dmin) * f32(mins[g])
        if step != 0:  # else the levels stay what the search found; they are multiplied by 0
            levels[g][:] = [min(top, max(0, nearest((v + offset) / step))) for v in groups[g]]
    packed = d.tobytes() + dmin.tobytes() + reference_pack_scales(scales, mins)
    if name == "q5_k":  # bit g of byte i is the fifth bit of weight i of group g
        packed += bytes(sum((levels[g][i] >> 4) << g for g in range(8)) for i in range(32))
    # Groups share bytes in pairs: weight i of the even group in the low nibble, of the odd one in the high.
    return packed + bytes(
        levels[g][i] & 15 | (levels[g + 1][i] & 15) << 4 for g in (0, 2, 4, 6) for i in range(32)
    )


def reference_scale_and_min(x, top: int, first: float, steps: int) -> tuple:
    """The scale and min (>= 0) of a group, so that scale * l - min is close to x with levels l in 0..top; and
    the levels, a list of int.

    Tries several ways to round to levels; for each the scale and the min of least squares follow from a 2 x 2
    system, and the smallest error wins. An error counts by w = root mean square of x + |x|. From
    make_qkx2_quants in llama.cpp's ggml-quants.c.
    """
    mean = np.sqrt(reference_sum(v * v for v in x) / f32(32))
    w = [mean + abs(v) for v in x]
    sum_w, sum_x = reference_sum(w), reference_sum(a * v for a, v in zip(w, x, strict=True))
    low, high = (
        min(f32(0), *x),
        max(x),
    )  # the min of a group is never above 0: the file stores it negated, unsigned
    if high == low:
        return f32(0), -low, [0] * 32
    to_level = f32(top) / (high - low)
    scale = f32(1) / to_level
    levels = reference_levels(x, to_level, low, top)
    best = reference_error(x, w, levels, scale, low)
    for step in range(steps + 1):
        # The trap: low is that of the best fit so far, not the group's lowest weight, and moves the later
        # steps.
        to_level = (f32(first) + f32(0.1) * f32(step) + f32(top)) / (high - low)
        tried = reference_levels(x, to_level, low, top)
        sum_l = reference_sum(a * f32(q) for a, q in zip(w, tried, strict=True))
        sum_l2 = reference_sum(a * f32(q) * f32(q) for a, q in zip(w, tried, strict=True))
        sum_xl = reference_sum(a * f32(q) * v for a, q, v in zip(w, tried, x, strict=True))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if not determinant > 0:
            continue
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        if new_low > 0:
            new_low, new_scale = f32(0), sum_xl / sum_l2
        error = reference_error(x, w, tried, new_scale, new_low)
        if error < best:
            best, scale, low, levels = error, new_scale, new_low, tried
    return scale, -low, levels


def reference_sum(values):
    """The sum in float32, from the first to the last: Python's own sum() would start from an int, math.fsum
    would be too exact.
    """
    total = f32(0)
    for v in values:
        total = total + v
    return total


def reference_levels(x, to_level, low, top: int) -> list[int]:
    return [min(top, max(0, nearest(to_level * (v - low)))) for v in x]


def reference_error(x, w, levels, scale, low):
    off = [scale * f32(q) + low - v for q, v in zip(levels, x, strict=True)]
    return reference_sum(a * (o * o) for a, o in zip(w, off, strict=True))


def reference_pack_scales(scales: list[int], mins: list[int]) -> bytes:
    """Eight scales and eight mins of 6 bits in 12 bytes.

    Bytes 0-3 and 4-7 hold those of groups 0-3 in their low six bits, bytes 8-11 the low nibbles of groups
    4-7, scale below min; the two high bits of groups 4-7 lie on top of bytes 0-7.
    """
    first = [scales[g] | (scales[g + 4] >> 4) << 6 for g in range(4)] + [
        mins[g] | (mins[g + 4] >> 4) << 6 for g in range(4)
    ]
    return bytes(first + [scales[g] & 15 | (mins[g] & 15) << 4 for g in range(4, 8)])


# fast


def fast_q45_k(x: np.ndarray, name: str) -> np.ndarray:
    """(n, 256) float32 -> (n, 144) uint8 as Q4_K, or (n, 176) as Q5_K; reference_q45_k explains it."""
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
    """reference_scale_and_min for the columns of x (32, N): scale and min, and in the place of the levels the
    (to_level, low) that give them, each (N,).

    A flat column needs no case of its own: to_level is infinite, its inverse, the scale, 0, and infinity
    times 0 is a NaN, whose nearest is 0.
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
        best, scale, low = (
            np.where(better, error, best),
            np.where(better, new_scale, scale),
            np.where(better, new_low, low),
        )
    return scale, -low, *found


def fast_round(v: np.ndarray, low: int, high: int) -> None:
    """v = nearest(v) in low..high, in place and still float32: nearest() without the way through int32 and
    back.
    """
    v += MAGIC
    bits = v.view(np.int32)
    bits &= 0x7FFFFF
    np.clip(bits, 0x400000 + low, 0x400000 + high, out=bits)
    bits |= 0x4B000000  # MAGIC's exponent, whatever v's was
    v -= MAGIC


def fast_error(x, w, q, scale, low):
    """(N,) weighted square errors; overwrites q."""
    q *= scale
    q += low
    q -= x
    q *= q
    q *= w
    return q.sum(axis=0)


def fast_six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 8) scales or mins -> d (n, 1) float16 and uint8 (n, 8) in 0..63."""
    largest = values.max(axis=1, keepdims=True, initial=0, where=values > 0)  # past the NaN
    inverse = np.where(largest > 0, f32(63) / largest, f32(0))
    return (largest / f32(63)).astype(np.float16), np.minimum(nearest(inverse * values).astype(u8), u8(63))


def fast_pack_scales(scales: np.ndarray, mins: np.ndarray) -> np.ndarray:
    """Two (n, 8) uint8 -> (n, 12); reference_pack_scales draws the bytes."""
    first = [v[:, :4] | v[:, 4:] >> 4 << 6 for v in (scales, mins)]
    return np.concatenate([*first, scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4], axis=1)


# back to weights


def weights_q45_k(blocks: np.ndarray, name: str) -> np.ndarray:
    """(n, 144) or (n, 176) uint8 -> (n, 256) float32: d * scale * q - dmin * min."""
    n = len(blocks)
    d, dmin = (blocks[:, a : a + 2].copy().view(np.float16).astype(f32) for a in (0, 2))  # (n, 1)
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    mins = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    nibbles = blocks[:, -128:].reshape(n, 4, 1, 32)
    q = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(n, 8, 32)
    if name == "q5_k":
        q |= (
            np.unpackbits(blocks[:, 16:48].reshape(n, 1, 32, 1), axis=3, bitorder="little")[:, 0].transpose(
                0, 2, 1
            )
            << 4
        )
    return ((d * scales)[:, :, None] * q - (dmin * mins)[:, :, None]).reshape(n, 256)

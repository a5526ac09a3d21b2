"""The quantizers in the form that explains them: one block at a time, as in llama.cpp's ggml-quants.c.

ggml/quantize.py and ggml/kquants.py do the same for many blocks at once and give the same bytes.
"""

import math

import numpy as np

from ggml.blocks import TYPES
from ggml.kquants import EPS, SEARCH, nearest
from ggml.quantize import HALF

f32 = np.float32


def reference_quantize_block(values: np.ndarray, name: str) -> bytes:
    """Returns the bytes of one block of (block_size,) float32 weights."""
    values = np.asarray(values, np.float32)
    assert values.shape == (TYPES[name].block_size,), (values.shape, name)
    with np.errstate(all="ignore"):
        if name == "q8_0":
            return reference_q8_0(values)
        if name == "q5_1":
            return reference_q5_1(values)
        if name in ("q4_0", "q5_0"):
            return reference_q45_0(values, name)
        return reference_q6_k(values) if name == "q6_k" else reference_q45_k(values, name)


def reference_q8_0(x: np.ndarray) -> bytes:
    """Returns one block of Q8_0 from 32 float32 weights.

    d maps the largest magnitude to 127; q = x / d, rounded with halves away from 0.
    """
    d = max(abs(v) for v in x) / f32(127)
    inverse = f32(1) / d if d else f32(0)
    q = [
        reference_floor(float(abs(v) * inverse) + 0.5) * (-1 if v < 0 else 1) for v in x
    ]  # + 0.5 in float64, where the sum is exact
    return np.float16(d).tobytes() + np.array(q, np.int8).tobytes()


def reference_q45_0(x: np.ndarray, name: str) -> bytes:
    """Returns one block of Q4_0 or Q5_0 from 32 float32 weights: q = floor(x / d + half + 0.5), half 8 or 16.

    d, which may be negative, maps the weight of the largest magnitude to -half, which has the largest
    magnitude of the levels -half..half - 1.
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
    """Returns one block of Q5_1 from 32 float32 weights: q = floor((x - m) / d + 0.5).

    The lowest weight is m and has level 0; the highest has level 31.
    """
    low, high = min(x), max(x)
    d = (high - low) / f32(31)
    inverse = f32(1) / d if d else f32(0)
    q = [reference_floor((v - low) * inverse + f32(0.5)) for v in x]
    return np.float16(d).tobytes() + np.float16(low).tobytes() + reference_pack(q, "q5_1")


def reference_floor(v) -> int:
    """Returns floor(v), or 0 if v is not finite.

    1 / d is infinite for d below 2**-128, which is 0 in float16, so the levels do not matter then.
    """
    return math.floor(v) if math.isfinite(v) else 0


def reference_pack(q: list[int], name: str) -> bytes:
    fifth = (
        b"" if name == "q4_0" else sum((level >> 4) << i for i, level in enumerate(q)).to_bytes(4, "little")
    )
    return fifth + bytes(q[i] & 15 | (q[i + 16] & 15) << 4 for i in range(16))


def reference_q45_k(x: np.ndarray, name: str) -> bytes:
    """Returns one block of Q4_K or Q5_K from 256 float32 weights.

    reference_scale_and_min finds a scale and a min for each group of 32. d and dmin map the largest scale and
    the largest min to 63. The levels are then computed again with the rounded scales and mins:
    q = round((x + dmin * min) / (d * scale)).
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
    """Returns a group's scale, min (>= 0) and levels l in 0..top, so that scale * l - min is close to x.

    It tries several ways to round to levels. For each, a 2 x 2 system gives the scale and the min with the
    least squared error, where each weight counts with w = root mean square of x + |x|. The smallest error
    wins. Source: make_qkx2_quants in llama.cpp's ggml-quants.c.
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
    """Returns the float32 sum from the first to the last value, as ggml adds; math.fsum is more exact."""
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
    """Returns eight scales and eight mins of 6 bits as 12 bytes.

    The low six bits of bytes 0-3 are the scales of groups 0-3, those of bytes 4-7 their mins. Bytes 8-11 hold
    the low four bits of groups 4-7, the scale in the low half and the min in the high half. The two high bits
    of groups 4-7 are the two high bits of bytes 0-7.
    """
    first = [scales[g] | (scales[g + 4] >> 4) << 6 for g in range(4)] + [
        mins[g] | (mins[g + 4] >> 4) << 6 for g in range(4)
    ]
    return bytes(first + [scales[g] & 15 | (mins[g] & 15) << 4 for g in range(4, 8)])


def reference_q6_k(x: np.ndarray) -> bytes:
    """Returns one block of Q6_K from 256 float32 weights.

    reference_scale finds a scale for each group of 16. d maps the scale of the largest magnitude to -128, and
    q = round(x / (d * scale)) + 32, in 0..63.
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
        # Two halves of four runs: nibbles of runs 0 and 2 share bytes, then 1 and 3; a byte holds the high
        # bits of all four.
    )
    nibbles = [
        q[h, r, i] & 15 | (q[h, r + 2, i] & 15) << 4 for h in (0, 1) for r in (0, 1) for i in range(32)
    ]
    high = [sum((q[h, r, i] >> 4) << 2 * r for r in range(4)) for h in (0, 1) for i in range(32)]
    return bytes(nibbles) + bytes(high) + scales.tobytes() + d.tobytes()


def reference_scale(x) -> tuple:
    """Returns a group's scale and levels l in 0..63, so that scale * (l - 32) is close to x.

    It tries to map the weight of the largest magnitude to -32, and to up to 0.9 steps more or less. For each,
    least squares with weights w = x**2 give scale = sum(w x l) / sum(w l l). The largest gain
    sum(w x l)**2 / sum(w l l) wins. Source: make_qx_quants in llama.cpp's ggml-quants.c.
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

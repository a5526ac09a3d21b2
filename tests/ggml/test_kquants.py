"""ggml/kquants.py: a block of Q4_K and Q5_K by hand, and the fast form equal to the one that explains it."""

import functools

import numpy as np
import pytest

from ggml.kquants import fast_q45_k, nearest, reference_q45_k, reference_sum
from ggml.quantize import dequantize, quantize, reference_quantize_block
from tests.ggml.ggml import ROWS, assert_slow_equals_fast

SCALES, MINS = [63, 32, 16, 8, 4, 2, 1, 33], [0, 1, 2, 3, 63, 16, 0, 33]
# The largest scale and the largest min are 63, so d = dmin = 1 (float16 3c00). Then the scales and mins of
# groups 0-3, with the upper two bits of groups 4-7 on top (2 = 33 >> 4 of the scales; 3, 1, 0, 2 of the
# mins), then the lower four bits of groups 4-7, the min's in the high half.
HEAD = bytes.fromhex("003c 003c") + bytes(
    [63, 32, 16, 2 << 6 | 8, 3 << 6 | 0, 1 << 6 | 1, 2, 2 << 6 | 3, 0xF4, 0x02, 0x01, 0x11]
)


def block_by_hand(n_levels: int) -> np.ndarray:
    """Group g counts up from level 0 if g is even and down to it if g is odd: weight = scale * level - min,
    which the search cannot improve.
    """
    up = np.arange(32) % n_levels
    levels = np.array([up if g % 2 == 0 else up[::-1] for g in range(8)])
    return (np.array(SCALES)[:, None] * levels - np.array(MINS)[:, None]).astype(np.float32).reshape(1, 256)


def test_a_q4_k_block_by_hand_has_these_bytes_and_comes_back():
    # Weight i of an even group has level i % 16, in the low half of byte i; that of the odd group beside it
    # 15 - i % 16, in the high half.
    pair = bytes.fromhex("f0 e1 d2 c3 b4 a5 96 87 78 69 5a 4b 3c 2d 1e 0f") * 2
    x = block_by_hand(16)
    assert reference_quantize_block(x[0], "q4_k") == HEAD + pair * 4
    assert quantize(x, "q4_k").tobytes() == HEAD + pair * 4
    assert (dequantize(quantize(x, "q4_k"), "q4_k") == x).all()


def test_a_q5_k_block_by_hand_has_these_bytes_and_comes_back():
    # Levels 0..31 up and 31..0 down: below weight 16 the odd groups have the fifth bit (bits 1, 3, 5, 7),
    # from there on the even ones.
    fifth = b"\xaa" * 16 + b"\x55" * 16
    pair = bytes.fromhex("f0 e1 d2 c3 b4 a5 96 87 78 69 5a 4b 3c 2d 1e 0f") * 2
    x = block_by_hand(32)
    assert reference_quantize_block(x[0], "q5_k") == HEAD + fifth + pair * 4
    assert quantize(x, "q5_k").tobytes() == HEAD + fifth + pair * 4
    assert (dequantize(quantize(x, "q5_k"), "q5_k") == x).all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_the_fast_form_equals_the_reference_byte_for_byte(name, kind):
    assert_slow_equals_fast(
        functools.partial(reference_q45_k, name=name),
        functools.partial(fast_q45_k, name=name),
        256,
        kind,
        n=3,
    )


@pytest.mark.parametrize("n", [1, 2, 3, 33])
def test_a_sum_over_the_first_axis_runs_from_the_first_weight_to_the_last(n):
    x = np.random.default_rng(n).standard_normal((32, 8 * n)).astype(np.float32)
    assert x.sum(axis=0).tolist() == [float(reference_sum(column)) for column in x.T]
    assert any(
        float(column.sum()) != float(reference_sum(column)) for column in np.ascontiguousarray(x.T)
    )  # numpy's other order, which would not do


def test_nearest_rounds_halves_to_even():
    assert nearest(np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.4, -3.6], np.float32)).tolist() == [
        -2,
        -2,
        0,
        0,
        2,
        2,
        3,
        -4,
    ]
    assert nearest(np.float32(62.5)) == 62

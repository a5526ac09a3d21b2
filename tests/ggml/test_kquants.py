"""ggml/kquants.py: a block of Q4_K, Q5_K and Q6_K by hand, and the fast forms equal to the references."""

import functools

import numpy as np
import pytest

from ggml.kquants import fast_q6_k, fast_q45_k, fast_scale, nearest
from ggml.quantize import quantize
from tests.ggml.ggml import ROWS, assert_reference_equals_fast, back
from tests.ggml.reference_quantizers import (
    reference_q6_k,
    reference_q45_k,
    reference_quantize_block,
    reference_scale,
    reference_sum,
)

SCALES, MINS = [63, 32, 16, 8, 4, 2, 1, 33], [0, 1, 2, 3, 63, 16, 0, 33]
# The largest scale and the largest min are 63, so d = dmin = 1 (float16 3c00). Then the scales and mins of
# groups 0-3, with the upper two bits of groups 4-7 on top (2 = 33 >> 4 of the scales; 3, 1, 0, 2 of the
# mins), then the lower four bits of groups 4-7, the min's in the high half.
HEAD = bytes.fromhex("003c 003c") + bytes(
    [63, 32, 16, 2 << 6 | 8, 3 << 6 | 0, 1 << 6 | 1, 2, 2 << 6 | 3, 0xF4, 0x02, 0x01, 0x11]
)


def block_by_hand(n_levels: int) -> np.ndarray:
    """Returns weights = scale * level - min that the search cannot improve.

    The levels of a group count up from 0 if its index is even, and down to 0 if it is odd.
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
    assert (back(quantize(x, "q4_k"), "q4_k") == x).all()


def test_a_q5_k_block_by_hand_has_these_bytes_and_comes_back():
    # Levels 0..31 up and 31..0 down: below weight 16 the odd groups have the fifth bit (bits 1, 3, 5, 7),
    # from there on the even ones.
    fifth = b"\xaa" * 16 + b"\x55" * 16
    pair = bytes.fromhex("f0 e1 d2 c3 b4 a5 96 87 78 69 5a 4b 3c 2d 1e 0f") * 2
    x = block_by_hand(32)
    assert reference_quantize_block(x[0], "q5_k") == HEAD + fifth + pair * 4
    assert quantize(x, "q5_k").tobytes() == HEAD + fifth + pair * 4
    assert (back(quantize(x, "q5_k"), "q5_k") == x).all()


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["q4_k", "q5_k"])
def test_the_fast_form_equals_the_reference_byte_for_byte(name, kind):
    assert_reference_equals_fast(
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


# Q6_K


def test_a_q6_k_block_by_hand_has_these_bytes_and_comes_back():
    # A half block is four runs of two groups of 16. The groups count -32, -28, .. 28, those of the third run
    # backwards; group 0 in twos, and the signs of the odd groups turned. The scale largest in magnitude, 2,
    # becomes -128, so d = 2 / -128 = -1/64 (float16 a400), and the scales 1 and -1 become -64 and 64. The
    # level over -32 is 0, 4, .. 60, or 60, 56, .. 0.
    up = np.arange(-32, 32, 4)
    runs = np.array([up, up, up, up, up[::-1], up[::-1], up, up] * 2)
    x = (runs * np.array([2, -1, *[1, -1] * 7])[:, None]).astype(np.float32).reshape(1, 256)
    # The low four bits are 0, 4, 8, c over and over, in the third run c, 8, 4, 0: bytes of runs 0 and 2, then
    # of runs 1 and 3.
    nibbles = bytes.fromhex("c0 84 48 0c") * 8 + bytes.fromhex("00 44 88 cc") * 8
    # The high two bits are 0 four times, 1 four times, 2, 3, in the third run 3, 2, 1, 0; of the four runs
    # from the lowest bit up.
    high = bytes([0b00_11_00_00] * 4 + [0b01_10_01_01] * 4 + [0b10_01_10_10] * 4 + [0b11_00_11_11] * 4) * 2
    scales = np.array([-128, 64, *[-64, 64] * 7], np.int8).tobytes()
    expected = nibbles * 2 + high * 2 + scales + bytes.fromhex("00a4")
    assert reference_quantize_block(x[0], "q6_k") == expected
    assert quantize(x, "q6_k").tobytes() == expected
    assert (back(quantize(x, "q6_k"), "q6_k") == x).all()


@pytest.mark.parametrize("kind", ROWS)
def test_the_fast_form_equals_the_reference_byte_for_byte_in_q6_k(kind):
    assert_reference_equals_fast(reference_q6_k, fast_q6_k, 256, kind, n=3)


def test_the_search_tries_up_to_nine_tenths_of_a_step_more_or_less_and_finds_the_references_scales():
    groups = np.random.default_rng(0).standard_normal((240, 16)).astype(np.float32)
    scales, to_level = fast_scale(groups)
    assert [reference_scale(group)[0] for group in groups] == scales.tolist()
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    tenths = np.rint(10 * (-to_level * largest - 32))
    assert (tenths.min(), tenths.max()) == (-9, 9)  # both ends won somewhere

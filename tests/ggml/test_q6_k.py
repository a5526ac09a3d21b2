"""ggml/q6_k.py: a block by hand, and the fast form equal to the one that explains it."""

import numpy as np
import pytest

from ggml.q6_k import fast_q6_k, fast_scale, reference_q6_k, reference_scale
from ggml.quantize import dequantize, quantize, reference_quantize_block
from tests.ggml.ggml import ROWS, assert_slow_equals_fast


def test_a_block_by_hand_has_these_bytes_and_comes_back():
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
    assert (dequantize(quantize(x, "q6_k"), "q6_k") == x).all()


@pytest.mark.parametrize("kind", ROWS)
def test_the_fast_form_equals_the_reference_byte_for_byte(kind):
    assert_slow_equals_fast(reference_q6_k, fast_q6_k, 256, kind, n=3)


def test_the_search_tries_up_to_nine_tenths_of_a_step_more_or_less_and_finds_the_references_scales():
    groups = np.random.default_rng(0).standard_normal((240, 16)).astype(np.float32)
    scales, to_level = fast_scale(groups)
    assert [reference_scale(group)[0] for group in groups] == scales.tolist()
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)[:, 0]
    tenths = np.rint(10 * (-to_level * largest - 32))
    assert (tenths.min(), tenths.max()) == (-9, 9)  # both ends won somewhere

"""ggml/blocks.py: a block of each type by hand, and quantizers equal to the reference."""

import functools

import numpy as np
import pytest

from ggml.blocks import TYPES
from ggml.quantize import fast_q5_1, fast_q8_0, fast_q45_0, quantize
from tests.ggml.ggml import ROWS, assert_reference_equals_fast, back
from tests.ggml.reference_quantizers import (
    reference_q5_1,
    reference_q8_0,
    reference_q45_0,
    reference_quantize_block,
)

BY_HAND = {
    # d = 127 / 127 = 1 (float16 3c00); 63.5 and -0.5 are halves, rounded away from 0; 0.49999997 is none
    "q8_0": ([127, -127, 63.5, -0.5, 0.49999997, 3, *[0] * 26], "003c" + "7f 81 40 ff 00 03" + "00" * 26),
    # weight i is i - 8 in the first half, and 7 - i in the second: d = -8 / -8 = 1, the levels are i and 15 -
    # i, those of the second half on top
    "q4_0": ([*range(-8, 8), *range(7, -9, -1)], "003c" + "f0 e1 d2 c3 b4 a5 96 87 78 69 5a 4b 3c 2d 1e 0f"),
    # 16 is the largest: d = 16 / -16 = -1 (float16 bc00); the levels are 0, 1, .. 31, and the upper 16 have
    # the fifth bit
    "q5_0": ([*range(16, -16, -1)], "00bc" + "0000ffff" + "00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff"),
    # m = 3 (4200) is level 0, 65 is level 31: d = 62 / 31 = 2 (4000)
    "q5_1": (
        [*range(3, 67, 2)],
        "0040" + "0042" + "0000ffff" + "00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff",
    ),
}
DECODED = {"q8_0": [127, -127, 64, -1, 0, 3, *[0] * 26]}  # the other blocks come back as they were


@pytest.mark.parametrize("name", BY_HAND)
def test_a_block_by_hand_has_these_bytes_and_comes_back(name):
    weights, expected = BY_HAND[name]
    row = np.array([weights], np.float32)
    assert reference_quantize_block(row[0], name) == bytes.fromhex(expected)
    assert quantize(row, name).tobytes() == bytes.fromhex(expected)
    assert back(quantize(row, name), name).tolist() == [DECODED.get(name, weights)]


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_fast_form_equals_the_reference_byte_for_byte(name, kind):
    slow = {"q8_0": reference_q8_0, "q5_1": reference_q5_1}.get(name) or functools.partial(
        reference_q45_0, name=name
    )
    fast = {"q8_0": fast_q8_0, "q5_1": fast_q5_1}.get(name) or functools.partial(fast_q45_0, name=name)
    assert_reference_equals_fast(slow, fast, 32, kind, n=24)


@pytest.mark.parametrize("name", BY_HAND)
def test_quantising_what_was_dequantised_changes_nothing(name):
    data = quantize(np.random.default_rng(0).standard_normal((50, 512)).astype(np.float32), name)
    assert (quantize(back(data, name), name) == data).all()


@pytest.mark.parametrize(("name", "steps"), [("q8_0", 0.5), ("q4_0", 1), ("q5_0", 1), ("q5_1", 0.5)])
def test_an_error_is_at_most_half_a_step_or_one_where_the_highest_level_is_cut_off(name, steps):
    rows = np.random.default_rng(1).standard_normal((200, 32)).astype(np.float32)
    data = quantize(rows, name)
    step = np.abs(data[:, :2].copy().view(np.float16).astype(np.float32))
    levels = 2 ** (
        TYPES[name].block_bytes // 4
    )  # 256, 16, 32, 64: a float16 d is off by up to 2**-11 of itself, and so is every level
    error = np.abs(back(data, name) - rows)
    assert (error <= step * (steps + levels * 2**-11) + 2**-11 * np.abs(rows)).all()
    assert (error > 0.4 * steps * step).any()


def test_a_q2_k_block_by_hand_is_scale_times_q_minus_min():
    # Group g of 16 weights has the scale g and the min 15 - g, in the low and the high half of its byte. Each
    # byte of q is 3 2 1 0 from its high bits down, so group g has the q of g // 2 % 4. d = 1 and dmin = 2.
    scales = bytes(g | (15 - g) << 4 for g in range(16))
    block = scales + bytes([0b11100100]) * 64 + bytes.fromhex("003c 0040")
    expected = [g * (g // 2 % 4) - 2 * (15 - g) for g in range(16) for _ in range(16)]
    assert back(np.frombuffer(block, np.uint8)[None].copy(), "q2_k").tolist() == [expected]


def test_a_q3_k_block_by_hand_is_scale_times_q_minus_four():
    # The third bits 4 to 7 are set, so groups 8 to 15 of 16 weights have q + 4. The scales are 24 to 39,
    # which stand for -8 to 7: bytes 0 to 7 hold their low 4 bits, the next 4 the high 2 bits 1 1 2 2. d = 2.
    scales = bytes.fromhex("08 19 2a 3b 4c 5d 6e 7f a5 a5 a5 a5")
    block = b"\xf0" * 32 + bytes([0b11100100]) * 64 + scales + bytes.fromhex("0040")
    expected = [2 * (g - 8) * (g // 2 % 4 + 4 * (g >= 8) - 4) for g in range(16) for _ in range(16)]
    assert back(np.frombuffer(block, np.uint8)[None].copy(), "q3_k").tolist() == [expected]

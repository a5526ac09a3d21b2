"""tasks/text.py: perplexity and bits per byte by hand."""

import math

import pytest

from tasks.text import score_loss


def test_a_model_that_picks_among_eight_tokens_of_two_bytes_has_three_bits_a_token():
    found = score_loss(loss=math.log(8), tokens=10, text_bytes=20)
    assert found == {"perplexity": pytest.approx(8), "bits_per_byte": pytest.approx(3 * 10 / 20)}


def test_a_loss_that_no_float_can_raise_e_to_and_a_text_without_bytes_are_numbers_still():
    assert math.isfinite(score_loss(1e6, 1, 0)["perplexity"])
    assert math.isnan(score_loss(math.nan, 1, 1)["perplexity"])

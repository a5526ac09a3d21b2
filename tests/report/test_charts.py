"""report/charts.py: scales, ticks and averages by hand, and values that no drawing may break on."""

import math
import re

import pytest

from report.charts import Frame, curves, frame_of, polyline, smooth, thin, ticks
from tests.report.pages import Page


def test_curve_points_are_per_cent_of_the_plot():
    frame, rows = frame_of([(0, 4.0), (5, 1.0), (10, 0.0)], may_log=False)
    assert rows == [0, 1, 2, 3, 4]
    assert polyline([(0, 4.0), (5, 1.0), (10, 0.0)], frame) == "0.00,0.00 50.00,75.00 100.00,100.00"
    assert polyline([(10, 2.0)], frame) == "100.00,50.00 100.00,50.00"


def test_a_loss_over_decades_is_drawn_on_a_log_scale():
    frame, rows = frame_of([(0, 10.0), (1, 1.0), (2, 0.1)], may_log=True)
    assert frame == Frame(0, 2, 0.1, 10.0, log=True) and rows == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])
    assert polyline([(0, 10.0), (1, 1.0), (2, 0.1)], frame) == "0.00,0.00 50.00,50.00 100.00,100.00"


def test_ticks_are_round_and_enclose_the_values():
    assert ticks(0, 5e-5) == pytest.approx([0, 2e-5, 4e-5, 6e-5])
    assert ticks(2.1, 2.9) == pytest.approx([2, 2.2, 2.4, 2.6, 2.8, 3])


def test_the_moving_average_is_unbiased_from_its_first_value():
    assert smooth([(1, 1.0), (2, None), (3, 3.0)], beta=0.5) == [
        (1, 1.0),
        (3, pytest.approx((0.25 + 1.5) / 0.75)),
    ]


def test_long_runs_are_thinned_to_means():
    assert thin([(1, 1.0), (2, 3.0), (3, 5.0)], most=2) == [(2, 2.0), (3, 5.0)]


LOSSES = ([], [math.nan], ["nan", "inf"], [2.0], [0.0, 0.0], [1, math.nan, 3, 1e30], [-1.0, -2.0])


@pytest.mark.parametrize("losses", LOSSES)
def test_no_loss_breaks_the_drawing(losses):
    drawn = curves(
        [{"step": s, "loss": v} for s, v in enumerate(losses)], [{"step": 0, "eval": {"loss": "nan"}}]
    )
    assert not re.search(r"nan|inf|e\+", "".join(re.findall(r'(?:points|cx|cy|x|y1?)="([^"]*)"', drawn)))
    assert ("<polyline" in drawn) == any(math.isfinite(float(v)) for v in losses)
    Page(drawn)


def test_a_spike_leaves_the_frame_and_is_told():
    steps = [
        {"step": s, "loss": 1.0 if s != 50 else -1.0, "grad_norm": 500.0 if s == 70 else 1.0}
        for s in range(100)
    ]
    drawn = curves([*steps, {"step": 100, "loss": math.nan}], [])
    assert "1 above the frame" in drawn and "1 without a finite value (the first is step 100)" in drawn


def test_the_loss_chart_of_a_run_with_rewards_has_the_gold_responses_only():
    """The two training losses are of other things: of pairs in DPO, and of nothing readable in GRPO."""
    evals = [{"step": n, "eval": {"set": "val", "loss": 1.0 + n}} for n in (1, 2)]
    steps = [{"step": n, "loss": 0.01 * n, "learning_rate": 1.0, "grad_norm": 1.0} for n in (1, 2)]
    plain = curves(steps, evals)
    assert "nats per token" in plain and "training, each step" in plain.partition("</figure>")[0]
    pairs = curves([record | {"rewards/margins": 0.5} for record in steps], evals)
    assert "nats per pair" in pairs
    scored = curves([record | {"reward": 0.5} for record in steps], evals).partition("</figure>")[0]
    assert "gold responses" in scored and "training, each step" not in scored

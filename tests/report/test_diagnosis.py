"""report/diagnosis.py: each warning on curves made for it, and none on curves of runs that went well."""

import math
import random

import pytest

from report.diagnosis import Kept, diagnose, jumped, turned

# The 60 steps of: train.py --config small.toml --set train.max_steps=60 --set train.eval_every=10
SMALL = [1.42, 1.822, 1.668, 1.094, 0.897, 0.984, 0.789, 0.795, 0.739, 0.684, 0.594, 0.308, 0.425, 0.257]
SMALL += [0.333, 0.32, 0.183, 0.249, 0.312, 0.215, 0.313, 0.165, 0.135, 0.192, 0.157, 0.134, 0.124, 0.143]
SMALL += [0.109, 0.131, 0.149, 0.072, 0.133, 0.101, 0.13, 0.133, 0.086, 0.182, 0.093, 0.097, 0.125, 0.1, 0.15]
SMALL += [0.097, 0.079, 0.117, 0.188, 0.091, 0.105, 0.08, 0.093, 0.06, 0.106, 0.245, 0.083, 0.089, 0.112]
SMALL += [0.071, 0.171, 0.105]
SMALL_EVALS = {10: 0.5216, 20: 0.1683, 30: 0.1173, 40: 0.0925, 50: 0.0853, 60: 0.0819}


def falling(count: int = 100, noise: float = 0.1, start: float = 3.0, end: float = 1.0, seed: int = 0):
    """Losses that fall from start to end, with relative noise between the steps."""
    rng = random.Random(seed)
    curve = [end + (start - end) * math.exp(-5 * n / count) for n in range(count)]
    return [value * (1 + noise * rng.gauss(0, 1)) for value in curve]


def said(losses, evals=None, before=None, kept=None, **more):
    """(findings, warnings) as two texts."""
    steps = [{"step": n, "loss": v, "learning_rate": 2e-3, **more} for n, v in enumerate(losses, 1)]
    records = [{"step": s, "eval": {"set": "val", "loss": v}} for s, v in (evals or {}).items()]
    found = diagnose(steps, records, kept, before)
    return " ".join(found.findings), found.warnings


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("count", "noise"), [(25, 0.05), (100, 0.1), (100, 0.3), (2000, 0.2)])
def test_noise_raises_no_alarm(seed, count, noise):
    assert said(falling(count, noise, seed=seed))[1] == []


def test_the_small_recipe_raises_no_alarm_and_is_described():
    findings, warnings = said(SMALL, SMALL_EVALS, {"loss": 1.506}, Kept(60))
    assert warnings == []
    assert "lowest at the last evaluation, 0.0819" in findings
    assert "kept the weights of its last step, 60, the best of 6 by validation loss" in findings


def test_a_few_hard_batches_are_no_jump():
    losses = falling()
    for at in (20, 50, 51, 80):
        losses[at] *= 5
    assert jumped(list(enumerate(losses, 1))) is None and said(losses)[1] == []


JUMPS = {
    "diverges": falling(50) + [1.5 + 0.1 * n for n in range(50)],
    "climbs from the first step": [1.4, 5.0, 7.0, 6.5, 6.2] + [6.0] * 30,
    "plateau": falling(40) + [4.0 + 0.2 * (n % 3) for n in range(60)],
    "comes back": falling(40) + [6.0, 5.5, 5.0, 4.5, 4.0, 3.5] + falling(40),
}


@pytest.mark.parametrize("losses", JUMPS.values(), ids=JUMPS)
def test_a_loss_that_jumps_up_asks_for_a_lower_learning_rate(losses):
    _, [warning] = said(losses)
    assert "learning rate may be too high" in warning
    assert "lower train.learning_rate" in warning and "0.002" in warning


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_loss_that_does_not_move_asks_for_a_higher_learning_rate(noise):
    rng = random.Random(1)
    losses = [2.3 * (1 + noise * rng.gauss(0, 1)) for _ in range(100)]
    _, [warning] = said(losses, {50: 2.31, 100: 2.3}, {"loss": 2.31})
    assert "learning rate may be too low" in warning and "raise train.learning_rate" in warning


def test_a_validation_loss_that_moves_is_movement():
    """Each step has other rows: the training loss of a run may hide in noise what validation shows."""
    assert said([2.3] * 100, {100: 2.1}, {"loss": 2.3})[1] == []


def test_a_long_run_that_learns_in_its_first_steps_has_moved():
    assert said([3.0, 2.0, 1.5, 1.2, 1.1] + [1.0] * 500)[1] == []


OVERFITTED = {10: 1.9, 20: 1.2, 30: 1.0, 40: 1.15, 50: 1.4}


def test_memorising_is_told_with_the_step_where_validation_turned():
    losses = [3 * math.exp(-n / 12) for n in range(50)]
    findings, [warning] = said(losses, OVERFITTED, kept=Kept(30, "loss", stopped_early=True))
    assert "memorises" in warning and "since step 30" in warning and "train.max_steps" in warning
    assert "lowest at step 30 (1) and rose to 1.4 by step 50" in findings
    assert (
        "kept the weights of step 30 of 50" in findings
        and "Early stopping ended the run at step 50" in findings
    )
    assert "a gap of +1.281" in findings


def test_a_rise_without_a_gap_is_no_memorising():
    """The training loss is as high: the two are of different rows, and nothing was learnt by heart."""
    findings, warnings = said(falling(50, 0.02, 2.0, 1.0), OVERFITTED)
    assert warnings == [] and "rose to 1.4" in findings


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([3, 2, 1], None),
        ([3, 1, 1.01], None),
        ([3, 1, 1.05], 2),
        ([1, 2, 3], 1),
        ([2, 1, 3, 1.5], 2),
        ([], None),
    ],
)
def test_validation_has_turned_if_it_is_two_per_cent_above_its_lowest(losses, step):
    assert turned(list(enumerate(losses, 1))) == step


def test_short_runs_and_the_losses_of_runs_with_rewards_are_not_judged():
    assert said([1.0] * 19)[1] == []
    assert said([0.01] * 100, reward=0.5)[1] == []
    findings, _ = said([0.0] * 30, {10: 11.7, 30: 11.77}, reward=0.5)
    assert "level after it" in findings and "gap" not in findings


def test_completions_that_teach_nothing_are_told_with_the_remedy():
    usual = {"reward": 0.5, "frac_reward_zero_std": 0.8, "completions/clipped_ratio": 0.4}
    assert said([0.01] * 30, **usual)[1] == []
    assert said([0.01] * 19, **usual | {"frac_reward_zero_std": 1})[1] == []
    _, [alike] = said([0.01] * 30, **usual | {"frac_reward_zero_std": 0.97})
    assert "97% of the groups" in alike and "grpo.rewards" in alike and "grpo.num_generations" in alike
    _, [cut] = said([0.0] * 30, **usual | {"completions/clipped_ratio": 1.0})
    assert "100% reached" in cut and "raise grpo.max_completion_length" in cut


def test_a_run_without_validation_and_values_that_are_not_finite_break_nothing():
    assert said(["nan", *falling()]) == ("", [])
    assert said([], {1: "nan"}, {"loss": "nan"}) == ("", [])
    findings, _ = said(falling(), {100: 1.0}, kept=Kept(100))
    assert "train.eval_every" in findings and "of its last step, 100." in findings

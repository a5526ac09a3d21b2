"""Reads what the losses of a run say: where it turned, what it kept, and warnings with their remedies.

Each threshold is documented beside its value. No warning concerns the loss of a run with rewards (GRPO),
whose loss is near zero whatever the model learns; of such a run, warnings say that its completions teach it
little.
"""

import math
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

from report.charts import Point, eval_losses, has_rewards, series, smooth
from report.metrics_log import number

# Runs of fewer steps are not judged: their losses are mostly noise.
MIN_STEPS = 20
# The learning rate is too high if the median of 9 losses in a row exceeds the lowest one before by more than
# this share of the first loss, and by more than this many standard deviations of the noise between steps.
WINDOW, JUMP_SHARE, JUMP_NOISE = 9, 0.25, 3.0
# It is too low if the training loss changes by less than this share from the first steps to the last quarter,
# and the validation loss by less than this share from before training to after it.
STILL_TRAIN, STILL_VALIDATION = 0.05, 0.02
# The validation loss has turned if the last evaluation is above the lowest one by more than this share.
TURNED = 0.02
# The model memorises if it has turned by more than this share, and the training loss is below this share of
# the validation loss.
RISEN, FAR_UNDER = 0.05, 0.7
# Of a run with rewards: too many groups of completions have one reward, or too many completions are cut, if
# the mean share over all steps is above this.
MOST_ALIKE, MOST_CUT = 0.9, 0.5


class Kept(NamedTuple):
    """The step whose weights a run kept, the metric that selected it, and whether early stopping ended it."""

    step: int
    metric: str = "loss"
    stopped_early: bool = False


class Diagnosis(NamedTuple):
    """Sentences about a run; those in `warnings` name a remedy."""

    findings: list[str]
    warnings: list[str]


def diagnose(
    steps: list[dict], evals: list[dict], kept: Kept | None = None, before: dict | None = None
) -> Diagnosis:
    """Returns the findings and warnings of a run.

    Args:
        steps, evals: the training and evaluation records, as read_metrics returns them.
        kept: the weights that the run kept, if it is known.
        before: measures of the first validation set before training.
    """
    train = [] if has_rewards(steps) else series(steps, "loss")
    validation = first_set(evals)
    findings = _findings(steps, train, validation, kept)
    losses = [value for _, value in train if value is not None]
    if len(losses) < MIN_STEPS:
        return Diagnosis(findings, _completion_warnings(steps))
    lr = max((number(record.get("learning_rate")) or 0 for record in steps), default=0)
    first = number((before or {}).get("loss"))
    jump = jumped(train)
    warnings = []
    if jump is not None:
        warnings.append(
            f"The learning rate may be too high: the training loss jumps up before step {jump:,}; lower "
            f"train.learning_rate (the highest was {lr:.3g}), to a third for a start, or raise "
            "train.warmup_steps."
        )
    elif still(losses) and (first is None or not validation or _level(first, validation[-1][1])):
        warnings.append(
            f"The learning rate may be too low: the loss hardly moves ({fmean(losses[:5]):.4g} in the first "
            f"steps, {fmean(losses[-5:]):.4g} in the last); raise train.learning_rate (the highest was "
            f"{lr:.3g}), threefold for a start, or train longer."
        )
    if (turn := turned(validation)) and memorises(train, validation):
        warnings.append(
            f"The model memorises its training rows: the validation loss rises since step {turn:,}, and the "
            f"training loss is far below it; train for about {turn:,} steps (train.max_steps), set "
            "train.early_stopping_patience, or add rows."
        )
    return Diagnosis(findings, warnings)


def first_set(evals: list[dict]) -> list[Point]:
    """Returns the finite losses of the validation set that is evaluated during training."""
    points = next(iter(eval_losses(evals).values()), [])
    return [(step, value) for step, value in points if value is not None]


def turned(validation: list[Point]) -> int | None:
    """Returns the step of the lowest validation loss, None if the loss has not risen since."""
    if not validation:
        return None
    lowest, last = min(validation, key=lambda point: point[1]), validation[-1]
    return lowest[0] if last[1] > (1 + TURNED) * lowest[1] else None


def memorises(train: list[tuple[int, float | None]], validation: list[Point]) -> bool:
    """Returns whether the validation loss has risen, and the training loss is far under it at the end."""
    (step, last), lowest = validation[-1], min(value for _, value in validation)
    now = at_step(smooth(train), step)
    return last > (1 + RISEN) * lowest and now is not None and now < FAR_UNDER * last


def jumped(train: list[tuple[int, float | None]]) -> int | None:
    """Returns the first step at which the training loss has jumped up, None if it never has."""
    points = [(step, value) for step, value in train if value is not None]
    values = [value for _, value in points]
    if len(values) < MIN_STEPS:
        return None
    # The median absolute difference of two normal variables is 0.954 standard deviations. Noise often grows
    # with the loss, so both the plain and the relative one count.
    plain = median(abs(b - a) for a, b in pairwise(values)) / 0.954
    relative = median(2 * abs(b - a) / (abs(a) + abs(b) or 1) for a, b in pairwise(values)) / 0.954
    lowest = values[0]
    for at in range(WINDOW, len(values) + 1):
        level = median(values[at - WINDOW : at])  # a few hard batches do not change it
        noise = max(plain, relative * abs(level))
        if level > lowest + max(JUMP_SHARE * abs(values[0]), JUMP_NOISE * noise):
            return points[at - 1][0]
        lowest = min(lowest, level)
    return None


def still(losses: list[float]) -> bool:
    """Returns whether the losses of the last quarter are those of the first steps and the first quarter."""
    quarter = len(losses) // 4
    last = fmean(losses[-quarter:])
    return all(
        abs(last - fmean(early)) < STILL_TRAIN * abs(fmean(early)) for early in (losses[:5], losses[:quarter])
    )


def at_step(points: list[Point], step: int) -> float | None:
    """Returns the value of the last point up to the step, None without one."""
    return next((value for s, value in reversed(points) if s <= step), None)


def _completion_warnings(steps: list[dict]) -> list[str]:
    """Returns warnings about a run whose completions teach it little; [] for a run without rewards."""
    alike, cut = (_mean(steps, key) for key in ("frac_reward_zero_std", "completions/clipped_ratio"))
    found = []
    if alike > MOST_ALIKE:
        found.append(
            f"The rewards do not tell completions apart: in {alike:.0%} of the groups all have one reward, "
            "and such a group teaches nothing; name rewards with more grades (grpo.rewards), raise "
            "grpo.num_generations or grpo.temperature, or take prompts that the model answers well only at "
            "times."
        )
    if cut > MOST_CUT:
        found.append(
            f"Most completions are cut: {cut:.0%} reached grpo.max_completion_length, and with "
            "grpo.mask_truncated_completions these teach nothing; raise grpo.max_completion_length."
        )
    return found


def _mean(steps: list[dict], key: str) -> float:
    """Returns the mean of a figure over the steps, 0 if fewer than MIN_STEPS have it."""
    values = [value for _, value in series(steps, key) if value is not None]
    return fmean(values) if len(values) >= MIN_STEPS else 0.0


def _level(first: float, last: float) -> bool:
    return math.isclose(first, last, rel_tol=STILL_VALIDATION)


def _findings(
    steps: list[dict], train: list[tuple[int, float | None]], validation: list[Point], kept: Kept | None
) -> list[str]:
    found = []
    if len(validation) > 1:
        lowest, (last, value) = min(validation, key=lambda point: point[1]), validation[-1]
        if turned(validation):
            found.append(
                f"The validation loss was lowest at step {lowest[0]:,} ({lowest[1]:.4g}) and rose to "
                f"{value:.4g} by step {last:,}."
            )
        elif lowest[0] == last:
            found.append(f"The validation loss was lowest at the last evaluation, {value:.4g}.")
        else:
            found.append(
                f"The validation loss was lowest at step {lowest[0]:,} ({lowest[1]:.4g}) and level after it."
            )
    elif validation:
        found.append(
            "The validation loss was measured only once; train.eval_every shows where it turns while a run "
            "trains."
        )
    if validation and (now := at_step(smooth(train), validation[-1][0])) is not None:
        last, value = validation[-1]
        found.append(
            f"At step {last:,} the training loss was {now:.4g} (smoothed) and the validation loss "
            f"{value:.4g}: a gap of {value - now:+.4g}."
        )
    if kept and validation:
        found.append(_kept_sentence(steps, kept, len(validation)))
    return found


def _kept_sentence(steps: list[dict], kept: Kept, evaluations: int) -> str:
    end = max((record["step"] for record in steps), default=kept.step)
    by = (
        f", the best of {evaluations} by validation {kept.metric.replace('_', ' ')}"
        if evaluations > 1
        else ""
    )
    early = f" Early stopping ended the run at step {end:,}." if kept.stopped_early else ""
    if kept.step == end:
        return f"The run kept the weights of its last step, {end:,}{by}.{early}"
    return f"The run kept the weights of step {kept.step:,} of {end:,}{by}.{early}"

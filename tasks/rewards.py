"""Rewards for reinforcement learning: functions of (prompt, completion, gold) that return a number in [0, 1].

    leak           1 - (leaked + lost entity characters) / entity characters
    preserved      1 if the text outside labels equals the source exactly, and labels hide at most a fifth of
                   the text outside entities, else 0
    entity_f1      2 * correct spans / (spans of the completion + gold spans); the index of a label is ignored
    over_mask      1 - (masked + lost characters outside entities) / characters outside entities
    exact_match    1 if completion = gold, up to white space at the ends
    label_match    the same, and case does not count
    ended          1 if the completion ended with a stop token, and not at the limit of its length
    format         1 if the completion, without white space at the ends, matches a regular expression

The prompt is the last turn of the user, without the system's and earlier turns.

The first four are for redactions; tasks/redaction.py defines their terms. They differ from its measures where
a model could earn something without an answer: a character that a completion neither copies nor masks (it is
lost) counts against it, and a blank completion gets 0. Where a row has no entity, no text outside entities or
no span, the reward is the share of the source's characters that are not lost.
"""

import re
from collections.abc import Callable

from tasks import redaction
from tasks.redaction import Comparison

MAY_HIDE = 0.2  # the share of the text outside entities that labels may hide in a text that is preserved
FORMAT = "format"  # the name of the reward that `format_reward` makes of a pattern


def leak(prompt: str, completion: str, gold: str) -> float:
    """Returns the fraction of entity characters that a label hides."""
    if _blank(completion, gold):
        return 0.0
    counts = redaction.compare(prompt, gold, completion)
    return _share(counts.leaked + counts.lost, counts.entity, counts)


def preserved(prompt: str, completion: str, gold: str) -> float:
    """Returns 1 if the text outside labels equals the source exactly (see MAY_HIDE), else 0."""
    if _blank(completion, gold):
        return 0.0
    counts = redaction.compare(prompt, gold, completion)
    changed = counts.lost or counts.lost_outside or counts.added
    return float(not changed and counts.over_masked <= MAY_HIDE * counts.outside)


def entity_f1(prompt: str, completion: str, gold: str) -> float:
    """Returns the F1 of the spans: a span is correct if a gold span has the same bounds and class."""
    if _blank(completion, gold):
        return 0.0
    counts = redaction.compare(prompt, gold, completion)
    spans = counts.predicted + counts.expected
    return 2 * counts.correct / spans if spans else _share(0, 0, counts)


def over_mask(prompt: str, completion: str, gold: str) -> float:
    """Returns the fraction of characters outside entities that the completion neither masks nor loses."""
    if _blank(completion, gold):
        return 0.0
    counts = redaction.compare(prompt, gold, completion)
    return _share(counts.over_masked + counts.lost_outside, counts.outside, counts)


def exact_match(prompt: str, completion: str, gold: str) -> float:
    """Returns 1 if the completion equals the gold response, up to white space at the ends, else 0."""
    return float(completion.strip() == gold.strip())


def label_match(prompt: str, completion: str, gold: str) -> float:
    """Returns 1 if the completion is the gold label; case and white space at the ends do not count."""
    return float(completion.strip().casefold() == gold.strip().casefold())


def ended(ended: bool) -> float:
    """Returns 1 if the completion ended with a stop token, else 0."""
    return float(ended)


def format_reward(pattern: str) -> Callable[[str], float]:
    """Returns the reward `format`; raises ValueError if `pattern` is empty or no regular expression."""
    if not pattern:
        raise ValueError("the pattern is empty; set a regular expression that the whole completion matches")
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise ValueError(f"the pattern {pattern!r} is not a regular expression: {e}") from None

    def matches(completion: str) -> float:
        return float(compiled.fullmatch(completion.strip()) is not None)

    return matches


def _blank(completion: str, gold: str) -> bool:
    return not completion.strip() and bool(gold.strip())


def _share(bad: int, all_: int, counts: Comparison) -> float:
    """Returns 1 - bad / all; of nothing, the share of the source that is not lost."""
    if not all_:
        bad, all_ = counts.lost + counts.lost_outside, counts.entity + counts.outside
    return 1 - min(bad / all_, 1.0) if all_ else 1.0


_FUNCTIONS: tuple[Callable[..., float], ...] = (
    leak,
    preserved,
    entity_f1,
    over_mask,
    exact_match,
    label_match,
    ended,
)
REWARDS: dict[str, Callable[..., float]] = {f.__name__: f for f in _FUNCTIONS}
_REDACTION = (
    (leak, 0.5),
    (preserved, 0.15),
    (entity_f1, 0.15),
    (over_mask, 0.05),
    (exact_match, 0.1),
    (ended, 0.05),
)
# {task: {reward: weight}}; the weights of a task add up to 1.
DEFAULTS: dict[str, dict[str, float]] = {
    "redaction": {f.__name__: weight for f, weight in _REDACTION},
    "classification": {"label_match": 1.0},
}

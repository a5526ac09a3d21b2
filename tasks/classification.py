"""Classification: each response is one of a few labels. Case and white space at the ends do not count.

accuracy    rows whose response is their gold label / all rows
macro_f1    mean over the gold labels of F1 = 2 c / (p + g): the label is the response of p rows, the gold
            label of g rows, and both in c rows
invalid     rows whose response is not a gold label of any row / all rows
"""

from collections.abc import Sequence

from data.rows import Sample
from tasks.measures import Counts, Metric, by_label, exact_counts, exact_match, label_scores, total
from tasks.text import LEGEND, TITLES, pieces, shown_prompt

__all__ = ["LEGEND", "METRICS", "TITLES", "applies", "counts", "from_counts", "overall", "pieces", "score"]
__all__ += ["shown_prompt"]
METRICS = (
    Metric("accuracy", "accuracy", percent=True, lower_is_better=False),
    Metric("macro_f1", "macro F1", percent=True, lower_is_better=False),
    Metric("invalid", "no label", percent=True, lower_is_better=True),
)
MIN_ROWS, MAX_LABELS, MAX_WORDS, ROWS_A_LABEL = 20, 50, 5, 3


def applies(samples: list[Sample]) -> bool:
    """Returns whether the samples are single exchanges whose responses look like labels.

    - There are 20 samples or more, each with one user turn and one response.
    - There are at most 50 different responses, of at most 5 words each.
    - A response occurs 3 times or more on average.
    """
    roles = [[role for role, _ in s.messages or ()] for s in samples]
    single = all(r in (["user", "assistant"], ["system", "user", "assistant"]) for r in roles)
    if len(samples) < MIN_ROWS or not single:
        return False
    labels = {_label(s.messages[-1][1]) for s in samples if s.messages}
    short = all(0 < len(label.split()) <= MAX_WORDS for label in labels)
    return short and len(labels) <= min(MAX_LABELS, len(samples) // ROWS_A_LABEL)


def score(rows: Sequence[tuple[str, str, str]]) -> dict:
    """Returns accuracy, macro_f1, invalid, exact_match, and per label precision, recall, F1 and support."""
    return from_counts(total(counts, rows))


def counts(row: tuple[str, str, str]) -> Counts:
    """Returns what one row adds: a gold label, a response's label, and a right one if these are equal."""
    _, gold, text = row
    expected, predicted = _label(gold), _label(text)
    labels = {("gold", expected): 1, ("response", predicted): 1}
    return {**exact_counts(gold, text), **labels, ("right", expected): int(expected == predicted)}


def from_counts(sums: Counts) -> dict:
    """Returns the measures of the rows whose counts add up to `sums`."""
    expected, predicted, right = (by_label(sums, kind) for kind in ("gold", "response", "right"))
    per_label = {
        label: label_scores(right.get(label, 0), predicted.get(label, 0), n)
        for label, n in sorted(expected.items())
    }
    return {
        "exact_match": exact_match(sums),
        "accuracy": sum(right.values()) / sums["rows"],
        "macro_f1": sum(s["f1"] for s in per_label.values()) / len(per_label),
        "invalid": sum(n for label, n in predicted.items() if label not in expected) / sums["rows"],
        "per_label": per_label,
    }


def overall(measures: dict) -> dict | None:
    """Returns the means of precision, recall and F1 over the labels."""
    scores = measures["per_label"].values()
    return {key: sum(s[key] for s in scores) / len(scores) for key in ("precision", "recall", "f1")}


def _label(response: str) -> str:
    return response.strip().casefold()

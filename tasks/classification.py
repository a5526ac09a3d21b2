"""Classification: each response is one of a few labels. Case and white space at the ends do not count.

accuracy    rows whose response is their gold label / all rows
macro_f1    mean over the gold labels of F1 = 2 c / (p + g): the label is the response of p rows, the gold
            label of g rows, and both in c rows
invalid     rows whose response is not a gold label of any row / all rows
"""

from collections import Counter

from data.rows import Sample
from tasks.measures import Metric, Row, exact_match, label_scores
from tasks.text import LEGEND, TITLES, pieces, shown_prompt

__all__ = ["LEGEND", "METRICS", "TITLES", "applies", "overall", "pieces", "score", "shown_prompt"]
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


def score(rows: list[Row]) -> dict:
    """Returns accuracy, macro_f1, invalid, exact_match, and per label precision, recall, F1 and support."""
    pairs = [(_label(row.gold), _label(row.text)) for row in rows]
    expected, predicted = Counter(gold for gold, _ in pairs), Counter(text for _, text in pairs)
    right = Counter(gold for gold, text in pairs if gold == text)
    per_label = {label: label_scores(right[label], predicted[label], n) for label, n in expected.items()}
    return {
        "exact_match": exact_match(rows),
        "accuracy": right.total() / len(rows),
        "macro_f1": sum(s["f1"] for s in per_label.values()) / len(per_label),
        "invalid": sum(text not in expected for _, text in pairs) / len(rows),
        "per_label": dict(sorted(per_label.items())),
    }


def overall(measures: dict) -> dict | None:
    """Returns the means of precision, recall and F1 over the labels."""
    scores = measures["per_label"].values()
    return {key: sum(s[key] for s in scores) / len(scores) for key in ("precision", "recall", "f1")}


def _label(response: str) -> str:
    return response.strip().casefold()

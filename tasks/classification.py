"""Classification: each response is one of a few labels.

accuracy    rows whose response is the gold label / rows; case and white space at the ends do not count
macro_f1    mean over the gold labels of F1 = 2 right / (responses with the label + rows of the label)
invalid     rows whose response is no gold label / rows
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
    """Returns whether 20 samples or more are single exchanges with at most 50 different responses.

    A response has at most 5 words, and occurs 3 times on average or more often.
    """
    roles = [[role for role, _ in s.messages or ()] for s in samples]
    single = all(r in (["user", "assistant"], ["system", "user", "assistant"]) for r in roles)
    if len(samples) < MIN_ROWS or not single:
        return False
    labels = {_label(s.messages[-1][1]) for s in samples if s.messages}
    short = all(0 < len(label.split()) <= MAX_WORDS for label in labels)
    return short and len(labels) <= min(MAX_LABELS, len(samples) // ROWS_A_LABEL)


def score(rows: list[Row]) -> dict:
    """Returns the measures above, exact_match, and per_label {label: precision, recall, f1, support}."""
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
    """Returns the means over the labels."""
    scores = measures["per_label"].values()
    return {key: sum(s[key] for s in scores) / len(scores) for key in ("precision", "recall", "f1")}


def _label(response: str) -> str:
    return response.strip().casefold()

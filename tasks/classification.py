"""Classification: each response is one of a few labels. Case and white space at the ends do not count.

accuracy    rows whose response is their gold label / all rows
macro_f1    mean over the gold labels of F1 = 2 c / (p + g): the label is the response of p rows, the gold
            label of g rows, and both in c rows
invalid     rows whose response is not a label / all rows
confusion   {gold label: {response's label, or NO_LABEL: rows}}

The labels are those that the user names, or else the gold responses. A model can also be asked without
generating anything: the label of the highest log-probability as the response is then its answer, which gives
label_accuracy and label_macro_f1.
"""

from collections import Counter
from collections.abc import Sequence

from common.errors import listed
from data.rows import Sample
from tasks.measures import Counts, Metric, exact_counts, exact_match, label_scores, total
from tasks.text import LEGEND, TITLES, pieces, shown_prompt

__all__ = ["LEGEND", "METRICS", "TITLES", "applies", "counts", "from_counts", "overall", "pieces", "score"]
__all__ += ["shown_prompt"]
METRICS = (
    Metric("accuracy", "accuracy", percent=True, lower_is_better=False),
    Metric("macro_f1", "macro F1", percent=True, lower_is_better=False),
    Metric("invalid", "no label", percent=True, lower_is_better=True),
    Metric("label_accuracy", "label accuracy", percent=True, lower_is_better=False),
    Metric("label_macro_f1", "label macro F1", percent=True, lower_is_better=False),
)
NO_LABEL = "(no label)"
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


def wrong_labels(labels: Sequence[str]) -> str:
    """Returns what is wrong with the labels that a user names, and the remedy; "" if nothing is."""
    known = [_label(label) for label in labels]
    if "" in known:
        return "has an empty label; remove it"
    twice = [label for label in labels if known.count(_label(label)) > 1]
    equal = ", ".join(map(repr, twice))
    return f"has equal labels, {equal} (case and outer spaces do not count); keep one" if twice else ""


def labels_of(samples: Sequence[Sample], named: Sequence[str] = ()) -> list[str]:
    """Returns the labels as the model should write them: those named, or the different responses, sorted.

    Raises ValueError that lists the rows whose response is none of the named labels.
    """
    responses = [(s.id, s.messages[-1][1].strip()) for s in samples if s.messages]
    if not named:
        return sorted({text for _, text in responses})
    known = {_label(label) for label in named}
    strangers = [f"{row}: {text[:80]!r}" for row, text in responses if _label(text) not in known]
    if strangers:
        head = f"{len(strangers)} rows have a response that is none of the labels {', '.join(named)}:"
        remedy = "Add it to data.labels (evaluate.py: --labels), or repair the rows."
        raise ValueError(listed(head, strangers, remedy))
    return list(dict.fromkeys(label.strip() for label in named))


def score(rows: Sequence[tuple[str, str, str]], labels: Sequence[str] = ()) -> dict:
    """Returns accuracy, macro_f1, invalid, exact_match, confusion, and precision, recall, F1 per label.

    `labels` are the responses that are no invalid ones; if there are none, the gold responses are.
    """
    return from_counts(total(counts, rows), labels)


def counts(row: tuple[str, str, str]) -> Counts:
    """Returns what one row adds: 1 to the cell of its gold label and its response."""
    _, gold, text = row
    return {**exact_counts(gold, text), ("cell", _label(gold), _label(text)): 1}


def from_counts(sums: Counts, labels: Sequence[str] = ()) -> dict:
    """Returns the measures of the rows whose counts add up to `sums`; `labels` as in `score`."""
    cells = {key[1:]: n for key, n in sums.items() if key[0] == "cell" and n}
    expected, predicted, right = Counter[str](), Counter[str](), Counter[str]()
    for (gold, text), n in cells.items():
        expected[gold] += n
        predicted[text] += n
        right[gold] += n if gold == text else 0
    per_label = {
        label: label_scores(right[label], predicted[label], n) for label, n in sorted(expected.items())
    }
    known = {_label(label) for label in labels} or {*expected}
    confusion: dict[str, dict[str, int]] = {gold: {} for gold in per_label}
    for (gold, text), n in sorted(cells.items()):
        column = text if text in known else NO_LABEL
        confusion[gold][column] = confusion[gold].get(column, 0) + n
    return {
        "exact_match": exact_match(sums),
        "accuracy": sum(right.values()) / sums["rows"],
        "macro_f1": sum(s["f1"] for s in per_label.values()) / len(per_label),
        "invalid": sum(n for text, n in predicted.items() if text not in known) / sums["rows"],
        "per_label": per_label,
        "confusion": confusion,
    }


def score_labels(golds: list[str], labels: Sequence[str], log_probs: list[list[float]]) -> dict:
    """Returns label_accuracy and label_macro_f1: each row's answer is its label of the highest probability.

    log_probs[row][i] is the log-probability of labels[i] as the response, with the end of the turn.
    """
    answers = [labels[max(range(len(labels)), key=row.__getitem__)] for row in log_probs]
    measures = score([("", gold, text) for gold, text in zip(golds, answers, strict=True)], labels)
    return {"label_accuracy": measures["accuracy"], "label_macro_f1": measures["macro_f1"]}


def columns(confusion: dict[str, dict[str, int]]) -> list[str]:
    """Returns the columns of a confusion matrix: all gold labels, other labels, and last NO_LABEL if used."""
    found = dict.fromkeys([*confusion, *sorted(text for row in confusion.values() for text in row)])
    return sorted(found, key=lambda text: text == NO_LABEL)


def overall(measures: dict) -> dict | None:
    """Returns the means of precision, recall and F1 over the labels."""
    scores = measures["per_label"].values()
    return {key: sum(s[key] for s in scores) / len(scores) for key in ("precision", "recall", "f1")}


def _label(response: str) -> str:
    return response.strip().casefold()

"""What all tasks share: how a measure is described, what a row is, and how a response is compared with the
gold one.
"""

import re
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

MAX_CHARACTERS = 4000  # Longer texts are not compared piece by piece.
MIN_RATIO = 0.3  # A diff of texts that are less alike shows accidents only.
TOKEN = re.compile(r"\+?\w+|\s+|[^\w\s]")  # +49 is one


class Metric(NamedTuple):
    """A measure: its key, its label, whether it is a share, and its direction."""

    key: str
    label: str
    percent: bool
    lower_is_better: bool


class Row(NamedTuple):
    """The last user turn of a sample, its gold response, and the model's response."""

    prompt: str
    gold: str
    text: str


LOSS = Metric("loss", "loss", percent=False, lower_is_better=True)
EXACT_MATCH = Metric("exact_match", "exact match", percent=True, lower_is_better=False)


def exact_match(rows: list[Row]) -> float:
    """Returns the share of responses that equal the gold one; white space around them does not count."""
    return sum(row.gold.strip() == row.text.strip() for row in rows) / len(rows)


def label_scores(found: int, predicted: int, expected: int) -> dict[str, float]:
    """Returns precision, recall and F1 of counts; a ratio of nothing to nothing is 1."""
    precision = found / predicted if predicted else float(not expected)
    recall = found / expected if expected else float(not predicted)
    f1 = 2 * found / (predicted + expected) if predicted + expected else 1.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": expected}


def differences(text: str, gold: str) -> list[tuple[str, str]]:
    """Returns a response against the gold one: [(kind, piece)], "" for equal text, "wrong", or "missing" (the
    gold's text).
    """
    if not gold or max(len(text), len(gold)) > MAX_CHARACTERS:
        return [("", text)]
    ours, theirs = TOKEN.findall(text), TOKEN.findall(gold)
    matcher = SequenceMatcher(str.isspace, theirs, ours, autojunk=False)
    if matcher.ratio() < MIN_RATIO:
        return [("", text)]
    found = []
    for op, i1, i2, j1, j2 in matcher.get_opcodes():
        kind, tokens = (
            ("missing", theirs[i1:i2]) if op == "delete" else ("" if op == "equal" else "wrong", ours[j1:j2])
        )
        found += [(kind, token) for token in tokens]
    return joined(found)


def joined(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the pieces with neighbours of one kind put together."""
    return [(kind, "".join(t for _, t in run)) for kind, run in groupby(pieces, key=lambda piece: piece[0])]

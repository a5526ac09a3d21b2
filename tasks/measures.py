"""What all tasks share: the description of a measure, and the comparison of a response with the gold one."""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

# Longer texts are not compared.
MAX_CHARACTERS = 4000
# The differences of texts that are less alike are accidents.
MIN_RATIO = 0.3
# +49 is one token.
TOKEN = re.compile(r"\+?\w+|\s+|[^\w\s]")
KINDS = {"equal": "", "insert": "wrong", "replace": "wrong", "delete": "missing"}


class Metric(NamedTuple):
    """A measure: its key, its label, whether it is a fraction to show in per cent, and its direction."""

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


def exact_match(rows: Sequence[tuple[str, str, str]]) -> float:
    """Returns the fraction of responses that equal the gold one, without white space at their ends."""
    return sum(gold.strip() == text.strip() for _, gold, text in rows) / len(rows)


def label_scores(found: int, predicted: int, expected: int) -> dict[str, float]:
    """Returns precision, recall and F1 of counts, and the support; 0 / 0 counts as 1."""
    precision = found / predicted if predicted else float(not expected)
    recall = found / expected if expected else float(not predicted)
    f1 = 2 * found / (predicted + expected) if predicted + expected else 1.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": expected}


def differences(
    text: str, gold: str, token: re.Pattern = TOKEN, unlike: str = ""
) -> list[tuple[str, list[str]]]:
    """Compares a response with the gold one; returns runs of tokens with their kinds: [(kind, tokens)].

    The kind is "" for equal text, "wrong" for text that is not in the gold, and "missing" for text that only
    the gold has. A response that has little in common with the gold is one run of kind `unlike`.
    """
    if not gold or max(len(text), len(gold)) > MAX_CHARACTERS:
        return [("", [text])]
    ours, theirs = token.findall(text), token.findall(gold)
    matcher = SequenceMatcher(str.isspace, theirs, ours, autojunk=False)
    if matcher.ratio() < MIN_RATIO:
        return [(unlike, ours)]
    opcodes = matcher.get_opcodes()
    return [(KINDS[op], theirs[i:j] if op == "delete" else ours[k:n]) for op, i, j, k, n in opcodes]


def joined(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns the pieces with neighbours of one kind joined."""
    return [(kind, "".join(t for _, t in run)) for kind, run in groupby(pieces, key=lambda piece: piece[0])]

"""Measures that all tasks share, and the comparison of a response with its gold (expected) response."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, NamedTuple

MAX_CHARACTERS = 4000  # Longer texts are not compared.
MIN_RATIO = 0.3  # The differences of texts that are less alike are accidents.
TOKEN = re.compile(r"\+?\w+|\s+|[^\w\s]")  # +49 is one token.
KINDS = {"equal": "", "insert": "wrong", "replace": "wrong", "delete": "missing"}


# What a row adds to each count. A measure of many rows is computed from the sums of their counts.
Counts = Mapping[Any, int]


class Metric(NamedTuple):
    """Describes a measure: its key, its label, whether to show it in per cent, and which way is better."""

    key: str
    label: str
    percent: bool
    lower_is_better: bool


class Row(NamedTuple):
    """One scored row: the last user turn, the gold (expected) response, and the model's response."""

    prompt: str
    gold: str
    text: str


@dataclass
class Answers:
    """Prompts, gold responses and generated responses: lists with one entry for each conversation."""

    prompts: list[str]  # the last message before the response
    golds: list[str]
    texts: list[str]  # the generated responses
    ended: list[bool] = field(
        default_factory=list
    )  # whether a stop token ended the response, and not a limit of tokens

    @property
    def cut(self) -> int:
        """Returns how many responses reached a limit of tokens before a stop token."""
        return self.ended.count(False)


LOSS = Metric("loss", "loss", percent=False, lower_is_better=True)
PREFERRED = Metric("rewards/accuracies", "preferred", percent=True, lower_is_better=False)
MARGIN = Metric("rewards/margins", "margin", percent=False, lower_is_better=False)
REWARD = Metric("reward", "reward", percent=False, lower_is_better=False)
EXACT_MATCH = Metric("exact_match", "exact match", percent=True, lower_is_better=False)


def exact_counts(gold: str, text: str) -> Counts:
    """Returns the counts of one row: "rows", and "exact" if the texts are equal up to outer white space."""
    return {"rows": 1, "exact": int(gold.strip() == text.strip())}


def exact_match(counts: Counts) -> float:
    """Returns the fraction of the rows whose response equals the gold response."""
    return counts["exact"] / counts["rows"]


def total(
    counts: Callable[[tuple[str, str, str]], Counts], rows: Iterable[tuple[str, str, str]]
) -> Counter[Any]:
    """Returns the sums of the counts of all rows."""
    sums = Counter[Any]()
    for row in rows:
        sums.update(counts(row))
    return sums


def by_label(sums: Counts, kind: str) -> dict[str, int]:
    """Returns {label: n} of the counts n above 0 whose key is (kind, label)."""
    return {key[1]: n for key, n in sums.items() if isinstance(key, tuple) and key[0] == kind and n}


def label_scores(found: int, predicted: int, expected: int) -> dict[str, float]:
    """Returns precision found / predicted, recall found / expected, F1, and the support (= expected).

    If `predicted` and `expected` are both 0, the scores are 1; if only one of them is 0, the scores are 0.
    """
    precision = found / predicted if predicted else float(not expected)
    recall = found / expected if expected else float(not predicted)
    f1 = 2 * found / (predicted + expected) if predicted + expected else 1.0
    return {"precision": precision, "recall": recall, "f1": f1, "support": expected}


def differences(
    text: str, gold: str, token: re.Pattern = TOKEN, unlike: str = ""
) -> list[tuple[str, list[str]]]:
    """Compares a response with the gold one; returns runs of tokens with their kinds: [(kind, tokens)].

    The kind is "" for text that both have, "wrong" for text of the response only, and "missing" for text of
    the gold only. If the two have little in common, the whole response is one run of the kind `unlike`.
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
    """Joins neighbouring (kind, text) pieces of the same kind into one."""
    return [(kind, "".join(t for _, t in run)) for kind, run in groupby(pieces, key=lambda piece: piece[0])]

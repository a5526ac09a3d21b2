"""Aligns a redaction to its source text: which source characters a label replaces, and which are copied.

A redaction is text with labels such as [CITY_1] in it. The pieces of text around the labels are called
literals. If the source contains all literals in order, each label stands for the source text between two
literals. Otherwise the redaction has altered the text. Then equal tokens are matched first, and each gap
between them is aligned as a whole, word by word, or by equal runs of characters.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import accumulate, pairwise
from typing import NamedTuple

LABEL = re.compile(r"\[[A-Z]+(?:_[A-Z]+)*(?:_\d+)?\]")  # A model may invent a class.
_TOKEN = re.compile(r" ?\w+|\s|[^\w\s]")
_WORD = re.compile(r"\s*\S+")
_MIN_RUN = 3  # Two different words share shorter runs of characters by chance.
_MAX_PAIRS = 4000  # With more pairs of places in one text, each literal takes its leftmost place.
_MAX_EQUAL_PAIRS = 100_000  # With more pairs of equal tokens, two stretches of text are not compared.
_CUT = 3.0  # the cost of a label that ends inside a word

# Maps (class, source text) to a number: how unlike its class the text looks.
Cost = Callable[[str, str], float]


class Span(NamedTuple):
    """A label of the class `label` stands for the source characters [start, end)."""

    start: int
    end: int
    label: str


class Alignment:
    """The alignment of a redaction to its source.

    Attributes:
        spans: one Span for each label, in order; white space at its ends is left out.
        masked: one byte per source character, 1 if the character is in a span.
        copied: one byte per source character, 1 if the redaction repeats the character in its place.
        inserted: source positions before which the redaction has additional text.
        literal: the text of the redaction with a NUL character in place of each label.
    """

    def __init__(self, source: str, redacted: str, cost: Cost):
        """Aligns the texts. A stretch of the source behind several labels is split at the least `cost`."""
        self.source, self.cost = source, cost
        self.spans: list[Span] = []
        self.masked, self.copied = bytearray(len(source)), bytearray(len(source))
        self.inserted: list[int] = []
        literals, labels = _parse(redacted, source)
        if not self._fit(0, len(source), literals, labels):
            all_literals, all_labels = _parse(redacted, "")
            if self._fit(0, len(source), all_literals, all_labels):
                literals = all_literals
            else:
                tokens = _tokens(literals, labels, _TOKEN.findall)
                self._copy_equal(0, _TOKEN.findall(source), tokens, 1, self._fill_gap)
        self.literal = "\0".join(literals)

    def _fit(self, start: int, end: int, literals: list[str], labels: list[str]) -> bool:
        """Records the labels and returns True if literals and labels can make up source[start:end]."""
        bounds = _place(self.source[start:end], literals, labels, self.cost)
        if bounds is None:
            return False
        self._copy(start, end)
        for label, (a, b) in zip(labels, bounds, strict=True):
            if self.source[start + a : start + b] != label:  # The source may hold a label of its own.
                self._add(label, start + a, start + b)
        return True

    def _copy(self, start: int, end: int) -> None:
        self.copied[start:end] = b"\1" * (end - start)

    def _add(self, label: str, start: int, end: int) -> None:
        """Records that a label stands for source[start:end]; if that is blank, the label is inserted text."""
        self.copied[start:end] = bytes(end - start)
        text = self.source[start:end]
        start += len(text) - len(text.lstrip())
        end = max(start, end - len(text) + len(text.rstrip()))
        self.masked[start:end] = b"\1" * (end - start)
        if start == end:
            self.inserted.append(start)
        self.spans.append(Span(start, end, _class_of(label)))

    def _copy_equal(
        self, start: int, ours: Sequence[str], theirs: list[str], shortest: int, fill: Callable
    ) -> None:
        """Marks as copied what `ours` (source tokens from position `start` on) and `theirs` have in common.

        Equal runs of fewer than `shortest` characters do not count. For each gap between runs, it calls
        fill(start and end of the gap in the source, tokens of `theirs` in the gap).
        """
        if _equal_pairs(ours, theirs) > _MAX_EQUAL_PAIRS:  # "aaaa..." would take seconds.
            return fill(start, start + sum(map(len, ours)), theirs)
        starts = list(accumulate(map(len, ours), initial=start))
        i = j = 0
        for a, b, size in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
            if size == 0 or starts[a + size] - starts[a] >= shortest:  # The last block has size 0.
                fill(starts[i], starts[a], theirs[j:b])
                i, j = a + size, b + size
                self._copy(starts[a], starts[i])

    def _fill_gap(self, start: int, end: int, tokens: list[str]) -> None:
        """Aligns source[start:end] with the redaction's `tokens`: as a whole, by words or by characters."""
        text = "".join(tokens)
        if not text or self._fit(start, end, *_parse(text, self.source)):
            return
        parts = [(start, end, text)]
        words, our_words = _WORD.findall(text), list(_WORD.finditer(self.source, start, end))
        if len(words) == len(our_words) > 1:
            parts = [(*ours.span(), word) for ours, word in zip(our_words, words, strict=True)]
        for a, b, part in parts:
            literals, labels = _parse(part, self.source)
            if not self._fit(a, b, literals, labels):
                tokens = _tokens(literals, labels, list)
                if a < b and self.source[a] == tokens[0] == " ":  # The blank before a word that changed.
                    self._copy(a, a + 1)
                    a, tokens = a + 1, tokens[1:]
                self._copy_equal(a, self.source[a:b], tokens, _MIN_RUN, self._share)

    def _share(self, start: int, end: int, tokens: list[str]) -> None:
        """Divides source[start:end] among the labels in `tokens`, which the redaction has in its place."""
        labels = [token for token in tokens if len(token) > 1]
        if len(labels) < len(tokens) and (labels or start == end):
            self.inserted.append(end)
        if labels and not self._fit(start, end, [""] * (len(labels) + 1), labels):
            for i, label in enumerate(labels):  # The labels outnumber the characters; the first takes all.
                self._add(label, end if i else start, end)


def _equal_pairs(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Returns the number of pairs of equal tokens, which is what the search for equal runs goes through."""
    counts = Counter(theirs)
    return sum(counts[token] for token in ours)


def _class_of(label: str) -> str:
    return label.strip("[]_0123456789")


def _parse(text: str, source: str) -> tuple[list[str], list[str]]:
    """Splits a redaction into (n + 1 literals, the n labels between them).

    A word in brackets that `source` has too, such as [NOTE], is not a label but part of a literal.
    """
    literals, labels, at = [""], [], 0
    for match in LABEL.finditer(text):
        literals[-1] += text[at : match.start()]
        at = match.end()
        if match[0] in source:
            literals[-1] += match[0]
        else:
            labels.append(match[0])
            literals.append("")
    literals[-1] += text[at:]
    return literals, labels


def _tokens(literals: list[str], labels: list[str], split: Callable[[str], list[str]]) -> list[str]:
    """Splits the literals into tokens and puts the labels between them; each label is one token."""
    tokens = split(literals[0])
    for label, literal in zip(labels, literals[1:], strict=True):
        tokens += [label, *split(literal)]
    return tokens


def _place(text: str, literals: list[str], labels: list[str], cost: Cost) -> list[tuple[int, int]] | None:
    """Returns (start, end) in `text` for each label, or None if the literals do not fit.

    Each label gets one character or more. Of several places for a literal, the one of least cost is taken.
    """
    if not labels:
        return [] if text == literals[0] else None
    head, *inner, tail = literals
    limit = len(text) - len(tail)
    if not (text.startswith(head) and text.endswith(tail)):
        return None
    left, at = [], len(head)
    for literal in inner:
        at = text.find(literal, at + 1, limit)
        if at < 0:
            return None
        left.append(at)
        at += len(literal)
    if at >= limit:
        return None
    places, at = [[limit]], limit
    for literal, low in zip(inner[::-1], left[::-1], strict=True):
        at = text.rfind(literal, 0, at - 1)
        places.insert(0, [p for p in range(low, at + 1) if text.startswith(literal, p)])
    starts = [*left, limit]
    if len(places[0]) + sum(len(a) * len(b) for a, b in pairwise(places)) <= _MAX_PAIRS:
        starts = _cheapest(text, literals, labels, places, cost)
    bounds = zip(literals[:-1], pairwise([0, *starts]), strict=True)
    return [(start + len(literal), end) for literal, (start, end) in bounds]


def _cheapest(
    text: str, literals: list[str], labels: list[str], places: list[list[int]], cost: Cost
) -> list[int]:
    """Chooses a place for each literal but the first at the least sum of costs (dynamic programming)."""
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # {place: (sum, path to it)}
    for label, literal, ends in zip(labels, literals[:-1], places, strict=True):
        following = {}
        for end in ends:
            cut = _CUT if 0 < end < len(text) and text[end - 1 : end + 1].isalnum() else 0.0
            ways = [
                (total + cost(_class_of(label), text[start + len(literal) : end]) + cut, [*path, end])
                for start, (total, path) in best.items()
                if start + len(literal) < end
            ]
            if ways:
                following[end] = min(ways, key=lambda way: way[0])
        best = following
    return best[places[-1][0]][1]

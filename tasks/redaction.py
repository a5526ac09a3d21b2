"""What a redaction got right: leaks, entities, masking too much, and text kept as it was.

A row is three texts: the source, the gold redaction, and a prediction. In a redaction a label such as
[GIVENNAME_1] or [MASKED] stands for a piece of the source; everything else is meant to be the source, byte
for byte. So both gold and prediction are aligned to the source, and all measures are counts of source
characters and source spans:

    entity      a gold span [start, end) of the source, of one class; its index number is not judged
    covered     a source character under a label of the prediction
    copied      a source character that the prediction repeats in its place
    survives    an entity character that is copied (in a run with a letter or digit), or any character of an
                entity whose
                value, of 3 characters or more, stands verbatim in the prediction more often than in the gold
                redaction

An empty prediction therefore leaks nothing and a senseless one next to nothing (a chance run of three
characters); both fail `preserved`, the entity scores and `exact_match`.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import pairwise
from typing import NamedTuple

from data.rows import Sample
from tasks.measures import EXACT_MATCH, LOSS, MAX_CHARACTERS, MIN_RATIO, TOKEN, Metric, joined

INSTRUCTION = (
    "Mask all PII in the following text. Replace each entity with the exact UPPERCASE label in square "
    "brackets "
    "(e.g., [PERSON], [EMAIL], [PHONE], [USERNAME], [ADDRESS], [CREDIT_CARD], [TIME], etc.). Preserve all "
    "non-PII text, "
    "whitespace, and punctuation exactly. Return ONLY the redacted text."
)
CLASSES = (
    "ACCOUNTNUM BUILDINGNUM CITY CREDITCARDNUMBER DATEOFBIRTH DRIVERLICENSENUM EMAIL GIVENNAME IDCARDNUM "
    "PASSWORD "
    "SOCIALNUM STREET SURNAME TAXNUM TELEPHONENUM USERNAME ZIPCODE"
).split()

_TEXT_MARK = "\n\nText:\n"
_KNOWN_LABEL = re.compile(r"\[(?:{}|MASKED)(?:_\d+)?\]".format("|".join(CLASSES)))
_ANY_LABEL = re.compile(r"(\[[A-Z]+(?:_[A-Z]+)*(?:_\d+)?\])")  # a model may invent a class
_TOKEN = re.compile(r" ?\w+|\s|[^\w\s]")
_WORD = re.compile(r"\s*\S+")
_WORDY = {
    "GIVENNAME": 1.0,
    "SURNAME": 0.9,
    "CITY": 0.5,
    "STREET": 0.5,
}  # the price of each word after the first
_UNSPACED = {"EMAIL", "USERNAME", "PASSWORD"}
_SEARCH_LIMIT = 4000  # gaps weighed for one text; beyond, the leftmost placing is taken
_BLOCK = 3  # shorter runs of equal characters between differing words are chance
_VERBATIM = 3  # a shorter value is found inside other words by chance


METRICS = (
    LOSS,
    EXACT_MATCH,
    Metric("leak_rate", "leak rate", percent=True, lower_is_better=True),
    Metric("entity_f1", "entity F1", percent=True, lower_is_better=False),
    Metric("preserved", "preserved", percent=True, lower_is_better=False),
    Metric("over_mask_rate", "over-masked", percent=True, lower_is_better=True),
)
LEGEND = {"ok": "masked as in the gold", "leak": "leaked", "wrong": "wrong or altered", "missing": "missing"}
TITLES = {"source": "Source", "gold": "Gold"}
SHOWN_LABEL = re.compile(r"\[[A-Z][A-Z0-9_]*\]")
SHOWN_TOKEN = re.compile(SHOWN_LABEL.pattern + "|" + TOKEN.pattern)


class Span(NamedTuple):
    """The source characters [start, end) for which a label of class `label` stands."""

    start: int
    end: int
    label: str


class _Piece(NamedTuple):
    text: str  # as it stands in the redaction
    label: str | None  # the class, or None for text to be copied


class _Alignment(NamedTuple):
    spans: list[Span]
    copied: bytearray  # one flag a source character
    inserted: list[int]  # source positions before which the redaction has text of its own
    literal: str  # the redaction's text, a NUL for each label


def prompt_for(text: str) -> str:
    """The prompt that asks for the redaction of a text; one that has the instruction already is left as it
    is.
    """
    return text if text.startswith(INSTRUCTION) else INSTRUCTION + _TEXT_MARK + text


def source_text(prompt: str) -> str:
    """The text to redact: what follows `Text:` and a line break, or the whole prompt where there is no such
    mark.
    """
    _, mark, text = prompt.partition(_TEXT_MARK)
    return text if mark else prompt


def is_redaction(prompt: str, response: str) -> bool:
    """Whether a data row is a redaction: its prompt begins with INSTRUCTION or its response has a known
    label.
    """
    return prompt.startswith(INSTRUCTION) or _KNOWN_LABEL.search(response) is not None


def applies(samples: list[Sample]) -> bool:
    """Every sample ends with a redaction."""
    ends = [s.messages[-2:] if s.messages else () for s in samples]
    return bool(samples) and all(len(end) == 2 and is_redaction(end[0][1], end[1][1]) for end in ends)


def shown_prompt(prompt: str) -> str:
    """Returns what the report shows of a prompt: the text to redact."""
    return source_text(prompt)


def overall(measures: dict) -> dict | None:
    """Returns precision, recall and F1 over all classes."""
    return {key: measures[f"entity_{key}"] for key in ("precision", "recall", "f1")}


def spans(source: str, redacted: str) -> list[Span]:
    """The spans of `source` for which the labels of `redacted` stand, in order, without blanks at their ends.

    A bracketed word that the source has too is text, not a label, if the rest then aligns. Where text and
    labels do not tell (two labels with a blank between, three words in the source), the split which suits the
    classes best is taken."""
    return _align(source, redacted).spans


def score(rows: Iterable[tuple[str, str, str]]) -> dict:
    """The redaction measures over all rows (source, gold, prediction); blanks around the three texts do not
    count.

    exact_match       = rows with prediction == gold / rows
    leak_rate         = entity characters that survive / entity characters (0 without entities)
    entity_precision  = predicted spans that equal a gold span in bounds and class / predicted spans
    entity_recall     = the same spans / gold spans;  entity_f1 = 2 * the same / (predicted + gold)
    over_mask_rate    = characters outside entities that are covered / characters outside entities
    preserved         = rows in which all characters that gold copies are copied, and none are added
                        outside entities / rows
    per_label         = {class: {"precision", "recall", "f1", "support" (gold spans)}}

    Without any span on either side, precision, recall and F1 are 1. Raises ValueError if there are no
    rows."""
    total: Counter[str] = Counter()
    found: Counter[str] = Counter()
    expected: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    for prompt, gold, prediction in rows:
        source, gold, prediction = source_text(prompt).strip(), gold.strip(), prediction.strip()
        truth, guess = _align(source, gold), _align(source, prediction)
        total.update(_row_counts(source, truth, guess))
        total["exact"] += prediction == gold
        expected.update(span.label for span in truth.spans)
        predicted.update(span.label for span in guess.spans)
        found.update(span.label for span in set(truth.spans) & set(guess.spans))
    if not total["rows"]:
        raise ValueError("score: no rows; give at least one (source, gold, prediction)")
    precision, recall, f1 = _prf(found.total(), predicted.total(), expected.total())
    return {
        "exact_match": total["exact"] / total["rows"],
        "leak_rate": total["leaked"] / max(total["entity"], 1),
        "entity_precision": precision,
        "entity_recall": recall,
        "entity_f1": f1,
        "over_mask_rate": total["overmasked"] / max(total["outside"], 1),
        "preserved": total["preserved"] / total["rows"],
        "per_label": {
            label: _label_scores(found[label], predicted[label], expected[label])
            for label in sorted(expected | predicted)
        },
    }


def _prf(found: int, predicted: int, expected: int) -> tuple[float, float, float]:
    if not predicted and not expected:
        return 1.0, 1.0, 1.0
    return found / max(predicted, 1), found / max(expected, 1), 2 * found / (predicted + expected)


def _label_scores(found: int, predicted: int, expected: int) -> dict:
    return dict(zip(("precision", "recall", "f1"), _prf(found, predicted, expected), strict=False)) | {
        "support": expected
    }


def _row_counts(source: str, truth: _Alignment, guess: _Alignment) -> dict[str, int]:
    """The counts that one row adds to the measures of `score`."""
    inside, covered = _flags(len(source), truth.spans), _flags(len(source), guess.spans)
    kept = all(ours for ours, gold in zip(guess.copied, truth.copied, strict=False) if gold)
    added = any(not (0 < at < len(source) and _within(at, truth.spans)) for at in guess.inserted)
    return {
        "rows": 1,
        "entity": sum(inside),
        "outside": len(source) - sum(inside),
        "leaked": _leaked(source, truth, guess),
        "overmasked": sum(c for c, i in zip(covered, inside, strict=False) if not i),
        "preserved": kept and not added,
    }


def _flags(size: int, marked: list[Span]) -> bytearray:
    flags = bytearray(size)
    for start, end, _ in marked:
        flags[start:end] = b"\1" * (end - start)
    return flags


def _within(at: int, entities: list[Span]) -> bool:
    return any(start < at < end for start, end, _ in entities)


def _leaked(source: str, truth: _Alignment, guess: _Alignment) -> int:
    """How many entity characters survive in the prediction (the module's docstring says what that means)."""
    by_value: dict[str, list[int]] = {}
    for start, end, _ in truth.spans:
        by_value.setdefault(source[start:end], []).append(_surviving(source, guess.copied, start, end))
    leaked = 0
    for value, survivors in by_value.items():
        if len(value) >= _VERBATIM:
            extra = guess.literal.count(value) - truth.literal.count(value)
            survivors = sorted(survivors, reverse=True)
            survivors = [len(value) if i < extra else n for i, n in enumerate(survivors)]
        leaked += sum(survivors)
    return leaked


def _surviving(source: str, copied: bytearray, start: int, end: int) -> int:
    """Characters of source[start:end] in copied runs that have a letter or digit; a lone blank or dot tells
    nothing.
    """
    kept = "".join(source[i] if copied[i] else "\0" for i in range(start, end))
    return sum(len(run) for run in kept.split("\0") if any(map(str.isalnum, run)))


# Alignment: exact where the redaction copied well (all of gold, most of a good model), else by tokens.


def _align(source: str, redacted: str) -> _Alignment:
    """Where each part of `redacted` comes from in `source`."""
    pieces = _pieces(redacted, lambda bracket: bracket not in source)
    bounds = _place(source, pieces)
    if bounds is None and any(p.label is None and _ANY_LABEL.search(p.text) for p in pieces):
        all_labels = _pieces(redacted, lambda bracket: True)
        if (bounds := _place(source, all_labels)) is not None:
            pieces = all_labels
    literal = "".join("\0" if p.label else p.text for p in pieces)
    result = _Alignment([], bytearray(len(source)), [], literal)
    if bounds is not None:
        _record(source, pieces, bounds, 0, result)
    else:
        _align_tokens(source, pieces, result)
    return result


def _pieces(redacted: str, is_label) -> list[_Piece]:
    pieces = []
    for part in _ANY_LABEL.split(redacted):
        if _ANY_LABEL.fullmatch(part) and is_label(part):
            pieces.append(_Piece(part, re.sub(r"_\d+$", "", part[1:-1])))
        elif part and pieces and pieces[-1].label is None:
            pieces[-1] = _Piece(pieces[-1].text + part, None)
        elif part:
            pieces.append(_Piece(part, None))
    return pieces


def _record(
    source: str, pieces: list[_Piece], bounds: list[tuple[int, int]], offset: int, result: _Alignment
) -> None:
    """Enter pieces placed at `bounds` of a text that begins at `offset` of the source."""
    for piece, (start, end) in zip(pieces, bounds, strict=False):
        start, end = start + offset, end + offset
        text = source[start:end]
        if piece.label is None or text == piece.text:  # a source may hold a label of its own
            result.copied[start:end] = b"\1" * (end - start)
            continue
        start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
        if start >= end:  # a label for nothing at all
            start = end = max(start, end)
            result.inserted.append(start)
        result.spans.append(Span(start, end, piece.label))


def _place(source: str, pieces: list[_Piece]) -> list[tuple[int, int]] | None:
    """Bounds of each piece in `source` if its text is there in order and each label stands for at least a
    character.

    Every literal has a leftmost and a rightmost place; where these differ, `_cheapest` chooses among those
    between."""
    labels = [p.label for p in pieces if p.label]
    literals = _literals(pieces)
    head, tail = literals[0], literals[-1]
    if not labels:
        return [(0, len(source))][: len(pieces)] if source == head else None
    limit = len(source) - len(tail)
    if not (source.startswith(head) and source.endswith(tail)):
        return None
    left, at = [], len(head)
    for text in literals[1:-1]:
        if (found := source.find(text, at + 1, limit)) < 0:
            return None
        left.append(found)
        at = found + len(text)
    if at >= limit:
        return None
    right, at = [], limit
    for text in reversed(literals[1:-1]):
        at = source.rfind(text, 0, at - 1)
        right.append(at)
    starts = left if left == right[::-1] else _cheapest(source, literals, labels, left, right[::-1])
    return _bounds(pieces, literals, [0, *starts, limit])


def _literals(pieces: list[_Piece]) -> list[str]:
    """The text before, between and after the labels; one more than there are labels."""
    literals = [""]
    for piece in pieces:
        if piece.label:
            literals.append("")
        else:
            literals[-1] += piece.text
    return literals


def _bounds(pieces: list[_Piece], literals: list[str], starts: list[int]) -> list[tuple[int, int]]:
    bounds, i = [], 0
    for piece in pieces:
        if piece.label:
            bounds.append((starts[i] + len(literals[i]), starts[i + 1]))
            i += 1
        else:
            bounds.append((starts[i], starts[i] + len(literals[i])))
    return bounds


def _cheapest(
    source: str, literals: list[str], labels: list[str], left: list[int], right: list[int]
) -> list[int]:
    """Starts of the inner literals, within [left, right], with the least sum of `_strain` over the labels'
    texts.
    """
    places = [[0]]
    for text, low, high in zip(literals[1:-1], left, right, strict=False):
        places.append([p for p in range(low, high + 1) if source.startswith(text, p)])
    places.append([len(source) - len(literals[-1])])
    if sum(len(a) * len(b) for a, b in itertools.pairwise(places)) > _SEARCH_LIMIT:
        return left
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for label, text, ends in zip(labels, literals, places[1:], strict=False):
        following = {}
        for end in ends:
            ways = [
                (cost + _strain(label, source[start + len(text) : end]) + _cut(source, end), path)
                for start, (cost, path) in best.items()
                if start + len(text) < end
            ]
            if ways:
                cost, path = min(ways, key=lambda way: way[0])
                following[end] = (cost, [*path, end])
        best = following
    return next(iter(best.values()))[1][:-1]


def _cut(source: str, at: int) -> float:
    """The price of a bound inside a word."""
    return 3.0 if 0 < at < len(source) and source[at - 1 : at + 1].isalnum() else 0.0


def _strain(label: str, text: str) -> float:
    """How unlike its class a text looks: only to choose between splits of one run of words."""
    words = text.split()
    digits = any(map(str.isdigit, text))
    if label in _WORDY:
        return _WORDY[label] * (len(words) - 1) + (1 if label == "STREET" else 5) * digits
    if label in _UNSPACED:
        return 5 * (len(words) - 1) + 10 * (label == "EMAIL" and "@" not in text)
    if label == "DATEOFBIRTH":
        return 0.2 * (len(words) - 1) + 10 * (not digits)
    if label in CLASSES:  # the numbers: 8631 BY is one postal code, and Den Haag no part of it
        return 0.4 * (len(words) - 1) + 10 * (not digits) + 3 * sum(any(map(str.islower, w)) for w in words)
    return 0.5 * (len(words) - 1)


def _align_tokens(source: str, pieces: list[_Piece], result: _Alignment) -> None:
    """Align a redaction that changed the text: equal tokens first, then each gap between them."""
    ours = _TOKEN.findall(source)
    theirs = [part for p in pieces for part in ([p] if p.label else _TOKEN.findall(p.text))]
    _walk_blocks(source, ours, theirs, 1, 0, result, _fill_gap)


def _walk_blocks(source: str, ours, theirs, shortest: int, offset: int, result: _Alignment, fill) -> None:
    """Mark the equal runs of two sequences as copied and hand what lies between to `fill`."""
    starts = [offset]
    for token in ours:
        starts.append(starts[-1] + len(token))
    i = j = 0
    for block in SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks():
        if block.size and sum(map(len, ours[block.a : block.a + block.size])) < shortest:
            continue
        fill(source, starts[i], starts[block.a], theirs[j : block.b], result)
        i, j = block.a + block.size, block.b + block.size
        result.copied[starts[block.a] : starts[i]] = b"\1" * (starts[i] - starts[block.a])


def _fill_gap(source: str, start: int, end: int, theirs: list, result: _Alignment) -> None:
    """Align source[start:end] with what stands in its place: as a whole if it goes, else word for word if as
    many.
    """
    text = "".join(t.text if isinstance(t, _Piece) else t for t in theirs)
    pieces = _pieces(text, {t.text for t in theirs if isinstance(t, _Piece)}.__contains__)
    ours = list(_WORD.finditer(source, start, end))
    words = _WORD.findall(text)
    if _fits(source, start, end, pieces, result):
        return
    if len(ours) != len(words) or len(words) < 2:
        _fill_letters(source, start, end, pieces, result)
        return
    for match, word in zip(ours, words, strict=False):
        part = _pieces(word, {p.text for p in pieces if p.label}.__contains__)
        if not _fits(source, *match.span(), part, result):
            _fill_letters(source, *match.span(), part, result)


def _fits(source: str, start: int, end: int, pieces: list[_Piece], result: _Alignment) -> bool:
    """Record the pieces as source[start:end] if `_place` can."""
    bounds = _place(source[start:end], pieces) if pieces and start < end else None
    _record(source, pieces, bounds or [], start, result)
    return bounds is not None or not pieces


def _fill_letters(source: str, start: int, end: int, pieces: list[_Piece], result: _Alignment) -> None:
    letters = [c for p in pieces for c in ([p] if p.label else p.text)]
    if start < end and source[start] == letters[0] == " ":  # the blank before a word that changed
        result.copied[start] = 1
        start, letters = start + 1, letters[1:]
    _walk_blocks(source, source[start:end], letters, _BLOCK, start, result, _fill_rest)


def _fill_rest(source: str, start: int, end: int, theirs: list, result: _Alignment) -> None:
    """Share source[start:end] among the labels in its place; text beside a label, or in no place, is
    inserted.
    """
    labels = [t for t in theirs if isinstance(t, _Piece)]
    if len(labels) < len(theirs) and (labels or start == end):
        result.inserted.append(end)
    if not labels:
        return
    bounds = _place(source[start:end], labels) if end - start >= len(labels) else None
    if bounds is None:  # more labels than characters: the first takes all
        bounds = [(0, end - start)] + [(end - start, end - start)] * (len(labels) - 1)
    _record(source, labels, bounds, start, result)


# how a row is shown


def pieces(text: str, gold: str, prompt: str) -> list[tuple[str, str]]:
    """Returns a redaction in pieces with their kinds: "" for copied text, "ok" for a right label, or a kind
    of LEGEND.

    A "missing" piece is the gold's text. Very long texts are not compared.
    """
    if not gold or max(len(text), len(gold)) > MAX_CHARACTERS:
        return [("", text)]
    ours, theirs = SHOWN_TOKEN.findall(text), SHOWN_TOKEN.findall(gold)
    matcher = SequenceMatcher(str.isspace, theirs, ours, autojunk=False)
    alike = matcher.ratio() >= MIN_RATIO
    secret, found = _entity_tokens(source_text(prompt), gold), []
    for op, i1, i2, j1, j2 in matcher.get_opcodes() if alike else [("replace", 0, 0, 0, len(ours))]:
        if op == "equal":
            found += [("ok" if SHOWN_LABEL.fullmatch(token) else "", token) for token in ours[j1:j2]]
        elif op == "delete":
            found.append(("missing", "".join(theirs[i1:i2])))
        else:
            found += _wrong_or_leaked(ours[j1:j2], secret)
    return joined(found)


def _entity_tokens(source: str, gold: str) -> set[str]:
    """The tokens of the source, in lower case, in whose place the gold has a label."""
    given, wanted = SHOWN_TOKEN.findall(source[:MAX_CHARACTERS]), SHOWN_TOKEN.findall(gold)
    ops = SequenceMatcher(str.isspace, given, wanted, autojunk=False).get_opcodes()
    spans = [given[i1:i2] for _, i1, i2, j1, j2 in ops if any(map(SHOWN_LABEL.fullmatch, wanted[j1:j2]))]
    return {token.casefold() for span in spans for token in span}


def _wrong_or_leaked(tokens: list[str], secret: set[str]) -> list[tuple[str, str]]:
    """[(kind, token)]: "leak" for an entity's words and what stands between two of them, else "wrong"."""
    words = [i for i, token in enumerate(tokens) if re.search(r"\w", token)]
    kinds = [
        "leak" if i in words and token.casefold() in secret else "wrong" for i, token in enumerate(tokens)
    ]
    for a, b in pairwise(words):
        if kinds[a] == kinds[b] == "leak":
            kinds[a:b] = ["leak"] * (b - a)
    return list(zip(kinds, tokens, strict=True))

"""Redaction: measures of leaked entities, found entities, text masked in excess, and text kept unchanged.

A label such as [GIVENNAME_1] or [MASKED] stands for a piece of the source text. All other text of a redaction
is copied from the source. The gold (expected) redaction and the model's are aligned to the source
(tasks/alignment.py). The measures count source characters and spans:

    entity      a span [start, end) of the source that a label of the gold stands for, with the label's class
    masked      a source character that a label of the model's redaction stands for
    copied      a source character that the model's redaction repeats in its place
    leaked      an entity character that is copied, in a run with a letter or digit. Besides, if the text of
                the model's redaction has a value (3 characters or more) n times more often than the text of
                the gold, n entities with this value leak as a whole

An empty response leaks nothing, but fails `preserved`, the entity scores and `exact_match`. `compare` gives
the counts of one row for rewards (tasks/rewards.py), which pay no such response.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from data.rows import Sample
from tasks.alignment import LABEL, Alignment, Span
from tasks.measures import (
    MAX_CHARACTERS,
    TOKEN,
    Counts,
    Metric,
    by_label,
    differences,
    exact_counts,
    exact_match,
    joined,
    label_scores,
    total,
)

INSTRUCTION = (
    "Mask all PII in the following text. Replace each entity with the exact UPPERCASE label in square "
    "brackets (e.g., [PERSON], [EMAIL], [PHONE], [USERNAME], [ADDRESS], [CREDIT_CARD], [TIME], etc.). "
    "Preserve all non-PII text, whitespace, and punctuation exactly. Return ONLY the redacted text."
)
CLASSES = (
    "ACCOUNTNUM BUILDINGNUM CITY CREDITCARDNUMBER DATEOFBIRTH DRIVERLICENSENUM EMAIL GIVENNAME IDCARDNUM "
    "PASSWORD SOCIALNUM STREET SURNAME TAXNUM TELEPHONENUM USERNAME ZIPCODE"
).split()
METRICS = (
    Metric("leak_rate", "leak rate", percent=True, lower_is_better=True),
    Metric("entity_f1", "entity F1", percent=True, lower_is_better=False),
    Metric("preserved", "preserved", percent=True, lower_is_better=False),
    Metric("over_mask_rate", "over-masked", percent=True, lower_is_better=True),
)
LEGEND = {
    "ok": "masked as in the gold",
    "leaked": "leaked",
    "wrong": "wrong or altered",
    "missing": "missing",
}
TITLES = {"source": "Source", "gold": "Gold"}

_TEXT_MARK = "\n\nText:\n"
_KNOWN_LABEL = re.compile(r"\[(?:{}|MASKED)(?:_\d+)?\]".format("|".join(CLASSES)))
# A label of a known class in lower case or with a blank, or with a bracket missing.
_BROKEN_LABEL = re.compile(
    r"\[\s*(?i:{0})(?:[ _-]?\d+)?\s*\]|(?<!\[)\b(?:{0})_\d+\b\]?|\[(?:{0})_\d+\b(?!\])".format(
        "|".join(CLASSES)
    )
)
_SHOWN_TOKEN = re.compile(LABEL.pattern + "|" + TOKEN.pattern)
_MIN_VERBATIM = 3  # A shorter value occurs inside other words by chance.
# How unlike its class a text is: the costs of each word after the first, of digits, of their absence, and of
# each word with a lower-case letter. Most classes are numbers: 8631 BY is a postal code, Den Haag is not.
_COSTS = dict.fromkeys(CLASSES, (0.4, 0.0, 10.0, 3.0))
_COSTS |= {"GIVENNAME": (1.0, 5, 0, 0), "SURNAME": (0.9, 5, 0, 0), "DATEOFBIRTH": (0.2, 0, 10, 0)}
_COSTS |= {"CITY": (0.5, 5, 0, 0), "STREET": (0.5, 1, 0, 0)}
_COSTS |= dict.fromkeys(("EMAIL", "USERNAME", "PASSWORD"), (5.0, 0.0, 0.0, 0.0))


def prompt_for(text: str) -> str:
    """Returns the prompt for a redaction: INSTRUCTION before the text, if the text does not begin with it."""
    return text if text.startswith(INSTRUCTION) else INSTRUCTION + _TEXT_MARK + text


def source_text(prompt: str) -> str:
    """Returns the text after a blank line and the line `Text:`, or the whole prompt if it lacks these."""
    _, mark, text = prompt.partition(_TEXT_MARK)
    return text if mark else prompt


def is_redaction(prompt: str, response: str) -> bool:
    """Returns whether the prompt begins with INSTRUCTION or the response has a label of a known class."""
    return prompt.startswith(INSTRUCTION) or _KNOWN_LABEL.search(response) is not None


def applies(samples: list[Sample]) -> bool:
    """Returns whether every sample ends with a redaction."""
    ends = [s.messages[-2:] if s.messages else () for s in samples]
    return bool(samples) and all(len(end) == 2 and is_redaction(end[0][1], end[1][1]) for end in ends)


def spans(source: str, redacted: str) -> list[Span]:
    """Returns the source span that each label of a redaction stands for, without white space at its ends.

    A word in brackets that the source has too is a label only if the redaction cannot be aligned otherwise.
    If two labels stand for three words, the words are divided as suits the classes of the labels best.
    """
    return _align(source, redacted).spans


def score(rows: Sequence[tuple[str, str, str]]) -> dict:
    """Returns the measures of one or more rows (prompt, gold, response), stripped of outer white space.

        exact_match       = rows with response == gold / rows
        leak_rate         = leaked entity characters / entity characters (0 without entities)
        entity_precision  = correct spans (equal to a gold span in bounds and class) / spans of the response
        entity_recall     = correct spans / gold spans
        entity_f1         = 2 * correct spans / (spans of the response + gold spans)
        over_mask_rate    = masked characters outside entities / characters outside entities
        preserved         = rows that copy all text outside entities and add no text there / rows
        per_label         = {class: {precision, recall, f1, support (number of gold spans)}}

    A span is a range of source characters that a label stands for. Without any span, the entity scores are 1.
    """
    return from_counts(total(counts, rows))


def counts(row: tuple[str, str, str]) -> Counts:
    """Returns what one row adds: characters, and ("gold", class), ("response", class), ("right", class)."""
    prompt, gold, text = row
    source = source_text(prompt).strip()
    truth, guess = _align(source, gold.strip()), _align(source, text.strip())
    kinds = {"gold": truth.spans, "response": guess.spans, "right": set(truth.spans) & set(guess.spans)}
    labels = Counter((kind, span.label) for kind, spans_ in kinds.items() for span in spans_)
    return {**exact_counts(gold, text), **_row_counts(truth, guess)._asdict(), **labels}


def from_counts(sums: Counts) -> dict:
    """Returns the measures of the rows whose counts add up to `sums`."""
    expected, predicted, found = (by_label(sums, kind) for kind in ("gold", "response", "right"))
    entities = label_scores(*(sum(kind.values()) for kind in (found, predicted, expected)))
    return {
        "exact_match": exact_match(sums),
        "leak_rate": sums["leaked"] / max(sums["entity"], 1),
        **{f"entity_{key}": entities[key] for key in ("precision", "recall", "f1")},
        "over_mask_rate": sums["over_masked"] / max(sums["outside"], 1),
        "preserved": sums["preserved"] / sums["rows"],
        "per_label": {
            label: label_scores(found.get(label, 0), predicted.get(label, 0), expected.get(label, 0))
            for label in sorted(expected | predicted)
        },
    }


class Comparison(NamedTuple):
    """The comparison of one response with its gold response: counts of source characters and of spans."""

    entity: int  # characters of entities
    outside: int  # characters outside entities
    leaked: int  # entity characters, see above
    over_masked: int  # characters outside entities that a label of the response stands for
    # Characters that the gold masks or copies, and the response does neither.
    lost: int  # in entities
    lost_outside: int
    added: int  # characters of the response, outside labels, that are not the source's in their place
    preserved: bool  # the response copies all text outside entities and adds no text there
    correct: int  # spans that both have, in bounds and class
    predicted: int  # spans of the response
    expected: int  # spans of the gold


@lru_cache(maxsize=4096)  # The rewards of one completion ask for the same comparison.
def compare(prompt: str, gold: str, text: str) -> Comparison:
    """Returns the counts of one row, stripped of outer white space as in `score`."""
    source = source_text(prompt).strip()
    return _row_counts(_align(source, gold.strip()), _align(source, text.strip()))


def broken_labels(redacted: str) -> list[str]:
    """Returns what looks like a label of a known class and is none, such as [city_1] or a missing bracket."""
    return [found for found in _BROKEN_LABEL.findall(redacted) if not LABEL.fullmatch(found)]


class Replaced(NamedTuple):
    """What a redaction of a file does to its source."""

    change: str  # how it changes text outside its labels, "" if it does not
    values: list[str]  # what the labels stand for, each once
    left: list[str]  # those of the values that remain elsewhere, as words


def replaced(source: str, redacted: str) -> Replaced:
    """Compares a redaction with its source; both are stripped."""
    found, change = _align(source, redacted), ""
    kept = bytes(a or b for a, b in zip(found.copied, found.masked, strict=True)).decode()
    lost = [gap.span() for gap in re.finditer(r"\0+", kept) if source[slice(*gap.span())].strip()]
    if lost:
        change = f"changes or leaves out {source[lost[0][0] : lost[0][0] + 40]!r}"
    elif _added(found) > 0:
        change = f"adds {_added(found)} characters"
    elif found.inserted:
        change = "has a label for nothing"
    values = list(dict.fromkeys(source[start:end] for start, end, _ in found.spans))
    again = [value for value in values if value in found.literal]
    left = [v for v in again if re.search(rf"(?<!\w){re.escape(v)}(?!\w)", found.literal)]
    return Replaced(change, values, left)


def likely_classes(text: str) -> list[str]:
    """Returns the classes that a text may be taken for: one word is no number, but may be a name or city."""
    costs = {label: _cost(label, text) for label in CLASSES}
    return [label for label, cost in costs.items() if cost <= min(costs.values()) + 1]


def overall(measures: dict) -> dict | None:
    """Returns precision, recall and F1 over all classes."""
    return {key: measures[f"entity_{key}"] for key in ("precision", "recall", "f1")}


def _align(source: str, redacted: str) -> Alignment:
    return Alignment(source, redacted, _cost)


def _cost(label: str, text: str) -> float:
    words = text.split()
    word, digit, no_digit, lower = _COSTS.get(label, (0.5, 0, 0, 0))
    cost = word * (len(words) - 1) + (digit if any(map(str.isdigit, text)) else no_digit)
    cost += lower * sum(any(map(str.islower, w)) for w in words)
    return cost + 10 * (label == "EMAIL" and "@" not in text)


def _row_counts(truth: Alignment, guess: Alignment) -> Comparison:
    """Returns what one row adds to the counts of `score`."""
    kept = all(ours or not gold for ours, gold in zip(guess.copied, truth.copied, strict=True))
    inside = all(any(start < at < end for start, end, _ in truth.spans) for at in guess.inserted)
    seen = [a or b for a, b in zip(guess.copied, guess.masked, strict=True)]
    return Comparison(
        entity=sum(truth.masked),
        outside=len(truth.source) - sum(truth.masked),
        leaked=_leaked(truth, guess),
        over_masked=sum(ours and not gold for ours, gold in zip(guess.masked, truth.masked, strict=True)),
        lost=sum(gold and not ours for ours, gold in zip(seen, truth.masked, strict=True)),
        lost_outside=sum(gold and not ours for ours, gold in zip(seen, truth.copied, strict=True)),
        added=max(_added(guess) - _added(truth), 0),
        preserved=kept and inside,
        correct=len(set(truth.spans) & set(guess.spans)),
        predicted=len(guess.spans),
        expected=len(truth.spans),
    )


def _added(redaction: Alignment) -> int:
    return len(redaction.literal.replace("\0", "")) - sum(redaction.copied)


def _leaked(truth: Alignment, guess: Alignment) -> int:
    """Returns the number of leaked entity characters."""
    by_value: dict[str, list[int]] = {}
    for start, end, _ in truth.spans:
        kept = "".join(truth.source[i] if guess.copied[i] else "\0" for i in range(start, end))
        # A lone blank or dot tells nothing.
        copied = sum(len(run) for run in kept.split("\0") if any(map(str.isalnum, run)))
        by_value.setdefault(truth.source[start:end], []).append(copied)
    leaked = 0
    for value, copied_counts in by_value.items():
        verbatim = guess.literal.count(value) - truth.literal.count(value)
        whole = max(verbatim, 0) if len(value) >= _MIN_VERBATIM else 0
        # A value that is copied in its place is one of the verbatim ones.
        copied_counts.sort(reverse=True)
        leaked += len(value) * min(whole, len(copied_counts)) + sum(copied_counts[whole:])
    return leaked


shown_prompt = source_text


def pieces(text: str, gold: str, prompt: str) -> list[tuple[str, str]]:
    """Splits a response into (kind, text) pieces. A "missing" piece is text that only the gold response has.

    The other kinds are "" for text as in the gold, "ok" for a label as in the gold, "leaked" for words of an
    entity, and "wrong" for other text that the gold does not have.
    """
    source, found = source_text(prompt)[:MAX_CHARACTERS], []
    entities = [source[start:end] for start, end, _ in spans(source, gold[:MAX_CHARACTERS])]
    secret = {token.casefold() for entity in entities for token in _SHOWN_TOKEN.findall(entity)}
    for kind, tokens in differences(text, gold, _SHOWN_TOKEN, unlike="wrong"):
        if kind == "wrong":
            found += _wrong_or_leaked(tokens, secret)
        else:
            found += [
                (kind or ("ok" if LABEL.fullmatch(token) and token in gold else ""), token)
                for token in tokens
            ]
    return joined(found)


def _wrong_or_leaked(tokens: list[str], secret: set[str]) -> list[tuple[str, str]]:
    """Returns (kind, token) pairs: "leaked" for words in `secret` and between two of them, else "wrong"."""
    words = [i for i, token in enumerate(tokens) if re.search(r"\w", token)]
    kinds = ["leaked" if i in words and t.casefold() in secret else "wrong" for i, t in enumerate(tokens)]
    for a, b in pairwise(words):
        if kinds[a] == kinds[b] == "leaked":
            kinds[a:b] = ["leaked"] * (b - a)
    return list(zip(kinds, tokens, strict=True))

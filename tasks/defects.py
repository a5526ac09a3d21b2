"""Looks for defects of rows that only their task can tell, for train.py --check-data.

Each function returns {kind: {id of a sample: note}}, as those of data/defects.py.
"""

import re
from collections import Counter
from collections.abc import Sequence
from types import ModuleType

from common.errors import closest
from data.defects import ANY, MANY, NEVER, Found
from data.rows import Sample
from tasks import classification, redaction
from tasks.alignment import LABEL
from tasks.choose import choose_task

KINDS: dict[str, tuple[str, float]] = {
    "unknown_labels": ("responses that are none of data.labels", ANY),
    "rare_labels": ("rows with a label that is rare and not a known one", NEVER),
    "broken_labels": ("redactions with a label that is not whole", MANY),
    "changed_text": ("redactions that change text outside labels", MANY),
    "left_values": ("redactions that leave a value which they replace elsewhere", MANY),
    "unbalanced": ("rows of a label that has most of the rows", NEVER),
}
RARE, RARE_SHARE = 3, 0.005  # A label is rare in fewer rows than 3 or than this share of them.
MOST = 0.8  # A file is a classification if so many of its rows have a usual label.
DOMINANT = 0.9  # share of the rows
MIN_VALUE = 4  # characters; a shorter value occurs elsewhere by chance


def likely_task(name: str, samples: Sequence[Sample], labels: Sequence[str]) -> ModuleType:
    """Returns the task called `name`; for "auto" that of most samples, of which the others may be defects."""
    if name != "auto" or labels:
        return choose_task(name, [*samples], labels)
    if 2 * sum(map(_is_redaction, samples)) > len(samples):
        return redaction
    counts = Counter(s.messages[-1][1].strip() for s in samples if s.messages)
    usual = [s for s in samples if s.messages and counts[s.messages[-1][1].strip()] >= RARE]
    if len(usual) > MOST * len(samples) and classification.applies(usual):
        return classification
    return choose_task(name, [*samples])


def task_defects(task: ModuleType, samples: Sequence[Sample], labels: Sequence[str]) -> Found:
    """Returns the defects of a task's samples; `labels` are those of a classification that the user names."""
    chats = [s for s in samples if s.messages and s.messages[-1][1]]  # GRPO's rows may have no response
    if task is redaction:
        chats = [s for s in chats if _is_redaction(s)]
    rows = [(s.id, s.messages[-2][1], s.messages[-1][1]) for s in chats if s.messages]
    if task is redaction:
        return redaction_defects(rows)
    return classification_defects(rows, labels) if task is classification else {}


def _is_redaction(sample: Sample) -> bool:
    return bool(sample.messages) and redaction.applies([sample])


def classification_defects(rows: Sequence[tuple[str, str, str]], labels: Sequence[str]) -> Found:
    """Returns rows of unknown and rare labels, and the rows of one label that nearly all rows have."""
    given = {id: response.strip() for id, _, response in rows}
    counts = Counter(given.values())
    known = {label.strip().casefold() for label in labels}
    found: Found = {"unknown_labels": {}, "rare_labels": {}}
    if known:
        strangers = {id: label for id, label in given.items() if label.casefold() not in known}
        found["unknown_labels"] = {
            id: f"{label[:60]!r}{closest(label, labels)}" for id, label in strangers.items()
        }
    else:
        found["rare_labels"] = _rare([*given.items()], counts, len(rows), set())
    [(label, most)] = counts.most_common(1) or [("", 0)]
    if len(counts) > 1 and most > DOMINANT * len(rows):
        note = f"{label[:60]!r} is the label of {most / len(rows):.0%}"
        found["unbalanced"] = {id: note for id, own in given.items() if own == label}
    return found


def redaction_defects(rows: Sequence[tuple[str, str, str]]) -> Found:
    """Returns redactions whose labels are rare or broken, that change text, or that leave a value."""
    found: Found = {"rare_labels": {}, "broken_labels": {}, "changed_text": {}, "left_values": {}}
    classes: list[tuple[str, str]] = []
    masked: Counter[str] = Counter()  # rows that replace a value
    left: dict[str, list[str]] = {}
    for id, prompt, response in rows:
        source, text = redaction.source_text(prompt).strip(), response.strip()
        if broken := [part for part in redaction.broken_labels(text) if part not in source]:
            found["broken_labels"][id] = repr(broken[0])
        change, values, again = redaction.replaced(source, text)
        masked.update(values)
        if change:
            found["changed_text"][id] = change
        elif again := [value for value in again if len(value) >= MIN_VALUE]:
            left[id] = again
        labels = {name for name in LABEL.findall(text) if name not in source}
        classes += [(id, name) for name in {re.sub(r"_\d+", "", label).strip("[]") for label in labels}]
    # The name of a city may be the word "City" of a form, which most rows leave.
    plain = Counter(word for _, _, response in rows for word in set(response.split())) if left else {}
    for id, again in left.items():
        if odd := [value for value in again if plain.get(value, 0) <= masked[value]]:
            found["left_values"][id] = repr(odd[0])
    counts = Counter(name for _, name in classes)
    found["rare_labels"] = _rare(classes, counts, len(rows), {*redaction.CLASSES, "MASKED"})
    return found


def _rare(pairs: Sequence[tuple[str, str]], counts: Counter, rows: int, known: set[str]) -> dict[str, str]:
    """Returns {id: note} of the pairs (id, label) whose label is rare and not known."""
    rare = {name for name, n in counts.items() if n < max(RARE, RARE_SHARE * rows)} - known
    usual = sorted(known or {*counts} - rare)
    hints = {name: closest(name, usual) for name in rare}
    hints = {name: hint if "did you mean" in hint else "" for name, hint in hints.items()}
    return {id: f"{name[:60]!r}{hints[name]}" for id, name in pairs if name in rare and usual}

"""Makes preference pairs for DPO out of redaction rows, without annotators.

    python -m tasks.redaction_pairs --data FILE [FILE ...] --out FILE [--seed N] [--limit N] [--kinds A,B]

A pair is {"prompt", "chosen", "rejected", "kind"}. `chosen` is the gold redaction of the row, and `rejected`
is the same with one error of a kind:

    leak        an entity stands there in the place of its label
    class       a label has the class of something else that the entity looks like
    over_mask   a label replaces a word outside entities
    altered     a word, a digit or an accent outside entities is changed, or a word is missing
    runs_on     the redaction does not end, but begins again

Each pair is checked: the error changes what tasks.redaction counts for its kind, and nothing else. The kinds
are about equally frequent. A row without entities permits neither `leak` nor `class`. Some rows permit no
`runs_on`: the alignment takes text after a last entity for a part of it. The pairs depend only on the rows,
their order and the seed.
"""

import argparse
import json
import random
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from common.errors import DONE, closest, listed, run
from common.files import replacing
from common.progress import say
from data.rows import Sample, read_samples
from tasks.alignment import LABEL
from tasks.redaction import (
    CLASSES,
    Comparison,
    Span,
    compare,
    is_redaction,
    likely_classes,
    source_text,
    spans,
)

_WORD = re.compile(r"\w+")
_MIN_WORD = 3  # characters of a word that a label replaces
_TRIES = 40  # An error at one place may change more than it should; so many places are tried.


class Redaction(NamedTuple):
    """A gold redaction in pieces: the source, and its spans with the labels that stand for them."""

    source: str
    spans: list[Span]
    labels: list[str]

    def text(self) -> str:
        """Returns the redaction."""
        pieces, at = [], 0
        for span, label in zip(self.spans, self.labels, strict=True):
            pieces += [self.source[at : span.start], label]
            at = span.end
        return "".join([*pieces, self.source[at:]])

    def with_label(self, span: Span, label: str) -> "Redaction":
        """Returns the redaction with one more label."""
        found = sorted([*zip(self.spans, self.labels, strict=True), (span, label)])
        return Redaction(self.source, [s for s, _ in found], [name for _, name in found])

    def without(self, index: int) -> "Redaction":
        """Returns the redaction without one of its labels."""
        left = [i for i in range(len(self.spans)) if i != index]
        return Redaction(self.source, [self.spans[i] for i in left], [self.labels[i] for i in left])

    def replaced(self, start: int, end: int, text: str) -> str:
        """Returns the redaction with other text in the place of source[start:end], outside the spans."""
        piece = Span(start, end, "")
        return self.with_label(piece, text).text()

    def words(self) -> list[tuple[int, int]]:
        """Returns (start, end) of each word of the source that has no character in a span."""
        words = [match.span() for match in _WORD.finditer(self.source)]
        return [(a, b) for a, b in words if all(b <= start or end <= a for start, end, _ in self.spans)]


def redaction_of(prompt: str, gold: str) -> Redaction | None:
    """Returns the pieces of a gold redaction, or None if it is not the source with labels in it."""
    source, gold = source_text(prompt).strip(), gold.strip()
    labels = [label for label in LABEL.findall(gold) if label not in source]
    found = spans(source, gold)
    if len(found) != len(labels):
        return None
    redaction = Redaction(source, found, labels)
    return redaction if redaction.text() == gold else None


# --- the errors: each yields responses, and the first that passes its check is taken


def _leak(gold: Redaction, rng: random.Random) -> Iterator[str]:
    for index in _shuffled(range(len(gold.labels)), rng):
        yield gold.without(index).text()


def _class(gold: Redaction, rng: random.Random) -> Iterator[str]:
    for index in _shuffled(range(len(gold.labels)), rng):
        span = gold.spans[index]
        if span.label in CLASSES:  # Another style has one label for all classes.
            for other in _shuffled(_likely(gold, span), rng):
                label = _next_label(gold, other)
                yield gold.without(index).with_label(span, label).text()


def _over_mask(gold: Redaction, rng: random.Random) -> Iterator[str]:
    for start, end in _shuffled(gold.words(), rng):
        if end - start >= _MIN_WORD:
            span = Span(start, end, "")
            known = {other.label for other in gold.spans}
            one_for_all = known and known.isdisjoint(CLASSES)
            label = gold.labels[0] if one_for_all else _next_label(gold, rng.choice(_likely(gold, span)))
            yield gold.with_label(span, label).text()


def _altered(gold: Redaction, rng: random.Random) -> Iterator[str]:
    words, changes = gold.words(), ("drop", "swap", "other")
    for (start, end), change in _shuffled([(w, c) for w in words for c in changes], rng):
        word = gold.source[start:end]
        if any(map(str.isdigit, word)):
            yield gold.replaced(start, end, _other_digit(word, rng))
        elif _plain(word) != word:
            yield gold.replaced(start, end, _plain(word))
        elif change == "drop" and gold.source[start - 1 : start] == " ":
            yield gold.replaced(start - 1, end, "")
        elif change == "swap" and len(word) > 3:
            at = rng.randrange(1, len(word) - 1)
            yield gold.replaced(start, end, word[:at] + word[at + 1] + word[at] + word[at + 2 :])
        else:
            others = [gold.source[a:b] for a, b in words if gold.source[a:b] != word]
            yield gold.replaced(start, end, rng.choice(others or [word * 2]))


def _runs_on(gold: Redaction, rng: random.Random) -> Iterator[str]:
    text = gold.text()
    lines = [line for line in re.split(r"(?<=[.!?])\s+|\n+", text) if line.strip()]
    beginnings = [" ".join(text.split()[:count]) for count in range(2, 9)]
    again = [text, *lines, *rng.sample(beginnings, 3)]
    for more, between in _shuffled([(m, b) for m in again for b in (" ", "\n", "\n\n")], rng):
        yield text + between + more.strip()


def _shuffled(items: Sequence, rng: random.Random) -> list:
    return rng.sample(items, len(items))


def _likely(gold: Redaction, span: Span) -> list[str]:
    """Returns the classes that a span's text looks like, but its own."""
    likely = [label for label in likely_classes(gold.source[span.start : span.end]) if label != span.label]
    return likely or [label for label in CLASSES if label != span.label]


def _next_label(gold: Redaction, name: str) -> str:
    """Returns a label of a class with the index that follows those of the redaction, if it has indices."""
    indices = [re.fullmatch(r"\[(.*)_(\d+)\]", label) for label in gold.labels]
    if gold.labels and not any(indices):
        return f"[{name}]"
    return f"[{name}_{1 + max((int(m[2]) for m in indices if m and m[1] == name), default=0)}]"


def _other_digit(word: str, rng: random.Random) -> str:
    at = rng.choice([i for i, c in enumerate(word) if c.isdigit()])
    return word[:at] + rng.choice([d for d in "0123456789" if d != word[at]]) + word[at + 1 :]


def _plain(word: str) -> str:
    """Returns a word without its accents."""
    marks = unicodedata.normalize("NFD", word)
    return unicodedata.normalize("NFC", "".join(c for c in marks if not unicodedata.combining(c)))


# --- the checks: what an error must change in the counts of a row, where nothing else may change


def _only_leaks(counts: Comparison) -> bool:
    hit = counts.leaked > 0 and counts.correct == counts.predicted == counts.expected - 1
    return hit and _keeps_text(counts)


def _only_mistakes_a_class(counts: Comparison) -> bool:
    hit = counts.correct == counts.expected - 1 and counts.predicted == counts.expected
    return hit and not counts.leaked and _keeps_text(counts)


def _only_masks_more(counts: Comparison) -> bool:
    hit = counts.over_masked > 0 and counts.predicted == counts.expected + 1
    return hit and counts.correct == counts.expected and not (counts.leaked or counts.lost or counts.added)


def _only_alters_text(counts: Comparison) -> bool:
    hit = not counts.preserved and counts.correct == counts.predicted == counts.expected
    return hit and not (counts.leaked or counts.over_masked or counts.lost)


def _only_adds_text(counts: Comparison) -> bool:
    hit = not counts.preserved and counts.added > 0 and counts.correct == counts.expected
    return hit and not (counts.leaked or counts.over_masked or counts.lost or counts.lost_outside)


def _keeps_text(counts: Comparison) -> bool:
    return counts.preserved and not (counts.over_masked or counts.lost or counts.added)


Error = Callable[[Redaction, random.Random], Iterator[str]]
KINDS: dict[str, tuple[Error, Callable[[Comparison], bool]]] = {
    "leak": (_leak, _only_leaks),
    "class": (_class, _only_mistakes_a_class),
    "over_mask": (_over_mask, _only_masks_more),
    "altered": (_altered, _only_alters_text),
    "runs_on": (_runs_on, _only_adds_text),
}


# --- pairs of a file


def rejected(prompt: str, gold: str, kind: str, seed: int = 0) -> str | None:
    """Returns the gold redaction with an error of the kind, or None if the row permits none."""
    redaction = redaction_of(prompt, gold)
    if redaction is None:
        return None
    make, passes = KINDS[kind]
    responses = make(redaction, random.Random(f"{seed} {kind} {prompt}"))
    for response, _ in zip(responses, range(_TRIES), strict=False):
        if response.strip() != gold.strip() and passes(compare(prompt, gold, response)):
            return response
    return None


def pairs(samples: Sequence[Sample], kinds: Sequence[str], seed: int = 0) -> list[dict[str, str]]:
    """Returns a pair for each sample that permits one, of the kind that is the rarest so far."""
    counts, found = dict.fromkeys(kinds, 0), []
    for sample in samples:
        (_, prompt), (_, gold) = (sample.messages or ())[-2:]
        # Of equally rare kinds, the one is taken that this row's random order has first.
        order = _shuffled(list(kinds), random.Random(f"{seed} {prompt}"))
        for kind in sorted(order, key=lambda kind: counts[kind]):
            response = rejected(prompt, gold, kind, seed)
            if response is not None:
                counts[kind] += 1
                found.append({"prompt": prompt, "chosen": gold, "rejected": response, "kind": kind})
                break
    return found


def main(argv: list[str] | None = None) -> int:
    """Writes the pairs of redaction files; returns the exit code (common/errors.py)."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.redaction_pairs", description="Preference pairs for DPO out of redaction rows."
    )
    add = parser.add_argument
    add("--data", required=True, nargs="+", type=Path, metavar="FILE", help="redaction rows, as for training")
    add("--out", required=True, type=Path, metavar="FILE", help="the JSONL file of pairs to write")
    add("--seed", type=int, default=0, metavar="N", help="another seed gives other errors (default 0)")
    add("--limit", type=int, metavar="N", help="take the first N rows only")
    add("--kinds", default=",".join(KINDS), metavar="A,B", help="default: %(default)s")
    args = parser.parse_args(argv)
    return run(lambda: write_pairs(args))


def write_pairs(args: argparse.Namespace) -> int:
    """Writes the file of pairs and prints how many there are of each kind; raises ValueError on bad input."""
    kinds = _checked_kinds(args)
    samples = read_samples(args.data)[0][: args.limit]
    others = [s.id for s in samples if not _is_single(s)]
    if others:
        head = f"{len(others)} row(s) are not one text and its redaction:"
        raise ValueError(listed(head, others, "Leave them out of --data."))
    found = pairs(samples, kinds, args.seed)
    if not found:
        raise ValueError(f"none of the {len(samples)} rows permits an error of the kind {', '.join(kinds)}")
    with replacing(args.out) as part:
        lines = [json.dumps(pair, ensure_ascii=False, separators=(",", ":")) for pair in found]
        part.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    counts = Counter(pair["kind"] for pair in found)
    say(f"{args.out}: {len(found)} pairs")
    for kind in kinds:
        say(f"  {kind:12}{counts[kind]:>8,}")
    if len(found) < len(samples):
        say(f"  {'left out':12}{len(samples) - len(found):>8,}  (rows that permit no such error)")
    return DONE


def _checked_kinds(args: argparse.Namespace) -> list[str]:
    """Returns the kinds, each once; raises ValueError with every problem of the options."""
    kinds = list(dict.fromkeys(kind.strip() for kind in args.kinds.split(",")))
    found = [f"--kinds: {kind!r} is unknown{closest(kind, KINDS)}" for kind in kinds if kind not in KINDS]
    if args.limit is not None and args.limit < 1:
        found.append(f"--limit is {args.limit}; it must be 1 or more")
    if args.out.is_dir():
        found.append(f"--out {args.out} is a folder; name a file")
    elif not args.out.parent.is_dir():
        found.append(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    elif any(args.out.resolve() == path.resolve() for path in args.data):
        found.append(f"--out {args.out} is also a file of --data; write the pairs to another file")
    if found:
        raise ValueError("\n".join(found))
    return kinds


def _is_single(sample: Sample) -> bool:
    turns = sample.messages or ()
    return len(turns) == 2 and is_redaction(turns[0][1], turns[1][1])


if __name__ == "__main__":
    sys.exit(main())

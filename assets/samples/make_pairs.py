"""Make the redaction samples: texts with entities in six languages, and the same texts with labels in their
place.

    python assets/samples/make_pairs.py --out assets/samples --train 4000 --val 300 --unseen 300 --seed 3407

reads clauses/<language>.txt (sections `== train`, `== unseen`, ...; {CLASS} and {distractor} slots), composes
1 to 5 clauses, fills them with values.py, adds the mess of real texts, and writes train.jsonl, val.jsonl and
val_unseen.jsonl. val has the clauses of train with new values; val_unseen has clauses and values that train
lacks. No name, city or street of train is in either. A label's number is that of its value within the sample
and the class.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run as a script, Python looks in assets/samples only
    sys.path.insert(0, str(ROOT))

from assets.samples.values import LANGUAGES, SPLIT_CLASSES, Values, load_fakers
from tasks.redaction import CLASSES, Span, prompt_for, spans

CLAUSES = Path(__file__).resolve().parent / "clauses"
DISTRACTORS = ("date", "time", "number", "price", "year", "percent", "code")
SECTIONS = ("train", "unseen", "neutral", "neutral_unseen", "fields", "fields_unseen")
SETS = {
    "train": ("train", ""),
    "val": ("held", ""),
    "val_unseen": ("held", "_unseen"),
}  # side of values, kind of sections
SLOT = re.compile(r"\{(\w+)\}")
MAIL = {  # header words, greetings and closings; not for val_unseen, which has no frame of train's
    "en": (
        "From To Subject Date",
        ("Hi", "Dear", "Hello", "Hey"),
        ("Best regards,", "Cheers,", "Kind regards", "Thanks,", "Yours sincerely,"),
    ),
    "de": (
        "Von An Betreff Datum",
        ("Hallo", "Liebe", "Lieber", "Guten Tag"),
        ("Mit freundlichen Grüßen", "Viele Grüße", "LG", "MfG"),
    ),
    "nl": (
        "Van Aan Onderwerp Datum",
        ("Beste", "Hoi", "Hallo", "Dag"),
        ("Met vriendelijke groet,", "Groeten,", "Groetjes", "Mvg,"),
    ),
    "fr": (
        "De À Objet Date",
        ("Bonjour", "Cher", "Chère", "Salut"),
        ("Cordialement,", "Bien à vous,", "Merci d'avance,", "Bises"),
    ),
    "es": (
        "De Para Asunto Fecha",
        ("Hola", "Estimado", "Estimada", "Querida"),
        ("Un saludo,", "Saludos cordiales,", "Atentamente,", "Besos"),
    ),
    "it": (
        "Da A Oggetto Data",
        ("Ciao", "Gentile", "Caro", "Cara"),
        ("Cordiali saluti,", "Saluti,", "Distinti saluti", "A presto,"),
    ),
}
QUOTES = {"en": '""', "de": "„“", "nl": '""', "fr": "«»", "es": "«»", "it": '""'}


class Part(NamedTuple):
    """A piece of a text; `label` is its class, or None where it is no entity."""

    text: str
    label: str | None = None


class Pair(NamedTuple):
    """A sample before it is a row: source text, redacted text, and the entities as spans of the source."""

    language: str
    source: str
    redacted: str
    entities: list[Span]


def read_clauses(folder: Path = CLAUSES) -> dict[str, dict[str, list[str]]]:
    """{language: {section: lines}} of the clause files; raises ValueError with every bad line of them."""
    problems, languages = [], {}
    for language in LANGUAGES:
        path, section = Path(folder) / f"{language}.txt", None
        sections = languages[language] = {name: [] for name in SECTIONS}
        if not path.is_file():
            problems.append(f"{path}: no such file; give the folder of the clause files with --clauses")
            continue
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            line = line.strip()
            if line.startswith("=="):
                section = line.strip("= ")
                if section not in SECTIONS:
                    problems.append(f"{path}:{number}: section {section!r}; use one of {', '.join(SECTIONS)}")
            elif line and section in SECTIONS:
                problems += (f"{path}:{number}: {problem}" for problem in _line_problems(section, line))
                sections[section].append(line)
        problems += (
            f"{path}: section {name!r} is empty; add lines under `== {name}`"
            for name in SECTIONS
            if not sections[name]
        )
    if problems:
        raise ValueError("\n".join(problems))
    return languages


def _line_problems(section: str, line: str) -> list[str]:
    if section.startswith("fields"):
        ok = "|" in line and all(name in CLASSES for name in line.rpartition("|")[2].split())
        return [] if ok else [f"{line!r} is no field; write `Postal code | ZIPCODE`"]
    unknown = [slot for slot in SLOT.findall(line) if slot not in CLASSES and slot not in DISTRACTORS]
    if section.startswith("neutral"):
        unknown += [slot for slot in SLOT.findall(line) if slot in CLASSES]
    return [f"slot {{{slot}}} is not for section {section!r}" for slot in unknown]


class Composer:
    """Writes the texts of one set: `pair()` gives the next sample."""

    def __init__(self, name: str, seed: int, clauses: dict, style: str):
        self.rng = random.Random(f"{seed} {name}")
        self.side, self.kind = SETS[name]
        fakers = load_fakers(seed + list(SETS).index(name))
        self.values = {language: Values(language, self.side, self.rng, fakers) for language in LANGUAGES}
        self.clauses, self.style = clauses, style
        self.decks: dict[tuple[str, str], list[str]] = {}

    def pair(self, language: str) -> Pair:
        """A sample in `language` whose labels align with its own entities; rare texts that do not are drawn
        again.
        """
        while True:
            self.values[language].names.clear()
            parts = _strip(self._text(language))
            pair = to_pair(language, parts, self.style)
            if aligns(pair):
                return pair

    def _draw(self, language: str, section: str) -> str:
        """The next line of a shuffled section, so that all lines come equally often."""
        if section == "train" and self.kind:
            section = "unseen"
        elif self.kind:
            section += self.kind
        deck = self.decks.setdefault((language, section), [])
        if not deck:
            deck.extend(self.clauses[language][section])
            self.rng.shuffle(deck)
        return deck.pop()

    def _text(self, language: str) -> list[Part]:
        rng, plain = self.rng, self.rng.random() < 0.08
        count = rng.choices((1, 2, 3, 4, 5), (15, 28, 26, 17, 14))[0]
        if rng.random() < (0.06 if self.side == "held" else 0.03):
            count = rng.randint(6, 15)  # the long tail, to about 200 words
        neutral = [plain or (i > 0 and rng.random() < 0.17) for i in range(count)]
        rng.shuffle(neutral)
        lines = [self._draw(language, "neutral" if n else "train") for n in neutral]
        person = count > 1 and not plain and rng.random() < 0.15
        if person:
            for i in (0, count - 1):
                lines[i] = self._named(language, lines[i])
        parts = self._layout(self._fill(language, lines, person), language)
        if not plain and rng.random() < 0.14:
            form, between = self._form(language), rng.choice(("\n", "\n\n", "<br>"))
            parts = (
                form
                if rng.random() < 0.3
                else _join([parts, form] if rng.random() < 0.5 else [form, parts], between)
            )
        if not plain and not self.kind and rng.random() < 0.12:
            parts = self._mail(language, parts)
        return self._mess(parts)

    def _named(self, language: str, line: str) -> str:
        """`line` if it has a slot for a given name, else another that has."""
        for _ in range(30):
            if "{GIVENNAME}" in line:
                break
            line = self._draw(language, "train")
        return line

    def _fill(self, language: str, lines: list[str], person: bool) -> list[list[Part]]:
        """Fill the slots; with `person`, the last line has the given name (and family name) of the first."""
        blocks = []
        for i, line in enumerate(lines):
            again = {}
            if person and i == len(lines) - 1 and i:
                first = [part for part in blocks[0] if part.label]
                again = {
                    part.label: part.text
                    for part in reversed(first)
                    if part.label in ("GIVENNAME", "SURNAME")
                }
            parts = []
            for j, piece in enumerate(SLOT.split(line)):
                if j % 2 == 0:
                    parts.append(Part(piece))
                else:
                    kind = "IBAN" if piece == "ACCOUNTNUM" and "IBAN" in line else piece
                    value = again.pop(piece, None) or self.values[language].draw(kind)
                    parts.append(Part(value, piece if piece in CLASSES else None))
            blocks.append(_lower(parts) if not person and self._sloppy(line) else parts)
        return blocks

    def _sloppy(self, line: str) -> bool:
        """Whether names in this line are small: mostly so where all of the line is."""
        words = SLOT.sub("", line)
        return words == words.lower() and len(words.split()) > 2 and self.rng.random() < 0.8

    def _form(self, language: str) -> list[Part]:
        """Two to five `field: value` lines."""
        rng = self.rng
        colon = rng.choice((": ", ": ", ": ", " : ", "=", " - ", ":\t", " | ", ":\n"))
        between = rng.choice(("\n", "\n", "\n", "<br>", "<br/>\n", "; ", ", ", "\n- ", " / "))
        parts = [Part("- ")] if between == "\n- " else []
        for i in range(rng.randint(2, 5)):
            field, _, names = self._draw(language, "fields").rpartition("|")
            parts.append(Part((between if i else "") + field.strip() + colon))
            for j, name in enumerate(names.split()):
                parts += [Part(" ")] * (j > 0) + [Part(self.values[language].draw(name), name)]
        return parts

    def _layout(self, blocks: list[list[Part]], language: str) -> list[Part]:
        """Put the clauses together as lines, paragraphs, lists or HTML."""
        rng, one = self.rng, len(blocks) == 1
        way = rng.random()
        if way < 0.07:
            return _join([_around("<p>", b, "</p>") for b in blocks], rng.choice(("", "\n", "\n\n")))
        if way < 0.12:
            open_, close = rng.choice(
                (("<p>", "</p>"), ("<div>", "</div>"), ("<div>\n", "\n</div>"), ("<span>", "</span>"))
            )
            return _around(open_, _join(blocks, rng.choice((" ", "<br>", "\n"))), close)
        if way < 0.15 and not one:
            return _around("<ul>\n", _join([_around("<li>", b, "</li>") for b in blocks], "\n"), "\n</ul>")
        if way < 0.22 and not one:
            marks = rng.choice(
                (
                    ["- "] * 20,
                    ["* "] * 20,
                    ["• "] * 20,
                    [f"{i}. " for i in range(1, 20)],
                    [f"{i}) " for i in range(1, 20)],
                )
            )
            return _join([_around(mark, b, "") for mark, b in zip(marks, blocks, strict=False)], "\n")
        if way < 0.24:
            return _join([_around("> ", b, "") for b in blocks], "\n")
        if way < 0.27 and not any(set(part.text) & set('"„“«»') for part in blocks[0]):
            blocks = [_around(QUOTES[language][0], blocks[0], QUOTES[language][1]), *blocks[1:]]
        between = rng.choices(
            (" ", "\n", "\n\n", "  ", "<br>", "<br/>\n", "\r\n", " \n"), (62, 14, 7, 5, 4, 3, 1, 1)
        )[0]
        if (
            any("".join(p.text for p in block)[-1] not in '.!?…"»“)' for block in blocks[:-1])
            and between.isspace()
        ):
            between = "\n"  # a line without a full stop ends in a line break
        return _join(blocks, between)

    def _mail(self, language: str, parts: list[Part]) -> list[Part]:
        """Put an e-mail's header, its greeting or its signature around the text."""
        rng, (words, greetings, closings) = self.rng, MAIL[language]

        def draw(name: str) -> Part:
            return Part(self.values[language].draw(name), name)

        sender = [draw("GIVENNAME"), Part(" "), draw("SURNAME")]
        origin, to, subject, date = words.split()
        way = rng.random()
        if way < 0.3:
            topic = self._fill(language, [self._draw(language, "neutral").rstrip(".")], False)[0]
            header = [
                Part(f"{origin}: "),
                *sender,
                Part(" <"),
                draw("EMAIL"),
                Part(f">\n{to}: "),
                draw("EMAIL"),
                Part(f"\n{subject}: "),
                *topic,
                Part("\n\n"),
            ]
            if rng.random() < 0.4:
                header[-1:] = [Part(f"\n{date}: {self.values[language].draw('date')}\n\n")]
            return header + parts
        if way < 0.5:
            parts = [
                Part(rng.choice(greetings) + " "),
                draw("GIVENNAME"),
                Part(rng.choice((",\n", ",\n\n", ", "))),
                *parts,
            ]
        closing = [Part("\n\n" if rng.random() < 0.5 else "\n"), Part(rng.choice(closings) + "\n"), *sender]
        if rng.random() < 0.4:
            closing += [Part("\n"), draw("TELEPHONENUM")]
        elif rng.random() < 0.4:
            closing += [
                Part("\n"),
                draw("STREET"),
                Part(" "),
                draw("BUILDINGNUM"),
                Part("\n"),
                draw("ZIPCODE"),
                Part(" "),
                draw("CITY"),
            ]
        return parts + closing

    def _mess(self, parts: list[Part]) -> list[Part]:
        """Sloppy case, doubled blanks, and marks around an entity."""
        rng = self.rng
        if rng.random() < 0.05:
            parts = _lower(parts)
        elif rng.random() < 0.04:
            parts = [p._replace(text=p.text.upper()) if p.label in ("SURNAME", "CITY") else p for p in parts]
        if rng.random() < 0.04:
            parts = [p._replace(text=p.text.replace(". ", ".  ")) if p.label is None else p for p in parts]
        entities = [i for i, part in enumerate(parts) if part.label]
        if entities and rng.random() < 0.07:
            at = rng.choice(entities)
            left, right = rng.choice(
                (
                    ("<b>", "</b>"),
                    ("<strong>", "</strong>"),
                    ("<i>", "</i>"),
                    ("**", "**"),
                    ("<td>", "</td>"),
                    ("'", "'"),
                )
            )
            parts[at : at + 1] = [Part(left), parts[at], Part(right)]
        return parts


def _lower(parts: list[Part]) -> list[Part]:
    """All in small letters but the entities whose case matters (passwords, IBANs, ...)."""
    return [p._replace(text=p.text.lower()) if p.label in (None, *SPLIT_CLASSES) else p for p in parts]


def _around(left: str, parts: list[Part], right: str) -> list[Part]:
    return [Part(left), *parts, Part(right)]


def _join(blocks: list[list[Part]], between: str) -> list[Part]:
    parts = list(blocks[0])
    for block in blocks[1:]:
        parts += [Part(between), *block]
    return parts


def _strip(parts: list[Part]) -> list[Part]:
    """Without blanks at the two ends: a chat turn is stripped, so they would be lost."""
    parts = [part for part in parts if part.text]
    parts[0] = parts[0]._replace(text=parts[0].text.lstrip())
    parts[-1] = parts[-1]._replace(text=parts[-1].text.rstrip())
    return parts


def to_pair(language: str, parts: list[Part], style: str = "indexed") -> Pair:
    """Join the parts; an entity becomes [CLASS_n], n being its value's place among those of its class, or
    [MASKED].
    """
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    source, redacted, entities = "", [], []
    for text, label in parts:
        if label:
            entities.append(Span(len(source), len(source) + len(text), label))
        source += text
        if label and (label, text) not in numbers:
            counts[label] = numbers[label, text] = counts.get(label, 0) + 1
        redacted.append(
            text if not label else f"[{label}_{numbers[label, text]}]" if style == "indexed" else "[MASKED]"
        )
    return Pair(language, source, "".join(redacted), entities)


def aligns(pair: Pair) -> bool:
    """Whether tasks.redaction finds the pair's entities again: as many, of the same classes, each over a part
    of its own text.

    Bounds may differ where no reader of the two texts could tell: Anna Maria Rossi as [GIVENNAME_1]
    [SURNAME_1]."""
    found = spans(pair.source, pair.redacted)
    return len(found) == len(pair.entities) and all(
        ours.label in (true.label, "MASKED") and ours.start < true.end and true.start < ours.end
        for ours, true in zip(found, pair.entities, strict=False)
    )


def make_set(
    name: str, count: int, seed: int, clauses: dict, style: str = "indexed", seen: set[str] | None = None
) -> list[Pair]:
    """`count` pairs of the set train, val or val_unseen, the six languages in turn, none with a source in
    `seen`.
    """
    composer, pairs = Composer(name, seed, clauses, style), []
    seen = set() if seen is None else seen
    while len(pairs) < count:
        pair = composer.pair(LANGUAGES[len(pairs) % len(LANGUAGES)])
        if pair.source not in seen:
            seen.add(pair.source)
            pairs.append(pair)
    composer.rng.shuffle(pairs)
    return pairs


def to_row(pair: Pair) -> str:
    """One line of JSONL: the constant instruction and the source, and the redacted text."""
    row = {"prompt": prompt_for(pair.source), "response": pair.redacted}
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make redaction samples in six languages.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for train.jsonl, val.jsonl and val_unseen.jsonl"
    )
    parser.add_argument("--clauses", type=Path, default=CLAUSES, help="folder of the clause files")
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--val", type=int, default=300)
    parser.add_argument("--unseen", type=int, default=300)
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--style", choices=("indexed", "masked"), default="indexed")
    args = parser.parse_args(argv)
    try:
        clauses, seen = read_clauses(args.clauses), set()
        args.out.mkdir(parents=True, exist_ok=True)
        for name, count in (("train", args.train), ("val", args.val), ("val_unseen", args.unseen)):
            pairs = make_set(name, count, args.seed, clauses, args.style, seen)
            (args.out / f"{name}.jsonl").write_text(
                "".join(to_row(pair) + "\n" for pair in pairs), "utf-8", newline="\n"
            )
            print(f"{args.out / name}.jsonl: {len(pairs)} samples")
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

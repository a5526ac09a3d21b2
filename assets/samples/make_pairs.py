"""Makes the redaction samples: texts with entities in six languages, and the same texts with labels.

    python assets/samples/make_pairs.py --out assets/samples --train 4000 --val 300 --unseen 300 --seed 3407

Reads clauses/<language>.txt (sections `== train`, `== unseen`, ...; {CLASS} and {distractor} slots), combines
1 to 5 clauses, fills their slots with values.py, adds irregularities of real texts, and writes train.jsonl,
val.jsonl and val_unseen.jsonl. val has the clauses of train with new values; val_unseen has new clauses and
new values. No name, city or street of train is in either. The number in a label is that of its value among
the values of the class in the sample.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # A script's own folder is the only one on the path.
    sys.path.insert(0, str(ROOT))

from assets.samples.values import LANGUAGES, SPLIT_CLASSES, Values, load_fakers
from tasks.redaction import CLASSES, Span, prompt_for, spans

CLAUSES = Path(__file__).resolve().parent / "clauses"
DISTRACTORS = ("date", "time", "number", "price", "year", "percent", "code")
SECTIONS = ("train", "unseen", "neutral", "neutral_unseen", "fields", "fields_unseen")
# The side of the values and the kind of the sections of each set.
SETS = {"train": ("train", ""), "val": ("held", ""), "val_unseen": ("held", "_unseen")}
SLOT = re.compile(r"\{(\w+)\}")
# Header words, greetings and closings. val_unseen does not use them: it shares no wording with train.
MAIL = {
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
    """A piece of a text; `label` is its class, or None if it is no entity."""

    text: str
    label: str | None = None


class Pair(NamedTuple):
    """A sample: source text, redacted text, and the entities as spans of the source."""

    language: str
    source: str
    redacted: str
    entities: list[Span]


def read_clauses(folder: Path = CLAUSES) -> dict[str, dict[str, list[str]]]:
    """Returns {language: {section: lines}}; raises ValueError with every bad line of the clause files."""
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
    """Composes the texts of one set; `pair` returns the next sample."""

    def __init__(self, name: str, seed: int, clauses: dict, style: str):
        self.rng = random.Random(f"{seed} {name}")
        self.side, self.kind = SETS[name]
        fakers = load_fakers(seed + list(SETS).index(name))
        self.values = {language: Values(language, self.side, self.rng, fakers) for language in LANGUAGES}
        self.clauses, self.style = clauses, style
        self.decks: dict[tuple[str, str], list[str]] = {}

    def pair(self, language: str) -> Pair:
        """Returns a sample whose labels align with its entities; draws again where they do not."""
        while True:
            self.values[language].names.clear()
            parts = _strip(self._text(language))
            pair = to_pair(language, parts, self.style)
            if aligns(pair):
                return pair

    def _draw(self, language: str, section: str) -> str:
        """Returns the next line of a shuffled section, so that all lines are equally frequent."""
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
            count = rng.randint(6, 15)  # Up to about 200 words.
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
            if rng.random() < 0.3:
                parts = form
            else:
                parts = _join([parts, form] if rng.random() < 0.5 else [form, parts], between)
        if not plain and not self.kind and rng.random() < 0.12:
            parts = self._mail(language, parts)
        return self._mess(parts)

    def _named(self, language: str, line: str) -> str:
        """Returns `line` if it has a slot for a given name, else another line that has one."""
        for _ in range(30):
            if "{GIVENNAME}" in line:
                break
            line = self._draw(language, "train")
        return line

    def _fill(self, language: str, lines: list[str], person: bool) -> list[list[Part]]:
        """Fills the slots; with `person`, the last line has the given name and surname of the first."""
        blocks = []
        for i, line in enumerate(lines):
            again = {}
            if person and i == len(lines) - 1 and i:
                names = [part for part in blocks[0] if part.label in ("GIVENNAME", "SURNAME")]
                again = {part.label: part.text for part in reversed(names)}
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
        """Returns whether names in this line are lower-case: mostly if the whole line is."""
        words = SLOT.sub("", line)
        return words == words.lower() and len(words.split()) > 2 and self.rng.random() < 0.8

    def _form(self, language: str) -> list[Part]:
        """Returns two to five `field: value` lines."""
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
        """Joins the clauses as lines, paragraphs, lists or HTML."""
        rng, one = self.rng, len(blocks) == 1
        way = rng.random()
        if way < 0.07:
            return _join([_around("<p>", b, "</p>") for b in blocks], rng.choice(("", "\n", "\n\n")))
        if way < 0.12:
            tags = (("<p>", "</p>"), ("<div>", "</div>"), ("<div>\n", "\n</div>"), ("<span>", "</span>"))
            left, right = rng.choice(tags)
            return _around(left, _join(blocks, rng.choice((" ", "<br>", "\n"))), right)
        if way < 0.15 and not one:
            return _around("<ul>\n", _join([_around("<li>", b, "</li>") for b in blocks], "\n"), "\n</ul>")
        if way < 0.22 and not one:
            mark = rng.choice(("- ", "* ", "• ", "{}. ", "{}) "))
            return _join([_around(mark.format(i), b, "") for i, b in enumerate(blocks, 1)], "\n")
        if way < 0.24:
            return _join([_around("> ", b, "") for b in blocks], "\n")
        if way < 0.27 and not any(set(part.text) & set('"„“«»') for part in blocks[0]):
            blocks = [_around(QUOTES[language][0], blocks[0], QUOTES[language][1]), *blocks[1:]]
        separators = (" ", "\n", "\n\n", "  ", "<br>", "<br/>\n", "\r\n", " \n")
        between = rng.choices(separators, (62, 14, 7, 5, 4, 3, 1, 1))[0]
        open_end = any("".join(p.text for p in block)[-1] not in '.!?…"»“)' for block in blocks[:-1])
        if open_end and between.isspace():
            between = "\n"  # A line without a full stop ends in a line break.
        return _join(blocks, between)

    def _mail(self, language: str, parts: list[Part]) -> list[Part]:
        """Adds the header, the greeting or the signature of an e-mail to the text."""
        rng, (words, greetings, closings) = self.rng, MAIL[language]

        def draw(name: str) -> Part:
            return Part(self.values[language].draw(name), name)

        sender = [draw("GIVENNAME"), Part(" "), draw("SURNAME")]
        origin, to, subject, date = words.split()
        way = rng.random()
        if way < 0.3:
            topic = self._fill(language, [self._draw(language, "neutral").rstrip(".")], False)[0]
            header = [Part(f"{origin}: "), *sender, Part(" <"), draw("EMAIL"), Part(f">\n{to}: ")]
            header += [draw("EMAIL"), Part(f"\n{subject}: "), *topic, Part("\n\n")]
            if rng.random() < 0.4:
                header[-1:] = [Part(f"\n{date}: {self.values[language].draw('date')}\n\n")]
            return header + parts
        if way < 0.5:
            greeting = [Part(rng.choice(greetings) + " "), draw("GIVENNAME")]
            parts = [*greeting, Part(rng.choice((",\n", ",\n\n", ", "))), *parts]
        closing = [Part("\n\n" if rng.random() < 0.5 else "\n"), Part(rng.choice(closings) + "\n"), *sender]
        if rng.random() < 0.4:
            closing += [Part("\n"), draw("TELEPHONENUM")]
        elif rng.random() < 0.4:
            closing += [Part("\n"), draw("STREET"), Part(" "), draw("BUILDINGNUM")]
            closing += [Part("\n"), draw("ZIPCODE"), Part(" "), draw("CITY")]
        return parts + closing

    def _mess(self, parts: list[Part]) -> list[Part]:
        """Changes the case of the text, doubles spaces, or puts marks around an entity."""
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
            marks = (("<b>", "</b>"), ("<strong>", "</strong>"), ("<i>", "</i>"), ("**", "**"))
            left, right = rng.choice((*marks, ("<td>", "</td>"), ("'", "'")))
            parts[at : at + 1] = [Part(left), parts[at], Part(right)]
        return parts


def _lower(parts: list[Part]) -> list[Part]:
    """Returns the parts in lower case, but for entities whose case matters (passwords, IBANs, ...)."""
    return [p._replace(text=p.text.lower()) if p.label in (None, *SPLIT_CLASSES) else p for p in parts]


def _around(left: str, parts: list[Part], right: str) -> list[Part]:
    return [Part(left), *parts, Part(right)]


def _join(blocks: list[list[Part]], between: str) -> list[Part]:
    parts = list(blocks[0])
    for block in blocks[1:]:
        parts += [Part(between), *block]
    return parts


def _strip(parts: list[Part]) -> list[Part]:
    """Removes white space at both ends, because the chat template strips each turn."""
    parts = [part for part in parts if part.text]
    parts[0] = parts[0]._replace(text=parts[0].text.lstrip())
    parts[-1] = parts[-1]._replace(text=parts[-1].text.rstrip())
    return parts


def to_pair(language: str, parts: list[Part], style: str = "indexed") -> Pair:
    """Joins the parts; an entity becomes [CLASS_n] for the n-th different value of its class, or [MASKED]."""
    numbers: dict[tuple[str, str], int] = {}
    counts: dict[str, int] = {}
    source, redacted, entities = "", [], []
    for text, label in parts:
        if label:
            entities.append(Span(len(source), len(source) + len(text), label))
        source += text
        if label and (label, text) not in numbers:
            counts[label] = numbers[label, text] = counts.get(label, 0) + 1
        replacement = f"[{label}_{numbers.get((label, text))}]" if style == "indexed" else "[MASKED]"
        redacted.append(replacement if label else text)
    return Pair(language, source, "".join(redacted), entities)


def aligns(pair: Pair) -> bool:
    """Returns whether tasks.redaction finds as many entities, of the same classes, that overlap the pair's.

    Bounds may differ where the two texts do not show them: Anna Maria Rossi as [GIVENNAME_1] [SURNAME_1].
    """
    found = spans(pair.source, pair.redacted)
    return len(found) == len(pair.entities) and all(
        ours.label in (true.label, "MASKED") and ours.start < true.end and true.start < ours.end
        for ours, true in zip(found, pair.entities, strict=False)
    )


def make_set(
    name: str, count: int, seed: int, clauses: dict, style: str = "indexed", seen: set[str] | None = None
) -> list[Pair]:
    """Returns `count` pairs of a set, the languages in turn, none with a source in `seen`, which grows."""
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
    """Returns a line of JSONL: the instruction with the source, and the redacted text."""
    row = {"prompt": prompt_for(pair.source), "response": pair.redacted}
    return json.dumps(row, ensure_ascii=False, separators=(",", ":"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes redaction samples in six languages.")
    files = "folder for train.jsonl, val.jsonl and val_unseen.jsonl"
    parser.add_argument("--out", type=Path, required=True, help=files)
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
            rows = "".join(to_row(pair) + "\n" for pair in pairs)
            (args.out / f"{name}.jsonl").write_text(rows, "utf-8", newline="\n")
            print(f"{args.out / name}.jsonl: {len(pairs)} samples")
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

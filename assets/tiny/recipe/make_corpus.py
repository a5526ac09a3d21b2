"""Makes the training corpus of the embedded base model: tasks on invented texts in six languages.

    python assets/tiny/recipe/make_corpus.py --out DIR --samples 300000 --seed 1

Writes DIR/train.jsonl and DIR/val.jsonl, rows {"prompt", "response"} or {"text"}. The wording is in
<language>.txt, the values in values.py, the tasks in exercises.py. The same seed gives the same bytes for any
--jobs.
"""

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import exercises
import values

HERE = Path(__file__).parent
BLOCK = 500  # This many samples share a random generator, and are the unit of work of --jobs.
WEIGHTS = {"en": 25, "de": 15, "nl": 15, "fr": 15, "es": 15, "it": 15}
TEXT_WORDS = {
    "en": ("Text", "Text", "Input", "Message", "Passage", "Document", "TEXT"),
    "de": ("Text", "Text", "Eingabe", "Nachricht", "Der Text"),
    "nl": ("Tekst", "Tekst", "Invoer", "Bericht", "De tekst"),
    "fr": ("Texte", "Texte", "Entrée", "Message", "Voici le texte"),
    "es": ("Texto", "Texto", "Entrada", "Mensaje", "El texto"),
    "it": ("Testo", "Testo", "Input", "Messaggio", "Il testo"),
}
# What stands before and after a text that follows its instruction; {t} is one of TEXT_WORDS.
BEFORE = [("\n\n{t}:\n", "")] * 9 + [("\n\n", "")] * 6 + [("\n", "")] * 3 + [(": ", "")] * 2 + [(" ", "")]
BEFORE += [("\n---\n", ""), ("\n---\n", "\n---"), ("\n\n---\n\n", "")] + [("\n\n{t}: ", "")] * 2
BEFORE += [("\n{t}: ", ""), ('\n\n"', '"'), (' "', '"'), ("\n«", "»"), ("\n“", "”"), ("\n```\n", "\n```")]
BEFORE += [("\n<text>\n", "\n</text>"), ("\n\n### {t}\n", ""), ("\n\n[{t}]\n", ""), ("\n\n{t}:\n\n", "")]
# The same for a text that precedes its instruction.
AFTER = [
    ("", "\n\n"),
    ("", "\n\n"),
    ("", "\n"),
    ('"', '"\n'),
    ('"', '"\n\n'),
    ("«", "»\n"),
    ("{t}: ", "\n\n"),
]
AFTER += [("{t}:\n", "\n\n"), ("", "\n---\n"), ("---\n", "\n---\n"), ("<text>", "</text>\n")]
AFTER += [("```\n", "\n```\n")]
HEADERS = {
    "en": ("From", "To", "Subject", "Date"),
    "de": ("Von", "An", "Betreff", "Datum"),
    "nl": ("Van", "Aan", "Onderwerp", "Datum"),
    "fr": ("De", "À", "Objet", "Date"),
    "es": ("De", "Para", "Asunto", "Fecha"),
    "it": ("Da", "A", "Oggetto", "Data"),
}
FAREWELLS = {
    "en": ("Bye", "Cheers", "Yours", "Sincerely", "Thanks"),
    "de": ("Gruß", "Viele Grüße", "Tschüss", "Danke", "Hochachtungsvoll"),
    "nl": ("Groeten", "Dag", "Bedankt", "Hartelijks", "Tot gauw"),
    "fr": ("Salut", "Bien à toi", "Merci", "Amitiés", "Respectueusement"),
    "es": ("Saludos", "Un saludo", "Gracias", "Hasta pronto", "Cordialmente"),
    "it": ("Saluti", "Ciao", "Grazie", "A presto", "Cordialmente"),
}
EMOJI = "😀 😊 👍 🎉 🚗 ❤️ 🙏 😅 📞 ✅ ⚠️ 🐶 ☕ ✈️ → • … € ½ °".split()


@dataclass
class Language:
    """The content of <code>.txt.

    clauses and neutral are templates, lists of (string, slot or None); kinds is {slot: (singular, plural)};
    tasks is {name: lines}. order_words are the words of the instructions, with repetitions. chain is a
    character model of the nouns, from which similar words are invented.
    """

    code: str
    clauses: list = field(default_factory=list)
    neutral: list = field(default_factory=list)
    fields: list = field(default_factory=list)
    kinds: dict = field(default_factory=dict)
    tasks: dict = field(default_factory=dict)
    nouns: list = field(default_factory=list)
    order_words: list = field(default_factory=list)
    chain: dict = field(default_factory=dict)

    def known(self):
        """Returns an empty memory for the values of one text."""
        return Known(self.nouns)


class Known:
    """The values that a text has used, so that a name can recur and an address can be made from a name."""

    def __init__(self, nouns, again=0.25):
        self.nouns, self.again, self.used = nouns, again, {}

    def recall(self, slot, rng):
        """Returns, in four of ten cases, a value that was used for the slot before, else None."""
        return rng.choice(self.used[slot]) if slot in self.used and rng.random() < 0.4 else None

    def value(self, slot, lang, rng):
        """Returns a value for the slot: one that the text has used, or a new one."""
        used = self.used.setdefault(slot, [])
        if used and rng.random() < self.again:
            return rng.choice(used)
        drawn = values.draw(slot, lang, rng, self)
        used.append(drawn)
        return drawn


def segments(line):
    """Splits "Hi {first}!" into [("Hi ", None), ("", "first"), ("!", None)]."""
    parts = re.split(r"\{(\w+)\}", line)
    return [("", part) if i % 2 else (part, None) for i, part in enumerate(parts) if part]


def read_language(path):
    """Reads <language>.txt; raises ValueError with all wrong lines."""
    lang, section, problems = Language(path.stem), None, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if line.startswith("== "):
            section = line[3:].strip()
        elif line:
            columns = [column.strip() for column in line.split("|")]
            unknown = set(re.findall(r"\{(\w+)\}", line)) - set(values.SLOTS)
            if section == "fields" and len(columns) == 2 and columns[1] in values.SLOTS:
                lang.fields.append((columns[0], columns[1]))
            elif section == "kinds" and len(columns) == 3:
                lang.kinds[columns[0]] = (columns[1], columns[2])
            elif section in ("clauses", "neutral") and not unknown:
                if not exercises.FORBIDDEN.search(line):
                    getattr(lang, section).append(segments(line))
            elif section in exercises.MAKERS or section == "none":
                lang.tasks.setdefault(section, []).append(line)
            else:
                slots = f"use the format of the section and the slots {', '.join(values.SLOTS)}"
                problems.append(f"{path.name}:{number}: {line!r} in section {section!r}; {slots}")
    missing = {*exercises.MAKERS, "none"} - {*lang.tasks, "label"}
    problems += [f"{path.name}: no section {name!r}; add it" for name in sorted(missing)]
    unnamed = {*values.SLOTS, *exercises.GROUPS} - set(lang.kinds)
    problems += [f"{path.name}: add a kind, `{slot} | singular | plural`" for slot in sorted(unnamed)]
    if problems:
        raise ValueError("\n".join(problems))
    starts = " ".join(part for item in lang.neutral + lang.clauses for part, _ in item[:1] or [])
    words = re.findall(r"\w+", starts + " ".join(part for item in lang.neutral for part, _ in item))
    keep = str.istitle if path.stem == "de" else str.islower
    lang.nouns = sorted({word for word in words if len(word) > 3 and keep(word)})
    lang.chain = values.learn(lang.nouns)
    orders = itertools.chain(*lang.tasks.values(), *exercises.REMARKS[lang.code], TEXT_WORDS[lang.code] * 20)
    lang.order_words = re.findall(r"(?<![<{])\b[^\W\d_]{3,}", " ".join(orders))
    return lang


def word_of(lang, rng):
    """Returns a word of the language or an invented word that looks like one."""
    return rng.choice(lang.nouns) if rng.random() < 0.55 else values.invent(lang.chain, rng, 2, 14).lower()


def stray_word(lang, known, rng):
    """Returns a word without relation to the text; no plain number, because a task might hide numbers."""
    if rng.random() < 0.4:
        stray = values.rand(lang.code, rng, known)
    else:
        stray = rng.choice(EMOJI) if rng.random() < 0.08 else word_of(lang, rng)
    return word_of(lang, rng) if stray.isdigit() else stray


def distorted(item, lang, rng):
    """Replaces a third of the longer words of the item, so that a copy requires reading."""

    def swap(match):
        return word_of(lang, rng) if rng.random() < 0.33 else match.group()

    return [(part if slot else re.sub(r"[^\W\d]{4,}", swap, part), slot) for part, slot in item]


def echoed(item, words, rng):
    """Replaces some words of the item by words of instructions, so that a copy does not run into these."""

    def swap(match):
        return rng.choice(words) if rng.random() < 0.15 else match.group()

    return [(part if slot else re.sub(r"[^\W\d]{3,}", swap, part), slot) for part, slot in item]


def filled(template, lang, known, rng):
    """Fills the slots of the template; a quarter of the results has a stray word between two words."""
    item = [(known.value(slot, lang.code, rng), slot) if slot else (part, None) for part, slot in template]
    if rng.random() < 0.25:
        i = rng.randrange(len(item))
        part, slot = item[i]
        gaps = [j for j, character in enumerate(part) if character == " "] if slot is None else []
        if gaps:
            at = rng.choice(gaps)
            item[i] = (f"{part[:at]} {stray_word(lang, known, rng)}{part[at:]}", None)
    return item


def form(lang, known, rng):
    """Returns one to seven lines of a form: label, sign, value."""
    sign = rng.choice((": ", ": ", ": ", ":\t", " - ", " = ", "; ", ":\n", " | "))
    end = rng.choice(("\n", "\n", "\n", ", ", "; ", " ", "<br>", " / ", "\n- "))
    tag = rng.random()
    item = []
    for label, slot in rng.sample(lang.fields, min(len(lang.fields), rng.choice((1, 1, 2, 3, 4, 5, 7)))):
        text = known.value(slot, lang.code, rng)
        if tag < 0.06:
            item += [(f"<tr><td>{label}</td><td>", None), (text, slot), ("</td></tr>", None)]
        elif tag < 0.12:
            item += [(f"<b>{label}</b>{sign}", None), (text, slot)]
        elif tag < 0.16:
            item += [(f'"{label}": "', None), (text, slot), ('"', None)]
        else:
            item += [(label + sign, None), (text, slot)]
        item.append((end, None))
    return item[:-1]


def mail(text, lang, known, rng):
    """Adds the header of an e-mail before the text, or a closing, a name and an address after it."""

    def fill(line):
        parts = segments(line)
        return [(known.value(slot, lang.code, rng), slot) if slot else (part, None) for part, slot in parts]

    if rng.random() < 0.5:
        origin, to, subject, date = HEADERS[lang.code]
        lines = [
            f"{origin}: " + rng.choice(("{first} {last} <{email}>", "{email}", "{last}, {first} <{email}>")),
            f"{to}: " + rng.choice(("{email}", "{email}", "{first} {last} <{email}>", "{first} {last}")),
        ]
        lines += [f"{date}: {{date}}"] * (rng.random() < 0.3)
        topic = " ".join(rng.choice(lang.nouns) for _ in range(rng.randint(1, 4)))
        lines += [f"{subject}: {topic}"] * (rng.random() < 0.7)
        header = fill(rng.choice(("\n", "\n", "\n", " ", "<br>", "; ")).join(lines))
        return [*header, (rng.choice(("\n\n", "\n", "\n---\n")), None), *text]
    place = "{building} {street}" if lang.code in ("en", "fr") else "{street} {building}"
    town = "{city} {zip}" if lang.code == "en" else "{zip} {city}"
    lines = [
        rng.choice(FAREWELLS[lang.code]) + rng.choice((",", "", ",", "!")),
        rng.choice(("{first} {last}", "{first} {last}", "{first}", "{last}")),
    ]
    addresses = [[], [place, town], [f"{place}, {town}"]]
    lines += rng.choice([*addresses, ["{phone}"], ["{email}"], ["{phone}", "{email}"], ["{city}"]])
    return [*text, (rng.choice(("\n\n", "\n")), None), *fill("\n".join(lines))]


def salad(lang, count, known, rng):
    """Returns words, names, strings and signs in no order, which can be copied only by reading them."""
    separators = (" ",) * 7 + (", ", ". ", "\n", "; ", ": ", " - ")
    item = []
    for _ in range(count):
        roll = rng.random()
        if roll < 0.4:
            word = word_of(lang, rng)
        elif roll < 0.65:
            word = values.rand(lang.code, rng, known)
        elif roll < 0.7:
            word = rng.choice(EMOJI) if rng.random() < 0.2 else exercises.symbol(rng, known.nouns)
        else:
            word = values.draw(rng.choice(values.SLOTS), lang.code, rng, known)
        item += [(word, None), (rng.choice(separators), None)]
    return item[:-1]


def goal_length(rng):
    """Returns the number of words of a text: log-uniform from 3 to 90, and for a few texts up to 190."""
    long = rng.random() >= 0.975
    return rng.randint(90, 190) if long else int(math.exp(rng.uniform(math.log(3), math.log(90))))


def draw_items(lang, known, rng, goal, plain_share=0.2):
    """Returns the items of a text (clauses, neutral sentences, forms), in all about `goal` words."""
    items, length = [], 0
    while not items or length < 0.8 * goal:
        roll = rng.random()
        if roll < 0.15:
            item = form(lang, known, rng)
        else:
            pool = lang.neutral if roll < 0.15 + plain_share else lang.clauses
            # Near the goal, the template whose length fits best is one of three.
            templates = [rng.choice(pool) for _ in range(3 if goal - length < 10 else 1)]
            template = min(templates, key=lambda t: abs(size(t) - goal + length))
            item = filled(template, lang, known, rng)
        items.append(item)
        length += size(item)
    return items


def size(item):
    """Returns the approximate number of words of an item."""
    return sum(part.count(" ") for part, _ in item) + 1


def shout(item, how):
    """Applies str.upper or str.lower to the item and its values."""
    return [(how(part), slot) for part, slot in item]


def spread(items, between, left="", right=""):
    """Returns the items as one text, each between left and right; {i} in left is the item's number."""
    text = []
    for i, item in enumerate(items):
        start = left.replace("{i}", str(i + 1))
        text += [((between if i else "") + start, None), *item, (right, None)]
    return text


HTML_TAGS = ("p", "p", "p", "div", "li", "span", "td", "b", "h2", "i", 'p class="note"', "section")
TITLES = ("# {t}\n", "**{t}**\n\n", "{T}\n", "<h1>{t}</h1>\n", "{c}:\n", "Re: {t}\n\n")
BULLETS = ("- ", "* ", "• ", "{i}. ", "{i}) ", "({i}) ", "– ", "\t", "## ", "[{i}] ")
QUOTES = ('""', "“”", "«»", "()", "''", ("**", "**"), "__")


def layout(items, lang, rng, lines):
    """Returns the items as a paragraph, lines, a list or HTML."""
    roll = rng.random()
    if lines or roll < 0.14:
        between = "\n" if lines or rng.random() < 0.6 else "\n\n"
        return spread(items, between, rng.choice(("", "", "- ", "{i}. ", "> ")))
    if roll < 0.3:
        tag = rng.choice(HTML_TAGS)
        text = spread(items, rng.choice(("", "\n", " ", "")), f"<{tag}>", f"</{tag.split()[0]}>")
        outer = rng.choice((None, None, "div", "ul", "body", "html", "article"))
        return [(f"<{outer}>", None), *text, (f"</{outer}>", None)] if outer else text
    if roll < 0.36:
        text = spread(items, rng.choice(("<br>", "<br/>", "<br>\n", " <br /> ")))
        return [("<p>", None), *text, ("</p>", None)]
    if roll < 0.44:
        return spread(items, "\n", rng.choice(BULLETS))
    if roll < 0.49:
        title = " ".join(rng.choice(lang.nouns) for _ in range(rng.randint(1, 3)))
        head = rng.choice(TITLES).format(t=title, T=title.upper(), c=title.capitalize())
        return [(head, None), *spread(items, rng.choice((" ", "\n")))]
    if roll < 0.53:
        return spread(items, " ", *rng.choice(QUOTES))
    return spread(items, rng.choice((" ", " ", " ", " ", " ", "  ", " / ", " ... ", " | ", "; ")))


def stretch(text, rng):
    """Doubles some spaces outside of values, or replaces them by a tab or a line break."""
    longer = rng.choice(("  ", "  ", "   ", "\t", "\n", " \n", "\u00a0"))

    def swap(match):
        return longer if rng.random() < 0.15 else " "

    return [(part if slot else re.sub(" ", swap, part), slot) for part, slot in text]


def tidy(text):
    """Joins adjacent plain parts, and removes empty parts and white space at both ends of the text."""
    joined = []
    for part, slot in text:
        if slot is None and joined and joined[-1][1] is None:
            joined[-1] = (joined[-1][0] + part, None)
        elif part:
            joined.append((part, slot))
    if joined:
        joined[0] = (joined[0][0].lstrip(), joined[0][1])
    if joined:
        joined[-1] = (joined[-1][0].rstrip(), joined[-1][1])
    return [(part, slot) for part, slot in joined if part]


def compose(lang, rng, task, stage=1):
    """Returns a text for the task, a list of (string, slot or None)."""
    known = Known(lang.nouns, 0.5 if task == "number_kind" else 0.35 if task == "label" else 0.25)
    goal = goal_length(rng)
    if task in exercises.WORD_TASKS and rng.random() < 0.2:
        return tidy(salad(lang, min(goal, 70), known, rng))
    if task in ("line", "hide_two"):
        goal = max(goal, 15)
    items = draw_items(lang, known, rng, goal, 0.2 if task in exercises.WORD_TASKS else 0.12)
    if rng.random() < (0.4 if task in exercises.WORD_TASKS else 0.1 if task == "label" else 0):
        items = [distorted(item, lang, rng) for item in items]
    if stage == 2 and rng.random() < 0.4:
        words = lang.order_words if rng.random() < 0.5 else load()["en"].order_words
        items = [echoed(item, words, rng) for item in items]
    if rng.random() < 0.09:
        how = str.lower if rng.random() < 0.67 else str.upper
        items = [shout(item, how) for item in items]
    elif rng.random() < 0.05:
        items[0] = shout(items[0], str.upper)
    text = layout(items, lang, rng, task == "line")
    if task != "line" and rng.random() < 0.1:
        text = mail(tidy(text), lang, known, rng)
    return tidy(stretch(text, rng) if rng.random() < 0.08 and task != "line" else text)


def prompt_of(instruction, text, lang, rng):
    """Returns the prompt with instruction and text; in seven of ten, the instruction precedes the text."""
    word = rng.choice(TEXT_WORDS[lang.code])
    if rng.random() < 0.7:
        left, right = rng.choice(BEFORE)
        if left in (": ", ' "') and instruction[-1] in ".:":
            instruction = instruction[:-1] + ("" if left == ": " else ":")
        elif left == ": " and instruction[-1] in "?!":
            left = " "
        return instruction + left.replace("{t}", word) + text + right
    left, between = rng.choice(AFTER)
    return left.replace("{t}", word) + text + between + instruction


def sample(languages, rng, name_tasks=False, stage=1):
    """Returns one row of the corpus."""
    shares = exercises.SHARES[stage]
    while True:
        lang = languages[rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]]
        if rng.random() < 0.08:
            row, task = {"text": exercises.plain(compose(lang, rng, "text", stage))}, "text"
        else:
            asked = lang if rng.random() < 0.75 else languages["en"]
            task = rng.choices(list(shares), list(shares.values()))[0]
            text = compose(lang, rng, task, stage)
            made = text and exercises.MAKERS[task](text, asked, rng)
            if not made:
                continue
            instruction, response = made
            if rng.random() < (0.4 if task == "copy" else 0.2 if task == "label" else 0.12):
                instruction = exercises.lengthen(instruction, task, asked, rng)
            row = {"prompt": prompt_of(instruction, exercises.plain(text), asked, rng), "response": response}
        if all(row.values()) and not any(exercises.FORBIDDEN.search(part) for part in row.values()):
            return row | {"task": task, "language": lang.code} if name_tasks else row


def make_block(job):
    """Returns the JSON lines of one block; job = (seed string, number of samples, name_tasks, stage)."""
    seed, count, *rest = job
    rng = random.Random(seed)
    return "".join(json.dumps(sample(load(), rng, *rest), ensure_ascii=False) + "\n" for _ in range(count))


@functools.cache
def load():
    """Returns {code: Language}; raises ValueError with all wrong lines of a file."""
    return {code: read_language(HERE / f"{code}.txt") for code in WEIGHTS}


def write(path, seed, count, jobs, name_tasks=False, stage=1):
    """Writes `count` samples to path, drawn from the seed (a string)."""
    starts, options = range(0, count, BLOCK), (name_tasks, stage)
    blocks = [(f"{seed}/{start}", min(BLOCK, count - start), *options) for start in starts]
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        if jobs < 2:
            file.writelines(map(make_block, blocks))
        else:
            with multiprocessing.Pool(jobs) as pool:
                file.writelines(pool.imap(make_block, blocks))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path, help="folder for train.jsonl and val.jsonl")
    parser.add_argument("--samples", type=int, default=300000)
    parser.add_argument("--val", type=int, default=500, help="samples in val.jsonl")
    stage = "shares of the tasks in the first or second stage of training (exercises.SHARES)"
    parser.add_argument("--stage", type=int, choices=exercises.SHARES, default=1, help=stage)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shard", type=int, help="write train-N.jsonl only: other samples of the same kind")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--name-tasks", action="store_true", help='add "task" and "language" to the rows')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    files = [("train", "train", args.samples, args.jobs), ("val", "val", args.val, 1)]
    if args.shard is not None:
        files = [(f"train-{args.shard}", f"shard{args.shard}", args.samples, args.jobs)]
    for name, seed, count, jobs in files:
        path, seed = args.out / f"{name}.jsonl", f"{args.seed}.{args.stage}/{seed}"
        write(path, seed, count, jobs, args.name_tasks, args.stage)


if __name__ == "__main__":
    main()

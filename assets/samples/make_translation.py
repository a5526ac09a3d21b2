"""Makes the translation samples: short English sentences and their German translations, from a small grammar.

    python assets/samples/make_translation.py --out assets/samples --seed 3407

Writes translation.jsonl and translation-val.jsonl ({"instruction", "input", "output"}). A row has one or two
sentences with things, colours, numbers, dates, times and places. The grammar inflects the German articles and
adjectives by gender and case. One pair of a colour and a thing in six is held out: no such pair of validation
occurs in training, so a model has to put known words together.
"""

import argparse
import json
import random
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = "Translate into German."
HELD_OUT = 6  # One pair of a colour and a thing in six is held out for validation.


class Thing(NamedTuple):
    """A noun: its English singular and plural, its German singular and plural, and its gender m, f or n."""

    one: str
    many: str
    eins: str
    viele: str
    gender: str


THINGS = [
    Thing(*line.split())
    for line in """
    boat boats Boot Boote n
    bridge bridges Brücke Brücken f
    car cars Auto Autos n
    chair chairs Stuhl Stühle m
    coat coats Mantel Mäntel m
    cup cups Tasse Tassen f
    door doors Tür Türen f
    flag flags Fahne Fahnen f
    garden gardens Garten Gärten m
    hat hats Hut Hüte m
    house houses Haus Häuser n
    key keys Schlüssel Schlüssel m
    lamp lamps Lampe Lampen f
    letter letters Brief Briefe m
    shirt shirts Hemd Hemden n
    ship ships Schiff Schiffe n
    suitcase suitcases Koffer Koffer m
    table tables Tisch Tische m
    tent tents Zelt Zelte n
    tower towers Turm Türme m
    train trains Zug Züge m
    umbrella umbrellas Schirm Schirme m
    wall walls Wand Wände f
    window windows Fenster Fenster n
    """.strip().splitlines()
]
VEHICLES = [thing for thing in THINGS if thing.one in ("boat", "car", "ship", "train")]
COLOURS = dict(zip(
    "black blue brown green grey red white yellow".split(),
    "schwarz blau braun grün grau rot weiß gelb".split(), strict=True,
))  # fmt: skip
PLACES = {name: name for name in ("Berlin", "Bremen", "Hamburg", "London", "Madrid", "Oslo", "Paris")}
PLACES |= {"Cologne": "Köln", "Geneva": "Genf", "Milan": "Mailand", "Munich": "München", "Vienna": "Wien"}
DAYS = dict(zip(
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag".split(), strict=True,
))  # fmt: skip
MONTHS = dict(zip(
    "January February March April May June July August September October November December".split(),
    "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split(), strict=True,
))  # fmt: skip
NUMBERS = dict(zip(
    "two three four five six seven eight nine ten eleven twelve".split(),
    "zwei drei vier fünf sechs sieben acht neun zehn elf zwölf".split(), strict=True,
))  # fmt: skip
# {gender: the word}, in the nominative, or where it is named so in the accusative
THE = {"m": "der", "f": "die", "n": "das"}
MY = {"m": "mein", "f": "meine", "n": "mein"}
A_ACCUSATIVE = {"m": "einen", "f": "eine", "n": "ein"}
ENDING_AFTER_MY = {"m": "er", "f": "e", "n": "es"}
ENDING_AFTER_A_ACCUSATIVE = {"m": "en", "f": "e", "n": "es"}


def is_held_out(colour, thing):
    """Returns whether the pair belongs to validation; every colour and every thing is on both sides."""
    return (THINGS.index(thing) + list(COLOURS).index(colour)) % HELD_OUT == 0


def draw_pair(rng, held_out):
    """Returns a colour (English, German stem) and a thing of one side."""
    while True:
        colour, thing = rng.choice(list(COLOURS)), rng.choice(THINGS)
        if is_held_out(colour, thing) == held_out:
            return (colour, COLOURS[colour]), thing


def pick(rng, words):
    return rng.choice(list(words.items()))


# --- sentences: each function returns (English, German)


def where_it_stands(rng, held_out):
    (colour, farbe), thing = draw_pair(rng, held_out)
    place, ort = pick(rng, PLACES)
    article = THE[thing.gender].capitalize()
    return f"The {colour} {thing.one} is in {place}.", f"{article} {farbe}e {thing.eins} ist in {ort}."


def how_many(rng, held_out):
    (colour, farbe), thing = draw_pair(rng, held_out)
    number, zahl = pick(rng, NUMBERS)
    return f"We have {number} {colour} {thing.many}.", f"Wir haben {zahl} {farbe}e {thing.viele}."


def where_is_mine(rng, held_out):
    (colour, farbe), thing = draw_pair(rng, held_out)
    mine = f"{MY[thing.gender]} {farbe}{ENDING_AFTER_MY[thing.gender]} {thing.eins}"
    return f"Where is my {colour} {thing.one}?", f"Wo ist {mine}?"


def looking_for(rng, held_out):
    (colour, farbe), thing = draw_pair(rng, held_out)
    ending = ENDING_AFTER_A_ACCUSATIVE[thing.gender]
    wanted = f"{A_ACCUSATIVE[thing.gender]} {farbe}{ending} {thing.eins}"
    return f"I am looking for a {colour} {thing.one}.", f"Ich suche {wanted}."


def price(rng, held_out):
    thing, euros = rng.choice(THINGS), rng.randint(2, 980)
    article = THE[thing.gender].capitalize()
    return f"The {thing.one} costs {euros} euros.", f"{article} {thing.eins} kostet {euros} Euro."


def timetable(rng, held_out):
    thing, (place, ort) = rng.choice(VEHICLES), pick(rng, PLACES)
    time = f"{rng.randint(5, 23)}:{rng.randrange(0, 60, 5):02d}"
    article = THE[thing.gender].capitalize()
    return (
        f"The {thing.one} leaves for {place} at {time}.",
        f"{article} {thing.eins} fährt um {time} Uhr nach {ort}.",
    )


def date(rng, held_out):
    (day, tag), (month, monat), (place, ort) = pick(rng, DAYS), pick(rng, MONTHS), pick(rng, PLACES)
    number = rng.randint(1, 28)
    return (
        f"On {day}, {number} {month}, we are in {place}.",
        f"Am {tag}, dem {number}. {monat}, sind wir in {ort}.",
    )


SENTENCES = (where_it_stands, how_many, where_is_mine, looking_for, price, timetable, date)
COLOURED = SENTENCES[:4]


def make_rows(rng, count, held_out, taken):
    """Returns `count` rows whose texts are not in `taken`, and adds them to it.

    The first sentence of a row of validation has a pair of a colour and a thing that is held out.
    """
    rows = []
    while len(rows) < count:
        kinds = [rng.choice(COLOURED if held_out else SENTENCES)]
        kinds += [rng.choice(SENTENCES)] if rng.random() < 0.4 else []
        english, german = zip(*(sentence(rng, held_out) for sentence in kinds), strict=True)
        text = " ".join(english)
        if text not in taken:
            taken.add(text)
            rows.append({"instruction": INSTRUCTION, "input": text, "output": " ".join(german)})
    return rows


def make_all(seed=3407):
    """Returns {file name: rows} of both files; the same seed gives the same rows."""
    taken = set()
    return {
        "translation.jsonl": make_rows(random.Random(f"{seed} train"), 800, False, taken),
        "translation-val.jsonl": make_rows(random.Random(f"{seed} held out"), 150, True, taken),
    }


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=3407)
    args = parser.parse_args()
    for name, rows in make_all(args.seed).items():
        (args.out / name).write_text(to_jsonl(rows), encoding="utf-8")
        print(f"{args.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()

"""Makes the small sample sets: raw text, chats, and reviews to classify.

    python assets/samples/make_small.py --out assets/samples --seed 3407

Writes pretrain-text.jsonl ({"text"}: the log of a lighthouse), chat.jsonl, chat-val.jsonl ({"messages"}: an
information desk, in six languages), classification.jsonl and classification-val.jsonl ({"instruction",
"input", "output"}: short reviews in six languages). The wording is in small/*.txt: sections `== name` with a
phrase a line, whose {slots} are filled from the section of that name. A validation set shares no row with its
training set, and the reviews share no clause.
"""

import argparse
import json
import random
import re
import string
from pathlib import Path

WORDING = Path(__file__).resolve().parent / "small"
LANGUAGES = ("en", "de", "nl", "fr", "es", "it")
LABELS = ("positive", "negative", "neutral")
INSTRUCTION = "Is this review positive, negative or neutral? Answer with one word."
HELD_OUT = 6  # One clause in six is held out for validation.
SLOT = re.compile(r"\{(\w+)\}")


def read_sections(path):
    """Returns {section: lines} of a wording file."""
    sections = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("== "):
            lines = sections.setdefault(line[3:].strip(), [])
        elif line.strip():
            lines.append(line.strip())
    return sections


# --- raw text


def expand(template, sections, rng, clock):
    """Replaces each {slot} by an expanded line of that section; {Slot} gives an upper-case first letter."""

    def fill(match):
        slot = match[1]
        text = number(slot, rng, clock) or expand(rng.choice(sections[slot.lower()]), sections, rng, clock)
        return text[0].upper() + text[1:] if slot[0].isupper() else text

    return SLOT.sub(fill, template)


def number(slot, rng, clock):
    """Returns a random number as text for a slot of numbers, a time for {hour}, or "" for another slot."""
    ranges = {"miles": (2, 9), "inches": (2, 18), "pints": (3, 60), "minutes": (2, 40), "hours": (3, 8)}
    if slot == "hour":
        clock[0] += 5 * rng.randint(1, 12)
        return f"{clock[0] // 60 % 24}:{clock[0] % 60:02d}"
    return str(rng.randint(*ranges[slot])) if slot in ranges else ""


def make_texts(rng, count):
    """Returns `count` rows {"text"}, each one entry of the log."""
    sections = read_sections(WORDING / "logbook.txt")
    seen = {}  # A dict keeps its order; that of a set differs between processes.
    while len(seen) < count:
        seen[expand(rng.choice(sections["entry"]), sections, rng, [60 * rng.randrange(24)])] = True
    return [{"text": text} for text in seen]


# --- chats


def columns(line):
    return [[choice.strip() for choice in column.split(" / ")] for column in line.split(" | ")]


def draw_value(kind, sections, rng):
    """Returns a value for a fact: a code, phone or name, or a time or number in the range that follows it."""
    kind, _, bounds = kind.partition(" ")
    if kind == "code":
        return "".join(rng.choices(string.ascii_uppercase, k=2)) + str(rng.randint(100, 999))
    if kind == "phone":
        return f"0{rng.randint(20, 99)} {rng.randint(100000, 999999)}"
    if kind == "name":
        return rng.choice(sections["name"])
    drawn = rng.randint(*map(int, bounds.split("-")))
    return f"{drawn}:{rng.randrange(0, 60, 5):02d}" if kind == "time" else str(drawn)


def turn(role, text):
    return {"role": role, "content": text}


def exchange(question, answer):
    return [turn("user", question), turn("assistant", answer)]


def desk_chat(sections, rng):
    """Returns a system turn with facts, and questions about them; in one chat of six, a fact is missing."""
    facts = [(columns(line), line) for line in rng.sample(sections["fact"], rng.randint(2, 5))]
    values = {line: draw_value(kind, sections, rng) for ((kind,), *_), line in facts}
    stated = facts if rng.random() > 1 / 6 else facts[1:]
    sentences = " ".join(rng.choice(fact[1]).replace("{v}", values[line]) for fact, line in stated)
    place = rng.choice(sections["place name"])
    system = rng.choice(sections["system"]).replace("{place}", place).replace("{facts}", sentences)
    messages = [turn("system", system)]
    for fact, line in rng.sample(facts, rng.randint(1, min(3, len(facts)))):
        known = any(line == other for _, other in stated)
        # Each wording of a question has one answer, so exact_match can reach 1.
        question, answer = rng.choice(list(zip(fact[2], fact[3], strict=True)))
        answer = answer.replace("{v}", values[line]) if known else sections["unknown"][0]
        messages += exchange(question, answer)
    return messages


def memory_chat(sections, rng):
    """Returns a chat without a system turn: the user states one to three facts and asks for one of them."""
    facts = [columns(line) for line in rng.sample(sections["own"], rng.randint(1, 3))]
    values = [draw_value(fact[0][0], sections, rng) for fact in facts]
    messages = []
    for (_, (statement,), (reply,), _, _), value in zip(facts, values, strict=True):
        messages += exchange(statement.replace("{v}", value), reply.replace("{v}", value))
    (*_, questions, answers), value = rng.choice(list(zip(facts, values, strict=True)))
    question, answer = rng.choice(list(zip(questions, answers, strict=True)))
    return messages + exchange(question, answer.replace("{v}", value))


def frame(messages, sections, rng, closing):
    """Adds a greeting to a third of the chats with a system turn, and thanks to a share `closing` of all."""
    at = 1 if messages[0]["role"] == "system" else 0
    hello, thanks = (exchange(*rng.choice(sections[part]).split(" | ")) for part in ("hello", "thanks"))
    greeted = messages[:at] + (hello if at and rng.random() < 1 / 3 else []) + messages[at:]
    return greeted + (thanks if rng.random() < closing else [])


def make_chats(rng, count, taken, closing):
    """Returns `count` rows {"messages"}, the languages in turn; none begins with a prompt in `taken`."""
    wording = [read_sections(WORDING / f"{language}.txt") for language in LANGUAGES]
    rows = []
    while len(rows) < count:
        sections = wording[len(rows) % len(LANGUAGES)]
        chat = (desk_chat if rng.random() < 0.65 else memory_chat)(sections, rng)
        messages = frame(chat, sections, rng, closing)
        prompt = json.dumps(messages[: 2 if messages[0]["role"] == "system" else 1])
        if prompt not in taken:
            taken.add(prompt)
            rows.append({"messages": messages})
    return rows


# --- reviews


def make_clauses(sections, rng):
    """Returns {(label, side): {theme: clauses}}, with the sides "train" and "held".

    A clause is (subject, predicate), or (sentence,) if it fits any review.
    """
    clauses = {}
    for label in LABELS:
        for theme in ("thing", "place", "work"):
            predicates = sections[f"{theme} {label}"] + sections[f"any {label}"]
            pairs = [(subject, predicate + ".") for subject in sections[theme] for predicate in predicates]
            split(clauses, label, theme, pairs, rng)
        split(clauses, label, "alone", [(line,) for line in sections[f"alone {label}"]], rng)
        # With its own generator, the same contexts are held out for every label.
        split(clauses, label, "context", [(line,) for line in sections["context"]], random.Random(0))
    return clauses


def split(clauses, label, theme, lines, rng):
    """Puts one in HELD_OUT lines on the held side, the others on the training side."""
    lines = rng.sample(lines, len(lines))
    cut = max(1, len(lines) // HELD_OUT)
    clauses.setdefault((label, "held"), {})[theme] = lines[:cut]
    clauses.setdefault((label, "train"), {})[theme] = lines[cut:]


def review(pools, rng):
    """Returns one or two clauses about a thing, place or work, sometimes with a verdict or a circumstance."""
    pool = pools[rng.choice(("thing", "place", "work"))]
    parts = [rng.choice(pool)]
    if rng.random() < 0.4:
        parts.append(rng.choice([clause for clause in pool if not set(clause) & set(parts[0])]))
    if rng.random() < 0.4:
        parts.insert(rng.choice((0, len(parts))), rng.choice(pools["alone"]))
    if rng.random() < 0.3:
        parts.insert(0, rng.choice(pools["context"]))
    return " ".join(" ".join(part) for part in parts)


def make_reviews(clauses, rng, side, count):
    """Returns `count` different rows {"instruction", "input", "output"}, labels and languages in turn."""
    rows = {}
    while len(rows) < count:
        label = LABELS[len(rows) % len(LABELS)]
        language = LANGUAGES[len(rows) // len(LABELS) % len(LANGUAGES)]
        text = review(clauses[language][label, side], rng)
        rows.setdefault(text, {"instruction": INSTRUCTION, "input": text, "output": label})
    return rng.sample(list(rows.values()), count)


def make_all(seed=3407):
    """Returns {file name: rows} of all five files; the same seed gives the same rows."""
    chat_rng, prompts = random.Random(f"{seed} chat"), set()
    rng = random.Random(f"{seed} classification")
    wording = {language: read_sections(WORDING / f"{language}.txt") for language in LANGUAGES}
    clauses = {language: make_clauses(sections, rng) for language, sections in wording.items()}
    return {
        "pretrain-text.jsonl": make_texts(random.Random(f"{seed} text"), 300),
        "chat.jsonl": make_chats(chat_rng, 300, prompts, closing=1 / 3),
        "chat-val.jsonl": make_chats(chat_rng, 40, prompts, closing=0),
        "classification.jsonl": make_reviews(clauses, rng, "train", 900),
        "classification-val.jsonl": make_reviews(clauses, rng, "held", 150),
    }


def to_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the five files")
    parser.add_argument("--seed", type=int, default=3407)
    args = parser.parse_args()
    for name, rows in make_all(args.seed).items():
        (args.out / name).write_text(to_jsonl(rows), encoding="utf-8")
        print(f"{args.out / name}: {len(rows)} rows")


if __name__ == "__main__":
    main()

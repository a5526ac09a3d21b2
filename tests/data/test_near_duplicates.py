"""data/near_duplicates.py against the similarity of every pair, and data/languages.py."""

import random

import numpy as np
import pytest

from data.languages import language
from data.near_duplicates import near_duplicates, shingles, word_hashes
from tests.makers import SCRIPTS

WORDS = [f"word{n}" for n in range(2000)]


def test_case_punctuation_blanks_and_unicode_form_do_not_count_and_words_do():
    a, b, c, d, empty = word_hashes(
        ["Café, au\tlait!", "cafe\u0301 AU lait", "cafe au lait", "au café lait", "?!"]
    )
    assert a.tolist() == b.tolist() and len({tuple(x.tolist()) for x in (a, c, d)}) == 3 and not len(empty)


def test_each_han_character_and_kana_is_a_word_and_a_korean_word_is_one():
    assert [len(x) for x in word_hashes(["東京は大きい", "안녕하세요 세계", "a\0b", ""])] == [6, 2, 2, 0]


def test_the_same_pairs_are_found_as_by_comparing_all():
    rng = random.Random(0)
    rows = [rng.choices(WORDS, k=60) for _ in range(60)]
    for changed in [0, 1, 2, 3, 6] * 8:  # copies with so many other words
        copy = list(rows[rng.randrange(60)])
        for at in rng.sample(range(60), changed):
            copy[at] = "other"
        rows.append(copy)
    hashes = word_hashes([" ".join(row) for row in rows])
    sets = [set(shingles(words).tolist()) for words in hashes]
    expected = {}
    for b in range(len(rows)):
        for a in reversed(range(b)):
            if len(sets[a] & sets[b]) >= 0.85 * len(sets[a] | sets[b]):
                expected[b] = a
    assert near_duplicates(hashes) == expected and len(expected) >= 10


def test_a_common_instruction_makes_no_rows_alike():
    rng = random.Random(0)
    instruction = " ".join(WORDS[:300])
    hashes = word_hashes([f"{instruction} {' '.join(rng.choices(WORDS, k=12))}" for _ in range(100)])
    assert not near_duplicates(hashes) and not near_duplicates(hashes[:5])


def test_no_rows_and_rows_without_words_have_no_duplicates():
    assert near_duplicates([]) == {} and near_duplicates([np.zeros(0, np.uint64)] * 3) == {}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Where is the station, and what is it called?", "en"),
        ("Ich bin nicht sicher, ob der Zug fährt.", "de"),
        ("Elle est dans la cuisine avec mon frère.", "fr"),
        ("No sé por qué está la puerta abierta.", "es"),
        ("Non so che cosa è successo nel giardino.", "it"),
        ("Ik weet niet of het huis te koop is.", "nl"),
        (SCRIPTS[0], "ar"),
        (SCRIPTS[2], "ja"),
        (SCRIPTS[5], "ko"),
        ("positive", "unknown"),
        ("12 34 -- 56", "unknown"),
        ("", "unknown"),
    ],
)
def test_a_language_is_told_by_its_script_or_frequent_words_and_else_unknown(text, expected):
    assert language(text) == expected

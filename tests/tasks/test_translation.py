"""tasks/translation.py: its figures are sacrebleu's, and without sacrebleu the remedy is named."""

import json
import random
import subprocess
import sys

import pytest
import sacrebleu

from data.rows import read_samples
from tasks.measures import Row
from tasks.translation import score
from tests.folders import ROOT

ROWS = [
    Row("", "The cat sits on the mat.", " The cat sat on the mat. "),
    Row("", "Good morning!", "Good morning!"),
]


def test_chrf_and_bleu_are_sacrebleus():
    measures = score(ROWS)
    texts, golds = [row.text.strip() for row in ROWS], [[row.gold for row in ROWS]]
    assert measures["chrf"] == sacrebleu.corpus_chrf(texts, golds).score
    assert measures["bleu"] == sacrebleu.corpus_bleu(texts, golds).score
    assert measures["exact_match"] == 0.5


def imperfect_rows(count):
    """Returns rows whose answers are right, empty, blank, shuffled or cut, some with white space around."""
    rng = random.Random(0)
    samples = read_samples(ROOT / "assets" / "samples" / "translation.jsonl")[0][:count]
    rows = []
    for number, sample in enumerate(samples):
        gold = sample.messages[-1][1]
        words = gold.split()
        texts = [gold, "", " ", " ".join(rng.sample(words, len(words))), gold[: len(gold) // 2]]
        before, after = rng.choice([("", ""), (" ", "\t"), ("", "  "), ("\t ", "")])
        rows.append(Row("", f" {gold} ", before + texts[number % len(texts)] + after))
    return rows


def test_the_figures_of_500_rows_are_those_that_sacrebleus_command_prints(tmp_path):
    rows = imperfect_rows(500)
    for name, lines in (("gold", [row.gold for row in rows]), ("text", [row.text for row in rows])):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = [tmp_path / "gold", "-i", tmp_path / "text", "-m", "bleu", "chrf", "-w", "6"]
    command = [sys.executable, "-m", "sacrebleu", *map(str, words)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs = {figure["name"]: figure["score"] for figure in json.loads(printed)}
    measures = score(rows)
    assert len(rows) == 500 and 20 < measures["bleu"] < 80
    assert measures["bleu"] == pytest.approx(theirs["BLEU"], abs=0.005)
    assert measures["chrf"] == pytest.approx(theirs["chrF2"], abs=0.005)


def test_gold_responses_reach_one_hundred():
    measures = score([Row("", row.gold, row.gold) for row in ROWS])
    assert measures["chrf"] == pytest.approx(100) and measures["bleu"] == pytest.approx(100)


def test_without_sacrebleu_only_exact_match_is_measured_and_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert score(ROWS) == {"exact_match": 0.5}
    assert 'pip install -e ".[translation]"' in capsys.readouterr().err

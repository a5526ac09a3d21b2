"""tasks/translation.py: its figures are sacrebleu's, and without sacrebleu the remedy is named."""

import sys

import pytest
import sacrebleu

from tasks.measures import Row
from tasks.translation import score

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


def test_gold_responses_reach_one_hundred():
    measures = score([Row("", row.gold, row.gold) for row in ROWS])
    assert measures["chrf"] == pytest.approx(100) and measures["bleu"] == pytest.approx(100)


def test_without_sacrebleu_only_exact_match_is_measured_and_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert score(ROWS) == {"exact_match": 0.5}
    assert 'pip install -e ".[translation]"' in capsys.readouterr().err

"""report/bootstrap.py: finds a planted regression, calls equal runs equal, and recomputes each measure."""

import json
import random
import re

import numpy as np
import pytest

from report import bootstrap
from tasks import classification, redaction, text, translation
from tests.folders import ROOT

LABEL = re.compile(r"\[[A-Z]+_\d+\]")
SEEDS = range(20)


@pytest.fixture(scope="module")
def golds() -> list[tuple[str, str]]:
    """(prompt, gold) of 300 rows."""
    lines = (ROOT / "assets/samples/val.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["prompt"], row["response"]) for row in map(json.loads, lines)]


def entities(golds) -> list[int]:
    return [len(LABEL.findall(gold)) for _, gold in golds]


def answered(golds, wrong: list[set[int]]):
    """Rows whose response is the gold, but for the labels with the numbers in `wrong`, a set a row."""
    rows = []
    for (prompt, gold), numbers in zip(golds, wrong, strict=True):
        pieces = LABEL.split(gold)
        labels = LABEL.findall(gold)
        labels = ["[TAXNUM_9]" if n in numbers else label for n, label in enumerate(labels)]
        said = "".join(a + b for a, b in zip(pieces, [*labels, ""], strict=True))
        rows.append((prompt, gold, said))
    return rows


def faults(counts, rates, seed) -> list[list[set[int]]]:
    """For each run, the labels of each row that are wrong: a share `rates[0]` in all runs, others in one."""
    rng, runs = random.Random(seed), [[set() for _ in counts] for _ in rates[1:]]
    for at, count in enumerate(counts):
        for n in range(count):
            draw, start = rng.random(), rates[0]
            for own, rate in zip(runs, rates[1:], strict=True):
                if draw < rates[0] or start <= draw < start + rate:
                    own[at].add(n)
                start += rate
    return runs


def interval(golds, wrong, draws=bootstrap.DRAWS):
    measures, intervals = bootstrap.paired([answered(golds, w) for w in wrong], redaction, draws)
    return measures[1]["entity_f1"] - measures[0]["entity_f1"], intervals[1]["entity_f1"]


def test_a_regression_of_three_points_is_found_among_noise_that_both_runs_share(golds):
    """8% of the labels are wrong in both runs; 2% more in the first run, and 5% more in the second."""
    found = [interval(golds, faults(entities(golds), (0.08, 0.02, 0.05), seed), 300) for seed in SEEDS]
    assert np.mean([difference for difference, _ in found]) == pytest.approx(-0.03, abs=0.005)
    assert all(high < 0 for _, (_, high) in found)


def test_equal_runs_that_fail_in_other_rows_are_rarely_called_different(golds):
    """A tenth of the rows is wrong as a whole, other rows in each run: the noise that is hardest to see."""
    called = 0
    for seed in SEEDS:
        rng, counts = random.Random(seed), entities(golds)
        wrong = [[set(range(c)) if rng.random() < 0.1 else set() for c in counts] for _ in range(2)]
        low, high = interval(golds, wrong, 300)[1]
        called += not low <= 0 <= high
    assert called <= 2


def test_a_draw_is_the_tasks_score_of_the_drawn_rows(golds, monkeypatch):
    """Two draws of five rows: the interval's ends are then the measures of these draws, recomputed."""
    monkeypatch.setattr(bootstrap, "LEVEL", 1.0)  # the ends are the smallest and the largest draw
    runs = [answered(golds[:5], w[:5]) for w in faults(entities(golds), (0, 0.3, 0.5), 1)]
    _, intervals = bootstrap.paired(runs, redaction, draws=2)
    times = np.random.default_rng(bootstrap.SEED).multinomial(5, np.full(5, 0.2), size=2)
    scores = []
    for draw in times:
        drawn = [[row for row, n in zip(rows, draw, strict=True) for _ in range(n)] for rows in runs]
        scores.append([redaction.score(rows) for rows in drawn])
    for key in ("entity_f1", "leak_rate", "preserved", "exact_match", "over_mask_rate"):
        differences = [second[key] - first[key] for first, second in scores]
        assert intervals[1][key] == pytest.approx([min(differences), max(differences)])


TASKS = {
    classification: [("p", "yes", "yes"), ("q", "no", "yes"), ("r", "no", "maybe"), ("s", "yes", " YES")],
    text: [("p", "a", "a"), ("q", "b", "c")],
    translation: [("p", "The cat sits here.", "The cat sat here."), ("q", "Good day!", "Good day!")],
}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)
def test_measures_of_the_sums_are_the_measures_of_the_rows(task):
    rows, other = TASKS[task], [(p, g, g) for p, g, _ in TASKS[task]]
    measures, intervals = bootstrap.paired([rows, other], task, draws=50)
    assert measures == [task.score(rows), task.score(other)]
    assert set(intervals[1]) == set(measures[0]) - {"per_label", "confusion"}
    assert all(low <= high for low, high in intervals[1].values())
    assert all(edges == [0, 0] for edges in intervals[0].values())


def test_a_label_stays_one_in_draws_that_have_no_row_of_it(monkeypatch):
    """Five rows of a label and one of another: in a third of the draws, the other is no gold response."""
    monkeypatch.setattr(bootstrap, "LEVEL", 1.0)
    rows = [*[("p", "yes", "no")] * 5, ("q", "no", "no")]
    right = [(prompt, gold, gold) for prompt, gold, _ in rows]
    _, intervals = bootstrap.paired([right, rows], classification, draws=50)
    assert intervals[1]["invalid"] == [0, 0]
    named = [(prompt, gold, "maybe") for prompt, gold, _ in rows]
    for labels, share in ((["yes", "no"], 1), (["Yes", "no", "Maybe "], 0)):
        measures, intervals = bootstrap.paired([right, named], classification, 50, labels)
        assert measures[1]["invalid"] == share and intervals[1]["invalid"] == [share, share]


def test_a_thousand_draws_of_300_rows_take_seconds(golds):
    """Processor time, which other processes do not change much: about one second on a slow core."""
    import time

    runs = [answered(golds, w) for w in faults(entities(golds), (0.08, 0.02, 0.05), 0)]
    redaction.score(runs[0])
    start = time.process_time()
    bootstrap.paired(runs, redaction)
    assert time.process_time() - start < 10


def test_the_interval_of_a_mean_difference_is_that_of_the_normal_approximation():
    """Of 400 rows, 100 are right with a only and 40 with b only: d has the mean 0.15, the variance 0.3275."""
    a, b = [1] * 100 + [0] * 40 + [1] * 260, [0] * 100 + [1] * 40 + [1] * 260
    low, high = bootstrap.mean_difference(a, b, 4000)
    spread = 1.96 * (0.3275 / 400) ** 0.5
    assert abs(low - (0.15 - spread)) < 0.006 and abs(high - (0.15 + spread)) < 0.006
    assert bootstrap.mean_difference(a, a, 100) == (0, 0)


def test_a_mean_difference_is_that_of_a_measure_which_is_a_mean():
    golds = [str(n) for n in range(40)]
    runs = [[("", gold, gold if at % every else "") for at, gold in enumerate(golds)] for every in (2, 5)]
    _, intervals = bootstrap.paired(runs, text, draws=50)
    a, b = ([gold == said for _, gold, said in rows] for rows in runs)
    assert bootstrap.mean_difference(b, a, 50) == pytest.approx(intervals[1]["exact_match"], abs=1e-12)

"""tasks/classification.py: the measures by hand, against nested loops, and their invariants."""

import random

import pytest

from tasks.classification import overall, score
from tasks.measures import Row

# gold a a a b b c; answered A (right), b, c, b (right), nothing, d
ROWS = [Row("", g, t) for g, t in zip("aaabbc", [" A\n", "b", "c", "b", "", "d"], strict=True)]


def test_the_measures_of_six_rows_by_hand():
    measures = score(ROWS)
    assert measures["accuracy"] == pytest.approx(2 / 6) and measures["exact_match"] == pytest.approx(1 / 6)
    assert measures["invalid"] == pytest.approx(2 / 6)  # nothing, and d
    # a: 1 of 1 answered, 1 of 3; b: 1 of 2, 1 of 2; c: 0 of 1, 0 of 1
    assert measures["per_label"]["a"] == {"precision": 1.0, "recall": 1 / 3, "f1": 0.5, "support": 3}
    assert measures["per_label"]["b"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert measures["per_label"]["c"]["f1"] == 0.0
    assert (
        measures["macro_f1"] == pytest.approx((0.5 + 0.5 + 0) / 3) == pytest.approx(overall(measures)["f1"])
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_measures_equal_nested_loops(seed):
    rng = random.Random(seed)
    rows = [Row("", rng.choice("abc"), rng.choice("abcd")) for _ in range(40)]
    measures = score(rows)
    f1s = []
    for label in sorted({row.gold for row in rows}):
        both = sum(1 for row in rows if row.gold == label and row.text == label)
        either = sum(1 for row in rows if row.gold == label) + sum(1 for row in rows if row.text == label)
        f1s.append(2 * both / either)
        assert measures["per_label"][label]["f1"] == pytest.approx(f1s[-1])
    assert measures["macro_f1"] == pytest.approx(sum(f1s) / len(f1s))
    assert measures["accuracy"] == pytest.approx(sum(row.gold == row.text for row in rows) / 40)


def test_gold_responses_score_one_and_the_order_of_rows_does_not_matter():
    perfect = score([Row("", row.gold, row.gold) for row in ROWS])
    assert (
        perfect["accuracy"] == perfect["macro_f1"] == perfect["exact_match"] == 1 and perfect["invalid"] == 0
    )
    assert score(ROWS[::-1]) == score(ROWS)

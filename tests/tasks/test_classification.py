"""tasks/classification.py: the measures by hand, against nested loops, and their invariants."""

import random

import pytest

from data.rows import Sample
from tasks.classification import NO_LABEL, columns, labels_of, overall, score, score_labels
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


def test_the_confusion_matrix_of_six_rows_by_hand():
    confusion = score(ROWS)["confusion"]
    assert confusion == {"a": {"a": 1, "b": 1, "c": 1}, "b": {"b": 1, NO_LABEL: 1}, "c": {NO_LABEL: 1}}
    assert columns(confusion) == ["a", "b", "c", NO_LABEL]


def test_a_named_label_without_a_gold_row_is_a_column_and_no_invalid_response():
    measures = score(ROWS, ["A", "b", "c", " D "])
    assert measures["confusion"]["c"] == {"d": 1} and measures["invalid"] == pytest.approx(1 / 6)
    assert columns(measures["confusion"]) == ["a", "b", "c", "d", NO_LABEL]


@pytest.mark.parametrize("seed", range(5))
def test_the_confusion_matrix_sums_to_the_measures(seed):
    rng = random.Random(seed)
    rows = [Row("", rng.choice("abc"), rng.choice("abcd")) for _ in range(40)]
    measures = score(rows)
    confusion = measures["confusion"]
    assert {gold: sum(row.values()) for gold, row in confusion.items()} == {
        gold: scores["support"] for gold, scores in measures["per_label"].items()
    }
    assert sum(row.get(gold, 0) for gold, row in confusion.items()) / 40 == measures["accuracy"]
    assert sum(row.get(NO_LABEL, 0) for row in confusion.values()) / 40 == measures["invalid"]


def test_labels_are_the_different_responses_or_those_that_are_named():
    samples = [
        Sample(f"a:{i}", (("user", "x"), ("assistant", t))) for i, t in enumerate([" no ", "yes", "no"])
    ]
    assert labels_of(samples) == ["no", "yes"]
    assert labels_of(samples, ["Yes", "No", "maybe "]) == ["Yes", "No", "maybe"]
    with pytest.raises(ValueError, match="data.labels") as caught:
        labels_of(samples, ["yes", "maybe"])
    assert "a:0: 'no'" in str(caught.value) and "a:2: 'no'" in str(caught.value)
    assert "--labels" in str(caught.value) and "yes, maybe" in str(caught.value)


def test_the_label_of_the_highest_log_probability_is_the_answer():
    found = score_labels(["a", "b", "B ", "a"], ["a", "b"], [[-1, -2], [-3, -2], [-1, -9], [-0.5, -0.6]])
    # a: 2 of 3 answered, 2 of 2; b: 1 of 1, 1 of 2
    assert found == {"label_accuracy": 3 / 4, "label_macro_f1": pytest.approx((4 / 5 + 2 / 3) / 2)}


def test_gold_responses_score_one_and_the_order_of_rows_does_not_matter():
    perfect = score([Row("", row.gold, row.gold) for row in ROWS])
    assert (
        perfect["accuracy"] == perfect["macro_f1"] == perfect["exact_match"] == 1 and perfect["invalid"] == 0
    )
    assert score(ROWS[::-1]) == score(ROWS)

"""tasks/choose.py: the task of the embedded samples, and each rule at its edge."""

import pytest

from data.rows import Sample, read_samples
from tasks import classification, redaction, text, translation
from tasks.choose import ALL_METRICS, TASKS, choose_task
from tests.folders import ROOT

SAMPLES = ROOT / "assets" / "samples"


def single(prompt: str, response: str) -> Sample:
    return Sample("a:1", (("user", prompt), ("assistant", response)))


@pytest.mark.parametrize(
    ("file", "task"),
    [
        ("val.jsonl", redaction),
        ("val_unseen.jsonl", redaction),
        ("classification-val.jsonl", classification),
        ("translation-val.jsonl", translation),
        ("chat-val.jsonl", text),
        ("pretrain-text.jsonl", text),
    ],
)
def test_auto_knows_the_samples_that_ship(file, task):
    assert choose_task("auto", read_samples(SAMPLES / file)[0]) is task


def test_a_named_task_is_taken_whatever_the_rows_are():
    for name, task in TASKS.items():
        assert choose_task(name, [single("hello", "you")]) is task


def test_named_labels_make_any_rows_a_classification_unless_the_task_is_named():
    rows = [single("hello", "you")]
    assert choose_task("auto", rows, ["you"]) is classification
    assert choose_task("text", rows, ["you"]) is text


def test_translation_applies_where_every_first_turn_asks_for_it():
    rows = [single("Translate to German: one", "eins"), single(" Translate: two", "zwei")]
    assert choose_task("auto", rows) is translation
    assert choose_task("auto", [*rows, single("Say two", "zwei")]) is text
    system = Sample("a:2", (("system", "Translate into French."), ("user", "one"), ("assistant", "un")))
    assert choose_task("auto", [system]) is translation


@pytest.mark.parametrize(
    ("rows", "applies"),
    [
        ([single(f"{i}", "ab"[i % 2]) for i in range(20)], True),
        ([single(f"{i}", "ab"[i % 2]) for i in range(19)], False),
        ([single(f"{i}", f"label {i % 7}") for i in range(20)], False),  # fewer than three rows a label
        ([single(f"{i}", "one two three four five six") for i in range(20)], False),
        ([Sample("x", text="raw")] * 30, False),
        ([Sample("x", (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))] * 30, False),
    ],
)
def test_classification_applies_to_few_short_labels_in_single_exchanges(rows, applies):
    assert classification.applies(rows) is applies


def test_no_rows_are_plain_text_and_each_measure_is_described_once():
    assert choose_task("auto", []) is text
    assert len({m.key for m in ALL_METRICS}) == len(ALL_METRICS)

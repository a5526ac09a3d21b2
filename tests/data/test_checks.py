"""data/checks.py: a small set with each finding once, and a clean set without findings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.checks import FINDINGS, MOJIBAKE, brief, examine
from data.render import IGNORE_INDEX, Counts, Document
from data.rows import Sample

__ = IGNORE_INDEX


def chat(id, prompt, response):
    return Sample(id, (("user", prompt), ("assistant", response)))


FAULTY = [
    chat("a:1", "p", "r"),
    chat("a:2", "p", "r"),  # duplicate of a:1
    chat("a:3", "q", "yes"),
    chat("a:4", "q", "no"),  # contradicts a:3
    chat("a:5", " ", "r"),  # empty prompt
    chat("a:6", "caf\u00c3\u00a9", "r"),  # UTF-8, decoded as Latin-1
    Sample("a:7", text="raw"),
]
HELD_OUT = [chat("v:1", "p ", "r"), chat("v:2", "unseen", "r")]
DOCUMENTS = [
    Document([2, 5, 6, 7], [__, 6, 7, __], "a:1"),
    Document([2, 5], [5, __], "a:2"),
    Document([2] * 6, [__] * 6, "a:3"),
]


def test_examine_finds_every_fault_of_a_small_set_once():
    counts = Counts(dropped=2, unsupervised=1, truncated=4)
    report = examine(FAULTY, DOCUMENTS, HELD_OUT, problems=["a.jsonl:8: bad"], counts=counts)
    assert {key: report[key] for key in FINDINGS} == {
        "duplicates": ["a:2"],
        "empty_prompts": ["a:5"],
        "contradictions": ["a:3", "a:4"],
        "overlap": ["v:1"],
        "mojibake": ["a:6"],
    }
    assert (report["samples"], report["validation"], report["skipped"]) == (7, 2, 1)
    assert (report["tokens"], report["longest"], report["supervised_share"]) == (12, 6, 3 / 12)
    assert (report["dropped"], report["truncated"]) == (3, 4)


def test_brief_has_each_finding_and_none_for_clean_data():
    report = examine(FAULTY, DOCUMENTS, HELD_OUT)
    for key, words in FINDINGS.items():
        assert f"{len(report[key])} {words}: {report[key][0]}" in brief(report)
    clean = examine([chat("a:1", "p", "r")], DOCUMENTS[:1])
    assert brief(clean) == "data: 1 samples, 0 held out, 4 tokens (50% supervised), longest 4"


def test_brief_shortens_a_long_list_of_ids_and_the_report_does_not():
    report = examine([chat(f"a:{i}", "p", "r") for i in range(6)])
    assert len(report["duplicates"]) == 5
    assert "5 exact copies of an earlier sample: a:1, a:2, a:3, ..." in brief(report)


def test_samples_without_documents_have_no_lengths_and_no_division_by_zero():
    report = examine(FAULTY)
    assert (report["longest"], report["supervised_share"]) == (0, 0.0)
    assert "tokens" not in brief(report)


@given(st.lists(st.tuples(st.sampled_from("pq "), st.sampled_from("rs")), max_size=12))
def test_findings_name_only_samples_of_the_set_and_distinct_rows_are_no_duplicates(pairs):
    report = examine([chat(f"a:{i}", *pair) for i, pair in enumerate(pairs)])
    assert len(report["duplicates"]) == len(pairs) - len(set(pairs))
    assert all(int(id[2:]) < len(pairs) for key in FINDINGS for id in report[key])


WORDS = ["\u00e9t\u00e9", "stra\u00dfe", "\u00ab pi\u00f1a \u00bb", "\u00c2ge", "\u20ac 5"]


@pytest.mark.parametrize("word", [*WORDS, "\u2019s", "\U0001f600"])
def test_text_is_mojibake_only_after_a_wrong_decoding(word):
    assert not MOJIBAKE.search(word)
    assert MOJIBAKE.search(word.encode().decode("latin-1"))
    assert MOJIBAKE.search(word.encode().decode("cp1252", errors="replace"))

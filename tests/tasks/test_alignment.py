"""tasks/alignment.py by hand: spans, copied characters and insertions, in exact and in altered redactions."""

import pytest

from tasks.alignment import Alignment


def align(source, redacted):
    return Alignment(source, redacted, cost=lambda label, text: len(text.split()))


def shown(source, redacted):
    """The source with "_" for each character that is not copied."""
    return "".join(c if flag else "_" for c, flag in zip(source, align(source, redacted).copied, strict=True))


def test_an_exact_redaction_gives_spans_without_blanks_and_copies_the_rest():
    found = align("Call Ann  now.", "Call[NAME_1]now.")
    assert found.spans == [(5, 8, "NAME")] and found.inserted == []
    assert shown("Call Ann  now.", "Call[NAME_1]now.") == "Call______now."
    assert found.literal == "Call\0now."


@pytest.mark.parametrize(
    ("redacted", "copied", "spans", "inserted"),
    [
        # A letter is lost. " tomor" is copied; "ow" is too short a run to be more than chance.
        ("Call [NAME_1] tomorow.", "Call ___ tomor___.", [(5, 8)], []),
        # Only "all " of the first words is equal.
        ("Please call [NAME_1] tomorrow.", "_all ___ tomorrow.", [(5, 8)], []),
        # Three labels share three characters; the blank between two of them is inserted.
        ("Call [NAME_1][CITY_1] [X_1] tomorrow.", "Call ___ tomorrow.", [(5, 6), (6, 7), (7, 8)], [8]),
        ("Call [NAME_1], please, tomorrow.", "Call ___ tomorrow.", [(5, 8)], [8]),
    ],
)
def test_an_altered_redaction_is_aligned_by_tokens(redacted, copied, spans, inserted):
    source = "Call Ann tomorrow."
    assert shown(source, redacted) == copied
    assert [span[:2] for span in align(source, redacted).spans] == spans
    assert align(source, redacted).inserted == inserted


def test_more_labels_than_characters_leave_the_text_to_the_first():
    assert align("ab", "[X_1][Y_1][Z_1]").spans == [(0, 2, "X"), (2, 2, "Y"), (2, 2, "Z")]


def test_the_cost_decides_how_labels_side_by_side_divide_a_text():
    assert [s[:2] for s in align("one two three", "[X_1] [Y_1]").spans] == [(0, 3), (4, 13)]
    long_first = Alignment(
        "one two three", "[X_1] [Y_1]", cost=lambda label, text: len(text) * (label == "Y")
    )
    assert [s[:2] for s in long_first.spans] == [(0, 7), (8, 13)]


def test_long_stretches_of_one_character_are_not_compared_by_runs():
    """100 * 1,100 pairs of equal characters, whose search would take seconds."""
    source = "x " + "a" * 100 + "b y"
    assert sum(align(source, f"x {'a' * 900}[NAME_1] y").copied) == 104
    assert sum(align(source, f"x {'a' * 1100}[NAME_1] y").copied) == 4

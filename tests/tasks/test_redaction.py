"""Redaction measures: every number here is worked out by hand."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks import redaction, text
from tasks.redaction import (
    CLASSES,
    INSTRUCTION,
    Span,
    compare,
    is_redaction,
    likely_classes,
    score,
    source_text,
    spans,
)

SOURCE = "Ann Lee, call 555-01 now."
GOLD = "[GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1] now."
# 12 entity characters: Ann 3, Lee 3, 555-01 6. 13 others: " ", ", call ", " now."


def measure(prediction, source=SOURCE, gold=GOLD):
    return score([(source, gold, prediction)])


def values(source, redacted):
    return [(source[s.start : s.end], s.label) for s in spans(source, redacted)]


def test_source_text_is_what_follows_the_instruction():
    assert source_text(f"{INSTRUCTION}\n\nText:\nHi\n\nText:\nthere") == "Hi\n\nText:\nthere"
    assert source_text("just a text") == "just a text"


def test_instruction_is_one_line_and_the_lab_s():
    assert "\n" not in INSTRUCTION
    assert INSTRUCTION.startswith(
        "Mask all PII in the following text. Replace each entity with the exact UPPERCASE label in"
    )
    assert INSTRUCTION.endswith(
        "[CREDIT_CARD], [TIME], etc.). Preserve all non-PII text, whitespace, and punctuation "
        "exactly. Return ONLY the redacted text."
    )


def test_redaction_rows_are_told_by_prompt_or_label():
    assert is_redaction(f"{INSTRUCTION}\n\nText:\nno entity", "no entity")
    assert is_redaction("Hide the names: Ann", "[GIVENNAME_1]")
    assert is_redaction("Hide the names: Ann", "[MASKED]")
    assert not is_redaction("Write a list", "[TODO] buy milk [see 1]")


def test_spans_are_source_positions_and_classes():
    assert spans(SOURCE, GOLD) == [
        Span(0, 3, "GIVENNAME"),
        Span(4, 7, "SURNAME"),
        Span(14, 20, "TELEPHONENUM"),
    ]


def test_lab_sentence_aligns_in_both_styles():
    source = (
        "The author of this text is Ignacio López Luna, but everybody calls him Ignasi. His ID number is "
        "123456789. "
        "He has a son named Arnau López, who was born on 21-07-2021."
    )
    gold = (
        "The author of this text is [GIVENNAME_1] [SURNAME_1], but everybody calls him [GIVENNAME_1]. His ID "
        "number is "
        "[IDCARDNUM_1]. He has a son named [GIVENNAME_1] [SURNAME_1], who was born on [DATEOFBIRTH_1]."
    )
    expected = [
        ("Ignacio", "GIVENNAME"),
        ("López Luna", "SURNAME"),
        ("Ignasi", "GIVENNAME"),
        ("123456789", "IDCARDNUM"),
        ("Arnau", "GIVENNAME"),
        ("López", "SURNAME"),
        ("21-07-2021", "DATEOFBIRTH"),
    ]
    assert values(source, gold) == expected
    masked = gold
    for label in ("GIVENNAME_1", "SURNAME_1", "IDCARDNUM_1", "DATEOFBIRTH_1"):
        masked = masked.replace(label, "MASKED")
    assert values(source, masked) == [(value, "MASKED") for value, _ in expected]


def test_adjacent_entities_split_where_the_classes_suit():
    assert values("In 8631 BY Den Haag.", "In [ZIPCODE_1] [CITY_1].") == [
        ("8631 BY", "ZIPCODE"),
        ("Den Haag", "CITY"),
    ]
    assert values("at Rue de la Paix 12", "at [STREET_1] [BUILDINGNUM_1]") == [
        ("Rue de la Paix", "STREET"),
        ("12", "BUILDINGNUM"),
    ]
    assert values("28170Madrid", "[ZIPCODE_1][CITY_1]") == [("28170", "ZIPCODE"), ("Madrid", "CITY")]
    assert values("mail a@b.org Tom", "mail [EMAIL_1] [GIVENNAME_1]") == [
        ("a@b.org", "EMAIL"),
        ("Tom", "GIVENNAME"),
    ]


def test_brackets_of_the_source_are_text():
    assert values("[NOTE] Ann said [EMAIL]", "[NOTE] [GIVENNAME_1] said [EMAIL]") == [("Ann", "GIVENNAME")]
    assert values("write [EMAIL] to a@b.org", "write [EMAIL] to [EMAIL]") == [("a@b.org", "EMAIL")]
    assert values("see [1] Ann", "see [1] [GIVENNAME_1]") == [("Ann", "GIVENNAME")]


def test_gold_against_itself_is_perfect():
    result = measure(GOLD)
    assert (result["exact_match"], result["leak_rate"], result["over_mask_rate"], result["preserved"]) == (
        1,
        0,
        0,
        1,
    )
    assert result["entity_precision"] == result["entity_recall"] == result["entity_f1"] == 1
    assert result["per_label"]["SURNAME"] == {"precision": 1, "recall": 1, "f1": 1, "support": 1}


def test_one_leaked_name_counts_its_characters():
    result = measure("[GIVENNAME_1] Lee, call [TELEPHONENUM_1] now.")
    assert result["leak_rate"] == 3 / 12
    assert (result["entity_precision"], result["entity_recall"]) == (1, 2 / 3)
    assert result["entity_f1"] == pytest.approx(0.8)
    assert (result["preserved"], result["exact_match"], result["over_mask_rate"]) == (1, 0, 0)
    assert result["per_label"]["SURNAME"] == {"precision": 0, "recall": 0, "f1": 0, "support": 1}


def test_half_a_number_leaks_half():
    result = measure("[GIVENNAME_1] [SURNAME_1], call 555[TELEPHONENUM_1] now.")
    assert result["leak_rate"] == 3 / 12
    assert result["entity_recall"] == 2 / 3  # the span has the wrong bounds
    assert result["preserved"] == 1


def test_wrong_class_hides_but_does_not_score():
    result = measure("[GIVENNAME_1] [CITY_1], call [TELEPHONENUM_1] now.")
    assert result["leak_rate"] == 0 and result["entity_f1"] == 2 / 3
    assert result["per_label"]["CITY"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_index_numbers_matter_to_exact_match_only():
    result = measure("[GIVENNAME_7] [SURNAME_2], call [TELEPHONENUM_1] now.")
    assert result["entity_f1"] == 1 and result["exact_match"] == 0 and result["leak_rate"] == 0


def test_masked_text_outside_entities_is_over_masked():
    result = measure("[GIVENNAME_1] [SURNAME_1], [CITY_1] [TELEPHONENUM_1] now.")
    assert result["over_mask_rate"] == 4 / 13  # call
    assert result["preserved"] == 0 and result["entity_precision"] == 3 / 4


def test_one_label_over_two_entities_masks_the_blank_between():
    result = measure("[GIVENNAME_1], call [TELEPHONENUM_1] now.")
    assert result["over_mask_rate"] == 1 / 13 and result["leak_rate"] == 0
    assert result["entity_recall"] == 1 / 3


@pytest.mark.parametrize(
    "prediction",
    [
        "[GIVENNAME_1] [SURNAME_1], cal [TELEPHONENUM_1] now.",  # dropped
        "[GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1] now!",  # changed
        "[GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1]  now.",  # a blank more
        "Sure: [GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1] now.",
        "[GIVENNAME_1] [SURNAME_1], call [TELEPHONENUM_1] now. Bye",
    ],
)
def test_text_outside_entities_must_be_byte_exact(prediction):
    result = measure(prediction)
    assert result["preserved"] == 0 and result["leak_rate"] == 0
    assert result["entity_recall"] == 1  # a slip of copying does not cost the spans


def test_an_altered_entity_is_no_leak_and_the_rest_is_preserved():
    result = measure("[GIVENNAME_1] Moo, call [TELEPHONENUM_1] now.")
    assert result["leak_rate"] == 0 and result["preserved"] == 1 and result["entity_recall"] == 2 / 3


def test_blanks_around_the_texts_do_not_count():
    result = score([(SOURCE + "\n", " " + GOLD, GOLD + "  ")])
    assert result["exact_match"] == result["preserved"] == 1


def test_empty_prediction_leaks_nothing_and_fails_the_rest():
    result = measure("")
    assert result["leak_rate"] == 0 and result["over_mask_rate"] == 0
    assert (
        result["exact_match"] == result["preserved"] == result["entity_f1"] == result["entity_precision"] == 0
    )


def test_echo_of_the_source_leaks_everything():
    result = measure(SOURCE)
    assert result["leak_rate"] == 1 and result["preserved"] == 1 and result["entity_f1"] == 0


def test_one_label_for_all_is_over_masking():
    result = measure("[MASKED]")
    assert result["leak_rate"] == 0 and result["over_mask_rate"] == 1
    assert result["preserved"] == result["entity_precision"] == 0


def test_invented_labels_lower_precision():
    result = measure(GOLD.replace("call", "[VERB_1] call"))
    assert result["entity_precision"] == 3 / 4 and result["entity_recall"] == 1 and result["preserved"] == 0
    assert result["per_label"]["VERB"]["support"] == 0


def test_redaction_followed_by_the_source_leaks_everything():
    assert measure(GOLD + "\n" + SOURCE)["leak_rate"] == 1


def test_value_beside_its_own_label_leaks_whole():
    assert measure("[GIVENNAME_1] (Ann) [SURNAME_1], call [TELEPHONENUM_1] now.")["leak_rate"] == 3 / 12


def test_value_that_is_also_a_word_of_the_text_is_no_leak():
    source, gold = "May will come in May.", "[GIVENNAME_1] will come in May."
    assert measure(gold, source, gold)["leak_rate"] == 0
    assert measure(source, source, gold)["leak_rate"] == 1


def test_repeated_value_leaks_as_often_as_it_stands_there():
    source, gold = "Tom met Tom and Tom.", "[GIVENNAME_1] met [GIVENNAME_1] and [GIVENNAME_1]."
    assert measure("[GIVENNAME_1] met Tom and [GIVENNAME_1].", source, gold)["leak_rate"] == 3 / 9
    assert measure("[GIVENNAME_1] met Tom and Tom.", source, gold)["leak_rate"] == 6 / 9


def test_measures_are_micro_averages():
    result = score([(SOURCE, GOLD, SOURCE), ("Hi Bo", "Hi [GIVENNAME_1]", "Hi [GIVENNAME_1]")])
    assert result["leak_rate"] == 12 / 14 and result["exact_match"] == 1 / 2
    assert result["entity_recall"] == 1 / 4 and result["entity_precision"] == 1
    assert result["per_label"]["GIVENNAME"] == {
        "precision": 1,
        "recall": 1 / 2,
        "f1": pytest.approx(2 / 3),
        "support": 2,
    }


def test_text_without_entities_scores_one_when_left_alone():
    result = measure("All is well.", "All is well.", "All is well.")
    assert (
        result["entity_f1"] == 1
        and result["leak_rate"] == 0
        and result["preserved"] == 1
        and result["per_label"] == {}
    )


def test_a_comparison_counts_the_characters_of_one_row():
    """Lee leaks, 555-01 is lost with the blank before it, "call" is masked, and " Bye" is added."""
    assert compare(SOURCE, GOLD, "[GIVENNAME_1] Lee, [CITY_1] now. Bye")._asdict() == {
        "entity": 12,
        "outside": 13,
        "leaked": 3,
        "over_masked": 5,
        "lost": 0,
        "lost_outside": 0,
        "added": 4,
        "preserved": False,
        "correct": 1,
        "predicted": 2,
        "expected": 3,
    }
    counts = compare(SOURCE, GOLD, "[GIVENNAME_1] [SURNAME_1], all now.")
    assert (counts.lost, counts.lost_outside, counts.added, counts.preserved) == (6, 2, 0, False)


def test_a_text_may_be_taken_for_the_classes_that_look_like_it():
    assert likely_classes("Ann") == ["CITY", "GIVENNAME", "PASSWORD", "STREET", "SURNAME", "USERNAME"]
    assert likely_classes("Den Haag") == ["CITY", "GIVENNAME", "STREET", "SURNAME"]
    assert {"ZIPCODE", "TAXNUM"} < {*likely_classes("555-01")} and "CITY" not in likely_classes("555-01")
    assert "EMAIL" in likely_classes("a@b.org")


WORDS = st.text(alphabet="abXY 0.[]_\n<>é-", min_size=0, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            WORDS,
            st.sampled_from(CLASSES + ["MASKED"]),
            st.text(alphabet="qrs TU789@", min_size=1).filter(str.strip),
        ),
        max_size=6,
    ),
    WORDS,
)
def test_gold_against_itself_is_always_perfect(parts, tail):
    source = "".join(text + value for text, _, value in parts) + tail
    gold = "".join(f"{text}[{label}_1]" for text, label, _ in parts) + tail
    result = score([(source, gold, gold)])
    assert result["exact_match"] == 1 and result["leak_rate"] == 0 and result["over_mask_rate"] == 0
    assert result["entity_precision"] == result["entity_recall"] == result["entity_f1"] == 1


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60),
    st.text(max_size=60),
    st.lists(st.sampled_from(["[CITY_1]", "Ann", " ", "x", "[FOO]"]), max_size=12),
)
def test_any_prediction_gets_shares_between_0_and_1(source, gold, prediction):
    result = score([(source, gold, "".join(prediction))])
    result.pop("per_label")
    assert all(0 <= value <= 1 for value in result.values())
    assert all(0 <= s.start <= s.end <= len(source) for s in spans(source, "".join(prediction)))


def test_600_rows_score_in_seconds():
    source = " ".join([SOURCE] * 8)
    rows = [
        (source, " ".join([GOLD] * 8), " ".join([GOLD.replace("call", f"cal {i} Lee")] * 8))
        for i in range(600)
    ]
    start = time.perf_counter()
    score(rows)
    assert time.perf_counter() - start < 15  # 1 to 2 s on an idle core


# how a row is shown

SHOWN_SOURCE = "He is Ignacio Luna, born 21-07-2021, said to like tea."
SHOWN_GOLD = "He is [GIVENNAME_1] [SURNAME_1], born [DATEOFBIRTH_1], said to like tea."


def test_labels_leaks_and_alterations_are_told_apart():
    after = "He is [GIVENNAME_1] Luna, born [EMAIL_1]-2021, said to like coffee."
    assert redaction.pieces(after, SHOWN_GOLD, SHOWN_SOURCE) == [
        ("", "He is "),
        ("ok", "[GIVENNAME_1]"),
        ("", " "),
        ("leaked", "Luna"),
        ("", ", born "),
        ("wrong", "[EMAIL_1]-"),
        ("leaked", "2021"),
        ("", ", said to like "),
        ("wrong", "coffee"),
        ("", "."),
    ]


def test_a_leaked_date_is_one_piece_and_lost_words_are_missing():
    after = "He is [GIVENNAME_1] [SURNAME_1], born 21-07-2021, like tea."
    assert [
        piece
        for piece in redaction.pieces(after, SHOWN_GOLD, SHOWN_SOURCE)
        if piece[0] in ("leaked", "missing")
    ] == [
        ("leaked", "21-07-2021"),
        ("missing", "said to "),
    ]


def test_every_value_of_an_echoed_source_is_a_leak():
    source = "Login: ann.lee@gous.net, initial password 5Wy401I6GaZ."
    gold = "Login: [EMAIL_1], initial password [PASSWORD_1]."
    leaked = [piece for kind, piece in redaction.pieces(source, gold, source) if kind == "leaked"]
    assert leaked == ["ann.lee@gous.net", "5Wy401I6GaZ"]


def test_an_answer_with_nothing_in_common_is_wrong_but_for_its_leaks():
    assert redaction.pieces("no, Luna", SHOWN_GOLD, SHOWN_SOURCE) == [("wrong", "no, "), ("leaked", "Luna")]
    assert text.pieces("no, Luna", "[A] is what they said", "") == [("", "no, Luna")]

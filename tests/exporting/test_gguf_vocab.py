"""exporting/gguf_vocab.py: the scores tokenize as the merges do."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exporting.gguf_vocab import (
    BYTE,
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    SPMTokenizer,
    merge_ranks,
    read_tokenizer,
    tokenizer_metadata,
    vocabulary,
)
from model.hub import TINY
from model.tokenizer import Tokenizer

TOKENIZER = Tokenizer(TINY)
CUTTER = SPMTokenizer(*vocabulary(read_tokenizer(TINY), TOKENIZER.vocab_size))


def small(**changes) -> dict:
    added = [
        {"id": 0, "content": "<pad>", "special": False},
        {"id": 1, "content": "<eos>", "special": True},
        {"id": 8, "content": "▁▁", "special": False},
    ]
    vocab = {"<pad>": 0, "<eos>": 1, "<0x41>": 2, "a": 3, "b": 4, "ab": 5, "abab": 6, "aba": 7, "▁▁": 8}
    merges = [["a", "b"], ["▁", "▁"], ["ab", "ab"], ["aba", "b"], ["ab", "a"]]
    return {
        "added_tokens": added,
        "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges} | changes,
    }


def test_scores_types_and_pieces_of_a_small_tokenizer_are_these():
    tokens, scores, types = vocabulary(small(), size=10)
    assert tokens == ["<pad>", "<eos>", "<0x41>", "a", "b", "ab", "abab", "aba", "  ", "[PAD9]"]
    # ab is made first, abab second (by two merges in a row, and "▁▁" is an added token and does not count),
    # aba third; a and b are never made.
    assert scores == [-1000.0, -1000.0, 0.0, -4.0, -5.0, -1.0, -2.0, -3.0, -1000.0, -10000.0]
    assert types == [CONTROL, CONTROL, BYTE, NORMAL, NORMAL, NORMAL, NORMAL, NORMAL, USER_DEFINED, UNUSED]


def test_the_best_score_is_joined_first_and_the_leftmost_among_equals():
    cutter = SPMTokenizer(*vocabulary(small(), size=9))
    assert cutter.encode("ababab") == [6, 5]  # ab ab ab -> abab ab
    assert cutter.encode("aba") == [7]
    assert cutter.encode("A") == [2]
    assert cutter.encode("a  b") == [3, 8, 4]  # two blanks are a piece of their own
    spaced = vocabulary(small(vocab=small()["model"]["vocab"] | {"▁": 9}), size=10)
    assert SPMTokenizer(*spaced, space_prefix=True).encode("ab") == [9, 5]


def test_there_are_as_many_pieces_as_asked_for_whether_the_file_has_more_or_fewer():
    for rows in (5, 9, 20):
        assert [len(part) for part in vocabulary(small(), rows)] == [rows] * 3


def test_merges_of_the_old_style_count_alike():
    assert (
        merge_ranks(["a b", "ab ab"], set())
        == merge_ranks([["a", "b"], ["ab", "ab"]], set())
        == {"ab": 1, "abab": 2}
    )


@settings(max_examples=400, deadline=None)
@example("  a   b\n\n\tc    ")
@example("😀 日本語 <0x41> <bos><unused3> <start_of_turn>user")
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
def test_the_scores_cut_any_text_as_the_tokenizer_does(text):
    assert CUTTER.encode(text) == TOKENIZER.encode(text)


def test_real_texts_of_six_languages_are_cut_alike():
    lines = (
        (TINY.parents[1] / "assets" / "samples" / "val.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    )
    for row in map(json.loads, lines):
        assert CUTTER.encode(row["prompt"]) == TOKENIZER.encode(row["prompt"])


def test_special_ids_are_looked_up_by_name():
    keys = tokenizer_metadata(TINY, TOKENIZER.vocab_size)
    assert {k.split(".")[-1]: v for k, (_, v) in keys.items() if k.endswith("_id")} == {
        "bos_token_id": 2, "eos_token_id": 1, "eot_token_id": 106, "unknown_token_id": 3,
        "padding_token_id": 0}  # fmt: skip


def test_a_tokenizer_without_its_special_pieces_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small()))
    with pytest.raises(ValueError, match="has no <bos>, <end_of_turn>, <unk> among the model's 9 vocab"):
        tokenizer_metadata(tmp_path, 9)


@pytest.mark.parametrize(
    ("model", "said"),
    [({"type": "WordPiece"}, "'WordPiece'"), ({"byte_fallback": False}, "byte_fallback False")],
)
def test_a_tokenizer_of_another_kind_is_refused(tmp_path, model, said):
    (tmp_path / "tokenizer.json").write_text(json.dumps(small(**model)))
    with pytest.raises(ValueError, match=said):
        read_tokenizer(tmp_path)

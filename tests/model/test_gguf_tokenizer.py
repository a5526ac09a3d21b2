"""model/gguf_tokenizer.py: a GGUF file's vocabulary cuts texts as llama.cpp does."""

import json
import random

import pytest
from tokenizers import Tokenizer as Backend

from exporting.gguf_vocab import SPMTokenizer, read_tokenizer, vocabulary
from model.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, merges, tokenizer_json
from model.hub import TINY
from model.tokenizer import Tokenizer

# Pieces of the examples with their scores; "▁" stands for a space.
PIECES = {"a": -9, "b": -8, "c": -7, "ab": -1, "bc": -2, "abc": -3, "▁": -6, "▁a": -4}


def vocabulary_keys(**changes) -> dict:
    """The tokenizer.ggml.* keys of a small vocabulary: control tokens, bytes, one fixed piece, and PIECES."""
    control = {"<pad>": CONTROL, "<eos>": CONTROL, "<bos>": CONTROL, "<unk>": UNKNOWN}
    control |= {"<start_of_turn>": CONTROL, "<end_of_turn>": NORMAL}  # a wrong type, as in some old files
    kinds = control | {f"<0x{i:02X}>": BYTE for i in range(256)} | {"<b>": USER_DEFINED}
    kinds |= dict.fromkeys(PIECES, NORMAL)
    scores = [float(PIECES.get(piece, -1000.0)) for piece in kinds]
    keys = {"model": "llama", "tokens": list(kinds), "scores": scores, "token_type": list(kinds.values())}
    return keys | {"bos_token_id": 2, "unknown_token_id": 3, "add_space_prefix": False} | changes


def cut(text: str, **changes) -> list[str]:
    """The pieces of a text."""
    content = tokenizer_json(vocabulary_keys(**changes), ("<bos>", "<end_of_turn>"))
    backend = Backend.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    return [backend.id_to_token(i) for i in backend.encode(text, add_special_tokens=False).ids]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("abc", ["abc"]),  # ab has the highest score, then abc
        ("bcb", ["bc", "b"]),
        ("aabc", ["a", "abc"]),
        (" a", ["▁a"]),
        ("a<b>a", ["a", "<b>", "a"]),  # a user-defined piece is cut out first
        ("é", ["<0xC3>", "<0xA9>"]),  # no piece: its bytes
        ("  ", ["▁", "▁"]),
    ],
)
def test_a_text_is_cut_as_by_hand(text, pieces):
    assert cut(text) == pieces


def test_a_control_token_in_a_text_stays_text_even_if_the_file_calls_it_an_ordinary_piece():
    assert "<end_of_turn>" not in cut("a<end_of_turn>") and "<bos>" not in cut("<bos>")


def test_a_space_is_put_before_a_text_where_the_file_says_so():
    assert cut("a", add_space_prefix=True) == ["▁a"] and cut("", add_space_prefix=True) == []


def test_the_merges_are_the_last_merge_of_each_piece_by_falling_score():
    keys = vocabulary_keys()
    found = merges(keys["tokens"], keys["scores"], keys["token_type"])
    assert found == [("a", "b"), ("b", "c"), ("ab", "c"), ("▁", "a")]  # "a" "bc" never meet: ab comes first
    scores = [{"ab": -9.0}.get(t, s) for t, s in zip(keys["tokens"], keys["scores"], strict=True)]
    assert ("a", "bc") in merges(keys["tokens"], scores, keys["token_type"])


def test_a_piece_that_merges_cannot_make_has_no_merge():
    tokens, scores = ["a", "b", "c", "bc", "abd", "xy"], [-5.0, -6.0, -7.0, -1.0, -2.0, -3.0]
    assert merges(tokens, scores, [NORMAL] * 6) == [
        ("b", "c")
    ]  # there is neither "ab", "bd", "d", "x" nor "y"


@pytest.mark.parametrize("seed", range(20))
def test_random_vocabularies_cut_random_texts_as_llama_cpps_algorithm(seed):
    """With pieces of three characters in any order of scores, merges are stolen and pieces out of reach."""
    rng = random.Random(seed)
    pieces = {"".join(rng.choices("abc", k=rng.randint(2, 6))) for _ in range(40)} | set("abc")
    tokens = [*sorted(pieces), "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    kinds = [NORMAL] * len(pieces) + [UNKNOWN] + [BYTE] * 256
    scores = [-float(rank) for rank in rng.sample(range(len(tokens)), len(tokens))]
    keys = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds}
    keys |= {"bos_token_id": 0, "unknown_token_id": len(pieces), "add_space_prefix": False}
    backend = Backend.from_str(json.dumps(tokenizer_json(keys, ())))
    spm = SPMTokenizer(tokens, scores, kinds)
    for _ in range(50):
        text = "".join(rng.choices("abc", k=rng.randint(1, 60)))
        assert backend.encode(text, add_special_tokens=False).ids == spm.encode(text), text


def test_the_embedded_vocabulary_cuts_random_texts_as_llama_cpps_algorithm_and_as_its_own_tokenizer_json():
    """SPMTokenizer is llama.cpp's algorithm step by step."""
    base = Tokenizer(TINY)
    tokens, scores, types = vocabulary(read_tokenizer(TINY), base.vocab_size)
    keys = {
        "model": "llama",
        "tokens": tokens,
        "scores": scores,
        "token_type": types,
        "add_space_prefix": False,
    }
    backend = Backend.from_str(json.dumps(tokenizer_json(keys, ("<bos>",))))
    backend.encode_special_tokens = True
    spm, rng = SPMTokenizer(tokens, scores, types), random.Random(0)
    pieces = [piece for piece, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    for _ in range(400):
        text = "".join(rng.choice([*rng.choices(pieces, k=3), " ", "é", "<bos>", "\n\n"]) for _ in range(12))
        text = text.replace("▁", " ")
        found = backend.encode(text, add_special_tokens=False).ids
        assert found == spm.encode(text) == base.encode(text), repr(text)

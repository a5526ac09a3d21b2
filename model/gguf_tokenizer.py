"""A GGUF file's vocabulary as tokenizer.json, for the tokenizers library.

llama.cpp's vocabulary has no merges but a score for each piece: of all neighbours whose concatenation is a
piece, it joins those with the highest score. Byte-pair encoding joins the neighbours whose merge comes first.
Both tokenize alike if the merges are all ways to divide a piece into two others, in the order of the scores.
Of the ways to divide one piece, only one ever occurs: inside the piece, neighbours are joined in the same
order wherever it stands. So the merges hold this one only, fewer than half of all, and load in half the time.

Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_spm.
"""

from itertools import pairwise
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # llama.cpp's token types
SPACE = "\u2581"
LISTS = {"tokens": str, "scores": float, "token_type": int}  # a list each, with an item for every entry
FLAGS = ("add_bos_token", "add_space_prefix")
MODEL = "llama"  # tokenizer.ggml.model of a SentencePiece vocabulary


def tokenizer_json(known: dict[str, Any], control: tuple[str, ...]) -> dict:
    """Returns the content of tokenizer.json for the tokenizer.ggml.* keys, given without that prefix.

    Pieces named in `control` are control tokens whatever type the file gives them. Raises ValueError for a
    vocabulary of another kind than Gemma's.
    """
    problem = _problem(known)
    if problem:
        raise ValueError(f"{problem}; Loupe needs the tokenizer of a Gemma 3 model")
    tokens, types = known["tokens"], known["token_type"]
    kinds = [CONTROL if token in control else kind for token, kind in zip(tokens, types, strict=True)]
    bos = known.get("bos_token_id", 2)
    return {
        "version": "1.0",
        "added_tokens": [
            _added(i, tokens[i], special=kind != USER_DEFINED)
            for i, kind in enumerate(kinds)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        ],
        "normalizer": _normalizer(known.get("add_space_prefix", True)),
        "pre_tokenizer": None,
        "post_processor": _begin_with(tokens[bos], bos) if known.get("add_bos_token", True) else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "unk_token": tokens[known.get("unknown_token_id", 3)],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges(tokens, known["scores"], kinds),
        },
    }


def merges(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Returns the last merge of each ordinary piece that merges make of characters, by its falling score."""
    ordinary = [i for i, kind in enumerate(types) if kind in (NORMAL, BYTE)]
    # sort() is stable: pieces of equal score stay in the order of their ids.
    ordinary.sort(key=lambda i: -scores[i])
    ranks = {tokens[i]: rank for rank, i in enumerate(ordinary)}
    found = (_last_merge(piece, ranks) for piece in ranks)
    return [pair for pair in found if pair]


def _last_merge(piece: str, ranks: dict[str, int]) -> tuple[str, str] | None:
    """Returns the two pieces that the last merge of a piece joins; None if merges do not make it.

    ranks: {piece: its place}; the neighbours whose concatenation comes first are joined first.
    """
    none, parts = len(ranks), list(piece)
    joined = [ranks.get(a + b, none) for a, b in pairwise(parts)]  # ranks of neighbours joined
    while len(joined) > 1:
        best = min(joined)
        if best == none:
            return None
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del joined[at]
        if at > 0:
            joined[at - 1] = ranks.get(parts[at - 1] + parts[at], none)
        if at < len(joined):
            joined[at] = ranks.get(parts[at] + parts[at + 1], none)
    return (parts[0], parts[1]) if len(parts) == 2 and all(part in ranks for part in parts) else None


def _problem(known: dict[str, Any]) -> str | None:
    """Returns what is wrong with the keys, or None."""
    if known.get("model") != MODEL:
        return f"tokenizer.ggml.model is {known.get('model')!r}, and Gemma's is {MODEL!r}"
    wrong = [f"tokenizer.ggml.{key}" for key, item in LISTS.items() if not _is_list(known.get(key), item)]
    if wrong:
        return f"there is no {', '.join(wrong)}, or of another type"
    sizes = {key: len(known[key]) for key in LISTS}
    if len(set(sizes.values())) > 1:
        sizes_said = ", ".join(f"{size:,} {key}" for key, size in sizes.items())
        return f"tokenizer.ggml.* have different lengths: {sizes_said}"
    tokens = known["tokens"]
    if len(set(tokens)) < len(tokens):
        return "tokenizer.ggml.tokens has an entry twice"
    ids = [key for key in known if key.endswith("_token_id")]
    found = [f"tokenizer.ggml.{k} is {known[k]!r}" for k in ids if not _is_id(known[k], len(tokens))]
    found += [
        f"tokenizer.ggml.{k} is {known[k]!r}" for k in FLAGS if not isinstance(known.get(k, True), bool)
    ]
    return f"{', '.join(found)}, which no vocabulary of {len(tokens):,} entries has" if found else None


def _is_list(value: Any, item: type) -> bool:
    """Returns whether a value is an array of items of this type; an array of a GGUF file has one type."""
    return isinstance(value, list) and isinstance(value[0] if value else item(), item)


def _is_id(value: Any, size: int) -> bool:
    return isinstance(value, int) and 0 <= value < size


def _added(number: int, content: str, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, **flags, "special": special}


def _normalizer(space_prefix: bool) -> dict:
    spaces = _replace(" ", SPACE)
    prefix = {"type": "Prepend", "prepend": SPACE}
    return {"type": "Sequence", "normalizers": [prefix, spaces]} if space_prefix else spaces


def _replace(old: str, new: str) -> dict:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _begin_with(token: str, number: int) -> dict:
    """Returns the post-processor that puts one control token before a text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }

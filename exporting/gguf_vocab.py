"""Converts Gemma's tokenizer.json to llama.cpp's vocabulary, and tokenizes with it as llama.cpp does.

tokenizer.json lists merges in order of priority. llama.cpp stores a score for each piece instead. It joins
the two neighbours whose joined piece has the highest score. Both give the same tokens if a piece that the
merges make earlier has a higher score.
"""

import heapq
import re
from pathlib import Path
from typing import Any

from common.control_tokens import END_OF_TURN
from common.files import read_json
from ggml.container import Metadata

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # llama.cpp's token types
ADDED_SCORE, PAD_SCORE, SPACE = -1000.0, -10000.0, "\u2581"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp's converter takes these for control tokens even if the file calls them ordinary ones.
LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<unused\d+>")
# llama.cpp's converter writes no "eot", and llama.cpp then looks for <end_of_turn> and its like by name.
SPECIAL = {"bos": "<bos>", "eos": "<eos>", "eot": END_OF_TURN, "unknown": "<unk>", "padding": "<pad>"}


def tokenizer_metadata(folder: str | Path, vocab_size: int) -> Metadata:
    """Returns the keys tokenizer.ggml.* for vocab_size entries; raises ValueError if it is not Gemma's."""
    tokens, scores, types = vocabulary(read_tokenizer(Path(folder)), vocab_size)
    missing = [piece for piece in SPECIAL.values() if piece not in tokens]
    if missing:
        where, entries = Path(folder) / "tokenizer.json", f"the model's {vocab_size:,} vocabulary entries"
        raise ValueError(f"{where}: has no {', '.join(missing)} among {entries}; use a Gemma 3's tokenizer")
    keys: Metadata = {
        "model": ("str", "llama"),
        "pre": ("str", "default"),
        "tokens": ("[str]", tokens),
        "scores": ("[f32]", scores),
        "token_type": ("[i32]", types),
    }
    keys |= {f"{name}_token_id": ("u32", tokens.index(piece)) for name, piece in SPECIAL.items()}
    keys |= {"add_bos_token": ("bool", True), "add_sep_token": ("bool", False)}
    keys["add_eos_token"] = ("bool", False)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """Returns the content of tokenizer.json; raises ValueError unless it is BPE with byte fallback."""
    path = folder / "tokenizer.json"
    raw = read_json(path, "download the model again")
    try:
        kind, fallback = raw["model"]["type"], raw["model"]["byte_fallback"]
    except (KeyError, TypeError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(f"{path}: not a tokenizer.json ({reason}); download the model again") from None
    if (kind, fallback) != ("BPE", True):
        found = f"model type {kind!r}, byte_fallback {fallback}"
        raise ValueError(f"{path}: {found}; Gemma's is 'BPE' with byte_fallback true")
    return raw


def vocabulary(raw: dict[str, Any], size: int) -> tuple[list[str], list[float], list[int]]:
    """Returns pieces, scores and llama.cpp's token types of tokenizer.json, as three lists by token id.

    Each list has `size` items. An id without a piece gets [PAD<id>], and ids from `size` on are left out.
    """
    tokens, scores, types = [f"[PAD{i}]" for i in range(size)], [PAD_SCORE] * size, [UNUSED] * size
    added = {token["id"]: token for token in raw["added_tokens"]}
    ranks = merge_ranks(raw["model"]["merges"], {token["content"] for token in added.values()})
    last = len(ranks)
    for piece, number in sorted(raw["model"]["vocab"].items(), key=lambda item: item[1]):
        if number >= size or number in added:
            continue
        if BYTE_PIECE.fullmatch(piece):
            tokens[number], scores[number], types[number] = piece, 0.0, BYTE
            continue
        if piece not in ranks:  # a single character, which no merge makes
            last += 1
        tokens[number], scores[number], types[number] = piece, -float(ranks.get(piece, last)), NORMAL
    for number, token in added.items():
        if number < size:
            special = token["special"] or LOOKS_SPECIAL.fullmatch(token["content"])
            tokens[number] = token["content"] if special else token["content"].replace(SPACE, " ")
            scores[number], types[number] = ADDED_SCORE, CONTROL if special else USER_DEFINED
    return tokens, scores, types


def merge_ranks(merges: list, skipped: set[str]) -> dict[str, int]:
    """Returns {piece: rank}. The first piece that a merge makes has rank 1; later pieces have higher ranks.

    Consecutive merges that make the same piece count once, and a piece keeps its first rank. Merges that make
    a piece in `skipped` are ignored.
    """
    ranks: dict[str, int] = {}
    count, before = 0, None
    for merge in merges:
        piece = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)
        if piece in skipped:
            continue
        count += piece != before
        before = piece
        ranks.setdefault(piece, count)
    return ranks


class SPMTokenizer:
    """Tokenizes plain text as llama.cpp does, with the pieces, scores and token types of a GGUF file.

    User-defined pieces are found first. A control token in the text stays text. Source: llama.cpp,
    src/llama-vocab.cpp, llm_tokenizer_spm.
    """

    def __init__(self, tokens: list[str], scores: list[float], types: list[int], space_prefix: bool = False):
        self.ids = {piece: i for i, piece in enumerate(tokens) if types[i] not in (UNUSED, CONTROL)}
        self.bytes = {piece: i for i, piece in enumerate(tokens) if types[i] == BYTE}
        self.scores, self.space_prefix = scores, space_prefix
        fixed = sorted((piece for piece, i in self.ids.items() if types[i] == USER_DEFINED), key=len)
        self.fixed = re.compile("(" + "|".join(map(re.escape, reversed(fixed))) + ")" if fixed else r"((?!))")

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of `text`; -1 stands for a byte that has no BYTE token in the vocabulary."""
        found = []
        for i, part in enumerate(self.fixed.split(" " + text if self.space_prefix and text else text)):
            pieces = [part] if i % 2 else merge_pieces(part.replace(" ", SPACE), self.ids, self.scores)
            for piece in pieces:
                if piece in self.ids:
                    found.append(self.ids[piece])
                else:
                    found += [self.bytes.get(f"<0x{byte:02X}>", -1) for byte in piece.encode("utf-8")]
        return found


def merge_pieces(text: str, ids: dict[str, int], scores: list[float]) -> list[str]:
    """Joins the characters of `text` to pieces in `ids` and returns the pieces.

    The neighbours whose joined piece has the highest score are joined first; among equals, the leftmost.
    """
    pieces = list(text)  # A piece that was joined to its left neighbour becomes "".
    left, right = list(range(-1, len(pieces) - 1)), list(range(1, len(pieces) + 1))
    heap: list[tuple[float, int, str]] = []

    def offer(a: int, b: int) -> None:
        if a >= 0 and b < len(pieces) and (piece := pieces[a] + pieces[b]) in ids:
            heapq.heappush(heap, (-scores[ids[piece]], a, piece))

    for i in range(len(pieces) - 1):
        offer(i, i + 1)
    while heap:
        _, a, piece = heapq.heappop(heap)
        b = right[a]
        if not pieces[a] or b >= len(pieces) or pieces[a] + pieces[b] != piece:
            continue  # One of the two has been joined to another piece since.
        pieces[a], pieces[b], right[a] = piece, "", right[b]
        if right[b] < len(pieces):
            left[right[b]] = a
        offer(left[a], a)
        offer(a, right[a])
    return [piece for piece in pieces if piece]

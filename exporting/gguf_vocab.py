"""Gemma's tokenizer.json as llama.cpp's vocabulary, and llama.cpp's way of cutting text with it.

Hugging Face's file lists merges in the order in which they are tried; llama.cpp has no merges, but a score
for each piece, and joins the neighbours whose piece scores highest. The two cut alike if the scores fall in
the order in which the merges first make each piece.
"""

import heapq
import re
from pathlib import Path

from common.files import read_json

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6  # llama.cpp's token types
ADDED_SCORE, PAD_SCORE, SPACE = -1000.0, -10000.0, "\u2581"
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# The converter takes these for control tokens even where the file calls them ordinary ones.
LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<unused\d+>")


def tokenizer_metadata(folder: str | Path, rows: int) -> dict[str, tuple[str, object]]:
    """The keys of tokenizer.ggml.* for a model whose embedding has `rows` rows; raises ValueError for a
    tokenizer that is not Gemma's kind.
    """
    tokens, scores, types = vocabulary(read_tokenizer(Path(folder)), rows)
    missing = [piece for piece in ("<bos>", "<eos>", "<unk>", "<pad>") if piece not in tokens]
    if missing:
        raise ValueError(
            f"{Path(folder) / 'tokenizer.json'}: has no {', '.join(missing)} among the model's {rows:,} "
            f"words; take a Gemma 3's tokenizer"
        )
    ids = {
        name: tokens.index(piece)
        for name, piece in (("bos", "<bos>"), ("eos", "<eos>"), ("unknown", "<unk>"), ("padding", "<pad>"))
    }
    return {
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.pre": ("str", "default"),
        "tokenizer.ggml.tokens": ("[str]", tokens),
        "tokenizer.ggml.scores": ("[f32]", scores), "tokenizer.ggml.token_type": ("[i32]", types),
        **{f"tokenizer.ggml.{name}_token_id": ("u32", number) for name, number in ids.items()},
        "tokenizer.ggml.add_bos_token": ("bool", True),
        "tokenizer.ggml.add_sep_token": ("bool", False),
        "tokenizer.ggml.add_eos_token": ("bool", False),
    }  # fmt: skip


def read_tokenizer(folder: Path) -> dict:
    """tokenizer.json; raises ValueError where it is missing or is not BPE with byte fallback, which is what
    llama.cpp's scores can say.
    """
    path = folder / "tokenizer.json"
    raw = read_json(path, "download the model again")
    try:
        kind = (raw["model"]["type"], raw["model"]["byte_fallback"])
    except (KeyError, TypeError) as e:
        raise ValueError(
            f"{path}: not a tokenizer.json ({type(e).__name__}: {e}); download the model again"
        ) from None
    if kind != ("BPE", True):
        raise ValueError(
            f"{path}: model type {kind[0]!r}, byte_fallback {kind[1]}; Gemma's is 'BPE' with byte_fallback "
            f"true"
        )
    return raw


def vocabulary(raw: dict, rows: int) -> tuple[list[str], list[float], list[int]]:
    """(pieces, scores, types), each `rows` long: ids without a piece become [PADn], and pieces without a row
    are left out.
    """
    tokens, scores, types = [f"[PAD{i}]" for i in range(rows)], [PAD_SCORE] * rows, [UNUSED] * rows
    added = {token["id"]: token for token in raw["added_tokens"]}
    ranks = merge_ranks(raw["model"]["merges"], {token["content"] for token in added.values()})
    last = len(ranks)
    for piece, number in sorted(raw["model"]["vocab"].items(), key=lambda item: item[1]):
        if number >= rows or number in added:
            continue
        if BYTE_PIECE.fullmatch(piece):
            tokens[number], scores[number], types[number] = piece, 0.0, BYTE
            continue
        if piece not in ranks:  # a single character: what merging begins with
            last += 1
        tokens[number], scores[number], types[number] = piece, -float(ranks.get(piece, last)), NORMAL
    for number, token in added.items():
        if number < rows:
            special = token["special"] or LOOKS_SPECIAL.fullmatch(token["content"])
            tokens[number] = token["content"] if special else token["content"].replace(SPACE, " ")
            scores[number], types[number] = ADDED_SCORE, CONTROL if special else USER_DEFINED
    return tokens, scores, types


def merge_ranks(merges: list, skipped: set[str]) -> dict[str, int]:
    """{piece: place among the pieces in the order in which merges first make them}; a piece that several
    neighbouring merges make counts once.
    """
    ranks, count, before = {}, 0, None
    for merge in merges:
        piece = "".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1)
        if piece in skipped:
            continue
        count += piece != before
        before = piece
        ranks.setdefault(piece, count)
    return ranks


class SPMTokenizer:
    """Cuts plain text as llama.cpp's SPM tokenizer does, for checks: user-defined pieces first, then the
    best-scored neighbours are joined.

    Source: llama.cpp, src/llama-vocab.cpp, llm_tokenizer_spm. Control tokens in the text stay text.
    """

    def __init__(self, tokens: list[str], scores: list[float], types: list[int], space_prefix: bool = False):
        self.ids, self.scores, self.space_prefix = (
            {piece: i for i, piece in enumerate(tokens) if types[i] not in (UNUSED, CONTROL)},
            scores,
            space_prefix,
        )
        fixed = sorted(
            (piece for piece, i in self.ids.items() if types[i] == USER_DEFINED), key=len, reverse=True
        )
        self.bytes = {piece: i for i, piece in enumerate(tokens) if types[i] == BYTE}
        self.fixed = re.compile("(" + "|".join(map(re.escape, fixed)) + ")" if fixed else r"((?!))")

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        found = []
        for i, part in enumerate(self.fixed.split(" " + text if self.space_prefix and text else text)):
            pieces = [part] if i % 2 else joined(part.replace(" ", SPACE), self.ids, self.scores)
            found += [number for piece in pieces for number in self.numbers(piece)]
        return found

    def numbers(self, piece: str) -> list[int]:
        """A piece's id, or those of its bytes; the file must call them bytes, or llama.cpp does not find them
        (None here).
        """
        return (
            [self.ids[piece]]
            if piece in self.ids
            else [self.bytes.get(f"<0x{byte:02X}>") for byte in piece.encode("utf-8")]
        )


def joined(text: str, ids: dict[str, int], scores: list[float]) -> list[str]:
    """The pieces of a text without user-defined ones: the neighbours whose piece has the highest score are
    joined, the leftmost first among equals.
    """
    pieces: list[str | None] = list(text)
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
        if pieces[a] is None or b >= len(pieces) or pieces[a] + pieces[b] != piece:
            continue  # one of the two was joined with another since
        pieces[a], pieces[b], right[a] = piece, None, right[b]
        if right[b] < len(pieces):
            left[right[b]] = a
        offer(left[a], a)
        offer(a, right[a])
    return [piece for piece in pieces if piece is not None]

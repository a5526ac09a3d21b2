"""Finds texts that nearly repeat an earlier one: MinHash (Broder 1997) in bands, a locality-sensitive hash.

A shingle is three words in a row; two texts are as similar as their sets of shingles (Jaccard similarity
|A and B| / |A or B|). The share of equal entries of two MinHash signatures estimates it. Texts whose
signatures agree in all entries of a band become candidates, and their similarity is then computed exactly.
With 12 bands of 5 entries, a pair of similarity s becomes a candidate with probability 1 - (1 - s^5)^12:
99.9% at 0.85, and 0.4% at 0.2.

N: texts, W: words or shingles of all texts, C: characters of some texts.
"""

import unicodedata
from collections.abc import Sequence

import numpy as np

BANDS, ENTRIES = 12, 5  # entries of a band
SLACK = 0.15  # A signature estimates the similarity with a standard error of about 0.05.
MIN_SHINGLES = 8  # Fewer shingles are alike by chance.
TEXTS = 2000  # so many at a time
PAIRS = 50_000  # Signatures of so many pairs are compared at a time.
BUCKET_BITS = 24  # for counting shingles

# The lower case of each letter and digit, 0 for other characters. From U+2E80 on (Han, kana, Hangul, emoji)
# each character is itself.
_FOLDED = np.array([ord(chr(c).lower()[0]) if chr(c).isalnum() else 0 for c in range(0x2E80)], np.uint64)
_UNSPACED = ((0x0E00, 0x0E80), (0x2E80, 0xAC00))  # Thai, Han, kana: each character counts as a word.
_ODD = np.random.default_rng(0).integers(2**63, size=64, dtype=np.uint64) | np.uint64(1)


def word_hashes(texts: Sequence[str]) -> list[np.ndarray]:
    """Returns a hash (uint64) of each word of each text.

    Equal arrays are texts that are equal but for case, punctuation, white space and Unicode form.
    """
    return [words for at in range(0, len(texts), TEXTS) for words in _word_hashes(texts[at : at + TEXTS])]


def _word_hashes(texts: Sequence[str]) -> list[np.ndarray]:
    joined = "\0".join(unicodedata.normalize("NFKC", text.replace("\0", " ")) for text in texts) + "\0"
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)  # (C,)
    ends = np.flatnonzero(codes == 0)  # (N,)
    folded = np.where(codes < len(_FOLDED), _FOLDED[np.minimum(codes, len(_FOLDED) - 1)], codes)
    at = np.flatnonzero(folded)  # letters and digits
    alone = np.logical_or.reduce([(codes[at] >= low) & (codes[at] < high) for low, high in _UNSPACED])
    new = np.ones(len(at), bool)  # whether a word begins here
    new[1:] = (at[1:] != at[:-1] + 1) | alone[1:] | alone[:-1]
    starts = np.flatnonzero(new)
    if not len(starts):
        return [np.zeros(0, np.uint64) for _ in texts]
    place = np.arange(len(at)) - np.repeat(starts, np.diff(starts, append=len(at)))  # in the word
    hashes = np.add.reduceat(folded[at] * _ODD[place % len(_ODD)], starts)  # (W,)
    return np.split(hashes ^ (hashes >> np.uint64(29)), np.searchsorted(at[starts], ends[:-1]))


def shingles(words: np.ndarray) -> np.ndarray:
    """Returns a hash (uint64) of every three words in a row, (words - 2,), or (0,) for fewer words."""
    mixed = words[:-2] * _ODD[0] + words[1:-1] * _ODD[1] + words[2:] * _ODD[2]
    return (mixed ^ (mixed >> np.uint64(31))) * _ODD[3]


def often(count: int) -> float:
    """Returns the number of rows, of `count`, that may share a passage; more share a fixed instruction."""
    return min(max(20, count / 50), max(2, count / 2))


def near_duplicates(rows: Sequence[np.ndarray], threshold: float = 0.85) -> dict[int, int]:
    """Returns {index of a row: index of an earlier row that is at least as similar as `threshold`}.

    A shingle in very many rows, such as a word of their common instruction, does not count.

    Args:
        rows: the result of word_hashes.
    """
    owner = np.repeat(np.arange(len(rows)), [len(words) for words in rows])
    flat = shingles(np.concatenate([*rows, np.zeros(2, np.uint64)]))  # (W,), two of them past a row's end
    inside = np.concatenate([owner[2:], [-1, -1]])[: len(owner)] == owner
    flat, owner = flat[inside], owner[inside]
    buckets = flat >> np.uint64(64 - BUCKET_BITS)
    rare = np.bincount(buckets.astype(np.int64), minlength=1)[buckets.astype(np.int64)] <= often(len(rows))
    flat, owner = flat[rare], owner[rare]
    kept = np.bincount(owner, minlength=len(rows))[owner] >= MIN_SHINGLES
    flat, owner = flat[kept], owner[kept]
    if not len(flat):
        return {}
    numbers, starts = np.unique(owner, return_index=True)
    members = np.split(flat, starts[1:])
    found: dict[int, int] = {}
    for a, b in _candidates(_signatures(flat, starts), threshold - SLACK):
        first, later = int(numbers[a]), int(numbers[b])
        if later in found and found[later] <= first:
            continue
        one, other = set(members[a].tolist()), set(members[b].tolist())
        if len(one & other) >= threshold * len(one | other):
            found[later] = first
    return found


def _signatures(flat: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Returns the smallest value of each hash function over each row's shingles, (N, BANDS * ENTRIES)."""
    draw = np.random.default_rng(1).integers(2**32, size=(BANDS * ENTRIES, 2), dtype=np.uint32)
    short = (flat >> np.uint64(32)).astype(np.uint32)
    columns = [np.minimum.reduceat((short ^ b) * (a | np.uint32(1)), starts) for a, b in draw]
    return np.stack(columns, axis=1)


def _candidates(signatures: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Returns pairs (earlier, later) that agree in a band and in a share of `least` of their entries.

    In a band, a row is paired with the first one of those that agree, and with the one before it, so the
    number of pairs grows with N and not with its square.
    """
    pairs = []
    for band in range(BANDS):
        part = signatures[:, band * ENTRIES : (band + 1) * ENTRIES]
        order = np.lexsort(part.T)  # stable: rows that agree stay in their order
        same = (part[order[1:]] == part[order[:-1]]).all(axis=1)
        new = np.concatenate([[True], ~same])
        first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        later = order[1:][same]
        pairs += [np.stack([order[:-1][same], later]), np.stack([first[1:][same], later])]
    unique = np.unique(np.concatenate(pairs, axis=1), axis=1)  # (2, pairs)
    found: list[tuple[int, int]] = []
    for start in range(0, unique.shape[1], PAIRS):
        a, b = unique[:, start : start + PAIRS]
        close = (signatures[a] == signatures[b]).mean(axis=1) >= least
        found += zip(a[close].tolist(), b[close].tolist(), strict=True)
    return found

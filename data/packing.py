"""Packing: documents laid end to end in one stream, without padding.

    T  tokens in the stream      D  documents in the stream      S  supervised positions (with a label)

    documents         a0 a1 a2 | b0 b1
    tokens            a0 a1 a2   b0 b1        (T,)
    position_ids      0  1  2    0  1         (T,)    start at 0 in each document
    cu_seqlens        0        3        5     (D+1,)  document d is tokens[cu_seqlens[d] : cu_seqlens[d+1]]

The loss is computed at the S supervised positions only.

If several documents begin with the same tokens, for example with the same instruction, the stream can hold
this prefix once. It is then a document of its own, followed by the other tokens of each document.

    documents         p0 p1 p2 a3 a4 | p0 p1 p2 b3
    tokens            p0 p1 p2   a3 a4   b3
    position_ids      0  1  2    3  4    3
    cu_seqlens        0          3       5      6
    shared_prefix     -1         0       0      (D,)  index of the document that is the prefix, -1 for none
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TypeVar

import torch

from data.render import IGNORE_INDEX, Document

T = TypeVar("T")
NO_PREFIX = -1  # Batch.shared_prefix of a document without a shared prefix
MIN_PREFIX_TOKENS = 16  # Shorter prefixes do not pay for the extra document.


@dataclass
class Batch:
    """A packed stream of documents, with the tokens to predict."""

    tokens: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (D+1,) int32, the dtype that flash and flex attention take
    target_positions: torch.Tensor  # (S,) int64, indices into T
    targets: torch.Tensor  # (S,) int64, the token to predict at each of them
    ids: list[str]  # of each document, in the stream's order; a pair's two documents have the same id
    target_counts: list[int]  # supervised positions of each of these documents; they add up to S
    num_tokens: int  # tokens of the documents, each with its whole prefix
    shared_prefix: list[int] | None = None  # D indices of documents; None if nothing is shared

    @property
    def num_targets(self) -> int:
        """Returns S."""
        return self.targets.shape[0]

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the sum over each document (len(ids),) of values (S,) at the supervised positions."""
        return torch.stack([part.sum() for part in values.split(self.target_counts)])

    def repeat(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the value of its document at each supervised position, (S,), for values (len(ids),)."""
        counts = torch.tensor(self.target_counts, device=values.device)
        return values.repeat_interleave(counts, output_size=self.num_targets)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """Returns the batch on another device; cu_seqlens stays on the CPU, where attention reads it."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """Returns the batch in pinned memory, from which the copy to a GPU runs in the background."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function):
        names = ("tokens", "position_ids", "target_positions", "targets")
        return replace(self, **{name: function(getattr(self, name)) for name in names})


def pack(documents: Sequence[Document], share_prefix: bool = False) -> Batch:
    """Packs documents into one stream on the CPU. Without share_prefix, it keeps their order.

    Args:
        documents: at least one document; none may be empty.
        share_prefix: if documents begin with the same MIN_PREFIX_TOKENS or more unsupervised tokens, put
            these tokens into the stream once, right before the documents.
            Documents with the same whole prompt share all of it.
    """
    assert documents, "a batch needs a document"
    num_tokens = sum(len(d.input_ids) for d in documents)
    shared_prefix = [NO_PREFIX] * len(documents)
    if share_prefix:
        documents, shared_prefix = _split_shared_prefixes(documents)
    lengths = [len(d.input_ids) for d in documents]
    assert min(lengths) > 0, "a stream cannot hold an empty document"
    starts = [0 if p == NO_PREFIX else lengths[p] for p in shared_prefix]
    positions = [range(start, start + n) for start, n in zip(starts, lengths, strict=True)]
    own = [d for i, d in enumerate(documents) if i not in shared_prefix]  # those that are no prefix
    labels = torch.tensor(list(chain.from_iterable(d.labels for d in documents)))  # (T,)
    target_positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (S,)
    return Batch(
        tokens=torch.tensor(list(chain.from_iterable(d.input_ids for d in documents))),
        position_ids=torch.tensor(list(chain.from_iterable(positions))),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        target_positions=target_positions,
        targets=labels[target_positions],
        ids=[d.id for d in own],
        target_counts=[len(d.labels) - d.labels.count(IGNORE_INDEX) for d in own],
        num_tokens=num_tokens,
        shared_prefix=shared_prefix if any(p != NO_PREFIX for p in shared_prefix) else None,
    )


def _split_shared_prefixes(documents):
    """Returns (documents, Batch.shared_prefix), with each shared prefix as a document of its own."""
    groups, shareables = {}, [_shareable(document) for document in documents]
    prompts = [tuple(d.input_ids[:n]) for d, n in zip(documents, shareables, strict=True)]
    occurs = Counter(prompts)
    for number, (document, shareable) in enumerate(zip(documents, shareables, strict=True)):
        # Documents with the same whole prompt share all of it; others may begin with the same instruction.
        prompt = prompts[number] if occurs[prompts[number]] > 1 else prompts[number][:MIN_PREFIX_TOKENS]
        key = prompt if shareable >= MIN_PREFIX_TOKENS else number
        groups.setdefault(key, []).append((document, shareable))
    out, shared_prefix = [], []
    for group in groups.values():
        shared, prefix = 0, NO_PREFIX
        if len(group) > 1:
            most = min(shareable for _, shareable in group)
            shared = common_prefix_length([d.input_ids for d, _ in group], most)
            prefix = len(out)
            out.append(Document(group[0][0].input_ids[:shared], [IGNORE_INDEX] * shared, ""))
            shared_prefix.append(NO_PREFIX)
        out += [Document(d.input_ids[shared:], d.labels[shared:], d.id) for d, _ in group]
        shared_prefix += [prefix] * len(group)
    return out, shared_prefix


def _shareable(document: Document) -> int:
    """Returns the number of tokens that may be shared: those before the first supervised position."""
    last = len(document.labels) - 1  # The last token is never shared: no stream holds an empty document.
    return next((i for i in range(last) if document.labels[i] != IGNORE_INDEX), last)


def grouped(items: Iterable[T], tokens: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yields groups of consecutive items with at most `limit` tokens; a longer item is a group of its own."""
    group: list[T] = []
    size = 0
    for item in items:
        if group and size + tokens(item) > limit:
            yield group
            group, size = [], 0
        group.append(item)
        size += tokens(item)
    if group:
        yield group


def common_prefix_length(rows: Sequence[list[int]] | Sequence[tuple[int, ...]], most: int) -> int:
    """Returns the length in tokens of the prefix that all rows have in common, at most `most`."""
    low, high = min(rows), max(rows)  # What these two share in lexicographic order, all rows share.
    return next((i for i in range(most) if low[i] != high[i]), most)

"""Documents laid end to end: a batch is one stream, never a padded rectangle.

    T  tokens of the whole batch       D  documents       S  supervised positions

    documents         a0 a1 a2 | b0 b1
    tokens            a0 a1 a2   b0 b1        (T,)
    position_ids      0  1  2    0  1         (T,)    restart with each document
    cu_seqlens        0        3        5     (D+1,)  document d is tokens[cu_seqlens[d] : cu_seqlens[d+1]]

Padding would be computed and thrown away; here every token is real. The loss runs at the S supervised
positions only.

Documents that begin with the same tokens, a constant instruction say, can share them: the opening is then
laid down once, as a document of its own, and the others follow without it.

    documents         i0 i1 i2 a3 a4 | i0 i1 i2 b3
    tokens            i0 i1 i2   a3 a4   b3
    position_ids      0  1  2    3  4    3
    cu_seqlens        0          3       5      6
    opening           -1         0       0             which document comes before this one's tokens, -1 for none
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain

import torch

from data.render import IGNORE_INDEX, Document

NONE = -1  # in the place of an opening's number
MIN_PREFIX_TOKENS = 16  # fewer do not pay for the cutting


@dataclass
class Batch:
    """A packed stream of documents and what to predict in it."""

    tokens: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (D+1,) int32, the type that flash and flex attention take
    target_positions: torch.Tensor  # (S,) int64, indices into T
    targets: torch.Tensor  # (S,) int64, the token that follows each of them
    ids: list[str]  # the documents' names, for error messages
    num_tokens: int  # tokens of the documents, each with its whole opening
    shared_prefix: list[int] | None = None  # D numbers; None where nothing is shared

    @property
    def num_targets(self):
        """S, as a plain number."""
        return self.targets.shape[0]

    def to(self, device, non_blocking=False):
        """The same batch on another device, but for cu_seqlens: its numbers are asked for where the kernels
        are launched.
        """
        return replace(
            self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking)), cu_seqlens=self.cu_seqlens
        )

    def pin_memory(self):
        """The same batch in page-locked memory, from which a copy to the GPU overlaps with its work."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function):
        tensors = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def pack(documents, share=False):
    """Lay documents end to end, in order.

    Args:
        documents: list of D data.render.Document, none of them empty.
        share: lay an opening that documents have in common, of MIN_PREFIX_TOKENS or more, down once.
            Documents with one opening then lie side by side.

    Returns:
        Batch on the CPU.
    """
    assert documents, "a batch needs a document"
    whole = [len(document.input_ids) for document in documents]
    assert min(whole) > 0, "an empty document has no place in a stream"
    shared_prefix = [NONE] * len(documents)
    if share:
        documents, shared_prefix = _split_shared_prefixes(documents)
    lengths = [len(document.input_ids) for document in documents]
    first = [lengths[o] if o != NONE else 0 for o in shared_prefix]  # position of each document's first token
    labels = torch.tensor(list(chain.from_iterable(document.labels for document in documents)))  # (T,)
    target_positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (S,)
    return Batch(
        tokens=torch.tensor(list(chain.from_iterable(document.input_ids for document in documents))),
        position_ids=torch.cat(
            [torch.arange(start, start + length) for start, length in zip(first, lengths, strict=True)]
        ),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        target_positions=target_positions,
        targets=labels[target_positions],
        ids=[d.id for i, d in enumerate(documents) if i not in shared_prefix],
        num_tokens=sum(whole),
        shared_prefix=shared_prefix if any(o != NONE for o in shared_prefix) else None,
    )


def _split_shared_prefixes(documents):
    """The documents with shared openings cut off and laid before them, and `opening`; nothing that is
    supervised is shared.
    """
    groups = {}
    for number, document in enumerate(documents):
        own = next(
            (i for i, label in enumerate(document.labels) if label != IGNORE_INDEX), len(document.labels)
        )
        free = min(own, len(document.labels) - 1)  # every document keeps a token
        key = tuple(document.input_ids[:MIN_PREFIX_TOKENS]) if free >= MIN_PREFIX_TOKENS else number
        groups.setdefault(key, []).append((document, free))
    out, shared_prefix = [], []
    for group in groups.values():
        shared = (
            _common([document.input_ids for document, _ in group], min(free for _, free in group))
            if len(group) > 1
            else 0
        )
        if shared:
            out.append(Document(group[0][0].input_ids[:shared], [IGNORE_INDEX] * shared, ""))
            shared_prefix.append(NONE)
        at = len(out) - 1 if shared else NONE
        out += [
            Document(document.input_ids[shared:], document.labels[shared:], document.id)
            for document, _ in group
        ]
        shared_prefix += [at] * len(group)
    return out, shared_prefix


def _common(rows, most):
    """How many tokens, `most` at most, all rows begin with: as many as the first and the last in the order of
    a dictionary do.
    """
    low, high = min(rows), max(rows)
    return next((i for i in range(most) if low[i] != high[i]), most)

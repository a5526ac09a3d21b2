"""Documents laid end to end: a batch is one stream, never a padded rectangle.

    T  tokens of the whole batch       D  documents       S  supervised positions

    documents         a0 a1 a2 | b0 b1
    tokens            a0 a1 a2   b0 b1        (T,)
    position_ids      0  1  2    0  1         (T,)    restart with each document
    cu_seqlens        0        3        5     (D+1,)  document d is tokens[cu_seqlens[d] : cu_seqlens[d+1]]

Padding would be computed and thrown away; here every token is real. The loss runs at the S supervised positions only.
"""

from dataclasses import dataclass, fields, replace
from itertools import accumulate, chain

import torch

from data.render import IGNORE_INDEX, Document


@dataclass
class Batch:
    """A packed stream of documents and what to predict in it."""

    tokens: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (D+1,) int32, the type that flash and flex attention take
    target_positions: torch.Tensor  # (S,) int64, indices into T
    targets: torch.Tensor  # (S,) int64, the token that follows each of them
    ids: list[str]  # the documents' names, without the filling, for error messages
    max_seqlen: int  # tokens of the longest document; a plain number, so that no GPU is asked for it
    filling: int = 0  # tokens at the end that belong to no document

    @property
    def num_tokens(self):
        """Tokens of the documents, as a plain number: T without the filling."""
        return self.tokens.shape[0] - self.filling

    @property
    def num_targets(self):
        """S, as a plain number."""
        return self.targets.shape[0]

    def to(self, device, non_blocking=False):
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same batch in page-locked memory, from which a copy to the GPU overlaps with its work."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function):
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def pack(documents, total=None):
    """Lay documents end to end, in order.

    Args:
        documents: list of D data.render.Document, none of them empty.
        total: fill the stream up to this many tokens with one more document of id 0 that nothing is predicted in: compiled
            layers want one shape.

    Returns:
        Batch on the CPU.
    """
    assert documents, "a batch needs a document"
    lengths = [len(document.input_ids) for document in documents]
    assert min(lengths) > 0, "an empty document has no place in a stream"
    missing = 0 if total is None else total - sum(lengths)
    assert missing >= 0, f"{sum(lengths)} tokens do not fit into {total}"
    ids = [document.id for document in documents]
    if missing:
        documents, lengths = [*documents, Document([0] * missing, [IGNORE_INDEX] * missing, "")], [*lengths, missing]
    labels = torch.tensor(list(chain.from_iterable(document.labels for document in documents)))  # (T,)
    target_positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)  # (S,)
    return Batch(
        tokens=torch.tensor(list(chain.from_iterable(document.input_ids for document in documents))),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        target_positions=target_positions,
        targets=labels[target_positions],
        ids=ids,
        max_seqlen=max(lengths),
        filling=missing,
    )

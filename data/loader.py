"""Divides documents into micro-batches. Each is a pure function of (seed, epoch, its index in the epoch).

To resume, a run therefore needs only the epoch and the index of its next micro-batch: `loader.batches(epoch,
start=index)` yields the micro-batches that an uninterrupted run would have had.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from itertools import chain

from data.packing import Batch, grouped, pack
from data.render import Document
from data.rows import Sample


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
    """Returns the indices 0 to n - 1 in the order in which an epoch visits n documents.

    If `shuffle`, Python's `random` shuffles them, so the order does not depend on torch's version. Its seed
    is a text with seed and epoch, because their sum would be the same for (1, 2) and (2, 1).
    """
    order = list(range(n))
    if shuffle:
        random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


class Loader:
    """Makes micro-batches of documents, in an order that depends on the seed and the epoch only.

    Args:
        documents: the documents of the training set.
        batch_size: samples per micro-batch, fewer in an epoch's last one; unused if max_tokens is given.
        seed: seed of the order.
        shuffle: if False, every epoch has the order of `documents`.
        max_tokens: the most tokens in a micro-batch. Micro-batches then take about equal time.
        share_prefix: compute the common prefix of documents in a micro-batch once (data/packing.py).
        per_sample: documents that each sample gave. They follow each other, and stay together.

    Raises:
        ValueError: `documents` is empty, batch_size is below 1, or a document exceeds max_tokens.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        max_tokens: int | None = None,
        share_prefix: bool = False,
        per_sample: int = 1,
    ):
        if not documents:
            raise ValueError("there is no document to train on: data.train gave none")
        if not max_tokens and batch_size < 1:
            raise ValueError(f"train.batch_size = {batch_size} must be at least 1")
        self.documents, self.batch_size, self.seed = documents, batch_size, seed
        self.shuffle, self.share_prefix = shuffle, share_prefix
        numbers = range(len(documents))
        self.samples = [list(numbers[i : i + per_sample]) for i in numbers[::per_sample]]
        # All epochs have the same groups: the learning rate schedule needs equally many steps in each.
        self.groups = self._group_by_tokens(max_tokens) if max_tokens else None

    def __len__(self) -> int:
        """Returns the number of micro-batches in an epoch. All epochs have the same number."""
        return len(self.groups) if self.groups else -(-len(self.samples) // self.batch_size)

    def plan(self, epoch: int) -> list[list[int]]:
        """Returns a list of document indices for each micro-batch of an epoch; every document occurs once."""
        if self.groups:
            return [self.groups[i] for i in epoch_order(len(self.groups), self.seed, epoch, self.shuffle)]
        order = [self.samples[i] for i in epoch_order(len(self.samples), self.seed, epoch, self.shuffle)]
        size = self.batch_size
        return [list(chain.from_iterable(order[i : i + size])) for i in range(0, len(order), size)]

    def batches(self, epoch: int, start: int = 0, stride: int = 1) -> Iterator[Batch]:
        """Yields the packed micro-batches start, start + stride, start + 2 * stride, ... of an epoch.

        With start = r and stride = n, process r of n processes gets its share of the micro-batches.
        """
        for group in self.plan(epoch)[start::stride]:
            yield self.batch(group)

    def batch(self, group: list[int]) -> Batch:
        """Returns one packed micro-batch: the documents whose indices are in `group`."""
        return pack([self.documents[i] for i in group], self.share_prefix)

    def _group_by_tokens(self, max_tokens: int) -> list[list[int]]:
        def tokens(sample: list[int]) -> int:
            return sum(len(self.documents[i].input_ids) for i in sample)

        order = [self.samples[i] for i in epoch_order(len(self.samples), self.seed, 0, self.shuffle)]
        longest = max(order, key=tokens)
        if tokens(longest) > max_tokens:
            raise ValueError(
                f"{self.documents[longest[0]].id} has {tokens(longest)} tokens, more than train.max_tokens = "
                f"{max_tokens} allows a micro-batch; raise it, or lower data.max_length"
            )
        return [list(chain.from_iterable(group)) for group in grouped(order, tokens, max_tokens)]


def split_validation(
    samples: Sequence[Sample], fraction: float, seed: int
) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into (training samples, validation samples). Both keep the order of `samples`.

    About the given fraction of the samples becomes validation, and at least one sample if fraction > 0.
    Samples with the same prompt stay together; otherwise validation would measure memorization. Prompts are
    taken for validation in the order of a hash, so few old samples change sides when a file gets new rows.

    Raises:
        ValueError: the fraction is not in [0, 1), or all samples have the same prompt.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"data.validation_fraction = {fraction} must be at least 0 and below 1")
    if fraction == 0:
        return list(samples), []
    groups: dict[bytes, list[int]] = {}
    for index, sample in enumerate(samples):
        digest = hashlib.sha256(f"{seed}\0{prompt_of(sample)}".encode()).digest()
        groups.setdefault(digest, []).append(index)
    if len(groups) < 2:
        raise ValueError(
            f"data.validation_fraction = {fraction}: {len(samples)} sample(s) with {len(groups)} distinct "
            "prompt(s) cannot be split; name a file in data.validation, or set the fraction to 0 to train "
            "without validation"
        )
    wanted = min(max(1, round(fraction * len(samples))), len(samples) - 1)
    held_out: set[int] = set()
    for _, group in sorted(groups.items()):
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out:  # Every group is larger than `wanted`.
        smallest = min(groups.values(), key=len)
        held_out.update(smallest)
    training = [sample for i, sample in enumerate(samples) if i not in held_out]
    return training, [sample for i, sample in enumerate(samples) if i in held_out]


def prompt_of(sample: Sample) -> str:
    """Returns a string to compare prompts by: the turns before the first response, or the raw text."""
    if sample.text is not None:
        return repr(sample.text.strip())
    messages = sample.messages or ()
    roles = [role for role, _ in messages]
    return repr([(role, content.strip()) for role, content in messages[: roles.index("assistant")]])

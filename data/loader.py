"""Which documents make which micro-batch: a pure function of (seed, epoch, index), so that a resume continues
exactly.

There is no iterator state to save. A checkpoint holds two numbers, the epoch and the index of the next
micro-batch, and `loader.batches(epoch, start=index)` goes on where the run stopped.
"""

import hashlib
import random

from data.packing import pack
from data.render import IGNORE_INDEX


def epoch_order(n, seed, epoch, shuffle=True):
    """The order of n documents in an epoch, as a list of indices.

    Python's generator, not torch's: its shuffle is the same in every version and on every machine. The text
    seed keeps (seed 1, epoch 2) apart from (seed 2, epoch 1), which their sum would not.
    """
    order = list(range(n))
    if shuffle:
        random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


class Loader:
    """Micro-batches of documents in a reproducible order; the last of an epoch may be short.

    Args:
        documents: list of Document.
        batch_size: documents in a micro-batch; unused when max_tokens is given.
        seed: with the epoch it determines the order.
        shuffle: False keeps the documents' order in every epoch.
        max_tokens: cut a micro-batch at this many tokens instead, so that short and long documents cost
        alike.
        share: compute an opening that documents of a micro-batch have in common once (data.packing).

    Raises:
        ValueError: there is no document, batch_size is below 1, or a document alone exceeds max_tokens.
    """

    def __init__(self, documents, batch_size, seed, shuffle=True, max_tokens=None, share=False):
        if not documents:
            raise ValueError("there is no document to train on: data.train gave none")
        if not max_tokens and batch_size < 1:
            raise ValueError(f"train.batch_size = {batch_size} must be at least 1")
        self.documents, self.batch_size, self.seed, self.shuffle, self.share = (
            documents,
            batch_size,
            seed,
            shuffle,
            share,
        )
        # cut once, not in each epoch: then all epochs have equally many steps, which the learning rate's
        # schedule needs
        self.groups = self._cut_by_tokens(max_tokens) if max_tokens else None

    @property
    def steps_per_epoch(self):
        """Micro-batches in an epoch, the short one included; the same in every epoch."""
        return len(self.groups) if self.groups else -(-len(self.documents) // self.batch_size)

    def __len__(self):
        return self.steps_per_epoch

    def plan(self, epoch):
        """The document indices of each micro-batch of an epoch; every document occurs once."""
        if self.groups:
            return [self.groups[i] for i in epoch_order(len(self.groups), self.seed, epoch, self.shuffle)]
        order = epoch_order(len(self.documents), self.seed, epoch, self.shuffle)
        return [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]

    def batches(self, epoch, start=0, stride=1):
        """Yield the packed micro-batches start, start + stride, ... of an epoch.

        A stride of the number of processes, each with its own start, gives every process its share.
        """
        for group in self.plan(epoch)[start::stride]:
            yield self.batch(group)

    def batch(self, group):
        """The packed micro-batch of these documents, named by their indices."""
        return pack([self.documents[i] for i in group], self.share)

    def _cut_by_tokens(self, max_tokens):
        groups, tokens = [[]], 0
        for i in epoch_order(len(self.documents), self.seed, 0, self.shuffle):
            length = len(self.documents[i].input_ids)
            if length > max_tokens:
                raise ValueError(
                    f"{self.documents[i].id} has {length} tokens, more than a micro-batch may have "
                    f"(max_tokens = {max_tokens}); "
                    "raise it, or lower data.max_length"
                )
            if tokens + length > max_tokens:
                groups.append([])
                tokens = 0
            groups[-1].append(i)
            tokens += length
        return groups


def split_validation(items, fraction, seed):
    """Hold out about `fraction` of the samples (or documents) for validation, and never a prompt that is
    trained on.

    Items with the same prompt stay together; otherwise validation would measure memory. Groups are taken in
    the order of a hash of seed and prompt, so adding rows to a file hardly moves the others from one side to
    the other.

    Returns:
        (training items, validation items), each in the order of `items`, neither empty unless fraction is 0.

    Raises:
        ValueError: the fraction is not in [0, 1), or all items have one and the same prompt.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"data.validation_fraction = {fraction} must be at least 0 and below 1")
    if fraction == 0:
        return list(items), []
    groups = {}
    for index, item in enumerate(items):
        groups.setdefault(hashlib.sha256(f"{seed}\0{prompt_of(item)}".encode()).digest(), []).append(index)
    if len(groups) < 2:
        raise ValueError(
            f"data.validation_fraction = {fraction}: {len(items)} sample(s) with {len(groups)} distinct "
            f"prompt(s) cannot be split; "
            "name a file in data.validation, or set the fraction to 0 to train without validation"
        )
    wanted = min(max(1, round(fraction * len(items))), len(items) - 1)
    held_out = set()
    for _, group in sorted(groups.items()):
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out:  # every group is larger than the share asked for
        held_out.update(min(groups.values(), key=len))
    return [x for i, x in enumerate(items) if i not in held_out], [
        x for i, x in enumerate(items) if i in held_out
    ]


def prompt_of(item):
    """What the model is given before its first response: text of a Sample, ids of a Document; all of it where
    there is no prompt.
    """
    if hasattr(item, "input_ids"):
        first = next((i for i, label in enumerate(item.labels) if label != IGNORE_INDEX), 0)
        return repr(item.input_ids[: first + 1] if first else item.input_ids)
    if item.text is not None:
        return repr(item.text.strip())
    roles = [role for role, _ in item.messages]
    return repr([(role, content.strip()) for role, content in item.messages[: roles.index("assistant")]])

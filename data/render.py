"""Turns a sample into token ids and labels. An example with the prompt "u1 u2" and the response "r1 r2":

    input_ids  <bos>  u1   u2   r1   r2   end     `end` is the id that ends a turn
    labels      --    --   r1   r2   end  --      loss_on = "response": the response and `end`
    labels      u1    u2   r1   r2   end  --      loss_on = "all": every token but the first

loss_on = "last" is "response" for the last response of a conversation only. A response in Sample.unsupervised
never has labels.

labels[i] is the token that the model must predict at position i; "--" is a position without a label. The
labels are shifted in this file only. `end` needs a label: without it a model never learns to stop.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from common.errors import listed
from common.progress import bar
from data.rows import Messages, Sample

IGNORE_INDEX = -100  # the label of a position without a target, as in torch and Hugging Face
CHUNK = 1000  # This many samples are tokenized at a time.


class Tokenizer(Protocol):
    """The part of model.tokenizer.Tokenizer that is used here; this folder imports nothing of model/."""

    bos_id: int
    eos_id: int

    @property
    def vocab_size(self) -> int: ...
    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def render_batch(self, conversations: Iterable[Messages]) -> list[list[tuple[list[int], bool]]]: ...


@dataclass
class Document:
    """The token ids and the labels of one sample: two lists of the same length."""

    input_ids: list[int]
    labels: list[int]
    id: str


@dataclass
class Counts:
    """Counts of samples and of tokens. Every sample is either kept, dropped or unsupervised."""

    kept: int = 0
    dropped: int = 0  # longer than max_length
    truncated: int = 0  # kept, but cut at max_length
    unsupervised: int = 0  # left out: without a label, before or after the cut
    tokens: int = 0  # in the kept documents
    supervised_tokens: int = 0
    longest: int = 0  # tokens of the longest sample before any cut

    def keep(self, document: Document, was_cut: bool) -> bool:
        """Counts a document and returns whether it is kept, that is, whether it has any label."""
        supervised = len(document.labels) - document.labels.count(IGNORE_INDEX)
        if not supervised:
            self.unsupervised += 1
            return False
        self.kept += 1
        self.truncated += was_cut
        self.tokens += len(document.input_ids)
        self.supervised_tokens += supervised
        return True


def render(sample: Sample, tokenizer: Tokenizer, loss_on: str = "response") -> Document:
    """Tokenizes one sample: <bos> and the turns of a chat, or <bos>, a raw text and <eos>.

    Args:
        sample: a chat (`messages`) or a raw text (`text`).
        tokenizer: the tokenizer of the base model.
        loss_on: "response" gives labels to the assistant's turns, "last" to the last of them, "all" to every
            token. All tokens of a raw text have labels in any case.
    """
    (document,) = _tokenize([sample], tokenizer, loss_on)
    return document


def render_all(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    loss_on: str = "response",
    max_length: int | None = None,
    on_long: str = "error",
    vocab_size: int | None = None,
) -> tuple[list[Document], Counts]:
    """Tokenizes samples; returns their documents and Counts. Samples without any label are left out.

    Args:
        samples, tokenizer, loss_on: as in render.
        max_length: limit of a document in tokens, with <bos> and the end of the turn; None or 0 for no limit.
        on_long: "error", "drop" (leaves longer samples out) or "truncate" (cuts off their ends).
        vocab_size: vocabulary entries of the model; by default those of the tokenizer.

    Raises:
        ValueError: a sample is too long and on_long is "error", a token id is outside the vocabulary, or no
            document is left.
    """
    documents, counts, too_long, limit = [], Counts(), [], max_length or sys.maxsize
    for document in _tokenize(samples, tokenizer, loss_on):
        _check_ids(document, vocab_size or tokenizer.vocab_size)
        length = len(document.input_ids)
        counts.longest = max(counts.longest, length)
        is_long = length > limit
        if is_long and on_long != "truncate":
            too_long.append(f"{document.id} ({length} tokens)")
            counts.dropped += 1
            continue
        if is_long:
            # The last token has no label: the token after it is cut off.
            labels = document.labels[: limit - 1] + [IGNORE_INDEX]
            document = Document(document.input_ids[:limit], labels, document.id)
        if counts.keep(document, was_cut=is_long):
            documents.append(document)
    if too_long and on_long == "error":
        remedy = f'Set data.max_length = {counts.longest}, or data.on_long = "drop" or "truncate".'
        head = f"{len(too_long)} samples are longer than data.max_length = {max_length} tokens:"
        raise ValueError(listed(head, too_long, remedy))
    if samples and not documents:
        raise ValueError(
            f"none of the {len(samples)} samples is left: {counts.dropped} are longer than {max_length} "
            "tokens (data.max_length, or the positions of the model) and "
            f"{counts.unsupervised} have no response within them; the longest has {counts.longest} tokens: "
            "raise data.max_length, or take shorter samples"
        )
    return documents, counts


def _tokenize(samples: Sequence[Sample], tokenizer: Tokenizer, loss_on: str) -> Iterator[Document]:
    """Yields one document for each sample. The tokenizer gets CHUNK samples at a time, in parallel."""
    # One int object for each token id: a list of them takes 8 bytes a token instead of 36.
    same: dict[int, int] = {}
    with bar(len(samples), "tokenizing", "samples", quiet=len(samples) <= CHUNK) as progress:
        for start in range(0, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            texts = iter(tokenizer.encode_batch([s.text for s in chunk if s.text is not None]))
            chats = iter(tokenizer.render_batch([s.messages or () for s in chunk if s.text is None]))
            for sample in chunk:
                is_chat = sample.text is None
                pieces = next(chats) if is_chat else [([*next(texts), tokenizer.eos_id], True)]
                has_labels = _supervised(sample, loss_on)
                input_ids: list[int] = [tokenizer.bos_id]
                labels: list[int] = []
                for ids, is_response in pieces:
                    ids = list(map(same.setdefault, ids, ids))
                    input_ids += ids
                    # The pieces of a conversation have its responses in their order.
                    labelled = next(has_labels) if is_response else loss_on == "all"
                    labels += ids if labelled else [IGNORE_INDEX] * len(ids)
                # <bos> has no label, so each label is one position before its token: the shift.
                yield Document(input_ids, labels + [IGNORE_INDEX], sample.id)
            progress.update(len(chunk))


def _supervised(sample: Sample, loss_on: str) -> Iterator[bool]:
    """Yields for each response of a conversation whether it has labels; True for a raw text."""
    if sample.messages is None:
        yield True
        return
    responses = [i for i, (role, _) in enumerate(sample.messages) if role == "assistant"]
    for i in responses:
        yield i not in sample.unsupervised and (loss_on != "last" or i == responses[-1])


def special_token_rows(samples: Sequence[Sample], tokens: Sequence[str]) -> dict[str, list[str]]:
    """Returns {token: ids of the samples whose text spells it} for those of `tokens` that occur."""
    if not tokens:
        return {}
    pattern = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
    found: dict[str, list[str]] = {}
    for sample in samples:
        texts = [sample.text or "", sample.rejected or "", *(text for _, text in sample.messages or ())]
        for token in {match for text in texts for match in pattern.findall(text)}:
            found.setdefault(token, []).append(sample.id)
    return found


def _check_ids(document: Document, vocab_size: int) -> None:
    highest = max(document.input_ids)
    if highest >= vocab_size or min(document.input_ids) < 0:
        raise ValueError(
            f"{document.id}: token id {highest} is outside the model's vocabulary of {vocab_size}; "
            "tokenizer.json does not belong to this model: take both from one folder"
        )

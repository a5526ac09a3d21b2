"""From a sample to token ids and the targets that the loss looks at.

    tokens    <bos>  u1   u2   r1   r2   end
    labels     --    --   r1   r2   end  --        "response": the response and the id that ends its turn
    labels     u1    u2   r1   r2   end  --        "all": every token but the first, which nothing predicts

Labels are shifted here, once: labels[i] is what position i must predict, so nothing downstream shifts again.
The id that ends the turn is supervised; leave it out, and the loss falls as nicely while the model never
learns to stop.
"""

from dataclasses import dataclass

from common.errors import listed
from common.progress import bar

IGNORE_INDEX = -100  # a label without a target, torch's and Hugging Face's number
CHUNK = 1000  # samples tokenised at a time


@dataclass
class Document:
    """Token ids with, at each position, the token to predict next or IGNORE_INDEX; both lists are equally
    long.
    """

    input_ids: list[int]
    labels: list[int]
    id: str


@dataclass
class Counts:
    """What became of the samples; each is in exactly one of kept, dropped and unsupervised."""

    kept: int = 0
    dropped: int = 0  # longer than max_length
    truncated: int = 0  # kept, but cut at max_length
    unsupervised: int = 0  # left out: no token to learn from, after a cut or from the start
    tokens: int = 0  # in the kept documents
    supervised_tokens: int = 0
    longest: int = 0  # tokens of the longest sample before any cut

    def keep(self, document, was_cut):
        """Count a document that stays, unless nothing in it is supervised; returns whether it stays."""
        supervised = len(document.labels) - document.labels.count(IGNORE_INDEX)
        if not supervised:
            self.unsupervised += 1
            return False
        self.kept += 1
        self.truncated += was_cut
        self.tokens += len(document.input_ids)
        self.supervised_tokens += supervised
        return True


def render(sample, tokenizer, loss_on="response"):
    """Turn one sample into one document: one <bos>, then its turns, or its text and <eos>.

    Args:
        sample: messages or text.
        tokenizer: has bos_id, eos_id, encode(text) -> ids, and render_turns(messages) -> [(ids, is
            response)]; render_all asks for encode_batch and render_batch, the same for lists.
        loss_on: "response" supervises the assistant's turns, "all" everything; raw text is always supervised
        whole.
    """
    return _document(sample, _pieces(sample, tokenizer), tokenizer.bos_id, loss_on)


def render_all(samples, tokenizer, loss_on="response", max_length=None, on_long="error", vocab_size=None):
    """Turn samples into documents of at most max_length tokens.

    Args:
        samples: list of Sample.
        max_length: tokens, <bos> and the end of turn included; None or 0 for no limit.
        on_long: what a longer sample does: "error", "drop" (left out), or "truncate" (its tail is cut off).
        vocab_size: rows of the model's embedding; the tokenizer's own size where it is None.

    Returns:
        (documents, Counts).

    Raises:
        ValueError: for samples that are too long under "error", for ids that the model has no embedding for,
        and when no document is left.
    """
    if on_long not in ("error", "drop", "truncate"):
        raise ValueError(f"data.on_long = {on_long!r} is not one of 'error', 'drop', 'truncate'")
    documents, counts, too_long = [], Counts(), []
    for document in _tokenised(samples, tokenizer, loss_on):
        _check_ids(document, vocab_size or tokenizer.vocab_size)
        length = len(document.input_ids)
        counts.longest = max(counts.longest, length)
        is_long = bool(max_length) and length > max_length
        if is_long and on_long == "truncate":
            document = _truncate(document, max_length)
        elif is_long:
            too_long.append(f"{document.id} ({length} tokens)")
            counts.dropped += 1
            continue
        if counts.keep(document, was_cut=is_long):
            documents.append(document)
    if too_long and on_long == "error":
        raise ValueError(_too_long(too_long, max_length, counts.longest))
    if samples and not documents:
        raise ValueError(
            f"none of the {len(samples)} samples is left: {counts.dropped} are longer than {max_length} "
            f"tokens (data.max_length, or what the model has "
            f"positions for) and {counts.unsupervised} have no response within them; the longest has "
            f"{counts.longest} tokens: raise data.max_length, or "
            "take shorter samples"
        )
    return documents, counts


def _pieces(sample, tokenizer):
    """The sample's token ids in order, in pieces (ids, whether they are a response), without <bos>."""
    if sample.text is None:
        return tokenizer.render_turns(sample.messages)
    return _text_pieces(tokenizer.encode(sample.text), tokenizer)


def _text_pieces(ids, tokenizer):
    return [(ids + [tokenizer.eos_id], True)]


def _document(sample, pieces, bos_id, loss_on):
    if loss_on not in ("response", "all"):
        raise ValueError(f"data.loss_on = {loss_on!r} is not one of 'response', 'all'")
    input_ids, labels = [bos_id], []
    for ids, is_response in pieces:
        input_ids += ids
        labels += ids if is_response or loss_on == "all" else [IGNORE_INDEX] * len(ids)
    # labels started one position early, for there is no label of <bos>: that is the shift
    return Document(input_ids, labels + [IGNORE_INDEX], sample.id)


class _Same(dict):
    """{i: i} for whatever is looked up, always the first object of its value."""

    def __missing__(self, key):
        self[key] = key
        return key


def _tokenised(samples, tokenizer, loss_on):
    """Yield the samples' documents; the texts go through the tokenizer many at a time, which it does in
    parallel.
    """
    one = (
        _Same().__getitem__
    )  # one int object for each id: a list of them costs 8 bytes a token, and 36 without
    with bar(len(samples), "tokenizing", "samples", quiet=len(samples) <= CHUNK) as progress:
        for start in range(0, len(samples), CHUNK):
            chunk = samples[start : start + CHUNK]
            texts = iter(tokenizer.encode_batch([sample.text for sample in chunk if sample.text is not None]))
            chats = iter(tokenizer.render_batch([sample.messages for sample in chunk if sample.text is None]))
            for sample in chunk:
                pieces = next(chats) if sample.text is None else _text_pieces(next(texts), tokenizer)
                pieces = [(list(map(one, ids)), is_response) for ids, is_response in pieces]
                yield _document(sample, pieces, tokenizer.bos_id, loss_on)
            progress.update(len(chunk))


def _truncate(document, length):
    # the last kept position loses its target: its next token is no longer in the document
    return Document(document.input_ids[:length], document.labels[: length - 1] + [IGNORE_INDEX], document.id)


def _check_ids(document, vocab_size):
    highest = max(document.input_ids)
    if highest >= vocab_size or min(document.input_ids) < 0:
        raise ValueError(
            f"{document.id}: token id {highest} is outside the model's vocabulary of {vocab_size}; "
            "tokenizer.json does not belong to this model: take both from one folder"
        )


def _too_long(too_long, max_length, longest):
    one = "sample is" if len(too_long) == 1 else "samples are"
    head = f"{len(too_long)} {one} longer than data.max_length = {max_length} tokens:"
    remedy = f'Set data.max_length = {longest}, or data.on_long = "drop" to leave them out, "truncate" to cut them.'
    return listed(head, too_long, remedy)

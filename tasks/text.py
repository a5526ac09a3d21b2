"""Chats and raw text: the task of samples to which no other task applies.

perplexity      exp(L), with the loss L in nats a supervised token: as uncertain as among so many tokens
bits_per_byte   L * supervised tokens / ln 2 / bytes of the supervised text in UTF-8

The perplexities of two models compare only if their tokenizers are the same. Bits per byte always compare.
"""

import math
from collections.abc import Sequence

from data.rows import Sample
from tasks.measures import Counts, Metric, differences, exact_counts, exact_match, total

METRICS: tuple[Metric, ...] = (
    Metric("perplexity", "perplexity", percent=False, lower_is_better=True),
    Metric("bits_per_byte", "bits per byte", percent=False, lower_is_better=True),
)
MAX_LOSS = 700.0  # exp of more is above what a float holds
LEGEND = {"wrong": "not in the expected text", "missing": "missing from the answer"}
TITLES = {"source": "Prompt", "gold": "Expected"}


def applies(samples: list[Sample]) -> bool:
    """Returns True: every sample is text."""
    return True


def score(rows: Sequence[tuple[str, str, str]]) -> dict:
    """Returns {"exact_match": the fraction of responses that equal the gold one}."""
    return from_counts(total(counts, rows))


def counts(row: tuple[str, str, str]) -> Counts:
    """Returns what one row adds to the counts."""
    _, gold, text = row
    return exact_counts(gold, text)


def from_counts(sums: Counts) -> dict:
    """Returns the measures of the rows whose counts add up to `sums`."""
    return {"exact_match": exact_match(sums)}


def score_loss(loss: float, tokens: int, text_bytes: int) -> dict:
    """Returns perplexity and bits_per_byte of a mean loss in nats over `tokens` of `text_bytes` bytes."""
    bits = loss * tokens / math.log(2)
    return {"perplexity": math.exp(min(loss, MAX_LOSS)), "bits_per_byte": bits / max(1, text_bytes)}


def shown_prompt(prompt: str) -> str:
    """Returns the whole prompt."""
    return prompt


def pieces(text: str, gold: str, prompt: str) -> list[tuple[str, str]]:
    """Splits a response into (kind, text) pieces: "" for text as in the gold, or another kind of LEGEND."""
    return [(kind, "".join(tokens)) for kind, tokens in differences(text, gold)]


def overall(measures: dict) -> dict | None:
    """Returns None: text has no labels."""
    return None

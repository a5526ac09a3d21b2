"""Chooses the next token of each row. B rows, D hidden size, V vocabulary entries, n candidate tokens."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from model.quantized import QuantizedWeight

CHUNK = 16_384  # vocabulary entries that a CPU multiplies at a time, so that the logits stay in its cache


@dataclass(frozen=True)
class Sampling:
    """Settings: greedy decoding if temperature is 0, else sampling from softmax(logits / temperature).

    With top_k, only the k most likely tokens are sampled (0: all). With top_p, only the fewest most likely
    tokens that together have this probability are sampled (1: all).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        """Returns an error message for each value that is out of range."""
        found = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            found.append(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        return found

    def uniforms(self, number: int, count: int) -> torch.Tensor:
        """Returns `count` random numbers in [0, 1), which depend on the seed and the prompt's number only."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        return torch.rand(count, generator=generator)


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns (probabilities, token ids), both (B, n), for logits (B, V). Ids None means 0 to V - 1 in order.

    As in transformers, the temperature is applied first, then top_k, then top_p (Holtzman et al. 2020).
    Tokens outside top_p get probability 0, and the others are not normalized again.
    """
    logits, ids = logits.float() / sampling.temperature, None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs  # the probability of all likelier tokens
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
    return probs, ids


def sample(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> torch.Tensor:
    """Returns the next token ids (B,) for logits (B, V): greedy ones if `uniform` is None, else random ones.

    Inverse transform sampling: `uniform` (B,) holds random numbers u in [0, 1). The result is the first token
    whose cumulative probability exceeds u times the sum of all probabilities.
    """
    if uniform is None:
        return logits.argmax(-1)
    probs, ids = distribution(logits, sampling)
    cdf = probs.cumsum(-1)
    target = uniform.to(cdf.device)[:, None] * cdf[:, -1:]
    # right=True never selects an id of probability 0.
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Returns log softmax(logits / temperature)[token] (B,) in nats, for logits (B, V) and token ids (B,).

    Greedy decoding counts as temperature 1; top_k and top_p have no effect.
    """
    scaled = logits.float() / (sampling.temperature or 1.0)
    return scaled.gather(-1, tokens[:, None])[:, 0] - scaled.logsumexp(-1)


def greedy(hidden: torch.Tensor, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    """Returns argmax(hidden weight^T), the ids (B,) of the largest logits; hidden (B, D), weight (V, D).

    It computes CHUNK logits of each row at a time, but all of a single row, unless W is quantized. A model
    with a logit softcap needs `sample`, because the softcap can round different logits to the same value.
    """
    size = CHUNK if len(hidden) > 1 or isinstance(weight, QuantizedWeight) else len(weight)
    chunks = (weight[i : i + size].to(hidden.dtype) for i in range(0, len(weight), size))
    best = [F.linear(hidden, chunk).max(-1) for chunk in chunks]
    chunk = torch.stack([found.values for found in best], -1).argmax(-1, keepdim=True)  # (B, 1)
    return (chunk * size + torch.stack([found.indices for found in best], -1).gather(-1, chunk))[:, 0]

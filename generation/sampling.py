"""Choosing the next token. B rows, D hidden size, V vocabulary entries, n candidates."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Vocabulary entries that a CPU multiplies at a time, so that their logits stay in its cache.
CHUNK = 16_384


@dataclass(frozen=True)
class Sampling:
    """Greedy decoding (temperature 0), or softmax(logits / temperature), cut to top_k and top_p."""

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
        """Returns random numbers (count,) for the tokens of a prompt, by the seed and the prompt's number."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        return torch.rand(count, generator=generator)


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns probabilities (B, n) of n candidates for logits (B, V), and their ids (B, n) or None for all.

    As in transformers, the temperature comes first, then top_k, then the fewest tokens that have top_p of the
    remaining probability (Holtzman et al. 2020). The result is not normalized again.
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
    """Returns the next ids (B,) for logits (B, V).

    Inverse transform sampling: the first id whose cumulative probability exceeds `uniform` (B,) in [0, 1);
    without `uniform`, greedy decoding.
    """
    if uniform is None:
        return logits.argmax(-1)
    probs, ids = distribution(logits, sampling)
    cdf = probs.cumsum(-1)
    target = uniform.to(cdf.device)[:, None] * cdf[:, -1:]
    # right=True never selects an id of probability 0.
    index = torch.searchsorted(cdf, target, right=True).clamp_(max=cdf.shape[-1] - 1)
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def greedy(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns argmax(hidden (B, D) weight^T (V, D)) (B,) from a chunk of the logits at a time.

    It is for models without a softcap, which can make the largest logits equal.
    """
    size = CHUNK if len(hidden) > 1 else len(weight)
    best = [F.linear(hidden, chunk.to(hidden.dtype)).max(-1) for chunk in weight.split(size)]
    chunk = torch.stack([found.values for found in best], -1).argmax(-1, keepdim=True)  # (B, 1)
    return (chunk * size + torch.stack([found.indices for found in best], -1).gather(-1, chunk))[:, 0]

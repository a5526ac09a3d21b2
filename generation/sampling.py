"""How the next token is chosen. B rows, D hidden size, V vocabulary, n ids that may be chosen."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Rows of the head that a CPU multiplies at once: their logits stay in its cache, where all of a large batch's
# are 64 MiB.
PIECE = 16_384


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits: temperature 0 takes the likeliest; else softmax(logits /
    temperature), cut to top_k and top_p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def problems(self) -> list[str]:
        found = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            found.append(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0:
            found.append(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p is {self.top_p}; it must be above 0 and at most 1 (off)")
        return found

    def uniforms(self, row: int, count: int) -> torch.Tensor:
        """(count,) the random numbers of a prompt, one for each of its tokens; they hang on the seed and its
        number only, not on its batch.
        """
        return torch.rand(
            count, generator=torch.Generator().manual_seed((self.seed * 1_000_003 + row) % 2**63)
        )


def distribution(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, V) logits -> probabilities (B, n), not normalised again after the cuts, and the ids (B, n) that
    they belong to (None: all, in order).

    As in transformers: temperature, then the top_k likeliest, then of these the fewest that hold top_p of
    their mass (Holtzman et al. 2020).
    """
    logits, ids = logits.float() / sampling.temperature, None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        before = probs.cumsum(-1) - probs  # mass of the likelier ones
        probs = probs.masked_fill(before >= sampling.top_p, 0.0)
    return probs, ids


def sample(logits: torch.Tensor, sampling: Sampling, uniform: torch.Tensor | None) -> torch.Tensor:
    """The next ids (B,) from logits (B, V): the likeliest, or by inverse CDF the first whose cumulated
    probability exceeds `uniform` (B,) < 1.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs, ids = distribution(logits, sampling)
    cdf = probs.cumsum(-1)
    target = uniform.to(cdf.device)[:, None] * cdf[:, -1:]
    index = torch.searchsorted(cdf, target, right=True).clamp_(
        max=cdf.shape[-1] - 1
    )  # right: never one of probability 0
    return (index if ids is None else ids.gather(-1, index))[:, 0]


def greedy(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B,) what choose() takes at temperature 0 from the logits hidden (B, D) weight^T (V, D), of which only
    pieces are ever there.

    For a model without a soft-cap, which makes equals of the largest logits.
    """
    size = PIECE if len(hidden) > 1 else len(weight)
    best = [F.linear(hidden, piece.to(hidden.dtype)).max(-1) for piece in weight.split(size)]
    piece = torch.stack([found.values for found in best], -1).argmax(-1, keepdim=True)  # (B, 1)
    return (piece * size + torch.stack([found.indices for found in best], -1).gather(-1, piece))[:, 0]

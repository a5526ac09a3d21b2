"""RMSNorm as Gemma 3 has it.  Shapes: x (..., D)."""

import torch
from torch import nn


class Gemma3RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), over the last axis (Zhang and Sennrich 2019; the 1 + is Gemma's, so that weight decays to identity)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # float32: Gemma's activations reach 8e5, whose square is past bfloat16's precision and float16's range. The product with
        # the weight is rounded last, as in Google's code: (x * w).to(float16), not x.to(float16) * w.
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (y * (1.0 + self.weight.float())).type_as(x)

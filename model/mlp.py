"""The feed-forward layer of Gemma 3, for T tokens with hidden size D."""

import torch
import torch.nn.functional as F
from torch import nn


class Gemma3MLP(nn.Module):
    """Maps x (T, D) to down(gelu_tanh(gate(x)) * up(x)) (T, D): GeGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))

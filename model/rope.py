"""RoPE (Su et al. 2021) with Hugging Face's channel pairs (i, i + D/2); T tokens, H heads, D head_dim."""

import torch


def rope_angles(
    position_ids: torch.Tensor, head_dim: int, theta: float, linear_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin, (T, D) float32, of the angles position * theta^(-2i/D) / linear_factor.

    These are columns i = 0 to D/2 - 1. Columns D/2 to D - 1 repeat them.
    """
    i = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids.device).float()
    inverse_frequency = 1.0 / (theta ** (i / head_dim)) / linear_factor  # (D/2,)
    angles = position_ids.float()[:, None] * inverse_frequency[None, :]  # (T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (T, D)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates channel pairs (i, i + D/2) of x (T, H, D): x * cos + (-x2, x1) * sin, x1 and x2 x's halves."""
    x1, x2 = x.chunk(2, dim=-1)
    return (x * cos[:, None, :] + torch.cat((-x2, x1), dim=-1) * sin[:, None, :]).type_as(x)

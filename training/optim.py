"""Optimisers and the learning rate's way."""

import math

import torch
from torch import nn


def make_optimizers(model: nn.Module, name: str, learning_rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW over all trainable weights (decay on matrices only), or Muon for the layers' matrices beside it.

    Muon (Jordan et al. 2024) orthogonalises each matrix's momentum; with "match_rms_adamw" one learning rate serves both (Liu et al. 2025).
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in trained if name == "muon" and p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n]
    chosen = set(map(id, muon))
    rest = [p for _, p in trained if id(p) not in chosen]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    # eps and betas are PyTorch's; fused runs one kernel over all tensors, on the CPU too
    groups = [g for g in groups if g["params"]]
    out = [torch.optim.AdamW(groups, lr=learning_rate, fused=True)] if groups else []  # none is left where Muon takes all of an adapter
    if muon:
        out.append(torch.optim.Muon(muon, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return out


def lr_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """What the peak rate is multiplied with in step 0 <= step < total: (step+1)/(warmup+1) at first, then 1 falling to 0 just after the last step."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0

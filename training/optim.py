"""AdamW, the choice between AdamW and Muon, and the learning rate schedule."""

import math

import torch
from torch import nn
from torch.optim.adamw import adamw

BETA2 = 0.999
HYPERPARAMETERS = {"beta1": 0.9, "eps": 1e-8, "amsgrad": False, "maximize": False}


class AdamW:
    """p <- p - lr (m / (sqrt(v) + eps) + weight_decay p) (Loshchilov and Hutter 2019, arXiv 1711.05101).

    p is a parameter and g its gradient. m and v are the moving averages of g with beta1 and of g^2 with
    beta2; in step t they are divided by 1 - beta1^t and 1 - beta2^t. The result has the same bits as that of
    torch.optim.AdamW, which is slower to start: its first step imports PyTorch's compiler (two seconds).
    """

    def __init__(self, groups: list[dict], lr: float, beta2: float = BETA2):
        """Takes the parameter groups, a list of {"params": list of tensors, "weight_decay": float}."""
        self.beta2 = beta2
        self.param_groups = [group | {"lr": lr} for group in groups]
        # parameter -> {"step": t, "exp_avg": m, "exp_avg_sq": v}
        self.state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            m, v, steps = ([self.state[p][n] for p in params] for n in ("exp_avg", "exp_avg_sq", "step"))
            settings = HYPERPARAMETERS | {"lr": group["lr"], "weight_decay": group["weight_decay"]}
            grads = [p.grad for p in params]
            adamw(params, grads, m, v, [], steps, fused=True, beta2=self.beta2, **settings)

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict:
        """Returns the state in the format of torch.optim, where each parameter is replaced by its index."""
        index = {p: i for i, p in enumerate(self._params())}
        groups = [group | {"params": [index[p] for p in group["params"]]} for group in self.param_groups]
        return {"state": {index[p]: entries for p, entries in self.state.items()}, "param_groups": groups}

    def load_state_dict(self, saved: dict) -> None:
        params = self._params()
        self.state = {
            params[i]: {name: x.to(params[i].device, copy=True) for name, x in entries.items()}
            for i, entries in saved["state"].items()
        }
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update(lr=old["lr"], weight_decay=old["weight_decay"])


Optimizers = list[AdamW | torch.optim.Optimizer]  # GradScaler takes both; its hints name only the second.


def make_optimizers(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float, adam_beta2: float = BETA2
) -> Optimizers:
    """Returns [AdamW] for "adamw"; for "muon", AdamW and a Muon that updates the matrices of the layers.

    Muon (Jordan et al. 2024) orthogonalizes the momentum. Its updates are scaled so that AdamW's learning
    rate suits them (Liu et al. 2025). Parameters of one dimension have no weight decay. `adam_beta2` is
    AdamW's beta2.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    outside = ("embed_tokens", "lm_head")
    muon = [p for n, p in trainable.items() if p.ndim == 2 and not any(part in n for part in outside)]
    muon = muon if name == "muon" else []
    chosen = set(map(id, muon))
    rest = [p for p in trainable.values() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]  # Muon may take all parameters of an adapter
    optimizers: Optimizers = [AdamW(groups, learning_rate, adam_beta2)] if groups else []
    if muon:
        optimizers.append(torch.optim.Muon(muon, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def lr_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """Returns the factor of the learning rate in a step, 0 <= step < total.

    In the first `warmup` steps it is (step + 1) / (warmup + 1). In step `warmup` it is 1. Then it stays 1
    ("constant"), or falls to 0 ("linear", "cosine"); it would be 0 in step `total`, which is never done.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if kind == "cosine" else 1.0

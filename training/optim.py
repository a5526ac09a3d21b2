"""Optimisers and the learning rate's way."""

import math

import torch
from torch import nn
from torch.optim.adamw import adamw


class AdamW:
    """p <- p - lr (m / (sqrt(v) + eps) + weight_decay p), with m and v the means of g and g^2 that forget by
    beta1 and beta2 a step, each over 1 - beta^t (Loshchilov and Hutter 2019, arXiv 1711.05101).

    torch.optim.AdamW to the last bit, by the same fused kernel, which the CPU has too; but that class imports
    PyTorch's compiler, and the first step waits.
    """

    def __init__(self, groups: list[dict], lr: float):
        """Groups {"params": tensors, "weight_decay": w}."""
        self.param_groups = [group | {"lr": lr} for group in groups]
        self.state = {}  # {parameter: its step, exp_avg (m) and exp_avg_sq (v)}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p] = {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            m, v, steps = (
                [self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            adamw(
                params,
                [p.grad for p in params],
                m,
                v,
                [],
                steps,
                fused=True,
                amsgrad=False,
                maximize=False,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
            )

    def _params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def state_dict(self) -> dict:
        """As torch.optim's: parameters by their number."""
        numbers = {p: i for i, p in enumerate(self._params())}
        return {
            "state": {numbers[p]: entries for p, entries in self.state.items()},
            "param_groups": [
                group | {"params": [numbers[p] for p in group["params"]]} for group in self.param_groups
            ],
        }

    def load_state_dict(self, saved: dict) -> None:
        params = self._params()
        self.state = {
            params[i]: {name: x.to(params[i].device, copy=True) for name, x in entries.items()}
            for i, entries in saved["state"].items()
        }
        for group, old in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update(lr=old["lr"], weight_decay=old["weight_decay"])


def make_optimizers(model: nn.Module, name: str, learning_rate: float, weight_decay: float) -> list:
    """AdamW over all trainable weights (decay on matrices only), or Muon for the layers' matrices beside it.

    Muon (Jordan et al. 2024) orthogonalises each matrix's momentum; with "match_rms_adamw" one learning rate
    serves both (Liu et al. 2025).
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [
        p
        for n, p in trained
        if name == "muon" and p.ndim == 2 and "embed_tokens" not in n and "lm_head" not in n
    ]
    chosen = set(map(id, muon))
    rest = [p for _, p in trained if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    out = [AdamW(groups, learning_rate)] if groups else []  # none is left where Muon takes all of an adapter
    if muon:
        out.append(
            torch.optim.Muon(
                muon, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    return out


def lr_factor(step: int, total: int, warmup: int, kind: str) -> float:
    """What the peak rate is multiplied with in step 0 <= step < total: (step+1)/(warmup+1) at first, then 1
    falling to 0 just after the last step.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    return 1.0

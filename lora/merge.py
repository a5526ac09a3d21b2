"""Adds adapters into the weights of their base layers, which gives an ordinary model."""

import math

import torch
from torch import nn

from lora.inject import adapters, unwrap
from lora.layer import LoRALinear


@torch.no_grad()
def merge(model: nn.Module, allow_zero: bool = False) -> dict[str, float]:
    """Merges every adapter into its base layer, removes it and returns {path: Frobenius norm of the change}.

    The sum is computed in float32 and rounded once to the weight's dtype. The norms are those of the rounded
    change: bfloat16 loses a change below half of its step.

    Raises:
        ValueError: the model has no adapters, a weight would not be finite, or, unless allow_zero, no weight
            would change (the adapter is untrained or too small). The model is unchanged then.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("nothing to merge: the model has no adapters")
    norms = {name: change(layer.base_layer.weight, rounded(layer)) for name, layer in layers.items()}
    refuse_empty(norms, allow_zero, next(iter(layers.values())).base_layer.weight.dtype)
    # Keeping the merged weights would take the memory of a second model; computing them again is cheap.
    for layer in layers.values():
        layer.base_layer.weight.copy_(rounded(layer))
    unwrap(model)
    return norms


def refuse_empty(
    norms: dict[str, float], allow_zero: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Raises ValueError if a norm is not finite or, unless allow_zero, all are zero."""
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        raise ValueError("not merged: these weights would not be finite: " + ", ".join(broken))
    if not any(norms.values()) and not allow_zero:
        raise ValueError(
            f"not merged: none of {len(norms)} weights would change. The adapter is untrained (lora_B is "
            f"zero) or too small for {dtype}: load the base in float32"
        )


def rounded(layer: LoRALinear) -> torch.Tensor:
    """Returns the merged weight (out, in) in the base weight's dtype."""
    return layer.merged_weight().to(layer.base_layer.weight.dtype)


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns the Frobenius norm of after - before, computed in float32."""
    return torch.linalg.vector_norm(after.float() - before.float()).item()

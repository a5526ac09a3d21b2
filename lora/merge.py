"""Adds adapters into the weights they adapt, so that what is left is an ordinary model."""

import math

import torch
from torch import nn

from lora.inject import adapters, unwrap


@torch.no_grad()
def merge(model: nn.Module, allow_zero: bool = False) -> dict[str, float]:
    """Merges every adapter into its base layer and takes the wrapper away; returns {path: Frobenius norm of
    the change its weight took}.

    The sum is made in float32 and rounded once, to the weight's own type; the norms are of what is left after
    that rounding, because a delta below half a bfloat16 step vanishes in it. Raises ValueError, before
    anything is changed, if the model has no adapters, if a weight would not be finite, or if no weight would
    change at all (an untrained or lost adapter) unless allow_zero.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("nothing to merge: the model has no adapters")
    norms = {name: change(layer.base_layer.weight, rounded(layer)) for name, layer in layers.items()}
    refuse_empty(norms, allow_zero, next(iter(layers.values())).base_layer.weight.dtype)
    # Each merged weight is made a second time here: rank-r products are cheap, and a second copy of a large
    # model in memory is not.
    for layer in layers.values():
        layer.base_layer.weight.copy_(rounded(layer))
    unwrap(model)
    return norms


def refuse_empty(
    norms: dict[str, float], allow_zero: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """ValueError for norms of which one is not finite, or, unless allow_zero, all are zero."""
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        raise ValueError("not merged, these weights would not be finite: " + ", ".join(broken))
    if not any(norms.values()) and not allow_zero:
        raise ValueError(
            f"not merged: none of {len(norms)} weights would change. The adapter is untrained (lora_B is "
            f"zero), or too small for "
            f"{dtype}: load the base in float32"
        )


def rounded(layer) -> torch.Tensor:
    """(out, in) merged weight in the base weight's type."""
    return layer.merged_weight().to(layer.base_layer.weight.dtype)


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Frobenius norm of after - before, in float32."""
    return torch.linalg.vector_norm(after.float() - before.float()).item()

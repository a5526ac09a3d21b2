"""Merges LoRA and DoRA adapters into the weights of their base layers: for good, or for a while."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from common.device import autocast_dtype
from lora.inject import adapters, unwrap
from lora.layer import LoRALinear


@torch.no_grad()
def merge(model: nn.Module, allow_zero: bool = False) -> dict[str, float]:
    """Merges every adapter into its base layer; returns {path of the layer: Frobenius norm of the change}.

    Each merged weight is computed in float32 and rounded once, to the base weight's dtype. The norms are
    taken after rounding: a change that bfloat16 rounds away has the norm 0. The merged weight of a quantized
    layer is dense.

    Raises:
        ValueError: the model has no adapters; a merged weight is not finite; or allow_zero is False and no
            weight changes (adapter untrained, or change rounded away). The model is then as before.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("nothing to merge: the model has no adapters")
    dtype = next(iter(layers.values())).frozen.dtype
    # A quantized weight is rounded too, or the norm of a change by 0 would be that of the rounding.
    norms = {n: change(layer.base_layer.weight.to(dtype), rounded(layer)) for n, layer in layers.items()}
    refuse_empty(norms, allow_zero, dtype)
    # Keeping the merged weights would take the memory of a second model; computing them again is cheap.
    for layer in layers.values():
        if hasattr(layer.base_layer, "quantized"):
            merged = nn.Parameter(rounded(layer), requires_grad=False)
            dense = nn.Linear(merged.shape[1], merged.shape[0], bias=False, device="meta")
            dense.weight, dense.bias, layer.base_layer = merged, layer.base_layer.bias, dense
        else:
            layer.base_layer.weight.copy_(rounded(layer))
    unwrap(model)
    return norms


@contextmanager
def merged(model: nn.Module, room: int) -> Iterator[list[nn.Module]]:
    """Lets each adapter and its layer compute one product inside the block, if float32 and `room` permit it.

    The block gets the base layers whose own weights are then out of use.

    A step of decoding has few tokens, so that the two small products take long beside that of W. The merged
    weights are copies and take up to `room` bytes. In float32 the outputs differ by rounding only; in
    bfloat16 a merged weight would round the adapter away, and each layer computes as before.
    """
    layers = [layer for layer in adapters(model).values() if layer.enabled]
    exact = all(layer.frozen.dtype == torch.float32 for layer in layers)
    exact = exact and not any(autocast_dtype(layer.lora_A.device.type) for layer in layers[:1])
    fits = 4 * sum(layer.frozen.numel() for layer in layers) <= room
    merged_layers = layers if exact and fits else []
    try:
        with torch.no_grad():
            for layer in merged_layers:
                one_product = partial(F.linear, weight=layer.merged_weight(), bias=layer.base_layer.bias)
                vars(layer)["forward"] = one_product
        yield [layer.base_layer for layer in merged_layers]
    finally:
        for layer in merged_layers:
            vars(layer).pop("forward", None)


def refuse_empty(
    norms: dict[str, float], allow_zero: bool = False, dtype: torch.dtype = torch.float32
) -> None:
    """Raises ValueError if a norm is not finite, or if all norms are zero and allow_zero is False."""
    broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if broken:
        raise ValueError("not merged: these weights would not be finite: " + ", ".join(broken))
    if not any(norms.values()) and not allow_zero:
        raise ValueError(
            f"not merged: none of {len(norms)} weights would change. The adapter is untrained (lora_B is "
            f"zero) or too small for {dtype}: load the base in float32"
        )


def rounded(layer: LoRALinear) -> torch.Tensor:
    """Returns a layer's merged weight (out, in), rounded to the base weight's dtype."""
    return layer.merged_weight().to(layer.frozen.dtype)


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns the Frobenius norm of after - before, computed in float32."""
    return torch.linalg.vector_norm(after.float() - before.float()).item()

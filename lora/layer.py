"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear layer plus the product of two small matrices.

Shapes: x (..., in), weight W (out, in), lora_A (r, in), lora_B (out, r).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.device import autocast_dtype, without_autocast
from lora.fused import FusedLoRA


class LoRALinear(nn.Module):
    """Computes y = W x + b + scaling * B A dropout(x), with scaling = lora_alpha / r and b the bias, if any.

    With use_rslora, scaling = lora_alpha / sqrt(r) (arXiv 2312.03732). A starts at Kaiming-uniform values,
    which depend on `seed` only. B starts at zero, so a new adapter changes no output. A and B are float32
    even if W is bfloat16, whose 8 significant bits would round away an update as small as the learning rate.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.enabled = True
        device, rows, columns = self.frozen.device, base_layer.out_features, base_layer.in_features
        # A CPU generator gives the same values on every device, and the global generator keeps its state.
        a = torch.empty(r, columns, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(rows, r, dtype=torch.float32, device=device))

    @property
    def frozen(self) -> torch.Tensor:
        """Returns W; of a quantized layer its model.quantized.QuantizedWeight, which has no dense copy."""
        quantized = getattr(self.base_layer, "quantized", None)
        return self.base_layer.weight if quantized is None else quantized

    def frozen_product(self, x: torch.Tensor) -> torch.Tensor:
        """Returns W x (..., out) for x (..., in), in the dtype of x or autocast's."""
        product = getattr(self.base_layer, "product", None)
        if product is not None:  # A quantized layer: F.linear would keep its dense W for the backward pass.
            return product(x)
        return F.linear(x, self.base_layer.weight.to(x.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x (..., in) to y (..., out), in the dtype of the base layer's output."""
        if not self.enabled:
            return self.base_layer(x)
        dtype = self.fused_dtype(x)
        if dtype is not None:
            weight = self.frozen if hasattr(self.base_layer, "quantized") else self.frozen.to(dtype)
            return FusedLoRA.apply(x.to(dtype), weight, self.lora_A, self.lora_B, self.scaling)
        y = self.base_layer(x)
        return (y + self.adapter_product(self.adapter_input(x))).to(y.dtype)

    def fused_dtype(self, x: torch.Tensor) -> torch.dtype | None:
        """Returns the dtype in which FusedLoRA computes, or None if FusedLoRA cannot be used.

        It needs enabled gradients, no bias and no active dropout. Without autocast, x, W and A must have one
        dtype.
        """
        dropout = self.training and self.lora_dropout > 0
        if not torch.is_grad_enabled() or self.base_layer.bias is not None or dropout:
            return None
        if dtype := autocast_dtype(x.device.type):
            return dtype
        return x.dtype if x.dtype == self.frozen.dtype == self.lora_A.dtype else None

    def adapter_input(self, x: torch.Tensor) -> torch.Tensor:
        """Returns dropout(x): in float32 as in PEFT, or, under autocast, in x's dtype."""
        if not autocast_dtype(x.device.type):
            x = x.to(self.lora_A.dtype)
        return F.dropout(x, self.lora_dropout, self.training)

    def adapter_product(self, x: torch.Tensor) -> torch.Tensor:
        """Returns scaling * B A x. A x is scaled, because it has r values per token, and B A x has `out`."""
        return F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    def delta_weight(self) -> torch.Tensor:
        """Returns scaling * B A, (out, in), in the dtype of A and B."""
        with without_autocast(self.lora_A.device.type):
            return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self) -> torch.Tensor:
        """Returns W + scaling * B A, (out, in), in float32 at least: the weight after merging."""
        weight = self.base_layer.weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) + self.delta_weight()

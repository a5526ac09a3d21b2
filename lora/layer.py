"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen linear layer plus a trained product of two thin matrices.

Shapes: x (..., in), lora_A (r, in), lora_B (out, r), weight (out, in).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lora.fused import FusedLoRA


class LoRALinear(nn.Module):
    """y = W x + b + scaling * B A dropout(x), with scaling = lora_alpha / r, or lora_alpha / sqrt(r) for
    rsLoRA (arXiv 2312.03732).

    A is Kaiming-uniform and drawn from `seed` alone, B is zero: a fresh adapter changes nothing. Both are
    float32 whatever the base's type is, since an update of learning_rate's size is lost in bfloat16's 8 bits.
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
        device, rows, columns = base_layer.weight.device, base_layer.out_features, base_layer.in_features
        # Drawn on the CPU from a generator of its own: the same numbers on every device, and the global
        # generator stays where it was.
        a = torch.empty(r, columns, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(rows, r, dtype=torch.float32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out) in the base layer's output type."""
        if not self.enabled:
            return self.base_layer(x)
        dtype = self.fused_type(x)
        if dtype is not None:
            return FusedLoRA.apply(
                x.to(dtype), self.base_layer.weight.to(dtype), self.lora_A, self.lora_B, self.scaling
            )
        y = self.base_layer(x)
        return (y + self.adapter_product(self.adapter_input(x))).to(y.dtype)

    def fused_type(self, x: torch.Tensor) -> torch.dtype | None:
        """The one type in which lora.fused multiplies; None where gradients, types, dropout or a bias ask for
        the plain sum.
        """
        if (
            not torch.is_grad_enabled()
            or self.base_layer.bias is not None
            or (self.training and self.lora_dropout > 0)
        ):
            return None
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype if x.dtype == self.base_layer.weight.dtype == self.lora_A.dtype else None

    def adapter_input(self, x: torch.Tensor) -> torch.Tensor:
        """x as the adapter reads it: float32 (PEFT's choice) unless autocast picks the type, then dropped out
        in training.
        """
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        return F.dropout(x, self.lora_dropout, self.training)

    def adapter_product(self, x: torch.Tensor) -> torch.Tensor:
        """scaling * B A x, scaled at the narrow waist, where it costs r multiplications a token and not
        `out`.
        """
        return F.linear(F.linear(x, self.lora_A) * self.scaling, self.lora_B)

    def delta_weight(self) -> torch.Tensor:
        """(out, in) float32: scaling * B A."""
        device = (
            "cpu" if self.lora_A.is_meta else self.lora_A.device.type
        )  # an export checks an adapter's shapes on the meta device
        with torch.autocast(device, enabled=False):
            return self.scaling * (self.lora_B @ self.lora_A)

    def merged_weight(self) -> torch.Tensor:
        """(out, in) float32 weight of the one linear layer that does what base and adapter do together."""
        return self.base_layer.weight.float() + self.delta_weight()

    def extra_repr(self) -> str:
        dropout = f"lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}"
        return f"r={self.r}, lora_alpha={self.lora_alpha}, {dropout}"

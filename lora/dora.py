"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA turns the rows of the weight, a trained vector sets their
lengths.

Shapes: x (..., in), weight (out, in), lora_magnitude_vector (out,).

Deviations from the paper, all of them PEFT's, so that adapters can be exchanged:
1. Lengths are taken over the input features, one for each output (the paper's columns, in its transposed
notation).
2. With dropout in training, the base's own share W x stays whole, and only what DoRA adds to it is computed
from the dropped input.
3. A bias is neither turned nor scaled.
"""

import torch
import torch.nn.functional as F
from torch import nn

from lora.layer import LoRALinear


class DoRALinear(LoRALinear):
    """y = g * (W x + scaling * B A x) + b, with g = m / ||W + scaling * B A||, one gain for each output; m
    starts as ||W||, so that g = 1.
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
        super().__init__(base_layer, r, lora_alpha, lora_dropout, use_rslora, seed)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out) in the base layer's output type."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        h, gain = self.adapter_input(x), self.lora_magnitude_vector / self.row_norms()  # (..., in), (out,)
        if self.training and self.lora_dropout > 0:
            frozen = F.linear(h, self.base_layer.weight.to(h.dtype))  # (..., out)
        else:
            frozen = y if self.base_layer.bias is None else y - self.base_layer.bias
        return (y + (gain - 1) * frozen + gain * self.adapter_product(h)).to(y.dtype)

    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        """(out,) ||W + scaling * B A||, float32 and without gradient.

        Section 4.3 of the paper: "we suggest treating ||V + dV||_c in Eq. (5) as a constant, thereby
        detaching it from the gradient graph. This means that while ||V + dV||_c dynamically reflects the
        updates of dV, it won't receive any gradient during backpropagation".
        """
        return torch.linalg.vector_norm(super().merged_weight(), dim=1)

    def merged_weight(self) -> torch.Tensor:
        """(out, in) float32: g * (W + scaling * B A), row by row."""
        return (self.lora_magnitude_vector / self.row_norms())[:, None] * super().merged_weight()

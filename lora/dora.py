"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA trains the directions of W's rows, a vector their norms.

Shapes: x (..., in), W (out, in), lora_magnitude_vector (out,).

Three details follow PEFT instead of the paper, so that adapters can be exchanged with PEFT:
1. The norms are those of the rows of W, one for each output. The paper writes them as norms of columns.
2. With dropout, W x uses the whole input x; only the change that DoRA adds to it uses dropout(x).
3. The bias is neither scaled nor trained.
"""

from typing import Any

import torch
from torch import nn

from lora.layer import LoRALinear


class DoRALinear(LoRALinear):
    """Computes y = g * (W x + scaling * B A x) + b, with g = m / ||W + scaling * B A|| (out,).

    ||.|| is the norm of each row. m is the trainable lora_magnitude_vector; it starts as ||W||, so g starts
    as 1.
    """

    def __init__(self, base_layer: nn.Linear, *args: Any, **kwargs: Any):
        """Takes the arguments of LoRALinear."""
        super().__init__(base_layer, *args, **kwargs)
        self.lora_magnitude_vector = nn.Parameter(self.row_norms())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x (..., in) to y (..., out), in the dtype of the base layer's output."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        h, gain = self.adapter_input(x), self.lora_magnitude_vector / self.row_norms()  # (..., in), (out,)
        if self.training and self.lora_dropout > 0:
            frozen = self.frozen_product(h)  # (..., out)
        else:
            frozen = y if self.base_layer.bias is None else y - self.base_layer.bias
        return (y + (gain - 1) * frozen + gain * self.adapter_product(h)).to(y.dtype)

    @torch.no_grad()
    def row_norms(self) -> torch.Tensor:
        """Returns the norm of each row of W + scaling * B A, (out,), in float32 at least, without gradient.

        Section 4.3 of the paper, where V + dV is W + scaling * B A: "we suggest treating ||V + dV||_c in Eq.
        (5) as a constant, thereby detaching it from the gradient graph. This means that while ||V + dV||_c
        dynamically reflects the updates of dV, it won't receive any gradient during backpropagation".
        """
        return torch.linalg.vector_norm(super().merged_weight(), dim=1)

    def merged_weight(self) -> torch.Tensor:
        """Returns g * (W + scaling * B A), (out, in), in float32 at least."""
        return (self.lora_magnitude_vector / self.row_norms())[:, None] * super().merged_weight()

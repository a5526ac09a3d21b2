"""LoRALinear's forward and backward pass for training, with fewer temporary tensors.

Shapes: x (..., in) with n tokens, weight W (out, in), lora_A (r, in), lora_B (out, r).
"""

import torch

from common.device import without_autocast


class FusedLoRA(torch.autograd.Function):
    """Computes y = W x + scaling * B A x, and dL/dx = W^T g + scaling * A^T B^T g with loss L and g = dL/dy.

    In both formulas, the second product is added to the first in place. A and B are cast to x's dtype once,
    where autocast would cast them for each of four matrix products. x and W have one dtype. A, B and their
    gradients may have a wider one. A quantized W is made dense for each product that it takes part in.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling):
        rows, a, b = x.reshape(-1, x.shape[-1]), lora_A.to(x.dtype), lora_B.to(x.dtype)  # rows (n, in)
        with without_autocast(x.device.type):
            ax = (rows @ a.t()).mul_(scaling)  # (n, r)
            y = (rows @ weight.to(x.dtype).t()).addmm_(ax, b.t())  # (n, out)
        ctx.quantized = None if isinstance(weight, torch.Tensor) else weight
        ctx.save_for_backward(x, None if ctx.quantized else weight, a, b, ax)
        ctx.scaling, ctx.wide = scaling, lora_A.dtype
        return y.view(*x.shape[:-1], -1)  # (..., out)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, ax = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])  # (n, in), (n, out)
        d_ax = (g @ b).mul_(ctx.scaling)  # (n, r)
        dx = None
        if ctx.needs_input_grad[0]:
            dense = ctx.quantized.to(g.dtype) if ctx.quantized else weight
            dx = (g @ dense).addmm_(d_ax, a).view_as(x)
        return dx, None, (d_ax.t() @ rows).to(ctx.wide), (g.t() @ ax).to(ctx.wide), None

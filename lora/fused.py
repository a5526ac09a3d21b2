"""LoRALinear's sum for training, in fewer passes over memory.

Shapes: x (..., in), weight (out, in), lora_A (r, in), lora_B (out, r).
"""

import torch


class FusedLoRA(torch.autograd.Function):
    """y = W x + scaling * B A x, with dL/dx = W^T g + scaling * A^T B^T g for g = dL/dy: in both sums the
    second product is added in place.

    lora.layer's plain sum writes the two products, adds them into a third tensor and, under autocast, casts A
    and B once for each of four uses; here it is once. x and W are of one type, A and B may be finer, and so
    are their gradients.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling):
        rows, a, b = x.reshape(-1, x.shape[-1]), lora_A.to(x.dtype), lora_B.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            waist = (rows @ a.t()).mul_(scaling)  # (n, r)
            y = (rows @ weight.t()).addmm_(waist, b.t())
        ctx.save_for_backward(x, weight, a, b, waist)
        ctx.scaling, ctx.fine = scaling, lora_A.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, waist = ctx.saved_tensors
        rows, g = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        d_waist = (g @ b).mul_(ctx.scaling)
        dx = (g @ weight).addmm_(d_waist, a).view_as(x) if ctx.needs_input_grad[0] else None
        return dx, None, (d_waist.t() @ rows).to(ctx.fine), (g.t() @ waist).to(ctx.fine), None

"""Cross-entropy of the language-model head at the supervised positions.  S supervised positions, D hidden size, V vocabulary.

Gemma's vocabulary has 262,144 words: the logits of one 2,048-token sample are 2 GB in float32, more than the rest of the 270M model
together.  So the head runs at supervised positions only, a chunk at a time, and no chunk's logits outlive it.
"""

import torch
import torch.nn.functional as F

CHUNK_BYTES = 64 * 2**20  # float32 logits of one chunk: large enough for full-speed matmuls, small beside the model


def slow_linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """sum over s of -log softmax(hidden_s W^T)[target_s]; hidden (S, D), weight (V, D), targets (S,) -> a scalar, in nats.  All logits at once."""
    logits = F.linear(hidden, weight)  # (S, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # the sum of V exponentials loses digits in bfloat16
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


class _ChunkedLoss(torch.autograd.Function):
    """The same sum, chunk by chunk, with the gradients worked out in the forward pass while the chunk's logits are at hand:
    dL/dlogits = softmax(logits) - onehot(target), dL/dhidden = dL/dlogits W, dL/dW = dL/dlogits^T hidden (W's only if W trains)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, chunk):
        wants_h, wants_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        w = weight.to(hidden.dtype)
        losses = torch.empty(len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        dh = torch.empty_like(hidden) if wants_h else None
        dw = torch.zeros_like(weight) if wants_w else None
        for s in range(0, len(targets), chunk):
            h, t = hidden[s : s + chunk], targets[s : s + chunk, None]
            logits = F.linear(h, w).to(losses.dtype)  # (chunk, V)
            capped = softcap * torch.tanh(logits / softcap) if softcap is not None else logits
            log_z = capped.logsumexp(-1, keepdim=True)
            losses[s : s + chunk] = (log_z - capped.gather(1, t))[:, 0]
            if not (wants_h or wants_w):
                continue
            d = capped.sub(log_z).exp_()
            d.scatter_add_(1, t, torch.full_like(log_z, -1.0))
            if softcap is not None:
                d *= 1 - (capped / softcap) ** 2
            d = d.to(hidden.dtype)
            if wants_h:
                torch.mm(d, w, out=dh[s : s + chunk])
            if wants_w:
                dw += d.t() @ h
        ctx.save_for_backward(dh, dw)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        dh, dw = ctx.saved_tensors
        return (None if dh is None else dh * grad_sum.to(dh.dtype)), (None if dw is None else dw * grad_sum.to(dw.dtype)), None, None, None


def linear_cross_entropy(hidden, weight, targets, softcap: float | None = None, chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of slow_linear_cross_entropy without ever holding all logits, and the (S,) losses it is over (no gradient flows through those)."""
    chunk = chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    device = hidden.device.type
    if not torch.is_grad_enabled():  # an autograd function's forward is not told, and would work out gradients that nobody asks for
        hidden, weight = hidden.detach(), weight.detach()
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # the types inside are chosen line by line
        total, losses = _ChunkedLoss.apply(hidden, weight, targets, softcap, chunk)
    return total, losses.detach()

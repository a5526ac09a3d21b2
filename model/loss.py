"""Cross-entropy of the language-model head at the supervised positions.  S supervised positions, D hidden size, V vocabulary.

Gemma's vocabulary has 262,144 words: the logits of one 2,048-token sample are 2 GB in float32, more than the rest of the 270M model
together.  So the head runs at supervised positions only, some words at a time, and no logits outlive their chunk of words.
"""

from functools import cache

import torch
import torch.nn.functional as F

CHUNK_BYTES = {
    "cpu": 16 * 2**20,
    "cuda": 256 * 2**20,
}  # float32 logits of one chunk: on a CPU they stay in its cache, a GPU wants few launches


def reference_linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None
) -> torch.Tensor:
    """sum over s of -log softmax(hidden_s W^T)[target_s]; hidden (S, D), weight (V, D), targets (S,) -> a scalar, in nats.  All logits at once."""
    logits = F.linear(hidden, weight)  # (S, V)
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # the sum of V exponentials loses digits in bfloat16
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="sum")


class _ChunkedLoss(torch.autograd.Function):
    """The same sum, some words of the vocabulary at a time, with dL/dhidden worked out on the way.

    dL/dhidden = softmax(logits) W - W[target] is attention over the words, with W for keys and values, and is summed up as attention is where it
    is fused (Milakov and Gimelshein 2018, arXiv 1805.02867): exponentials are taken below the largest logit so far, and where a larger one turns up,
    what is summed already shrinks.  dL/dW = dL/dlogits^T hidden wants the whole sum first, so if W trains the words pass a second time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, compiled, chunk):
        wants_h, wants_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wide, t = torch.promote_types(hidden.dtype, torch.float32), targets[:, None]
        top = torch.full(
            (len(t), 1), -torch.inf, dtype=wide, device=hidden.device
        )  # the largest logit so far
        total, at_target = (
            torch.zeros_like(top),
            torch.zeros_like(top),
        )  # sum of exp(logit - top); the target's logit
        dh = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if wants_h else None
        fold = _compiled_fold() if compiled else _fold
        for words, w, here in _chunks(weight, hidden.dtype, t, chunk):
            higher, sums, found, p = fold(F.linear(hidden, w), words, top, softcap, wide, wants_h)
            at_target, shrink = torch.where(here, found, at_target), (top - higher).exp_()
            total.mul_(shrink).add_(sums)
            if wants_h:
                dh.mul_(shrink).add_(p @ w)
            top = higher
        log_z = top + total.log()
        slope = torch.ones_like(at_target) if softcap is None else 1 - (at_target / softcap) ** 2
        if wants_h:
            dh = dh.div_(total).sub_(slope * weight[targets]).to(hidden.dtype)
        dw = _weight_gradient(hidden, weight, t, log_z, slope, softcap, chunk) if wants_w else None
        ctx.save_for_backward(dh, dw)
        losses = (log_z - at_target)[:, 0]
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum, _):
        dh, dw = ctx.saved_tensors
        return (
            (None if dh is None else dh * grad_sum.to(dh.dtype)),
            (None if dw is None else dw * grad_sum.to(dw.dtype)),
            None,
            None,
            None,
            None,
        )


def _chunks(weight, dtype, targets, chunk: int):
    """For each chunk of words: the targets' places in it (S, 1), its rows of W (words, D), and which targets are in it (S, 1)."""
    for s in range(0, len(weight), chunk):
        w = weight[s : s + chunk].to(dtype)
        yield (targets - s).clamp(0, len(w) - 1), w, (targets >= s) & (targets < s + len(w))


def _fold(z, targets, top, softcap, wide, wants_p: bool):
    """What a chunk's products z (S, words) bring: the largest logit now, the sum of p = exp(logit - largest), the logits at `targets`, each (S, 1), and
    p times the slope, in z's type, where it is wanted."""
    narrow = z.dtype
    logits, slope = _capped(z.to(wide), softcap)
    del z  # nobody else holds it: one chunk less at the worst moment
    found = logits.gather(1, targets)
    higher = torch.maximum(top, logits.amax(-1, keepdim=True))
    p = logits.sub_(higher).exp_()
    sums = p.sum(-1, keepdim=True)
    return higher, sums, found, (p if slope is None else p.mul_(slope)).to(narrow) if wants_p else None


@cache
def _compiled_fold():
    """_fold in two passes over the logits in the place of six, for chunks of every size."""
    return torch.compile(_fold, dynamic=True)


def _capped(logits, softcap):
    """The logits, soft-capped where there is a cap c, and then their slope d(c tanh(z / c)) / dz = 1 - tanh^2, else None."""
    if softcap is None:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    return tanh * softcap, 1 - tanh**2


def _weight_gradient(hidden, weight, targets, log_z, slope_at_target, softcap, chunk: int) -> torch.Tensor:
    """dL/dW (V, D) of finished sums log_z (S, 1)."""
    dw, s = torch.empty_like(weight), 0
    for words, w, here in _chunks(weight, hidden.dtype, targets, chunk):
        logits, slope = _capped(F.linear(hidden, w).to(log_z.dtype), softcap)
        d = logits.sub_(log_z).exp_()
        d = d if slope is None else d.mul_(slope)
        d.scatter_add_(1, words, -slope_at_target * here)
        dw[s : s + len(w)] = d.to(hidden.dtype).t() @ hidden
        s += len(w)
    return dw


def vocab_chunk_size(rows: int, device: str) -> int:
    """How many words of the vocabulary a chunk takes for so many supervised positions."""
    return max(128, CHUNK_BYTES[device if device == "cuda" else "cpu"] // (4 * max(1, rows)))


def linear_cross_entropy(
    hidden, weight, targets, softcap: float | None = None, chunk: int | None = None, compiled: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of reference_linear_cross_entropy without ever holding all logits, and the (S,) losses it is over (no gradient flows through those).

    `chunk` words at a time; by default as many as CHUNK_BYTES of float32 logits are.  `compiled`: torch.compile what is between the products.
    """
    device = hidden.device.type
    chunk = chunk or vocab_chunk_size(len(targets), device)
    if (
        not torch.is_grad_enabled()
    ):  # an autograd function's forward is not told, and would work out gradients that nobody asks for
        hidden, weight = hidden.detach(), weight.detach()
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # the types inside are chosen line by line
        total, losses = _ChunkedLoss.apply(hidden, weight, targets, softcap, compiled, chunk)
    return total, losses.detach()

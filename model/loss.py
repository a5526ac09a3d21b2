"""Log-probabilities of the target tokens, computed without holding all logits in memory.

Shapes: S supervised positions (positions that have a target), D hidden size, V vocabulary entries.

Gemma's vocabulary has 262,144 entries. The float32 logits of 2,048 tokens take 2 GiB, twice as much as all
float32 weights of the 270M model. So logits are computed only at supervised positions, and only for one chunk
of vocabulary entries at a time.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.device import autocast_dtype, without_autocast
from model.quantized import QuantizedWeight

# Bytes of a chunk's float32 logits. On a CPU they stay in its cache; a GPU wants few launches.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}

MOST_DENSE_BYTES = 256 * 2**20  # of a quantized head, dequantized at a time


def reference_token_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """Returns the log-probabilities (S,) log softmax(hidden[s] W^T)[targets[s]] in nats, for each position s.

    Args:
        hidden: (S, D) hidden states.
        weight: (V, D) the language-model head W.
        targets: (S,) the token id that each position predicts.
        softcap: c, which replaces each logit z by c * tanh(z / c); None leaves the logits as they are.
    """
    logits = F.linear(hidden, weight)  # (S, V)
    # The sum of V exponentials loses digits in bfloat16.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def token_log_probs(
    hidden: Tensor,
    weight: Tensor | QuantizedWeight,
    targets: Tensor,
    softcap: float | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the targets' log-probabilities (S,) in nats, and whether each target has the largest logit.

    The log-probabilities equal those of reference_token_log_probs, but are computed in chunks of the
    vocabulary. The first four arguments are also those of reference_token_log_probs.

    Args:
        chunk: vocabulary entries in a chunk; by default as many as CHUNK_BYTES of float32 logits.
        compiled: whether to apply torch.compile to the elementwise operations between the matrix products.
    """
    device = hidden.device.type
    chunk = chunk or vocab_chunk_size(len(targets), device)
    if isinstance(weight, QuantizedWeight):
        chunk = min(chunk, max(128, MOST_DENSE_BYTES // (4 * weight.shape[1])))
    if not torch.is_grad_enabled():
        # The forward pass of an autograd function cannot see no_grad, and would compute gradients for
        # nothing.
        hidden, weight = hidden.detach(), weight.detach()
    hidden = hidden.to(autocast_dtype(device) or hidden.dtype)
    with without_autocast(device):  # each line below chooses its dtype
        return _ChunkedLogProbs.apply(hidden, weight, targets, softcap, compiled, chunk)


def vocab_chunk_size(positions: int, device: str) -> int:
    """Returns the vocabulary entries per chunk: CHUNK_BYTES of logits for all positions, but at least 128."""
    kind = "cuda" if device in ("cuda", "meta") else "cpu"  # "meta": training/memory_estimate.py
    return max(128, CHUNK_BYTES[kind] // (4 * max(1, positions)))


class _ChunkedLogProbs(torch.autograd.Function):
    """Computes log p_s = z_s[t_s] - log sum_v exp(z_s[v]), and its gradient already in the forward pass.

    z_s = W h_s (V,) are the logits of the hidden state h_s (D,), and t_s is the target. The gradient of -log
    p_s is dh_s = softmax(z_s) W - W[t_s], which is a sum over v too. Both sums use an online softmax (Milakov
    and Gimelshein 2018, arXiv 1805.02867): each term is exp(z - largest logit so far), and a chunk with a
    larger logit first rescales the sums. The backward pass multiplies dh_s by dL/d(-log p_s), with L the
    loss. For a trainable W it computes the chunks again, because dL/dW needs the finished sums.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, compiled, chunk):
        wants_h, wants_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        wide, t = torch.promote_types(hidden.dtype, torch.float32), targets[:, None]
        # The largest logit so far.
        top = torch.full((len(t), 1), -torch.inf, dtype=wide, device=hidden.device)
        # Sum of exp(z - top); z at the target.
        total, at_target = torch.zeros_like(top), torch.zeros_like(top)
        dh = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if wants_h else None
        fold = _compiled_fold() if compiled else _fold
        for entries, w, here in _chunks(weight, hidden.dtype, t, chunk):
            higher, sums, found, p = fold(F.linear(hidden, w), entries, top, softcap, wide, wants_h)
            at_target, shrink = torch.where(here, found, at_target), (top - higher).exp_()
            total.mul_(shrink).add_(sums)
            if wants_h:
                dh.mul_(shrink).add_(p @ w)
            top = higher
        log_z = top + total.log()
        slope = torch.ones_like(at_target) if softcap is None else 1 - (at_target / softcap) ** 2
        if wants_h:
            dh = dh.div_(total).sub_(slope * weight[targets]).to(hidden.dtype)
        saved = (hidden, weight, targets, log_z, slope) if wants_w else (None,) * 5
        ctx.save_for_backward(dh, *saved)
        ctx.softcap, ctx.chunk = softcap, chunk
        correct = (at_target == top)[:, 0]
        ctx.mark_non_differentiable(correct)
        return (at_target - log_z)[:, 0], correct

    @staticmethod
    def backward(ctx, grad, _):
        dh, _, weight, *_ = ctx.saved_tensors
        grad = -grad[:, None]  # (S, 1) of -log p
        dw = None if weight is None else _weight_gradient(ctx, grad)
        return None if dh is None else dh * grad.to(dh.dtype), dw, None, None, None, None


def _chunks(
    weight: Tensor | QuantizedWeight, dtype: torch.dtype, targets: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields (entries, w, here) for each chunk of the vocabulary.

    w (chunk, D) are the chunk's rows of W. `here` (S, 1) is True where the target is in the chunk, and
    `entries` (S, 1) is then its row number in w.
    """
    for s in range(0, len(weight), chunk):
        w = weight[s : s + chunk].to(dtype)
        yield (targets - s).clamp(0, len(w) - 1), w, (targets >= s) & (targets < s + len(w))


def _fold(
    z: Tensor, targets: Tensor, top: Tensor, softcap: float | None, wide: torch.dtype, wants_p: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Processes one chunk of logits z (S, chunk); `top` (S, 1) is the largest logit of the earlier chunks.

    Returns the largest logit so far, the sum of p = exp(logit - largest) over this chunk, and the logits at
    `targets`, each (S, 1). Then, if wants_p, p (S, chunk) times the softcap's derivative, in z's dtype.
    """
    narrow = z.dtype
    logits, slope = _capped(z.to(wide), softcap)
    del z  # the last reference: one chunk less at the peak
    found = logits.gather(1, targets)
    higher = torch.maximum(top, logits.amax(-1, keepdim=True))
    p = logits.sub_(higher).exp_()
    sums = p.sum(-1, keepdim=True)
    return higher, sums, found, (p if slope is None else p.mul_(slope)).to(narrow) if wants_p else None


@cache
def _compiled_fold() -> Callable:
    """Returns the compiled _fold for chunks of any size; it passes over the logits twice, not six times."""
    return torch.compile(_fold, dynamic=True)


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Returns c * tanh(logits / c) and its derivative 1 - tanh(logits / c)^2; (logits, None) if c is None."""
    if softcap is None:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    return tanh * softcap, 1 - tanh**2


def _weight_gradient(ctx: Any, grad: Tensor) -> Tensor:
    """Returns dL/dW (V, D) = sum over s of grad_s (softmax(z_s) - onehot(t_s)) h_s^T.

    grad (S, 1) is dL/d(-log p_s). `ctx` holds what the forward pass of _ChunkedLogProbs saved.
    """
    _, hidden, weight, targets, log_z, slope_at_target = ctx.saved_tensors
    dw, s = torch.empty_like(weight), 0
    for entries, w, here in _chunks(weight, hidden.dtype, targets[:, None], ctx.chunk):
        logits, slope = _capped(F.linear(hidden, w).to(log_z.dtype), ctx.softcap)
        d = logits.sub_(log_z).exp_()
        d = d if slope is None else d.mul_(slope)
        d.scatter_add_(1, entries, -slope_at_target * here).mul_(grad)
        dw[s : s + len(w)] = d.to(hidden.dtype).t() @ hidden
        s += len(w)
    return dw

"""Log-probabilities of the target tokens, without ever holding all logits.

S supervised positions, D hidden size, V vocabulary entries.

Gemma's vocabulary has 262,144 entries. The float32 logits of one sample of 2,048 tokens take 2 GiB, more than
all other weights of the 270M model. So the head runs at supervised positions only, over a chunk of vocabulary
entries at a time.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of a chunk's float32 logits. On a CPU they stay in its cache; a GPU wants few launches.
CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}


def reference_token_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """Returns log softmax(hidden_s W^T)[target_s] for each position s, in nats, from all logits at once.

    Args:
        hidden: (S, D) hidden states.
        weight: (V, D) the language-model head W.
        targets: (S,) the token id that each position predicts.
        softcap: c of logits c * tanh(z / c), None for none.
    """
    logits = F.linear(hidden, weight)  # (S, V)
    # The sum of V exponentials loses digits in bfloat16.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns reference_token_log_probs in chunks of the vocabulary, and whether each target has the largest
    logit.

    The (S,) log-probabilities carry gradient, each position its own: sft sums them, dpo and grpo weigh them.

    Args:
        chunk: vocabulary entries at a time; by default as many as CHUNK_BYTES of float32 logits.
        compiled: torch.compile the elementwise part between the matrix products.
    """
    device = hidden.device.type
    chunk = chunk or vocab_chunk_size(len(targets), device)
    if not torch.is_grad_enabled():
        # The forward pass of an autograd function cannot see no_grad, and would compute gradients for
        # nothing.
        hidden, weight = hidden.detach(), weight.detach()
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):  # each line below chooses its dtype
        return _ChunkedLogProbs.apply(hidden, weight, targets, softcap, compiled, chunk)


def vocab_chunk_size(positions: int, device: str) -> int:
    """Returns the vocabulary entries of one chunk for so many supervised positions."""
    return max(128, CHUNK_BYTES[device if device == "cuda" else "cpu"] // (4 * max(1, positions)))


class _ChunkedLogProbs(torch.autograd.Function):
    """log p_s = z_s[t_s] - log sum_v exp(z_sv), with d(-log p_s)/dh_s computed in the forward pass.

    d(-log p)/dh = softmax(z) W - W[t] is attention with W as keys and values, and is summed as fused
    attention is (Milakov and Gimelshein 2018, arXiv 1805.02867): exponentials are taken below the largest
    logit so far, and the sums shrink when a chunk brings a larger one. The backward pass scales row s by the
    gradient of log p_s. dL/dW needs that gradient and the finished sums, so for a trainable W the backward
    pass computes the chunks again.
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
        dh, hidden, weight, targets, log_z, slope = ctx.saved_tensors
        grad = -grad[:, None]  # (S, 1) of -log p
        dw = None
        if weight is not None:
            dw = _weight_gradient(
                hidden, weight, targets[:, None], log_z, slope, grad, ctx.softcap, ctx.chunk
            )
        return None if dh is None else dh * grad.to(dh.dtype), dw, None, None, None, None


def _chunks(
    weight: Tensor, dtype: torch.dtype, targets: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields for each chunk: the targets' indices in it (S, 1), its rows of W (chunk, D), which targets it
    has (S, 1).
    """
    for s in range(0, len(weight), chunk):
        w = weight[s : s + chunk].to(dtype)
        yield (targets - s).clamp(0, len(w) - 1), w, (targets >= s) & (targets < s + len(w))


def _fold(
    z: Tensor, targets: Tensor, top: Tensor, softcap: float | None, wide: torch.dtype, wants_p: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Folds the logits z (S, chunk) of one chunk into the running sums.

    Returns the largest logit so far, the sum of p = exp(logit - largest), the logits at `targets`, each (S,
    1), and, if wanted, p times the softcap's slope in z's dtype.
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
    """Returns _fold in two passes over the logits instead of six, for chunks of every size."""
    return torch.compile(_fold, dynamic=True)


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Returns c tanh(z / c) and its slope 1 - tanh^2; the logits as they are and None without a cap."""
    if softcap is None:
        return logits, None
    tanh = logits.div_(softcap).tanh_()
    return tanh * softcap, 1 - tanh**2


def _weight_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    log_z: Tensor,
    slope_at_target: Tensor,
    grad: Tensor,
    softcap: float | None,
    chunk: int,
) -> Tensor:
    """Returns dL/dW (V, D) = sum over s of grad_s (softmax(z_s) - onehot(t_s)) h_s^T, from the finished log_z
    (S, 1).
    """
    dw, s = torch.empty_like(weight), 0
    for entries, w, here in _chunks(weight, hidden.dtype, targets, chunk):
        logits, slope = _capped(F.linear(hidden, w).to(log_z.dtype), softcap)
        d = logits.sub_(log_z).exp_()
        d = d if slope is None else d.mul_(slope)
        d.scatter_add_(1, entries, -slope_at_target * here).mul_(grad)
        dw[s : s + len(w)] = d.to(hidden.dtype).t() @ hidden
        s += len(w)
    return dw

"""Attention over a packed stream, in which several documents (training samples) follow one another.

A token sees itself and the earlier tokens of its own document; on a local layer, only the last W of these.
Shapes: T tokens in the stream, H query heads, K key/value heads (H is a multiple of K), D head_dim, W sliding
window in tokens. cu_seqlens (documents + 1,): document d is tokens[cu_seqlens[d] : cu_seqlens[d + 1]].

A prefix that several documents share can be in the stream once, as a document of its own before them. Here
the letters are tokens, and | separates documents:

    a b c d | a b e f g   ->   a b | c d | e f g     shared_prefix = [-1, 0, 0]

shared_prefix[d] is the index of the document that holds the prefix of document d, or -1 for none. A token
sees the prefix as it sees the start of its own document. So the results are the same as without sharing, and
the prefix is computed once (Hydragen, arXiv 2402.05099, does this in decoding).
"""

from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from model.norm import Gemma3RMSNorm
from model.rope import rotate

NO_PREFIX = -1
# Up to this many keys, masked_attention is faster than the fused kernel on a CPU (benchmarks/attention.py).
MAX_PLAIN_KEYS = 640


def document_index(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Returns the index of each token's document, (T,)."""
    starts = torch.zeros(total, dtype=torch.int64, device=cu_seqlens.device)
    starts[cu_seqlens[1:-1].long()] = 1
    return starts.cumsum(0)


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    shared_prefix: list[int] | None = None,
) -> torch.Tensor:
    """Returns softmax(q k^T * scale + mask) v, (T, H, D), for q (T, H, D), k and v (T, K, D).

    Token i sees token j if j is in i's document or its shared prefix, j is not later than i, and j is less
    than `window` tokens back. The mask (T, T) is 0 there and -inf elsewhere. With a softcap c, each score s
    becomes c * tanh(s / c).
    """
    total, heads, groups = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (T, H, D)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale  # (H, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    document, lengths = document_index(cu_seqlens, total), cu_seqlens.diff()
    prefix = torch.tensor(shared_prefix or [NO_PREFIX] * len(lengths), device=q.device)
    start = torch.where(prefix < 0, 0, lengths[prefix])  # position of each document's first token
    position = torch.arange(total, device=q.device) - cu_seqlens[document] + start[document]
    own = document[:, None] == document[None, :]  # (T, T)
    in_prefix = prefix[document][:, None] == document[None, :]  # (T, T)
    distance = position[:, None] - position[None, :]
    seen = (own | in_prefix) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = scores.masked_fill(~seen, float("-inf"))
    # The sum of a row may have thousands of small terms, for which bfloat16 has too few digits.
    weights = scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
    return torch.einsum("hij,jhd->ihd", weights, v).reshape(total, heads, -1)  # (T, H, D)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float
) -> torch.Tensor:
    """Returns softmax(q k^T * scale) v, (N, I, H, D), for N independent blocks of I queries and J keys.

    Args:
        q: (N, I, H, D); k and v: (N, J, K, D).
        hidden: (N, I, J) or (1, I, J) bool, True where a query does not see a key.
    """
    queries, groups = q.shape[1], q.shape[2] // k.shape[2]
    # (N, K, H/K * I, D): one matrix for all query heads of a key head.
    q = q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (N, K, J, D)
    scores = ((q * scale) @ k.transpose(-1, -2)).unflatten(2, (groups, queries))  # (N, K, H/K, I, J)
    # The backward pass need not know of the mask: a score with weight 0 has gradient 0.
    scores.detach().masked_fill_(hidden[:, None, None], float("-inf"))
    weights = scores.softmax(-1)
    y = (weights.flatten(2, 3) @ v).unflatten(2, (groups, queries))  # (N, K, H/K, I, D)
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3)  # (N, I, H, D)


def plain_is_faster(q: torch.Tensor, keys: int) -> bool:
    """Returns whether masked_attention beats the fused kernel, whose bfloat16 backward is slow on a CPU."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys <= MAX_PLAIN_KEYS


def document_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    scale: float,
    shared_prefix: list[int] | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Returns causal attention (T, H, D) for q, k, v as in reference_attention, one document at a time.

    Documents for which plain_is_faster is true use masked_attention. All others use PyTorch's fused kernel,
    which builds no mask and ignores `window`. `lengths` has the number of tokens of each document.
    """
    out, documents = [], list(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True))
    prefixes = shared_prefix or [NO_PREFIX] * len(lengths)
    for (qd, kd, vd), prefix in zip(documents, prefixes, strict=True):
        before = 0
        if prefix != NO_PREFIX:
            q_prefix, k_prefix, v_prefix = documents[prefix]
            before, kd, vd = lengths[prefix], torch.cat((k_prefix, kd)), torch.cat((v_prefix, vd))
        if plain_is_faster(q, len(kd)):
            hidden = torch.ones(1, len(qd), len(kd), dtype=torch.bool).triu_(1 + before)  # (1, L, before + L)
            if window is not None and len(kd) > window:
                hidden |= torch.ones_like(hidden).tril_(before - window)
            out.append(masked_attention(qd[None], kd[None], vd[None], hidden, scale)[0])
            continue
        if before:  # The fused kernel's causal mask is square, so the prefix needs its queries too.
            qd = torch.cat((q_prefix, qd))
        qd, kd, vd = (x.transpose(0, 1)[None] for x in (qd, kd, vd))  # (1, H or K, before + L, D)
        y = F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, scale=scale, enable_gqa=True)
        out.append(y[0].transpose(0, 1)[before:])  # (L, H, D)
    return torch.cat(out)


def repeat_prefixes(x: torch.Tensor, lengths: list[int], shared_prefix: list[int], most: int) -> torch.Tensor:
    """Returns the stream x (T, ...) with the last `most` tokens of its shared prefix before each document."""
    documents, parts = x.split(lengths), []
    ends = {p: documents[p][max(0, lengths[p] - most) :] for p in set(shared_prefix) - {NO_PREFIX}}
    for own, prefix in zip(documents, shared_prefix, strict=True):
        parts += [own] if prefix == NO_PREFIX else [ends[prefix], own]
    return torch.cat(parts)


def varlen_is_possible(v: torch.Tensor) -> bool:
    """Returns whether FlashAttention takes v: 16-bit, D = 8, 16, ..., or 256, on an Ampere or newer GPU.

    A tensor on the meta device stands for one on such a GPU (training/memory_estimate.py).
    """
    half = v.device.type in ("cuda", "meta") and v.dtype in (torch.bfloat16, torch.float16)
    fits = v.shape[-1] <= 256 and v.shape[-1] % 8 == 0
    return half and fits and (v.device.type == "meta" or torch.cuda.get_device_capability(v.device) >= (8, 0))


def band_mask(cu_seqlens: torch.Tensor, total: int, window: int) -> torch.Tensor:
    """Returns a mask (N, 1, W, 2W) bool for band_attention, True where a query sees a key.

    The stream is cut into N = ceil(T / W) blocks of W tokens. The W queries of a block have 2W keys: those of
    the previous block and those of their own.
    """
    blocks = -(-total // window)
    padding = blocks * window - total
    document = F.pad(document_index(cu_seqlens, total), (0, padding), value=-1).view(blocks, window)  # (N, W)
    before = F.pad(document, (0, 0, 1, 0), value=-2)[:-1]  # (N, W); the first block has no block before it
    keys = torch.cat((before, document), dim=1)  # (N, 2W)
    query_index = torch.arange(window, device=keys.device)[:, None] + window
    distance = query_index - torch.arange(2 * window, device=keys.device)[None, :]  # (W, 2W)
    return ((document[:, :, None] == keys[:, None, :]) & (distance >= 0) & (distance < window))[:, None]


def band_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """Returns sliding-window attention (T, H, D), with 2W scores per token instead of T.

    The stream is cut into blocks of W tokens. A key less than W tokens back is in the query's own block or in
    the previous one (Longformer, Beltagy et al. 2020). q, k and v are as in reference_attention, `mask` as
    returned by band_mask.
    """
    total, blocks = q.shape[0], mask.shape[0]
    padding = (0, 0, 0, 0, 0, blocks * window - total)
    q, k, v = (F.pad(x, padding).view(blocks, window, *x.shape[1:]) for x in (q, k, v))  # (N, W, H or K, D)
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], x), dim=1) for x in (k, v))  # (N, 2W, K, D)
    if plain_is_faster(q, 2 * window):
        return masked_attention(q, k, v, ~mask[:, 0], scale).flatten(0, 1)[:total]  # (T, H, D)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, H or K, W or 2W, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).flatten(0, 1)[:total]  # (T, H, D)


def _copy_to(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns x on the device without waiting for a GPU."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class PackedAttention:
    """Attention of one packed stream. All layers call the same object, which selects the implementation."""

    def __init__(
        self,
        cu_seqlens: torch.Tensor,
        total: int,
        window: int,
        scale: float,
        softcap: float | None = None,
        reference: bool = False,
        shared_prefix: list[int] | None = None,
        device: torch.device | None = None,
    ):
        """Reads cu_seqlens (documents + 1,), which should be on the CPU; `device` is that of q, k and v."""
        self.window, self.scale, self.softcap, self.shared_prefix = window, scale, softcap, shared_prefix
        self.reference = reference or softcap is not None
        self.lengths = cu_seqlens.diff().tolist()
        self.cu_seqlens = _copy_to(cu_seqlens.int(), device or cu_seqlens.device)
        prefixes = shared_prefix or [NO_PREFIX] * len(self.lengths)
        self.before = [self.lengths[p] if p != NO_PREFIX else 0 for p in prefixes]  # tokens of each prefix
        self.longest = max(map(sum, zip(self.before, self.lengths, strict=True)))

    def _key_lengths(self, sliding: bool) -> list[int]:
        """Returns each document's number of keys: its own tokens and the visible part of its prefix."""
        most = self.window - 1 if sliding else self.longest
        return [min(b, most) + n for b, n in zip(self.before, self.lengths, strict=True)]

    @cached_property
    def key_bounds(self) -> dict[bool, torch.Tensor]:
        """Returns {sliding: cu_seqlens (documents + 1,) of the keys}, which include those of the prefixes."""
        if self.shared_prefix is None:
            return {False: self.cu_seqlens, True: self.cu_seqlens}
        bounds = {sliding: [0, *accumulate(self._key_lengths(sliding))] for sliding in (False, True)}
        device = self.cu_seqlens.device
        return {s: _copy_to(torch.tensor(b, dtype=torch.int32), device) for s, b in bounds.items()}

    @cached_property
    def band(self) -> torch.Tensor:
        """Returns band_mask of the stream with repeated prefixes."""
        return band_mask(self.key_bounds[True], sum(self._key_lengths(True)), self.window)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool
    ) -> torch.Tensor:
        """Maps q (T, H, D), k and v (T, K, D) to (T, H, D)."""
        prefix, scale, window = self.shared_prefix, self.scale, self.window if sliding else None
        if self.reference:
            return reference_attention(q, k, v, self.cu_seqlens, scale, window, self.softcap, prefix)
        if varlen_is_possible(v):
            return self._varlen(q, k, v, sliding)
        # The window hides nothing in a document that is no longer than it.
        if not sliding or self.longest <= self.window:
            return document_attention(q, k, v, self.lengths, scale, prefix)
        # Up to two windows, a document's own (L, L) scores are no more than the band's.
        if self.longest <= 2 * self.window and plain_is_faster(q, self.longest):
            return document_attention(q, k, v, self.lengths, scale, prefix, window)
        if prefix is None:
            return band_attention(q, k, v, self.band, self.window, scale)
        q, k, v = (repeat_prefixes(x, self.lengths, prefix, self.window - 1) for x in (q, k, v))
        y = band_attention(q, k, v, self.band, self.window, scale)
        ends = zip(y.split(self._key_lengths(True)), self.lengths, strict=True)
        return torch.cat([document[len(document) - n :] for document, n in ends])

    def _varlen(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool) -> torch.Tensor:
        """Returns causal attention (T, H, D) of all documents in one launch of FlashAttention.

        A document with a shared prefix has more keys than queries; its queries belong to the last keys. So
        query i belongs to key n = i + keys - queries (FlashAttention's README). It sees the keys up to n, on
        a local layer only from n - window + 1.
        """
        from torch.nn.attention.varlen import varlen_attn

        back = self.window - 1 if sliding else -1  # FlashAttention's window counts the keys before n.
        if self.shared_prefix is not None:
            most = self.window - 1 if sliding else self.longest
            k, v = (repeat_prefixes(x, self.lengths, self.shared_prefix, most) for x in (k, v))
        bounds = (self.cu_seqlens, self.key_bounds[sliding], max(self.lengths), self.longest)
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = varlen_attn(q, k, v, *bounds, scale=self.scale, window_size=(back, 0), enable_gqa=True)
        assert isinstance(y, torch.Tensor)
        return y


class Gemma3Attention(nn.Module):
    """The projections, RMSNorm and RoPE of grouped-query attention (Gemma 3 report, section 2)."""

    def __init__(
        self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, eps: float, bias: bool = False
    ):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias)
        self.q_norm = Gemma3RMSNorm(head_dim, eps)
        self.k_norm = Gemma3RMSNorm(head_dim, eps)

    def project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Projects x (T, hidden) to q (T, H, D), k and v (T, K, D); q and k are RMS-normed, then rotated."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """Maps y (T, H, D) to (T, hidden)."""
        return self.o_proj(y.flatten(-2))

"""Attention over a packed stream: causal, inside each document only, and on local layers no further back than
the window.

T tokens of all documents one behind the other, H query heads, K key/value heads (H a multiple of K), D
head_dim, W window in tokens. `cu_seqlens` (documents + 1,) are the bounds: document d is tokens[cu_seqlens[d]
: cu_seqlens[d+1]].

Documents that begin alike may share an opening, which then stands once in the stream, a document of its own
before them:

    a b c d | a b e f g   ->   a b | c d | e f g     opening  -1 0 0

opening[d] is the number of the document that comes before document d's own tokens, -1 for none. A token sees
the opening as it would see its document's own beginning, so nothing changes but that the opening is worked
out once (Hydragen, arXiv 2402.05099, does it in decoding).
"""

from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import nn

from model.norm import Gemma3RMSNorm
from model.rope import rotate

SHORT = 640  # keys
NONE = -1  # in the place of an opening's number


def document_index(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """(T,) the number of the document that each token belongs to."""
    marks = torch.zeros(total, dtype=torch.int64, device=cu_seqlens.device)
    marks[cu_seqlens[1:-1].long()] = 1
    return marks.cumsum(0)


def reference_attention(
    q,
    k,
    v,
    cu_seqlens,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    shared_prefix: list[int] | None = None,
):
    """softmax(q k^T * scale + mask) v with the (T, T) mask written out; q (T, H, D), k and v (T, K, D) -> (T,
    H, D).

    Token i sees token j where both are in one document, or j is in the opening of i's, where j is not later,
    and where it is less than `window` tokens back. With a softcap c, scores pass c * tanh(s / c) first. This
    one says what attention means; it takes T^2 memory and serves the tests and softcapped models.
    """
    total, heads, groups = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (T, H, D)
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale  # (H, T, T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    document, before = (
        document_index(cu_seqlens, total),
        torch.tensor(shared_prefix or [NONE] * (len(cu_seqlens) - 1), device=q.device),
    )
    lengths = cu_seqlens.diff()
    position = (
        torch.arange(total, device=q.device)
        - cu_seqlens[document]
        + torch.where(before < 0, 0, lengths[before])[document]
    )
    own, opened = (
        document[:, None] == document[None, :],
        before[document][:, None] == document[None, :],
    )  # (T, T)
    distance = position[:, None] - position[None, :]
    seen = (own | opened) & (distance >= 0)
    if window is not None:
        seen &= distance < window
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = (
        scores.to(torch.promote_types(q.dtype, torch.float32)).softmax(-1).to(q.dtype)
    )  # float32: a row may sum thousands of small weights
    return torch.einsum("hij,jhd->ihd", weights, v).reshape(total, heads, -1)


def masked_attention(q, k, v, hidden: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(q k^T * scale) v of N independent pieces, where hidden (N or 1, I, J) says which keys a query
    does not see.

    q (N, I, H, D), k and v (N, J, K, D) -> (N, I, H, D), with N H I J scores kept for the backward pass.
    """
    queries, groups = q.shape[1], q.shape[2] // k.shape[2]
    q = (
        q.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    )  # (N, K, H/K * I, D): one matrix for all heads that share a key head
    k, v = k.transpose(1, 2), v.transpose(1, 2)  # (N, K, J, D)
    scores = ((q * scale) @ k.transpose(-1, -2)).unflatten(2, (groups, queries))  # (N, K, H/K, I, J)
    scores.detach().masked_fill_(
        hidden[:, None, None], float("-inf")
    )  # unseen by the backward pass: where a weight is 0 its score's gradient is 0
    weights = scores.softmax(-1)
    y = (weights.flatten(2, 3) @ v).unflatten(2, (groups, queries))  # (N, K, H/K, I, D)
    return y.permute(0, 3, 1, 2, 4).flatten(2, 3)


def plain_is_faster(q: torch.Tensor, keys: int) -> bool:
    """Whether masked_attention beats PyTorch's fused kernel: in bfloat16 on a CPU, whose fused backward is
    slow, up to SHORT keys (benchmarks/attention.py measures it)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys <= SHORT


def document_attention(
    q,
    k,
    v,
    lengths: list[int],
    scale: float,
    shared_prefix: list[int] | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention, one document after the other; a long one through PyTorch's fused kernel, which builds
    no mask. Shapes as in reference_attention.

    A `window` is for documents that plain_is_faster takes: the fused kernel has none.
    """
    out, documents = [], list(zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True))
    for (qd, kd, vd), o in zip(documents, shared_prefix or [NONE] * len(lengths), strict=True):
        before = 0
        if o != NONE:
            before, kd, vd = lengths[o], torch.cat((documents[o][1], kd)), torch.cat((documents[o][2], vd))
        if plain_is_faster(q, len(kd)):
            unseen = torch.ones(1, len(qd), len(kd), dtype=torch.bool).triu_(
                1 + before
            )  # (1, L, before + L): what comes later
            if window is not None and len(kd) > window:
                unseen |= torch.ones_like(unseen).tril_(before - window)
            out.append(masked_attention(qd[None], kd[None], vd[None], unseen, scale)[0])
            continue
        if before:
            qd = torch.cat(
                (documents[o][0], qd)
            )  # asked again, for the fused kernel's causal mask is a square
        qd, kd, vd = (x.transpose(0, 1)[None] for x in (qd, kd, vd))  # (1, H or K, before + L, D)
        y = F.scaled_dot_product_attention(qd, kd, vd, is_causal=True, scale=scale, enable_gqa=True)
        out.append(y[0].transpose(0, 1)[before:])  # (L, H, D)
    return torch.cat(out)


def write_out(x: torch.Tensor, lengths: list[int], shared_prefix: list[int], most: int) -> torch.Tensor:
    """The stream with the last `most` tokens of its opening before every document that has one: x (T, ...) ->
    (T', ...).
    """
    documents = x.split(lengths)
    ends = {o: documents[o][max(0, lengths[o] - most) :] for o in set(shared_prefix) - {NONE}}
    return torch.cat(
        [
            part
            for own, o in zip(documents, shared_prefix, strict=True)
            for part in ([ends[o], own] if o != NONE else [own])
        ]
    )


def varlen_is_possible(v: torch.Tensor) -> bool:
    """Whether PyTorch's FlashAttention takes numbers like v's: half precision, heads of 8, 16, ... 256, on a
    GPU of the Ampere generation or later.
    """
    return (
        v.device.type == "cuda"
        and v.dtype in (torch.bfloat16, torch.float16)
        and v.shape[-1] <= 256
        and v.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(v.device) >= (8, 0)
    )


def varlen_attention(
    q,
    k,
    v,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    most_keys: int,
    scale: float,
    window: int | None = None,
):
    """Causal attention of a whole stream in one launch; q (T, H, D), k and v (T', K, D) -> (T, H, D).

    starts and key_starts (documents + 1,) int32 bound each document's queries and its keys. Where it has more
    keys, its queries are the last tokens: query i sees the keys from n - window + 1 to n, where n = i + keys
    - queries (FlashAttention's README; its window counts what lies before n).
    """
    from torch.nn.attention.varlen import varlen_attn

    back = -1 if window is None else window - 1
    return varlen_attn(
        q.to(v.dtype),
        k.to(v.dtype),
        v,
        starts,
        key_starts,
        longest,
        most_keys,
        scale=scale,
        window_size=(back, 0),
        enable_gqa=True,
    )


def band_mask(cu_seqlens: torch.Tensor, total: int, window: int) -> torch.Tensor:
    """(N, 1, W, 2W) who sees whom when the stream is cut into N = ceil(T / W) blocks of queries, each beside
    the keys of its own block and the one before.
    """
    blocks = -(-total // window)
    document = F.pad(document_index(cu_seqlens, total), (0, blocks * window - total), value=-1).view(
        blocks, window
    )
    before = F.pad(document, (0, 0, 1, 0), value=-2)[:-1]  # (N, W); the first block has nothing before it
    keys = torch.cat((before, document), dim=1)  # (N, 2W)
    distance = (
        torch.arange(window, device=keys.device)[:, None]
        + window
        - torch.arange(2 * window, device=keys.device)[None, :]
    )  # (W, 2W)
    return ((document[:, :, None] == keys[:, None, :]) & (distance >= 0) & (distance < window))[:, None]


def band_attention(q, k, v, mask: torch.Tensor, window: int, scale: float) -> torch.Tensor:
    """Sliding-window attention of a whole stream in one call, with memory 2 W per token; `mask` is
    band_mask's. Shapes as in reference_attention.

    A query at distance < W from a key finds it in its own block of W tokens or in the one before (Beltagy et
    al. 2020, Longformer).
    """
    total, blocks = q.shape[0], mask.shape[0]
    q, k, v = (
        F.pad(x, (0, 0, 0, 0, 0, blocks * window - total)).view(blocks, window, *x.shape[1:])
        for x in (q, k, v)
    )  # (N, W, H or K, D)
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1], x), dim=1) for x in (k, v))  # (N, 2W, K, D)
    if plain_is_faster(q, 2 * window):
        return masked_attention(q, k, v, ~mask[:, 0], scale).flatten(0, 1)[:total]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, H or K, W or 2W, D)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).flatten(0, 1)[:total]  # (T, H, D)


def _there(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on the device; a GPU is not waited for."""
    return (
        x.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda" and x.device.type == "cpu"
        else x.to(device)
    )


class PackedAttention:
    """How the layers of one forward pass attend: chosen once for a stream, called by every layer as
    attend(layer, q, k, v, sliding).
    """

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
        """cu_seqlens is best on the CPU, for its numbers are read here, and a GPU would be waited for;
        `device` is where q, k and v will be.
        """
        self.window, self.scale, self.softcap, self.shared_prefix = window, scale, softcap, shared_prefix
        self.reference = reference or softcap is not None
        self.lengths = cu_seqlens.diff().tolist()
        self.cu_seqlens = _there(cu_seqlens.int(), device or cu_seqlens.device)
        self.before = [
            self.lengths[o] if o != NONE else 0 for o in shared_prefix or [NONE] * len(self.lengths)
        ]
        self.longest = max(map(sum, zip(self.before, self.lengths, strict=True)))
        # Of an opening, only what the window still reaches stands before each document's own tokens.
        self.parts = [
            n
            for pair in zip((min(b, window - 1) for b in self.before), self.lengths, strict=True)
            for n in pair
        ]

    @cached_property
    def key_starts(self) -> dict[bool, torch.Tensor]:
        """{sliding: (documents + 1,)} the bounds of the documents with their openings written out, whole or
        as far as the window reaches.
        """
        if self.shared_prefix is None:
            return {False: self.cu_seqlens, True: self.cu_seqlens}
        reach = {False: self.longest, True: self.window - 1}
        keys = {
            sliding: [min(b, most) + n for b, n in zip(self.before, self.lengths, strict=True)]
            for sliding, most in reach.items()
        }
        return {
            sliding: _there(torch.tensor([0, *accumulate(n)], dtype=torch.int32), self.cu_seqlens.device)
            for sliding, n in keys.items()
        }

    @cached_property
    def band(self) -> torch.Tensor:
        """band_mask of the stream with its openings written out."""
        return band_mask(self.key_starts[True], sum(self.parts), self.window)

    def __call__(self, layer: int, q, k, v, sliding: bool) -> torch.Tensor:
        if self.reference:
            return reference_attention(
                q,
                k,
                v,
                self.cu_seqlens,
                self.scale,
                self.window if sliding else None,
                self.softcap,
                self.shared_prefix,
            )
        if varlen_is_possible(v):
            if self.shared_prefix is not None:
                k, v = (
                    write_out(
                        x, self.lengths, self.shared_prefix, self.window - 1 if sliding else self.longest
                    )
                    for x in (k, v)
                )
            return varlen_attention(
                q,
                k,
                v,
                self.cu_seqlens,
                self.key_starts[sliding],
                max(self.lengths),
                self.longest,
                self.scale,
                self.window if sliding else None,
            )
        if (
            not sliding or self.longest <= self.window
        ):  # a document no longer than the window never feels it: the causal kernel alone is right
            return document_attention(q, k, v, self.lengths, self.scale, self.shared_prefix)
        if self.longest <= 2 * self.window and plain_is_faster(
            q, self.longest
        ):  # squares, then, are no more than the band
            return document_attention(q, k, v, self.lengths, self.scale, self.shared_prefix, self.window)
        if self.shared_prefix is None:
            return band_attention(q, k, v, self.band, self.window, self.scale)
        q, k, v = (write_out(x, self.lengths, self.shared_prefix, self.window - 1) for x in (q, k, v))
        return torch.cat(band_attention(q, k, v, self.band, self.window, self.scale).split(self.parts)[1::2])


class Gemma3Attention(nn.Module):
    """Grouped-query attention with RMS-normed queries and keys; the norm comes before RoPE (Gemma 3 report,
    section 2).
    """

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
        """x (T, hidden) -> q (T, H, D), k (T, K, D), v (T, K, D)."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), v

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """y (T, H, D) -> (T, hidden)."""
        return self.o_proj(y.flatten(-2))

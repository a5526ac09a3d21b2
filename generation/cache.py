"""The KV cache: keys and values of earlier tokens, so that a decoding step computes only the new token.

B rows (one text each), H query heads, K key/value heads, G = H / K query heads per key/value head, D
head_dim, T tokens of a packed stream, C cache positions, W sliding window in tokens.

The token at position p of a text is at cache position p of its row, whatever the other rows hold. On a layer
with a sliding window it is at p % W (a ring buffer): it replaces the token that has just left the window.

    cache position   0  1  2  3  4  5
    row 0            a  b  c  d  e  f        length 6
    row 1            p  q  r  .  .  .        length 3; the positions after it are masked

So a new text can start in a row as soon as another text ends there. RoPE is applied to keys before they are
stored, so attention does not need them in the order of their positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import NO_PREFIX
from model.attention import PackedAttention
from model.config import Gemma3Config

# Rows that attend together on a CPU. A block is as wide as its longest row; neighbours have similar lengths.
BLOCK = 16


class KVCache:
    """The keys and values of B rows, and the attention of a decoding step: model(..., attend=cache)."""

    def __init__(self, cfg: Gemma3Config, rows: int, room: int, device: torch.device | str = "cpu"):
        """Makes B = `rows` empty rows of `room` positions; min(W, room) on layers with a sliding window W."""
        self.cfg, self.room, self.device = cfg, room, torch.device(device)
        self.ring = min(cfg.sliding_window, room)
        self.lengths = [0] * rows  # tokens in each row, with the one of the current step
        self.keys: dict[int, Tensor] = {}  # layer -> (B, K, C, D)
        self.values: dict[int, Tensor] = {}

    def prefill(
        self, rows: list[int], lengths: list[int], shared_prefix: "SharedPrefix | None" = None
    ) -> "Prefill":
        """Returns what model(..., attend=...) needs to read prompts of these lengths into these rows."""
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        return Prefill(self, rows, lengths, shared_prefix)

    def advance(self) -> Tensor:
        """Moves every row to its next position; returns the position ids (B,) of the tokens of this step."""
        # Only the row of a finished text can be full; it stays at its last position.
        self.lengths = [min(n + 1, self.room) for n in self.lengths]
        lengths = torch.tensor(self.lengths, device=self.device)
        self.rows, self.position = torch.arange(len(lengths), device=self.device), lengths - 1
        self.ring_position = self.position % self.ring
        block = BLOCK if self.device.type == "cpu" else len(lengths)
        self.blocks = [self._block(slice(i, i + block), lengths) for i in range(0, len(lengths), block)]
        return self.position

    def _block(self, rows: slice, lengths: Tensor) -> tuple[slice, dict[bool, tuple]]:
        """Returns (rows, {False for full attention or True for sliding: (number of used positions, mask)}).

        The mask (rows, 1, 1, C) is -inf at positions after the end of a row; it is None if nothing is masked.
        """
        longest, shortest = max(self.lengths[rows]), min(self.lengths[rows])
        hidden = torch.arange(longest, device=self.device) >= lengths[rows, None]  # (B, C)
        dtype = next(iter(self.values.values())).dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))
        mask = mask[:, None, None]  # (B, 1, 1, C)
        # A full ring holds exactly the window, so one mask serves both kinds of layers.
        used = {False: longest, True: min(longest, self.ring)}
        return rows, {sliding: (n, mask[..., :n] if shortest < n else None) for sliding, n in used.items()}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding: bool) -> Tensor:
        """Stores k and v (B, K, D) of one token per row; returns the attention (B, H, D) of q (B, H, D)."""
        keys, values = self.keys[layer], self.values[layer]
        position = self.ring_position if sliding else self.position
        keys[self.rows, :, position], values[self.rows, :, position] = k.to(keys.dtype), v
        # The G heads that share a key stand where query positions would, so no key is copied for a head.
        grouped = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1))  # (B, K, G, D)
        parts = []
        for rows, masks in self.blocks:
            used, mask = masks[sliding]
            parts.append(self._attend(grouped[rows], keys[rows, :, :used], values[rows, :, :used], mask))
        return torch.cat(parts).flatten(1, 2)  # (B, H, D)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Returns softmax(q k^T * scale + mask) v, (B, K, G, D), for q (B, K, G, D), k and v (B, K, C, D)."""
        scale, softcap = self.cfg.attention_scale, self.cfg.attn_logit_softcapping
        if softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)  # (B, K, G, C)
        if mask is not None:
            scores = scores + mask
        # A row may sum thousands of small weights, so the softmax is in float32.
        return scores.float().softmax(-1).to(v.dtype) @ v

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows, in this order, and drops the others."""
        index, used = torch.tensor(rows, device=self.device), max(self.lengths)
        self.lengths = [self.lengths[row] for row in rows]
        for buffers in (self.keys, self.values):
            for layer, x in buffers.items():
                buffers[layer] = x.new_zeros(len(rows), *x.shape[1:])
                buffers[layer][:, :, :used] = x[index, :, :used]

    def copy(self, sources: list[int], rows: list[int]) -> None:
        """Copies row sources[i] to row rows[i]."""
        for row, source in zip(rows, sources, strict=True):
            self.lengths[row] = self.lengths[source]
        for x in (*self.keys.values(), *self.values.values()):
            x[rows] = x[sources]

    def buffers(self, layer: int, like: Tensor, sliding: bool) -> tuple[Tensor, Tensor]:
        """Returns a layer's keys and values (B, K, C, D); creates them in the dtype of `like` (T, K, D)."""
        if layer not in self.keys:
            shape = (len(self.lengths), like.shape[1], self.ring if sliding else self.room, like.shape[2])
            # Zeros, because a masked position has weight 0, and 0 * NaN would be NaN.
            self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[layer], self.values[layer]


class SharedPrefix:
    """Attention over a prefix that all prompts share. It keeps q, k and v of the prefix for each Prefill."""

    def __init__(self, cfg: Gemma3Config, length: int, device: torch.device | str = "cpu"):
        self.length = length
        self.position_ids = torch.arange(length, device=device)
        self.cu_seqlens = torch.tensor([0, length], device=device)
        self.attend = PackedAttention(
            self.cu_seqlens, length, cfg.sliding_window, cfg.attention_scale, cfg.attn_logit_softcapping
        )
        self.layers: dict[int, tuple] = {}  # layer -> q (P, H, D), k and v (P, K, D)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding: bool) -> Tensor:
        self.layers[layer] = q, k, v
        return self.attend(layer, q, k, v, sliding)


class Prefill:
    """Attention over packed prompts, for model(..., attend=...). It stores their keys and values in the
    cache.

    With a shared prefix, the model gets only the tokens after it. Their attention includes the prefix
    (model/attention.py), and every row of the cache gets a copy of the prefix.
    """

    def __init__(
        self, cache: KVCache, rows: list[int], lengths: list[int], shared_prefix: SharedPrefix | None = None
    ):
        """Makes position_ids and cu_seqlens for the model; `lengths` count tokens with the shared prefix."""
        cfg, device, shared = cache.cfg, cache.device, shared_prefix.length if shared_prefix else 0
        self.cache, self.shared_prefix = cache, shared_prefix
        bounds = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0))  # (rows + 1,)
        self.cu_seqlens = bounds - shared * torch.arange(len(lengths) + 1, device=device)
        # For each of the T tokens of the whole prompts: its prompt, its row, and its position.
        prompt = torch.arange(len(lengths), device=device).repeat_interleave(bounds.diff())
        self.row = torch.tensor(rows, device=device)[prompt]
        self.position = position = torch.arange(sum(lengths), device=device) - bounds[prompt]
        self.position_ids = position[position >= shared]
        # (T,) the index of each token in the shared prefix followed by the stream.
        self.source = torch.where(position < shared, position, (position >= shared).cumsum(0) - 1 + shared)
        # The tokens that a sliding layer still attends to.
        self.recent = (position >= bounds.diff()[prompt] - cache.ring).nonzero()[:, 0]
        seen, prefixes = self.cu_seqlens, None
        if shared_prefix:
            seen, prefixes = F.pad(self.cu_seqlens + shared, (1, 0)), [NO_PREFIX] + [0] * len(lengths)
        scale, softcap = cfg.attention_scale, cfg.attn_logit_softcapping
        self.attend = PackedAttention(
            seen, int(seen[-1]), cfg.sliding_window, scale, softcap, shared_prefix=prefixes
        )

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, sliding: bool) -> Tensor:
        if self.shared_prefix is None:
            self._store(layer, k, v, sliding)
            return self.attend(layer, q, k, v, sliding)
        q, k, v = (torch.cat(pair) for pair in zip(self.shared_prefix.layers[layer], (q, k, v), strict=True))
        self._store(layer, k[self.source], v[self.source], sliding)
        return self.attend(layer, q, k, v, sliding)[self.shared_prefix.length :]

    def _store(self, layer: int, k: Tensor, v: Tensor, sliding: bool) -> None:
        keys, values = self.cache.buffers(layer, v, sliding)
        row, position = self.row, self.position
        if sliding:
            row, position, k, v = (x[self.recent] for x in (row, position, k, v))
            position = position % self.cache.ring
        keys[row, :, position], values[row, :, position] = k.to(keys.dtype), v

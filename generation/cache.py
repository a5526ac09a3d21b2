"""The KV cache: what decoding remembers of the tokens before, so that a new token costs one position and not
the whole text again.

B rows (one text each), H query heads, K key/value heads, G = H / K query heads that share one, D head_dim, T
tokens of a packed stream, S slots, W window.

A row's token at position p lies in slot p, whatever the other rows hold; on a sliding layer in slot p % W,
over the token that just left its window.

    slot     0  1  2  3  4  5
    row 0    a  b  c  d  e  f        length 6
    row 1    p  q  r  .  .  .        length 3: the slots behind it are hidden from it

So a row can come in where another ended, whenever it likes. Keys were turned by RoPE at their own position
before they came here, hence the order of a ring's slots is free.
"""

import torch
import torch.nn.functional as F

from model.attention import NONE, PackedAttention
from model.config import Gemma3Config

# Rows that attend at once on a CPU: each block is as wide as its longest row, and rows of like length come
# together.
BLOCK = 16


class KVCache:
    """Keys and values of B rows; one object serves a whole forward pass as the model's `attend`, called by
    every layer.
    """

    def __init__(self, cfg: Gemma3Config, rows: int, room: int, device: torch.device | str = "cpu"):
        """B empty rows with room for so many tokens each: 2 * B * K * D numbers a slot, W slots on a sliding
        layer.
        """
        self.cfg, self.room, self.device = cfg, room, torch.device(device)
        self.ring = min(cfg.sliding_window, room)
        self.lengths = [0] * rows  # tokens in each row, the one that advance() opened included
        self.keys: dict[int, torch.Tensor] = {}  # layer -> (B, K, S, D)
        self.values: dict[int, torch.Tensor] = {}

    def prefill(
        self, rows: list[int], lengths: list[int], shared_prefix: "SharedPrefix | None" = None
    ) -> "Prefill":
        """The `attend` for a packed stream of prompts (what follows `opening`, if there is one), which become
        the rows of these numbers.
        """
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        return Prefill(self, rows, lengths, shared_prefix)

    def advance(self) -> torch.Tensor:
        """Opens the next slot of every row; returns the position ids (B,) of the tokens that the model is to
        be called with, and the cache as `attend`.

        A row that is full, which only a finished one may be, writes its last slot again.
        """
        self.lengths = [min(n + 1, self.room) for n in self.lengths]
        lengths = torch.tensor(self.lengths, device=self.device)
        self.rows, self.position = torch.arange(len(lengths), device=self.device), lengths - 1
        self.slot = self.position % self.ring
        block = BLOCK if self.device.type == "cpu" else len(lengths)
        self.blocks = [self._block(slice(i, i + block), lengths) for i in range(0, len(lengths), block)]
        return self.position

    def _block(self, rows: slice, lengths: torch.Tensor) -> tuple[slice, dict[bool, tuple]]:
        """Rows that attend together in this step, and {sliding: (slots in use, mask)}: (B, 1, 1, S) with -inf
        behind a row's end, None where there is none.
        """
        used, shortest = max(self.lengths[rows]), min(self.lengths[rows])
        hidden = torch.arange(used, device=self.device) >= lengths[rows, None]  # (B, S)
        dtype = next(iter(self.values.values())).dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, float("-inf"))[
            :, None, None
        ]
        # A ring that is full holds the window and nothing else, so that one mask says what is hidden on
        # layers of both kinds.
        slots = {False: used, True: min(used, self.ring)}
        return rows, {sliding: (n, mask[..., :n] if shortest < n else None) for sliding, n in slots.items()}

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool
    ) -> torch.Tensor:
        """One token a row: q (B, H, D), k and v (B, K, D) -> (B, H, D); stores k and v in the slots that
        advance() opened.
        """
        keys, values = self.keys[layer], self.values[layer]
        slot = self.slot if sliding else self.position
        keys[self.rows, :, slot], values[self.rows, :, slot] = k.to(keys.dtype), v
        # The G heads that share a key take the place of query positions: no head's keys are ever copied for
        # another.
        grouped = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1))  # (B, K, G, D)
        parts = []
        for rows, (used, mask) in ((rows, found[sliding]) for rows, found in self.blocks):
            parts.append(self._attend(grouped[rows], keys[rows, :, :used], values[rows, :, :used], mask))
        return torch.cat(parts).flatten(1, 2)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """softmax(q k^T * scale + mask) v; q (B, K, G, D), k and v (B, K, S, D) -> (B, K, G, D)."""
        scale, softcap = self.cfg.attention_scale, self.cfg.attn_logit_softcapping
        if softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)  # (B, K, G, S)
        if mask is not None:
            scores = scores + mask
        return scores.float().softmax(-1).to(v.dtype) @ v  # float32: a row may sum thousands of small weights

    def keep(self, rows: list[int]) -> None:
        """The rows that stay, in their new order."""
        index, used = torch.tensor(rows, device=self.device), max(self.lengths)
        self.lengths = [self.lengths[row] for row in rows]
        for store in (self.keys, self.values):
            for layer, x in store.items():
                store[layer] = x.new_zeros(len(rows), *x.shape[1:])
                store[layer][:, :, :used] = x[index, :, :used]

    def copy(self, sources: list[int], rows: list[int]) -> None:
        """Row rows[i] becomes what row sources[i] is."""
        for row, source in zip(rows, sources, strict=True):
            self.lengths[row] = self.lengths[source]
        for store in (self.keys, self.values):
            for x in store.values():
                x[rows] = x[sources]

    def slots(self, layer: int, like: torch.Tensor, sliding: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The (B, K, S, D) buffers of a layer, made at first use with the type of `like`, its values (T, K,
        D).

        Zeros, since a slot behind a row's end is multiplied with weight 0, and 0 * NaN is NaN.
        """
        if layer not in self.keys:
            shape = (len(self.lengths), like.shape[1], self.ring if sliding else self.room, like.shape[2])
            self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[layer], self.values[layer]


class SharedPrefix:
    """The `attend` for what all prompts begin with, an instruction say: read once, and remembered for every
    Prefill after it.
    """

    def __init__(self, cfg: Gemma3Config, length: int, device: torch.device | str = "cpu"):
        self.length = length
        self.position_ids = torch.arange(length, device=device)
        self.cu_seqlens = torch.tensor([0, length], device=device)
        self.attend = PackedAttention(
            self.cu_seqlens, length, cfg.sliding_window, cfg.attention_scale, cfg.attn_logit_softcapping
        )
        self.layers: dict[int, tuple] = {}  # layer -> q (O, H, D), k, v (O, K, D)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool
    ) -> torch.Tensor:
        self.layers[layer] = q, k, v
        return self.attend(layer, q, k, v, sliding)


class Prefill:
    """Packed attention over prompts that leaves their keys and values in the cache.

    After an opening of O tokens the layers see only what is a prompt's own; attention sees the opening before
    each (model/attention.py), and the cache gets a copy of it in every row.
    """

    def __init__(
        self, cache: KVCache, rows: list[int], lengths: list[int], shared_prefix: SharedPrefix | None = None
    ):
        """`lengths` are those of whole prompts; position_ids and cu_seqlens are then the stream's, of own
        tokens only.
        """
        cfg, device, shared = cache.cfg, cache.device, shared_prefix.length if shared_prefix else 0
        self.cache, self.shared_prefix = cache, shared_prefix
        bounds = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0))  # (rows + 1,)
        self.cu_seqlens = bounds - shared * torch.arange(len(lengths) + 1, device=device)
        number = torch.arange(len(lengths), device=device).repeat_interleave(
            bounds.diff()
        )  # (T,) of whole prompts
        position = torch.arange(sum(lengths), device=device) - bounds[number]  # (T,)
        self.position_ids = position[position >= shared]
        # (T,) where each token of the whole prompts stands in the opening with the own tokens behind it
        self.source = torch.where(position < shared, position, (position >= shared).cumsum(0) - 1 + shared)
        self.row, self.position = torch.tensor(rows, device=device)[number], position  # (T,)
        self.recent = (position >= bounds.diff()[number] - cache.ring).nonzero()[
            :, 0
        ]  # tokens that a sliding layer will still look at
        seen, before = self.cu_seqlens, None  # of the stream that attention sees
        if shared_prefix:
            seen, before = F.pad(self.cu_seqlens + shared, (1, 0)), [NONE] + [0] * len(lengths)
        self.attend = PackedAttention(
            seen,
            int(seen[-1]),
            cfg.sliding_window,
            cfg.attention_scale,
            cfg.attn_logit_softcapping,
            shared_prefix=before,
        )

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool
    ) -> torch.Tensor:
        if self.shared_prefix is None:
            self._store(layer, k, v, sliding)
            return self.attend(layer, q, k, v, sliding)
        q, k, v = (torch.cat(pair) for pair in zip(self.shared_prefix.layers[layer], (q, k, v), strict=True))
        self._store(layer, k[self.source], v[self.source], sliding)
        return self.attend(layer, q, k, v, sliding)[self.shared_prefix.length :]

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor, sliding: bool) -> None:
        keys, values = self.cache.slots(layer, v, sliding)
        row, slot = self.row, self.position
        if sliding:
            row, slot, k, v = (x[self.recent] for x in (row, slot, k, v))
            slot = slot % self.cache.ring
        keys[row, :, slot], values[row, :, slot] = k.to(keys.dtype), v

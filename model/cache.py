"""The KV cache: what decoding remembers of the tokens before, so that a new token costs one position and not the whole text again.

B rows (one text each), H query heads, K key/value heads, G = H / K query heads that share one, D head_dim, T tokens of a packed stream, S slots,
W window.

Rows of unequal length end in the same column: a prompt that is shorter than the longest starts further right.

    column   0  1  2  3  4 | 5  6
    row 0    a  b  c  d  e | f  g        start 0
    row 1    .  .  p  q  r | s  t        start 2: columns 0 and 1 are hidden from it for good

So every step writes one column of all rows at once, and position = column - start.  Keys were turned by RoPE at their own position before they
came here, hence the order of the slots is free: a full layer puts column c in slot c, a sliding layer in slot c % W, over the column that
just left its window.
"""

import torch
import torch.nn.functional as F

from model.attention import PackedAttention
from model.config import Gemma3Config


class KVCache:
    """Keys and values of B rows; one object serves a whole forward pass as the model's `attend`, called by every layer."""

    def __init__(self, cfg: Gemma3Config, lengths: list[int], max_new_tokens: int, device: torch.device | str = "cpu"):
        """Room for B prompts of `lengths` and `max_new_tokens` after the longest: 2 * B * K * D numbers a slot, W slots on a sliding layer."""
        self.cfg = cfg
        self.width = max(lengths)  # columns that are filled, or about to be by prefill
        self.room = self.width + max_new_tokens
        self.ring = min(cfg.sliding_window, self.room)
        self.start = torch.tensor([self.width - n for n in lengths], device=device)  # (B,)
        self.latest_start = self.width - min(lengths)
        self.keys: dict[int, torch.Tensor] = {}  # layer -> (B, K, S, D)
        self.values: dict[int, torch.Tensor] = {}
        self.masks: dict[bool, torch.Tensor | None] = {}  # of this step: sliding -> (B, 1, 1, S)

    def prefill(self, first_row: int, lengths: list[int], opening: "Opening | None" = None) -> "Prefill":
        """The `attend` for a packed stream of prompts (what follows `opening`, if there is one), which go to rows first_row, first_row + 1, ..."""
        return Prefill(self, first_row, lengths, opening)

    def advance(self) -> torch.Tensor:
        """Opens the next column; returns the position ids (B,) of the tokens that the model is to be called with, and the cache as `attend`."""
        assert self.width < self.room, "the cache was made for fewer new tokens"
        self.width += 1
        columns = torch.arange(self.width, device=self.start.device)
        slots = columns[: self.ring]
        newest = self.width - 1
        self.masks = {False: self._mask(columns, 0), True: self._mask(newest - (newest - slots) % self.ring, self.width - self.ring)}
        return newest - self.start

    def _mask(self, columns: torch.Tensor, oldest: int) -> torch.Tensor | None:
        """What is added to the scores of slots that hold `columns` (S,): -inf left of a row's start; None where no row starts after the `oldest`."""
        if oldest >= self.latest_start:
            return None
        hidden = columns < self.start[:, None]  # (B, S)
        dtype = next(iter(self.values.values())).dtype
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None, None]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool) -> torch.Tensor:
        """One token a row: q (B, H, D), k and v (B, K, D) -> (B, H, D); stores k and v in the column that advance() opened."""
        keys, values = self.keys[layer], self.values[layer]
        slot = (self.width - 1) % self.ring if sliding else self.width - 1
        keys[:, :, slot], values[:, :, slot] = k, v
        used = min(self.width, self.ring) if sliding else self.width
        # The G heads that share a key take the place of query positions: no head's keys are ever copied for another.
        grouped = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1))  # (B, K, G, D)
        return self._attend(grouped, keys[:, :, :used], values[:, :, :used], self.masks[sliding]).flatten(1, 2)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """softmax(q k^T * scale + mask) v; q (B, K, G, D), k and v (B, K, S, D) -> (B, K, G, D)."""
        scale, softcap = self.cfg.attention_scale, self.cfg.attn_logit_softcapping
        if softcap is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)  # (B, K, G, S)
        if mask is not None:
            scores = scores + mask
        return scores.float().softmax(-1).to(v.dtype) @ v  # float32: a row may sum thousands of small weights

    def keep(self, rows: list[int]) -> None:
        """The rows that stay, in their new order: finished ones are left out, and a row named twice is copied."""
        index = torch.tensor(rows, device=self.start.device)
        self.start = self.start[index]
        self.latest_start = int(self.start.max())
        for store in (self.keys, self.values):
            for layer in store:
                store[layer] = store[layer].index_select(0, index)

    def slots(self, layer: int, like: torch.Tensor, sliding: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The (B, K, S, D) buffers of a layer, made at first use with the type of `like`, its values (T, K, D).

        Zeros, since a slot left of a row's start is multiplied with weight 0, and 0 * NaN is NaN.
        """
        if layer not in self.keys:
            shape = (self.start.shape[0], like.shape[1], self.ring if sliding else self.room, like.shape[2])
            self.keys[layer], self.values[layer] = like.new_zeros(shape), like.new_zeros(shape)
        return self.keys[layer], self.values[layer]


class Opening:
    """The `attend` for what all prompts begin with, an instruction say: read once, and remembered for every Prefill after it."""

    def __init__(self, cfg: Gemma3Config, length: int, device: torch.device | str = "cpu"):
        self.length = length
        self.position_ids = torch.arange(length, device=device)
        self.cu_seqlens = torch.tensor([0, length], device=device)
        self.attend = PackedAttention(self.cu_seqlens, length, cfg.sliding_window, cfg.attention_scale, cfg.attn_logit_softcapping)
        self.layers: dict[int, tuple] = {}  # layer -> q (O, H, D), k, v (O, K, D)

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool) -> torch.Tensor:
        self.layers[layer] = q, k, v
        return self.attend(layer, q, k, v, sliding)


class Prefill:
    """Packed attention over prompts that leaves their keys and values in the cache.

    After an opening of O tokens the layers see only what is a prompt's own.  Attention alone puts the opening back before each, so it is
    what it always is; the projections and the MLP, nine tenths of the time, run over the opening once and not once a prompt.
    """

    def __init__(self, cache: KVCache, first_row: int, lengths: list[int], opening: Opening | None = None):
        """`lengths` are those of whole prompts; position_ids and cu_seqlens are then the stream's, of own tokens only."""
        cfg, device, shared = cache.cfg, cache.start.device, opening.length if opening else 0
        self.cache, self.opening = cache, opening
        bounds = F.pad(torch.tensor(lengths, device=device).cumsum(0), (1, 0))  # (rows + 1,)
        self.attend = PackedAttention(bounds, sum(lengths), cfg.sliding_window, cfg.attention_scale, cfg.attn_logit_softcapping)
        number = torch.arange(len(lengths), device=device).repeat_interleave(bounds.diff())  # (T,) of whole prompts
        position = torch.arange(sum(lengths), device=device) - bounds[number]  # (T,)
        self.own = (position >= shared).nonzero()[:, 0]  # (own tokens,) where they stand in the whole prompts
        # (T,) where each token of the whole prompts stands in the opening with the own tokens behind it
        self.source = torch.where(position < shared, position, (position >= shared).cumsum(0) - 1 + shared)
        self.position_ids = position[self.own]
        self.cu_seqlens = bounds - shared * torch.arange(len(lengths) + 1, device=device)
        self.row = number + first_row  # (T,)
        self.column = cache.start[self.row] + position  # (T,)
        self.recent = (self.column >= cache.width - cache.ring).nonzero()[:, 0]  # tokens that a sliding layer will still look at

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sliding: bool) -> torch.Tensor:
        if self.opening is not None:
            q, k, v = (torch.cat(pair)[self.source] for pair in zip(self.opening.layers[layer], (q, k, v), strict=True))  # (T, H or K, D)
        self._store(layer, k, v, sliding)
        y = self.attend(layer, q, k, v, sliding)
        return y if self.opening is None else y[self.own]

    def _store(self, layer: int, k: torch.Tensor, v: torch.Tensor, sliding: bool) -> None:
        keys, values = self.cache.slots(layer, v, sliding)
        row, column = self.row, self.column
        if sliding:
            row, column, k, v = (x[self.recent] for x in (row, column, k, v))
            column = column % self.cache.ring
        keys[row, :, column], values[row, :, column] = k.to(keys.dtype), v

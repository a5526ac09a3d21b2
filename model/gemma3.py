"""Gemma 3's decoder: token ids in, hidden states out. The modules have Hugging Face's names.

Shapes: T tokens of a packed stream (documents one after the other), D hidden size, V vocabulary entries, H
query heads, K key/value heads, E head_dim.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention import Gemma3Attention, PackedAttention
from model.config import FULL, SLIDING, Gemma3Config
from model.mlp import Gemma3MLP
from model.norm import Gemma3RMSNorm
from model.quantized import QuantizedWeight
from model.rope import rope_angles

# attend(layer, q, k, v, sliding) -> y: PackedAttention, or the KV cache when decoding.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]

HEAD_ROWS = 2**14  # Vocabulary entries of a quantized head that are dense at a time while decoding.


class Gemma3DecoderLayer(nn.Module):
    """Computes x += norm(attention(norm(x))), then x += norm(mlp(norm(x))), with four different norms."""

    def __init__(self, cfg: Gemma3Config, index: int):
        super().__init__()
        self.index, self.sliding = index, cfg.layer_types[index] == SLIDING
        self.compiled: tuple[Callable, Callable] | None = None
        hidden, eps = cfg.hidden_size, cfg.rms_norm_eps
        heads, kv_heads = cfg.num_attention_heads, cfg.num_key_value_heads
        self.self_attn = Gemma3Attention(hidden, heads, kv_heads, cfg.head_dim, eps, cfg.attention_bias)
        self.mlp = Gemma3MLP(hidden, cfg.intermediate_size)
        self.input_layernorm = Gemma3RMSNorm(hidden, eps)
        self.post_attention_layernorm = Gemma3RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = Gemma3RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = Gemma3RMSNorm(hidden, eps)

    def before_attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps x (T, D) to q (T, H, E), k (T, K, E) and v (T, K, E)."""
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after_attention(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Maps x (T, D) and the attention's y (T, H, E) to (T, D)."""
        x = x + self.post_attention_layernorm(self.self_attn.output(y))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend: Attend,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps x (T, D) to (T, D); with output_positions (n,), computes and returns only these n rows."""
        before, after = self.before_attention, self.after_attention
        if self.compiled and self.training:
            before, after = self.compiled
        q, k, v = before(x, cos, sin)
        y = attend(self.index, q, k, v, self.sliding)
        return after(x, y) if output_positions is None else after(x[output_positions], y[output_positions])


class Gemma3TextModel(nn.Module):
    """Embedding, decoder layers and final norm.

    With gradient_checkpointing, training stores only the input of each layer, and the backward pass computes
    the layer again (Chen et al. 2016, arXiv 1604.06174).
    """

    def __init__(self, cfg: Gemma3Config):
        super().__init__()
        self.config, self.gradient_checkpointing = cfg, False
        # nn.Embedding(V, D) would draw random values, which on the meta device imports PyTorch's compiler.
        embedding = torch.empty(cfg.vocab_size, cfg.hidden_size)  # (V, D)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Gemma3DecoderLayer(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = Gemma3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        attend: Attend,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Maps tokens and position_ids (T,) to hidden states (T, D), or (n, D) at output_positions (n,)."""
        cfg, weight = self.config, self.embed_tokens.weight
        # As in Google's code, the scale is rounded to the weights' dtype before it multiplies: sqrt(640) is
        # 25.298 in float32 and 25.25 in bfloat16.
        scale = torch.full((), cfg.hidden_size**0.5, dtype=weight.dtype, device=weight.device)
        x = self.embed_tokens(tokens) * scale  # (T, D)
        angles = {
            FULL: rope_angles(position_ids, cfg.head_dim, cfg.rope_theta, cfg.rope_linear_factor),
            SLIDING: rope_angles(position_ids, cfg.head_dim, cfg.rope_local_base_freq),
        }
        angles = {kind: (cos.to(x.dtype), sin.to(x.dtype)) for kind, (cos, sin) in angles.items()}
        for layer, kind in zip(self.layers, cfg.layer_types, strict=True):
            # Other rows of the last layer's output are not used.
            rows = output_positions if layer is self.layers[-1] else None
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, *angles[kind], attend, rows, use_reentrant=False)
            else:
                x = layer(x, *angles[kind], attend, rows)
        return self.norm(x)


class Gemma3ForCausalLM(nn.Module):
    """The language model. `forward` returns hidden states; `logits` maps them to logits."""

    def __init__(self, cfg: Gemma3Config):
        super().__init__()
        self.config, self.compiled = cfg, False
        self.model = Gemma3TextModel(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor | QuantizedWeight:
        """Returns the weight (V, D) of the language-model head: the embedding's weight if they are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        attend: Attend | None = None,
        reference: bool = False,
        shared_prefix: list[int] | None = None,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the hidden states (T, D) of a packed stream, or (n, D) at output_positions (n,).

        Args:
            tokens, position_ids: (T,) token ids, and the position of each token in its document.
            cu_seqlens: (documents + 1,); document d is tokens[cu_seqlens[d] : cu_seqlens[d + 1]].
            attend: the function that computes attention, such as a KV cache; by default a PackedAttention.
            reference: whether that PackedAttention uses the slow reference_attention.
            shared_prefix: for each document the index of the document that holds its prefix, or -1 for none.
        """
        if attend is None:
            cfg = self.config
            window, scale, cap = cfg.sliding_window, cfg.attention_scale, cfg.attn_logit_softcapping
            attend = PackedAttention(
                cu_seqlens, len(tokens), window, scale, cap, reference, shared_prefix, tokens.device
            )
        return self.model(tokens, position_ids, attend, output_positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the logits hidden W^T (n, V), in float32 at least, with the head's weight W and softcap."""
        weight = self.head_weight
        if isinstance(weight, QuantizedWeight):
            rows = range(0, len(weight), HEAD_ROWS)
            parts = [F.linear(hidden, weight[i : i + HEAD_ROWS].to(hidden.dtype)) for i in rows]
            z = torch.cat(parts, 1)
        else:
            z = F.linear(hidden, weight.to(hidden.dtype))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        cap = self.config.final_logit_softcapping
        return z if cap is None else cap * torch.tanh(z / cap)

    def compile_layers(self) -> None:
        """Compiles each layer's parts before and after attention, and the loss, for streams of every length.

        Attention is not compiled, because its shapes change with the documents. Only training uses the
        compiled code.
        """
        self.compiled = True
        for layer in self.model.layers:
            assert isinstance(layer, Gemma3DecoderLayer)
            before = torch.compile(layer.before_attention, dynamic=True)
            layer.compiled = before, torch.compile(layer.after_attention, dynamic=True)

    def reset_parameters(self, seed: int, std: float = 0.02) -> None:
        """Initializes the weights for pretraining: matrices from normal(0, std), vectors to zero.

        As in GPT-2, o_proj and down_proj, which write to the residual stream, use std / sqrt(2 * layers).
        """
        generator = torch.Generator().manual_seed(seed)
        shrink = (2 * self.config.num_hidden_layers) ** -0.5
        for name, p in self.named_parameters():
            if p.ndim < 2:
                nn.init.zeros_(p)
            else:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=std * (shrink if into_residual else 1.0), generator=generator)

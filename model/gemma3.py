"""Gemma 3's decoder, from token ids to hidden states.

T tokens of a packed stream, D hidden size. Module names are Hugging Face's.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention import Gemma3Attention, PackedAttention
from model.config import FULL, SLIDING, Gemma3Config
from model.mlp import Gemma3MLP
from model.norm import Gemma3RMSNorm
from model.rope import rope_angles


class Gemma3DecoderLayer(nn.Module):
    """x += norm(attention(norm(x))), then x += norm(mlp(norm(x))): a norm before and after each half."""

    def __init__(self, cfg: Gemma3Config, index: int):
        super().__init__()
        self.kind = cfg.layer_types[index]
        self.index, self.sliding = index, self.kind == SLIDING
        self.compiled = None
        self.self_attn = Gemma3Attention(
            cfg.hidden_size,
            cfg.num_attention_heads,
            cfg.num_key_value_heads,
            cfg.head_dim,
            cfg.rms_norm_eps,
            cfg.attention_bias,
        )
        self.mlp = Gemma3MLP(cfg.hidden_size, cfg.intermediate_size)
        self.input_layernorm = Gemma3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_attention_layernorm = Gemma3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.pre_feedforward_layernorm = Gemma3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.post_feedforward_layernorm = Gemma3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def before_attention(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        return self.self_attn.project(self.input_layernorm(x), cos, sin)

    def after_attention(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = x + self.post_attention_layernorm(self.self_attn.output(y))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        attend,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x (T, D) -> (T, D), or only the named rows of it."""
        before, after = (
            self.compiled
            if self.compiled and self.training
            else (self.before_attention, self.after_attention)
        )
        q, k, v = before(x, cos, sin)
        y = attend(self.index, q, k, v, self.sliding)
        return after(x, y) if output_positions is None else after(x[output_positions], y[output_positions])


class Gemma3TextModel(nn.Module):
    """Embedding, decoder layers, final norm; `gradient_checkpointing` keeps only the layers' inputs for the
    backward pass, which runs each layer anew (Chen et al. 2016, arXiv 1604.06174)."""

    def __init__(self, cfg: Gemma3Config):
        super().__init__()
        self.config, self.gradient_checkpointing = cfg, False
        # Not nn.Embedding(V, D), which draws numbers, and on the meta device that imports PyTorch's compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(cfg.vocab_size, cfg.hidden_size), freeze=False
        )  # (V, D)
        self.layers = nn.ModuleList(Gemma3DecoderLayer(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = Gemma3RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        attend,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        cfg, weight = self.config, self.embed_tokens.weight
        # The scale is rounded to the weights' type first, as in Google's code: sqrt(640) is 25.298 in float32
        # but 25.25 in bfloat16.
        x = self.embed_tokens(tokens) * torch.full(
            (), cfg.hidden_size**0.5, dtype=weight.dtype, device=weight.device
        )  # (T, D)
        angles = {
            FULL: rope_angles(position_ids, cfg.head_dim, cfg.rope_theta, cfg.rope_linear_factor),
            SLIDING: rope_angles(position_ids, cfg.head_dim, cfg.rope_local_base_freq),
        }
        angles = {kind: (cos.to(x.dtype), sin.to(x.dtype)) for kind, (cos, sin) in angles.items()}
        for layer in self.layers:
            # Nobody looks at the last layer's other rows.
            arguments = x, *angles[layer.kind], attend, output_positions if layer is self.layers[-1] else None
            x = (
                checkpoint(layer, *arguments, use_reentrant=False)
                if self.gradient_checkpointing and self.training
                else layer(*arguments)
            )
        return self.norm(x)


class Gemma3ForCausalLM(nn.Module):
    """The language model: hidden states of a packed stream, and the head's weight for whoever turns them into
    logits or a loss.
    """

    def __init__(self, cfg: Gemma3Config):
        super().__init__()
        self.config, self.compiled = cfg, False
        self.model = Gemma3TextModel(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, D) the language-model head, which is the embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(
        self,
        tokens: torch.Tensor,
        position_ids: torch.Tensor,
        cu_seqlens: torch.Tensor,
        attend=None,
        reference: bool = False,
        shared_prefix: list[int] | None = None,
        output_positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """tokens, position_ids (T,) and document bounds cu_seqlens (documents + 1,) -> hidden states (T, D),
        or (rows, D) of the named rows alone.

        `opening`: the documents' shared openings (model/attention.py); `attend` replaces packed attention (KV
        cache).
        """
        cfg = self.config
        if attend is None:
            attend = PackedAttention(
                cu_seqlens,
                tokens.shape[0],
                cfg.sliding_window,
                cfg.attention_scale,
                cfg.attn_logit_softcapping,
                reference,
                shared_prefix,
                tokens.device,
            )
        return self.model(tokens, position_ids, attend, output_positions)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, D) hidden states -> (n, V) float32 logits: hidden W^T, soft-capped where the config says so.
        For a few positions only.
        """
        z = nn.functional.linear(hidden, self.head_weight.to(hidden.dtype)).float()
        cap = self.config.final_logit_softcapping
        return z if cap is None else cap * torch.tanh(z / cap)

    def compile_layers(self) -> None:
        """Compiles the two halves of every layer around its attention, and the loss, once for streams of
        every length; evaluation runs the plain halves.

        The attention stays as it is: its shapes change with each stream's documents.
        """
        self.compiled = True
        for layer in self.model.layers:
            layer.compiled = tuple(
                torch.compile(half, dynamic=True) for half in (layer.before_attention, layer.after_attention)
            )

    def reset_parameters(self, seed: int, std: float = 0.02) -> None:
        """Fresh weights for pretraining: normal(0, std) for matrices, out-projections smaller by sqrt(2 *
        layers) (GPT-2), zero norm weights.
        """
        generator = torch.Generator().manual_seed(seed)
        shrink = (2 * self.config.num_hidden_layers) ** -0.5
        for name, p in self.named_parameters():
            if p.ndim < 2:
                nn.init.zeros_(p)
            else:
                nn.init.normal_(
                    p,
                    std=std * (shrink if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0),
                    generator=generator,
                )

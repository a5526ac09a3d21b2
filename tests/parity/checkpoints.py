"""transformers' Gemma 3 with random weights, in narrow shapes of the five published models.

The shapes have the published layer pattern, ratio of heads, RoPE and query scale. Their layer counts end at
the same place in the pattern of six: 18 and 48 end with a global layer, 26 and 62 with two local layers
after it, 34 with four.
"""

import torch

from model.config import FULL, SLIDING
from tests.folders import TINY_VISION

WINDOW = 16


def shape(layers: int, heads: int, kv_heads: int, linear_factor: float | None = None, **changes) -> dict:
    full = {"rope_type": "linear", "factor": linear_factor} if linear_factor else {"rope_type": "default"}
    return {
        "num_hidden_layers": layers,
        "layer_types": [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "rope_parameters": {
            FULL: full | {"rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
    } | changes


SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}
SHAPES = {
    "270m": shape(12, 4, 1, head_dim=16, query_pre_attn_scalar=16),
    "1b": shape(8, 4, 1, intermediate_size=192),
    "4b": shape(10, 8, 4, linear_factor=8.0),
    "12b": shape(12, 16, 8, linear_factor=8.0),
    "27b": shape(8, 32, 16, linear_factor=8.0, query_pre_attn_scalar=168),
    # No published model has Gemma 2's softcaps, biases or an untied head.
    "softcaps": shape(8, 4, 2, **SOFTCAPS, attention_bias=True, tie_word_embeddings=False),
}
MULTIMODAL = ("4b", "12b", "27b")


def reference_model(name: str, text_shape: dict | None = None):
    """Gemma3ForCausalLM, or Gemma3ForConditionalGeneration for the multimodal sizes.

    Its attention is eager, and no weight of its text part is zero.
    """
    import transformers

    text = transformers.Gemma3TextConfig(**(text_shape or SHAPES[name]))
    torch.manual_seed(0)  # for the vision part
    if name in MULTIMODAL:
        parts = {"text_config": text.to_dict(), "vision_config": TINY_VISION}
        config = transformers.Gemma3Config(**parts, mm_tokens_per_image=1)
        reference = transformers.Gemma3ForConditionalGeneration(config)
    else:
        reference = transformers.Gemma3ForCausalLM(text)
    reference.set_attn_implementation("eager")
    _randomise(reference)
    return reference.eval()


def _randomise(reference) -> None:
    """Makes attention sharp and the embedding small; the last norm compensates for the small embedding.

    With a tied head and a large embedding the model would repeat its last token.
    """
    means = {"q_norm": 0.5, "k_norm": 0.5, "model.norm": 4.0}
    generator = torch.Generator().manual_seed(0)
    for name, p in text_parameters(reference).items():
        if p.ndim == 1:  # norms and biases
            mean = next((mean for key, mean in means.items() if key in name), 0.0)
            torch.nn.init.normal_(p, mean, 0.3, generator=generator)
        else:
            std = (0.2 if "embed" in name else 1.0) * p.shape[1] ** -0.5
            torch.nn.init.normal_(p, std=std, generator=generator)


def text_parameters(reference) -> dict[str, torch.nn.Parameter]:
    """The text part's parameters by their names in model/gemma3.py."""
    text, head = getattr(reference.model, "language_model", reference.model), reference.lm_head.weight
    untied = {} if head is text.embed_tokens.weight else {"lm_head.weight": head}
    return {f"model.{name}": p for name, p in text.named_parameters()} | untied


def reference_logits(reference, tokens: torch.Tensor) -> torch.Tensor:
    """(n, V) logits of one document (n,)."""
    cap = getattr(reference.config, "attn_logit_softcapping", None)
    # transformers' Gemma 3 reads the attention softcap from its config, but does not pass it to the
    # attention function.
    extra = {} if cap is None else {"softcap": cap}
    return reference(input_ids=tokens[None], use_cache=False, **extra).logits[0]

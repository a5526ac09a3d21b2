"""A model of seven layers with a window of 8 tokens, and random token ids, for the tests of decoding."""

import torch

from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3ForCausalLM

WINDOW = 8


def small_model(**changes) -> Gemma3ForCausalLM:
    """Returns a random model with an untied head: with a tied one it would repeat its input token."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 7,
        "vocab_size": 61,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "layer_types": [SLIDING] * 3 + [FULL] + [SLIDING] * 2 + [FULL],
    }
    model = Gemma3ForCausalLM(Gemma3Config(**sizes | changes))
    model.reset_parameters(seed=0, std=0.3)
    return model


def texts(lengths: list[int], vocab: int = 61) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]

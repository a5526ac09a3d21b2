"""Loads a Gemma 3 from a GGUF file: its config from the gemma3.* keys, its tensors by Hugging Face names.

Gemma's norms multiply by 1 + weight, and llama.cpp's by the weight alone, so a GGUF file holds 1 + weight.
Source: llama.cpp, src/models/gemma3.cpp and conversion/gemma.py.
"""

from collections.abc import Callable

import torch
from torch import nn

from ggml.blocks import dequantize
from ggml.container import GGUFFile
from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.gguf_names import gguf_name

USUAL_PATTERN = 6  # every sixth layer is global unless the file says otherwise
LAYERS_27B = 62  # a model of so many layers scales its scores by hidden / heads and not by head_dim


def read_gguf_config(file: GGUFFile) -> Gemma3Config:
    """Returns the config in the file's metadata; a missing optional key has llama.cpp's default value."""
    known = {key.removeprefix("gemma3."): value for key, value in file.metadata.items()}
    get = known.__getitem__
    layers, hidden, heads = get("block_count"), get("embedding_length"), get("attention.head_count")
    head_dim, window = get("attention.key_length"), known.get("attention.sliding_window")
    usual = [(i + 1) % USUAL_PATTERN != 0 for i in range(layers)]
    sliding = known.get("attention.sliding_window_pattern") or usual
    return Gemma3Config(
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=layers,
        vocab_size=len(get("tokenizer.ggml.tokens")),
        num_attention_heads=heads,
        num_key_value_heads=get("attention.head_count_kv"),
        head_dim=head_dim,
        max_position_embeddings=get("context_length"),
        rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
        query_pre_attn_scalar=hidden / heads if layers == LAYERS_27B else head_dim,
        sliding_window=window or 1,
        layer_types=[SLIDING if window and s else FULL for s in sliding],
        rope_theta=known.get("rope.freq_base", 1e4),
        rope_local_base_freq=known.get("rope.freq_base_swa", 1e4),
        rope_linear_factor=known.get("rope.scaling.factor", 1.0),
        final_logit_softcapping=known.get("final_logit_softcapping"),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def read_rows(file: GGUFFile, name: str, start: int, stop: int) -> torch.Tensor:
    """Returns rows start to stop - 1 of a tensor, by Hugging Face's name, in float32; a vector is one row."""
    tensor = file.tensors[gguf_name(name)]
    rows = dequantize(torch.tensor(file.data(tensor.name)[start:stop]), tensor.type)
    return rows - 1.0 if name.endswith("norm.weight") else rows


def read_tensor(file: GGUFFile, name: str) -> torch.Tensor:
    """Returns a whole tensor, by Hugging Face name, in float32."""
    shape = file.tensors[gguf_name(name)].shape
    return read_rows(file, name, 0, shape[0] if len(shape) > 1 else 1).view(shape)


def model_of(config: Gemma3Config, read: Callable[[str], torch.Tensor]) -> Gemma3ForCausalLM:
    """Returns a frozen model of this architecture, with read(name) as the value of each parameter."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    for name, _ in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(read(name), requires_grad=False))
    return model

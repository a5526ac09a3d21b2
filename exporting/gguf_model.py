"""A Gemma 3 text model as GGUF: llama.cpp's keys, tensor names and transforms, made from config.json and
tokenizer.json alone.

Source: llama.cpp's conversion/gemma.py and src/models/gemma3.cpp. Two things that no key says:
1. Gemma's norms multiply with 1 + weight, llama.cpp's with the weight, so the 1 is added here.
2. llama.cpp scales the attention's scores by 1 / sqrt(head_dim), or for 62 layers (27B) by 1 / sqrt(hidden /
heads); other models are refused.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from exporting.gguf_vocab import tokenizer_metadata
from exporting.merged import MergedCheckpoint
from ggml.container import TensorInfo, write_gguf
from ggml.quantize import FILE_TYPES, quantize, tensor_type
from model.config import SLIDING, Gemma3Config
from model.gguf_names import gguf_name
from model.gguf_weights import LAYERS_27B, USUAL_PATTERN
from model.hub import TINY


def write_model(
    path: str | Path,
    model: MergedCheckpoint,
    quant: str,
    *,
    name: str,
    origin: dict[str, str],
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Writes the merged model in the types of `quant` and returns write_gguf's digests; `origin` becomes
    loupe.* keys.

    progress(bytes) is called after each piece.
    Raises ValueError for an architecture or a tokenizer that llama.cpp's Gemma 3 cannot express.
    """
    tensors = plan(model, quant)
    sources = {gguf_name(ours): ours for ours in model.names}
    types = {tensor.name: tensor.type for tensor in tensors}

    def read(tensor: str) -> Iterator[np.ndarray]:
        for rows in transformed(model, sources[tensor]):
            if not np.isfinite(rows).all():
                raise ValueError(
                    f"{model.folder}: {sources[tensor]} holds an infinity or NaN; look at the training run, "
                    f"and export an earlier step"
                )
            piece = quantize(rows, types[tensor])
            yield piece
            progress(piece.nbytes)

    metadata = architecture_metadata(model.config, quant, name) | tokenizer_metadata(
        model.folder, model.config.vocab_size
    )
    metadata |= {
        "tokenizer.chat_template": ("str", chat_template(model.folder)),
        "tokenizer.ggml.add_space_prefix": ("bool", False),
    }
    return write_gguf(
        path, metadata | {f"loupe.{key}": ("str", value) for key, value in origin.items()}, tensors, read
    )


def plan(model: MergedCheckpoint, quant: str) -> list[TensorInfo]:
    """The tensors of the file in the order of the checkpoint's, each with the type that `quant` gives it."""
    layers, tied, names = (
        model.config.num_hidden_layers,
        model.config.tie_word_embeddings,
        {gguf_name(n): model.shapes[n] for n in model.names},
    )
    return [
        TensorInfo(name, shape, tensor_type(quant, name, layers, shape[-1], tied))
        for name, shape in names.items()
    ]


def transformed(model: MergedCheckpoint, name: str) -> Iterator[np.ndarray]:
    """A tensor as the file wants it, float32, in slices of whole rows (n, columns): a norm's weight plus 1,
    all else as it is.
    """
    for rows in model.pieces(name):
        yield rows.contiguous().numpy() if rows.ndim > 1 else (rows + 1.0).numpy()[None]


def architecture_metadata(cfg: Gemma3Config, quant: str, name: str) -> dict[str, tuple[str, object]]:
    """The keys of general.* and gemma3.* in the order in which llama.cpp's converter writes them; raises
    ValueError with all that it cannot express.
    """
    refuse_inexpressible(cfg)
    own = {
        "block_count": ("u32", cfg.num_hidden_layers),
        "context_length": ("u32", cfg.max_position_embeddings),
        "embedding_length": ("u32", cfg.hidden_size),
        "feed_forward_length": ("u32", cfg.intermediate_size),
        "attention.head_count": ("u32", cfg.num_attention_heads),
        "attention.head_count_kv": ("u32", cfg.num_key_value_heads),
    }  # fmt: skip
    if cfg.rope_linear_factor != 1.0:
        own |= {
            "rope.scaling.type": ("str", "linear"),
            "rope.scaling.factor": ("f32", cfg.rope_linear_factor),
        }
    own |= {
        "rope.freq_base": ("f32", cfg.rope_theta), "rope.freq_base_swa": ("f32", cfg.rope_local_base_freq),
        "attention.layer_norm_rms_epsilon": ("f32", cfg.rms_norm_eps),
        "attention.key_length": ("u32", cfg.head_dim), "attention.value_length": ("u32", cfg.head_dim),
    }  # fmt: skip
    general = {
        "general.architecture": ("str", "gemma3"),
        "general.type": ("str", "model"),
        "general.name": ("str", name),
    }
    keys = (
        general
        | {f"gemma3.{key}": value for key, value in own.items()}
        | {"general.file_type": ("u32", FILE_TYPES[quant])}
    )
    if cfg.final_logit_softcapping is not None:
        keys["gemma3.final_logit_softcapping"] = ("f32", cfg.final_logit_softcapping)
    keys["gemma3.attention.sliding_window"] = ("u32", cfg.sliding_window)
    sliding = [kind == SLIDING for kind in cfg.layer_types]
    if sliding != [(i + 1) % USUAL_PATTERN != 0 for i in range(cfg.num_hidden_layers)]:
        keys["gemma3.attention.sliding_window_pattern"] = ("[bool]", sliding)
    return keys | {"general.quantization_version": ("u32", 2)}


def refuse_inexpressible(cfg: Gemma3Config) -> None:
    """ValueError with everything in the config that the file has no place for."""
    width = cfg.hidden_size / cfg.num_attention_heads if cfg.num_hidden_layers == LAYERS_27B else cfg.head_dim
    problems = []
    if cfg.query_pre_attn_scalar != width:
        problems.append(
            f"query_pre_attn_scalar is {cfg.query_pre_attn_scalar:g}, but llama.cpp scales the scores of "
            f"such a model by {width:g} ** -0.5"
        )
    if cfg.attn_logit_softcapping is not None:
        problems.append(
            f"attn_logit_softcapping is {cfg.attn_logit_softcapping:g}, but llama.cpp's Gemma 3 has no such "
            f"cap"
        )
    if cfg.attention_bias:
        problems.append("attention_bias is true, but llama.cpp's Gemma 3 has no biases")
    if problems:
        raise ValueError(
            "this model cannot be a GGUF: " + "; ".join(problems) + "; --to safetensors can hold it"
        )


def chat_template(folder: Path) -> str:
    """Returns the folder's Jinja template, or the embedded model's, which renders Loupe's turns."""
    for source in (folder, TINY):
        if (source / "chat_template.jinja").is_file():
            return (source / "chat_template.jinja").read_text(encoding="utf-8")
        config = source / "tokenizer_config.json"
        template = (
            json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
        )
        if isinstance(template, str):
            return template
    raise AssertionError("the embedded model has a template")

"""Writes a Gemma 3 text model as a GGUF file, with llama.cpp's metadata keys and tensor names.

Source: llama.cpp, conversion/gemma.py and src/models/gemma3.cpp. Two facts have no metadata key:
1. Gemma's RMSNorm multiplies by 1 + weight, and llama.cpp's by the stored value. The file stores 1 + weight.
2. llama.cpp multiplies attention scores by head_dim ** -0.5, or by (hidden_size / num_attention_heads) **
   -0.5 in a model of 62 layers (Gemma 3 27B). A model with another scale is refused.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from common.progress import bar, say, warn
from exporting.gguf_vocab import tokenizer_metadata
from exporting.merged import MergedCheckpoint
from exporting.source import Source
from exporting.target import need_space
from exporting.verify import comparison_sample, verify
from ggml.container import Metadata, TensorInfo, write_gguf
from ggml.quantize import FILE_TYPES, quantize, tensor_type
from model.chat_template import chat_template
from model.config import SLIDING, Gemma3Config
from model.gguf_names import gguf_name
from model.gguf_weights import LAYERS_27B, USUAL_PATTERN
from model.tokenizer import Tokenizer


def export_gguf(source: Source, path: Path, name: str, quant: str, verified_by: str | None) -> str:
    """Writes the model, with its adapter merged in, as the GGUF file `path`, and returns a summary.

    Args:
        name: the model's name, stored under the key general.name.
        quant: the type of the weights, such as "q4_k_m".
        verified_by: "loupe" compares file and model, "llama.cpp" also runs llama.cpp, None compares nothing.
    """
    model = MergedCheckpoint(source.folder, source.adapter)
    tokenizer = Tokenizer(source.folder)
    if model.adapter:
        model.norms()  # Refuses an adapter that changes nothing before minutes of writing.
    size = sum(tensor.nbytes for tensor in plan(model, quant))
    need_space(path, size)
    origin = source.origin | {"verified": "yes" if verified_by else "no"}
    with bar(size, f"writing {quant}", "B") as progress:
        digests = write_model(path, model, quant, name=name, origin=origin, progress=progress.update)
    if verified_by:
        samples = source.held_out.read() if source.held_out else []
        sample = comparison_sample(samples, tokenizer, model.config.max_position_embeddings)
        for found in verify(path, model, quant, sample, tokenizer, digests, verified_by == "llama.cpp"):
            say(str(found))
    summary = f"{quant}, {path.stat().st_size / 2**20:,.1f} MiB{'' if verified_by else ', not verified'}"
    if model.has_quantized_base and model.adapter and not model.adapter.get("use_dora"):
        summary += "; the base was quantized again: --to gguf-lora leaves it as it is"
    return summary


def write_model(
    path: str | Path,
    model: MergedCheckpoint,
    quant: str,
    *,
    name: str,
    origin: dict[str, str],
    progress: Callable[[int], object],
) -> dict[str, str]:
    """Writes the merged model as a GGUF file; returns {part: SHA-256} for the header and each tensor.

    Args:
        quant: the type of the weights, such as "q4_k_m".
        origin: {key: text}; each text is stored in the file under the key loupe.<key>.
        progress: called after each written piece with the size of that piece in bytes.

    Raises:
        ValueError: llama.cpp does not support the config or the tokenizer, or a weight is infinite or NaN.
    """
    tensors = plan(model, quant)
    sources = {gguf_name(ours): ours for ours in model.names}
    types = {tensor.name: tensor.type for tensor in tensors}

    def read(tensor: str) -> Iterator[np.ndarray]:
        for rows in transformed(model, sources[tensor]):
            try:
                piece = quantize(rows, types[tensor])
            except ValueError as e:
                raise ValueError(f"{model.folder}: {sources[tensor]}: {e}") from None
            yield piece
            progress(piece.nbytes)

    metadata = architecture_metadata(model.config, quant, name)
    metadata |= tokenizer_metadata(model.folder, model.config.vocab_size)
    tokenizer = Tokenizer(model.folder)
    metadata["tokenizer.chat_template"] = ("str", chat_template(tokenizer))
    warn_of_other_stops(tokenizer)
    metadata["tokenizer.ggml.add_space_prefix"] = ("bool", False)
    metadata |= {f"loupe.{key}": ("str", text) for key, text in origin.items()}
    return write_gguf(path, metadata, tensors, read)


def plan(model: MergedCheckpoint, quant: str) -> list[TensorInfo]:
    """Returns each tensor's GGUF name, shape and type for the file type `quant`, in checkpoint order."""
    layers, tied = model.config.num_hidden_layers, model.config.tie_word_embeddings
    shapes = {gguf_name(name): model.shapes[name] for name in model.names}
    return [
        TensorInfo(name, shape, tensor_type(quant, name, layers, shape[-1], tied))
        for name, shape in shapes.items()
    ]


def transformed(model: MergedCheckpoint, name: str) -> Iterator[np.ndarray]:
    """Yields a tensor in float32 in pieces (rows, columns). A norm's weight w becomes one row, 1 + w."""
    for rows in model.pieces(name):
        yield rows.contiguous().numpy() if rows.ndim > 1 else (rows + 1.0).numpy()[None]


def architecture_metadata(cfg: Gemma3Config, quant: str, name: str) -> Metadata:
    """Returns the metadata keys general.* and gemma3.*, in the order of llama.cpp's converter.

    Raises ValueError that lists every setting of `cfg` that llama.cpp's Gemma 3 does not support.
    """
    refuse_inexpressible(cfg)
    own: Metadata = {
        "block_count": ("u32", cfg.num_hidden_layers),
        "context_length": ("u32", cfg.max_position_embeddings),
        "embedding_length": ("u32", cfg.hidden_size),
        "feed_forward_length": ("u32", cfg.intermediate_size),
        "attention.head_count": ("u32", cfg.num_attention_heads),
        "attention.head_count_kv": ("u32", cfg.num_key_value_heads),
    }
    if cfg.rope_linear_factor != 1.0:
        own["rope.scaling.type"] = ("str", "linear")
        own["rope.scaling.factor"] = ("f32", cfg.rope_linear_factor)
    own |= {
        "rope.freq_base": ("f32", cfg.rope_theta),
        "rope.freq_base_swa": ("f32", cfg.rope_local_base_freq),
        "attention.layer_norm_rms_epsilon": ("f32", cfg.rms_norm_eps),
        "attention.key_length": ("u32", cfg.head_dim),
        "attention.value_length": ("u32", cfg.head_dim),
    }
    keys: Metadata = {"general.architecture": ("str", "gemma3"), "general.type": ("str", "model")}
    keys |= {"general.name": ("str", name)} | {f"gemma3.{key}": value for key, value in own.items()}
    keys["general.file_type"] = ("u32", FILE_TYPES[quant])
    if cfg.final_logit_softcapping is not None:
        keys["gemma3.final_logit_softcapping"] = ("f32", cfg.final_logit_softcapping)
    keys["gemma3.attention.sliding_window"] = ("u32", cfg.sliding_window)
    sliding = [kind == SLIDING for kind in cfg.layer_types]
    if sliding != [(i + 1) % USUAL_PATTERN != 0 for i in range(cfg.num_hidden_layers)]:
        keys["gemma3.attention.sliding_window_pattern"] = ("[bool]", sliding)
    keys["general.quantization_version"] = ("u32", 2)
    return keys


def refuse_inexpressible(cfg: Gemma3Config) -> None:
    """Raises ValueError that lists every setting of `cfg` that llama.cpp's Gemma 3 does not support."""
    width = cfg.hidden_size / cfg.num_attention_heads if cfg.num_hidden_layers == LAYERS_27B else cfg.head_dim
    problems = []
    if cfg.query_pre_attn_scalar != width:
        scalar = f"query_pre_attn_scalar is {cfg.query_pre_attn_scalar:g}"
        problems.append(f"{scalar}, but llama.cpp scales the scores of this model by {width:g} ** -0.5")
    if cfg.attn_logit_softcapping is not None:
        cap = f"attn_logit_softcapping is {cfg.attn_logit_softcapping:g}"
        problems.append(f"{cap}, but llama.cpp's Gemma 3 has no such cap")
    if cfg.attention_bias:
        problems.append("attention_bias is true, but llama.cpp's Gemma 3 has no biases")
    if problems:
        raise ValueError(f"this model cannot be a GGUF: {'; '.join(problems)}; use --to safetensors")


def warn_of_other_stops(tokenizer: Tokenizer) -> None:
    """Warns of each stop token besides <eos> and <end_of_turn>, because a GGUF file has no key for it."""
    for token in sorted(tokenizer.stop_ids - {tokenizer.eos_id, tokenizer.end_of_turn_id}):
        warn(f"{tokenizer.folder}: the GGUF file cannot say that {tokenizer.piece(token)!r} ends an answer")

"""Writes an adapter alone as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER.

llama.cpp (src/llama-adapter.cpp) computes W x + (alpha / rank) B A x. The file has one alpha, under the key
adapter.lora.alpha; the rank is that of each layer's tensors. Where a layer was trained with another scaling
(rsLoRA or an alpha of its own), the file stores B * scaling / (alpha / rank).
"""

from pathlib import Path

import torch

from common.progress import say
from exporting.llama_cpp import llama
from exporting.merged import MergedCheckpoint
from exporting.source import Source
from exporting.target import need_space
from exporting.verify import (
    LORA_BOUND,
    compare_answers,
    compare_bytes,
    comparison_sample,
    log_probs,
    trained_model,
)
from ggml.container import Metadata, TensorInfo, write_gguf
from lora.dora import DoRALinear
from model.gguf_names import gguf_name
from model.tokenizer import Tokenizer


def export_lora(source: Source, path: Path, name: str, verified_by: str | None = "loupe") -> str:
    """Writes the adapter in float32 to `path`, checks the bytes on the disk, and returns a summary.

    If `verified_by` is "llama.cpp", it also runs the base's GGUF file with this adapter in llama.cpp.

    Raises ValueError if there is no adapter, if it is DoRA or untrained, if a value is not finite, or if the
    base is not a GGUF file and llama.cpp is asked; NotTheSame if llama.cpp computes something else.
    """
    model = MergedCheckpoint(source.folder, source.adapter)
    if not model.adapter:
        raise ValueError("there is no adapter to export; give --adapter, or --to gguf for the model")
    if any(isinstance(layer, DoRALinear) for layer in model.layers.values()):
        raise ValueError(
            "a DoRA adapter cannot be a LoRA GGUF: llama.cpp adds B A x and has no place for DoRA's row "
            "norms; merge it into the model with --to gguf"
        )
    if verified_by == "llama.cpp" and not source.gguf:
        raise ValueError(
            f"--verify llama.cpp: the base {source.name} is not a GGUF file, and llama.cpp loads no other; "
            "leave the option out, or train and export with a GGUF file as the base"
        )
    alpha = float(model.adapter["lora_alpha"])
    tensors = {}
    for layer_path, layer in model.layers.items():
        stem, share = gguf_name(layer_path + ".weight"), layer.scaling / (alpha / layer.r)
        tensors[f"{stem}.lora_a"] = model.tensors[f"{layer_path}.lora_A"].float()
        tensors[f"{stem}.lora_b"] = model.tensors[f"{layer_path}.lora_B"].float() * share
    refuse_useless(tensors)
    metadata: Metadata = {
        "general.architecture": ("str", "gemma3"),
        "general.type": ("str", "adapter"),
        "general.name": ("str", name),
        "adapter.type": ("str", "lora"),
        "adapter.lora.alpha": ("f32", alpha),
    }
    metadata |= {f"loupe.{key}": ("str", text) for key, text in source.origin.items()}
    infos = [TensorInfo(key, tuple(t.shape), "f32") for key, t in tensors.items()]
    need_space(path, sum(info.nbytes for info in infos))
    compare_bytes(path, write_gguf(path, metadata, infos, lambda key: [tensors[key].contiguous().numpy()]))
    if verified_by == "llama.cpp":
        compare_beside(source, path)
    size = f"{path.stat().st_size / 2**20:,.1f} MiB"
    base = source.gguf[0].name if source.gguf else f"a GGUF of {source.name}"
    return f"LoRA of {len(model.layers)} layers in float32, {size}, for {base}"


def compare_beside(source: Source, lora: Path | None) -> None:
    """Prints how llama.cpp differs from what was trained, with the base's GGUF file and `lora` beside it.

    Without `lora` the base alone is compared.

    Raises NotTheSame if it differs by more than llama.cpp's rounding of the inputs of quantized matrices.
    """
    model, tokenizer = MergedCheckpoint(source.folder, source.adapter), Tokenizer(source.folder)
    samples = source.held_out.read() if source.held_out else []
    sample = comparison_sample(samples, tokenizer, model.config.max_position_embeddings)
    trained, context = log_probs(trained_model(model), sample), len(sample.tokens) + 16
    with llama(source.gguf[0], model.config.vocab_size, lora, context) as server:
        name = f"llama.cpp against {'adapter' if lora else 'model'}"
        say(str(compare_answers(name, server, sample, tokenizer, trained, LORA_BOUND)))


def refuse_useless(tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if a value is infinite or NaN, or if every B is zero (the adapter is untrained)."""
    broken = [key for key, t in tensors.items() if not t.isfinite().all()]
    if broken:
        where = f"the adapter holds an infinity or NaN in {', '.join(broken)}"
        raise ValueError(f"{where}; look at the training run, and export an earlier step")
    if not any(t.any() for key, t in tensors.items() if key.endswith(".lora_b")):
        unchanged = f"none of {len(tensors) // 2} weights would change"
        raise ValueError(f"{unchanged}: the adapter is untrained (lora_B is zero); export a trained one")

"""Writes an adapter alone as a GGUF file, for llama.cpp's --lora and Ollama's ADAPTER.

llama.cpp (src/llama-adapter.cpp) computes W x + (alpha / rank) B A x. The file has one alpha, under the key
adapter.lora.alpha; the rank is that of each layer's tensors. Where a layer was trained with another scaling
(rsLoRA or an alpha of its own), the file stores B * scaling / (alpha / rank).
"""

from pathlib import Path

import torch

from exporting.merged import MergedCheckpoint
from exporting.source import Source
from exporting.target import need_space
from exporting.verify import compare_bytes
from ggml.container import Metadata, TensorInfo, write_gguf
from lora.dora import DoRALinear
from model.gguf_names import gguf_name


def export_lora(source: Source, path: Path, name: str) -> str:
    """Writes the adapter in float32 to `path`, checks the bytes on the disk, and returns a summary.

    Raises ValueError if there is no adapter, if it is DoRA or untrained, or if a value is not finite.
    """
    model = MergedCheckpoint(source.folder, source.adapter)
    if not model.adapter:
        raise ValueError("there is no adapter to export; give --adapter, or --to gguf for the model")
    if any(isinstance(layer, DoRALinear) for layer in model.layers.values()):
        raise ValueError(
            "a DoRA adapter cannot be a LoRA GGUF: llama.cpp adds B A x and has no place for DoRA's row "
            "norms; merge it into the model with --to gguf"
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
    size = f"{path.stat().st_size / 2**20:,.1f} MiB"
    base = source.gguf[0].name if source.gguf else f"a GGUF of {source.name}"
    return f"LoRA of {len(model.layers)} layers in float32, {size}, for {base}"


def refuse_useless(tensors: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if a value is infinite or NaN, or if every B is zero (the adapter is untrained)."""
    broken = [key for key, t in tensors.items() if not t.isfinite().all()]
    if broken:
        where = f"the adapter holds an infinity or NaN in {', '.join(broken)}"
        raise ValueError(f"{where}; look at the training run, and export an earlier step")
    if not any(t.any() for key, t in tensors.items() if key.endswith(".lora_b")):
        unchanged = f"none of {len(tensors) // 2} weights would change"
        raise ValueError(f"{unchanged}: the adapter is untrained (lora_B is zero); export a trained one")

"""An adapter alone as GGUF, for llama.cpp's --lora and Ollama's ADAPTER.

llama.cpp (src/llama-adapter.cpp) adds scale * B A x with scale = adapter.lora.alpha / rank, the rank read off
each tensor. One alpha for the whole file is all there is, so what makes a layer's scaling another (its own
alpha or rank, rsLoRA) is put into its B.
"""

from pathlib import Path

import torch

from exporting.merged import MergedCheckpoint
from exporting.target import need_space
from ggml.container import TensorInfo, write_gguf
from lora.dora import DoRALinear
from model.gguf_names import gguf_name


def write_lora(
    path: str | Path, model: MergedCheckpoint, *, name: str, origin: dict[str, str]
) -> dict[str, str]:
    """Writes the adapter in float32 and returns write_gguf's digests.

    Raises ValueError for DoRA, whose row lengths no tensor of the file can say, and for an adapter that is
    untrained or not finite.
    """
    if model.adapter is None:
        raise ValueError("there is no adapter to export; give --adapter, or --to gguf for the model")
    if any(isinstance(layer, DoRALinear) for layer in model.layers.values()):
        raise ValueError(
            "a DoRA adapter cannot be a LoRA GGUF: llama.cpp adds B A x and knows no row lengths; merge it "
            "into the model with --to gguf"
        )
    alpha = float(model.adapter["lora_alpha"])
    tensors = {}
    for layer_path, layer in model.layers.items():
        a, b = (model.tensors[f"{layer_path}.{half}"].float() for half in ("lora_A", "lora_B"))
        stem = gguf_name(layer_path + ".weight")
        tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"] = a, b * (layer.scaling / (alpha / layer.r))
    refuse_useless(tensors)
    metadata = {
        "general.architecture": ("str", "gemma3"),
        "general.type": ("str", "adapter"),
        "general.name": ("str", name),
        "adapter.type": ("str", "lora"),
        "adapter.lora.alpha": ("f32", alpha),
    }
    infos = [TensorInfo(key, tuple(t.shape), "f32") for key, t in tensors.items()]
    need_space(path, sum(info.nbytes for info in infos) + 2**24)
    return write_gguf(
        path,
        metadata | {f"loupe.{key}": ("str", value) for key, value in origin.items()},
        infos,
        lambda key: [tensors[key].contiguous().numpy()],
    )


def refuse_useless(tensors: dict[str, torch.Tensor]) -> None:
    """ValueError for numbers that are not finite, and where every B is zero, so that the file would change no
    weight.
    """
    broken = [key for key, t in tensors.items() if not t.isfinite().all()]
    if broken:
        raise ValueError(
            f"the adapter holds an infinity or NaN in {', '.join(broken)}; look at the training run, and "
            f"export an earlier step"
        )
    if not any(t.any() for key, t in tensors.items() if key.endswith(".lora_b")):
        raise ValueError(
            f"none of {len(tensors) // 2} weights would change: the adapter is untrained (lora_B is zero); "
            f"export a trained one"
        )

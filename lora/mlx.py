"""Reads adapters of mlx-lm (mlx_lm/tuner/lora.py, dora.py) as if PEFT had written them.

mlx-lm computes W x + scale * (x lora_a) lora_b. Its lora_a (in, r) and lora_b (r, out) are PEFT's transposed,
its scale is PEFT's lora_alpha / r, and its m (out,) is DoRA's lora_magnitude_vector.
"""

from collections.abc import Iterable

import torch

WEIGHTS = "adapters.safetensors"
NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def is_mlx(config: dict) -> bool:
    """Returns whether mlx-lm wrote an adapter_config.json."""
    return "peft_type" not in config and bool({"fine_tune_type", "lora_parameters"} & config.keys())


def peft_config(config: dict, names: Iterable[str]) -> dict:
    """Returns PEFT's adapter_config.json for mlx-lm's, given the names of the tensors.

    Raises ValueError if all weights were trained, or if the rank or the scale is missing.
    """
    kind, settings = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise ValueError(
            f"fine_tune_type: {kind!r}: mlx-lm trained whole weights, which are no adapter; write a model "
            "with `mlx_lm.fuse` and take it with --model"
        )
    try:
        rank, scale = settings["rank"], settings["scale"]  # type: ignore[index]
        lora_alpha = float(scale + 0) * (rank + 0)  # of a text or a list, `*` would make copies
    except (KeyError, TypeError, OverflowError):
        raise ValueError("lora_parameters: must be mlx-lm's object with the numbers rank and scale") from None
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": settings.get("dropout", 0.0),  # type: ignore[union-attr]
        "use_dora": kind == "dora",
        "target_modules": sorted({name.rpartition(".")[0] for name in names}),
    }


def peft_tensor(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Returns the name, without PEFT's prefix, and the tensor that PEFT would have written."""
    path, _, kind = name.rpartition(".")
    return f"{path}.{NAMES.get(kind, kind)}", tensor.T.contiguous() if tensor.ndim == 2 else tensor

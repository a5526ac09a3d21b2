"""Floating-point operations (FLOPs) of a training step, and the peak FLOP/s of a GPU.

FLOPs / seconds / peak is the model FLOPs utilization, MFU (Chowdhery et al. 2022, PaLM, appendix B).
"""

import re

import torch

from model.gemma3 import Gemma3ForCausalLM
from model.quantized import all_weights

# FLOP/s of dense bfloat16 products with float32 accumulation, from NVIDIA's data sheets. The first pattern
# that occurs in the device's name counts.
PEAKS = {
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H[12]00": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}
# Devices whose name has one of these parts have another peak.
OTHERS = r" Laptop| D\b| Ti\b|MIG"


def step_flops(model: Gemma3ForCausalLM, tokens: int, targets: int) -> int:
    """Returns the FLOPs of a training step over `tokens` tokens, of which `targets` are supervised positions.

    A matrix of n values costs 2 n FLOPs a token forward, 2 n for the gradient of its input, and 2 n for its
    own gradient if it is trainable. The head, and the last layer's o_proj and MLP, are computed at supervised
    positions only. Attention's products of q, k and v are not counted: a twelfth of all in short documents.
    """
    last = len(model.model.layers) - 1
    at_targets = (f"{last}.self_attn.o_proj.", f"{last}.mlp.")
    matrices = {n: w for n, w in all_weights(model.model.layers).items() if len(w.shape) == 2}
    uses = [(w, targets if n.startswith(at_targets) else tokens) for n, w in matrices.items()]
    uses.append((model.head_weight, targets))
    return sum((6 if w.requires_grad else 4) * w.numel() * n for w, n in uses)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the peak FLOP/s of a GPU for products in bfloat16 or float16; None for others or unknown."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    known = [peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)]
    return known[0] if known and not re.search(OTHERS, name) else None

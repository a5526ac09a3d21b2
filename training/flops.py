"""How much a step multiplies, and the share of a GPU's peak that this is: MFU, model FLOPs utilisation
(Chowdhery et al. 2022, PaLM, appendix B).
"""

import re

import torch

# Dense bfloat16 products with sums in float32, FLOP/s, by a part of the device's name; the first that fits
# counts (NVIDIA's data sheets).
PEAKS = {
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H[12]00": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}
OTHERS = r" Laptop| D\b| Ti\b|MIG"  # cards of the same name, and parts of cards, that promise less or more


def step_flops(model, tokens: int, targets: int) -> int:
    """FLOPs of the products with weights in a step over streams of so many tokens, of which `targets` are
    predicted.

    A weight matrix of n numbers costs a token 2 n forward, 2 n for the gradient of its input, and 2 n for its
    own where it trains. The head, and the last layer behind its attention, run at the targets only. Left out:
    attention's products of tokens with tokens (a twelfth where documents are short).
    """
    last, head = model.model.layers[-1], model.head_weight
    few = {id(p) for part in (last.self_attn.o_proj, last.mlp) for p in part.parameters()}
    layers = [
        (p, targets if id(p) in few else tokens) for p in model.model.layers.parameters() if p.ndim == 2
    ]
    return sum((6 if p.requires_grad else 4) * p.numel() * n for p, n in [*layers, (head, targets)])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the GPU promises for products in half precision; None where no data sheet of it is known
    here, or for other products.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return (
        None
        if re.search(OTHERS, name)
        else next((peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    )

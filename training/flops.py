"""The floating-point operations of a step, and the peak of the GPU, which give MFU, model FLOPs utilization
(Chowdhery et al. 2022, PaLM, appendix B).
"""

import re

import torch

from model.gemma3 import Gemma3ForCausalLM

# FLOP/s of dense bfloat16 products that are summed in float32, from NVIDIA's data sheets. The first pattern
# that is found in the device's name counts.
PEAKS = {
    r"H100 PCIe": 756e12,
    r"H[12]00 NVL": 835e12,
    r"H[12]00": 989e12,
    r"A100": 312e12,
    r"L40S": 362e12,
    r"RTX 4090": 165e12,
    r"RTX 3090": 71e12,
}
# Other cards with such a name, and parts of a card, have another peak.
OTHERS = r" Laptop| D\b| Ti\b|MIG"


def step_flops(model: Gemma3ForCausalLM, tokens: int, targets: int) -> int:
    """Returns the FLOPs of the products with weights in a step over so many tokens and supervised positions.

    A token costs 2 n FLOPs forward for a matrix of n values, 2 n for the gradient of its input, and 2 n for
    the matrix's own gradient if it is trainable. The head, and all that follows the last layer's attention,
    run at the supervised positions only. The products inside attention are left out; they are a twelfth of
    the total for short documents.
    """
    last, head = model.model.layers[-1], model.head_weight
    at_targets = {id(p) for n, p in last.named_parameters() if n.startswith(("self_attn.o_proj", "mlp"))}
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    uses = [(p, targets if id(p) in at_targets else tokens) for p in matrices] + [(head, targets)]
    return sum((6 if p.requires_grad else 4) * p.numel() * n for p, n in uses)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns the FLOP/s that the GPU's data sheet promises for 16-bit products, or None if it is unknown."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    known = [peak for part, peak in PEAKS.items() if re.search(rf"\b{part}\b", name)]
    return known[0] if known and not re.search(OTHERS, name) else None

"""Steps that cannot be right: what is not finite in them, and a loss that runs away."""

import math
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from data.packing import Batch
from model.weights import is_finite

MAX_BAD_STEPS = 3  # This many steps in a row that were not applied stop the run.
RECENT, BEFORE = 5, 50  # losses that are compared with each other; a few hard batches change neither median


class Diverged(RuntimeError):
    """Raised where going on would learn nothing, or lose what was learnt."""


def bad_weight(model: nn.Module, trainable: bool = False) -> str | None:
    """Returns "the weight NAME" of the first parameter, or trainable one, that is not finite, or None."""
    for name, p in model.named_parameters():
        if (p.requires_grad or not trainable) and not is_finite(p.detach()):
            return f"the weight {name}"
    return None


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Returns {parameter: norm of its gradient}, the last layer first, as the backward pass runs."""
    with_grad = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return {name: torch.linalg.vector_norm(grad.float()).item() for name, grad in reversed(with_grad)}


def bad_gradient(norms: dict[str, float]) -> str:
    """Returns "the gradient of NAME", the first that the backward pass made not finite."""
    name = next((name for name, norm in norms.items() if not math.isfinite(norm)), None)
    # Each gradient may be finite, and the sum of their squares not.
    return f"the gradient of {name}" if name else "the gradients' norm"


@torch.no_grad()
def bad_output(
    model: nn.Module, forward: Callable[[Batch], object], micro_batches: list[Batch]
) -> tuple[str, list[str]] | None:
    """Returns the first module output that is not finite in forward(batch), and the ids of that batch.

    None if all outputs are finite.
    """
    found: list[str] = []

    def look(name):
        def hook(_, __, output):
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of {name}")

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if n]
    try:
        for batch in micro_batches:
            forward(batch)
            if found:
                return found[0], batch.ids
    finally:
        for h in handles:
            h.remove()
    return None


def ran_away(losses: list[float], factor: float) -> bool:
    """Returns whether the median of the last RECENT losses is over `factor` times that of the BEFORE before.

    False with fewer losses, and with a factor of 0.
    """
    if not factor or len(losses) < RECENT + BEFORE:
        return False
    return median(losses[-RECENT:]) > factor * median(losses[-RECENT - BEFORE : -RECENT])

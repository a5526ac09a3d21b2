"""train.py --plan prints the memory that a training run will take, and the largest batch that fits."""

import torch

from common.device import Precision
from common.machine import free, mebibytes
from common.progress import say
from model.hub import resolve
from training import build
from training.config import Config
from training.dataset import read
from training.memory_estimate import estimate, too_large_to_probe
from training.memory_probe import Probe, probe

MARGIN = 1.1  # This many times the estimate has to be free: a long run grows a little.


def plan(cfg: Config, gpu: float = 0) -> None:
    """Prints the memory of a run on this machine or, if `gpu` is not 0, on a GPU of so many GiB.

    Needs no weights of the base, and writes no run folder.
    """
    cfg, precision = build.prepare(cfg)
    device = precision.device
    folder = resolve(cfg.model.name, cfg.model.revision, weights=False)
    # Raises for mistakes in the rows before anything is measured.
    base, data = read(cfg, build.make_objective(cfg), folder)
    room, where = free(device), str(device)
    if gpu:
        room, where = int(gpu * 2**30), f"a GPU of {gpu:g} GiB"
        # The device is only there to be asked for: nothing is computed.
        precision = Precision(
            "bf16" if cfg.train.precision == "auto" else precision.name, torch.device("cpu")
        )
    if gpu or too_large_to_probe(cfg, base, data, precision):
        say("estimated  from the shapes of a step's tensors, none of which is computed")
        found = estimate(cfg, base, data, precision)
    else:
        say("probing    some of the run's steps, with random weights: half a minute, more for a large base")
        found = probe(cfg, int(room / MARGIN))
    say(f"\nmost is taken in {found.heaviest}, in {precision.name} on {where}:")
    counted = sum(found.parts.values())
    for part, size in found.parts.items():
        _line(part, size)
    _line("everything else", max(0, found.peak - counted), "activations, logits, libraries, gaps in the heap")
    _line("in all", found.peak)
    _line("free", room)
    fits = not found.failed and found.peak * MARGIN <= room
    say("it fits" if fits else _remedy(cfg, found, int(room / MARGIN)))


def _line(name: str, size: int, remark: str = "") -> None:
    say(f"  {name:22}{mebibytes(size):>12}   {remark}".rstrip())


def _remedy(cfg: Config, found: Probe, room: int) -> str:
    """Returns the advice to print if a run does not fit into `room` bytes: the settings to lower."""
    t, name = cfg.train, "max_tokens" if cfg.train.max_tokens else "batch_size"
    wanted, size = getattr(t, name), found.largest(room)
    if not size:
        less = "" if t.gradient_checkpointing else "set train.gradient_checkpointing = true, "
        less += "" if cfg.model.quantize not in ("none", "keep") else "quantize the base (model.quantize), "
        return (
            f"it does not fit, not even one row at a time: {less}lower data.max_length "
            f"(now {cfg.data.max_length}) or adapter.r, keep the base in bfloat16, or use a smaller model"
        )
    if size >= wanted:
        return "training fits, but evaluation does not: lower train.eval_samples or generate.max_new_tokens"
    steps = -(-wanted * t.gradient_accumulation_steps // size)
    return (
        f"it does not fit; the largest batch that does is train.{name} = {size} (now {wanted}), with "
        f"train.gradient_accumulation_steps = {steps} (now {t.gradient_accumulation_steps}) "
        "for a step of as many samples"
    )

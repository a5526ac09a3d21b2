"""train.py --plan prints the memory that a training run will take, and the largest batch that fits."""

from common.machine import free, mebibytes
from common.progress import say
from model.hub import resolve
from training import build
from training.config import Config
from training.dataset import read
from training.memory_probe import Probe, probe

MARGIN = 1.1  # This many times the estimate has to be free: a long run grows a little.


def plan(cfg: Config) -> None:
    """Measures and prints the memory of a run; needs no weights of the base, and writes no run folder."""
    cfg, precision = build.prepare(cfg)
    device = precision.device
    folder = resolve(cfg.model.name, cfg.model.revision, weights=False)
    # Raises for mistakes in the rows before anything is measured.
    read(cfg, build.make_objective(cfg), folder)
    room = free(device)
    say("probing    some of the run's steps, with random weights: half a minute, more for a large base")
    found = probe(cfg, int(room / MARGIN))
    say(f"\nmost is taken in {found.heaviest}, in {precision.name} on {device}:")
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
        return (
            "it does not fit, not even one row at a time: lower data.max_length "
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

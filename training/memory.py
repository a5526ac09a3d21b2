"""What memory a run will take here, planned before it starts (train.py --plan).

The tensors are counted without making them (training/rehearsal.py).  On CUDA that is what the allocator's peak will be, but for what kernels take inside; on a
CPU, where they fit, steps are then done for real and the process is measured (training/trial.py).
"""

from common.device import Precision, pick_device
from common.machine import free, mebibytes, resident
from common.progress import say
from model.hub import resolve
from training import setup, trial
from training.config import Config
from training.dataset import read
from training.rehearsal import PARTS, Rehearsal, largest

PROCESS, AROUND = "process", "around them"
MARGIN = 1.3  # times the tensors' bytes is what has to be free for a run on CUDA, and for a trial to be made
TRIED = 1.1  # times what a trial took is what has to be free for its run: a long one grows on


def plan(cfg: Config) -> None:
    """Prints what the run will take of this machine, and the largest batch that fits where it does not; needs the rows and the base's config.json and
    tokenizer.json, and writes no run."""
    device = pick_device(cfg.train.device)
    setup.refuse_without_compiler(cfg, device)
    precision = Precision(cfg.train.precision, device)
    reader, data = read(cfg, resolve(cfg.model.name, cfg.model.revision, weights=False))
    process, room = resident() if device.type == "cpu" else 0, free(device)
    say("rehearsing the run without its numbers: some seconds, more for a large base")
    rehearsal = Rehearsal(cfg, setup.without_weights(reader), data, precision)
    worst = max(
        [rehearsal.loading, rehearsal.steps(cfg.train), *rehearsal.evaluations()], key=lambda f: f.total
    )
    around, for_tensors = 0, (room - process) / MARGIN
    if (
        tried := device.type == "cpu" and 2 * process + worst.total * MARGIN <= room
    ):  # this process stays beside the trial's
        say("doing some of its steps, with random weights: a minute, more for a large base and many rows")
        if measured := trial.in_its_own_process(trial.peak, cfg):
            around = max(0, measured - worst.total - process)
            for_tensors = room / TRIED - process - around
        else:
            say("which were ended for want of memory: what they would have taken is not known")
            for_tensors = min(for_tensors, worst.total) / 2
    say(f"\nmost is taken in {worst.phase}, in {precision.name} on {device}:")
    for part in PARTS:
        _line(part, worst.parts.get(part, 0))
    if device.type == "cpu":
        _line(PROCESS, process, "interpreter, torch and rows, measured in this one")
    if tried:
        _line(AROUND, around, "gaps in the heap, kernels, libraries: what the steps took more")
    _line("in all", worst.total + process + around)
    _line("free", room)
    say("it fits" if worst.total <= for_tensors else _remedy(rehearsal, int(for_tensors)))


def _line(name: str, size: int, remark: str = "") -> None:
    say(f"  {name:20}{mebibytes(size):>12}   {remark}".rstrip())


def _remedy(rehearsal: Rehearsal, room: int) -> str:
    """The largest batch whose steps fit into `room` bytes beside the process, with as many samples a step as before."""
    cfg, best = rehearsal.cfg, largest(rehearsal, room)
    t, name = cfg.train, "max_tokens" if cfg.train.max_tokens else "batch_size"
    if best is None:
        return (
            f"it does not fit, not even one row at a time: lower data.max_length (now {cfg.data.max_length}) or adapter.r, keep the base in bfloat16, "
            "or take a smaller model"
        )
    if best == t:
        return "training fits, but what comes around it does not: lower train.eval_samples or generate.max_new_tokens"
    now, size = getattr(t, name), getattr(best, name)
    steps = -(-now * t.gradient_accumulation_steps // size)
    return (
        f"it does not fit; the largest batch that does is train.{name} = {size} (now {now}), with train.gradient_accumulation_steps = {steps} "
        f"(now {t.gradient_accumulation_steps}) for a step of as many samples"
    )

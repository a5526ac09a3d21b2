"""What memory a run will take here, planned before it starts (train.py --plan).

On CUDA a plan is what the allocator's peak will be.  A process on the CPU also holds the interpreter, torch's libraries and the rows: the process that plans
holds the same, so what that takes is measured in it, after a doll's steps have loaded what a run loads.
"""

from dataclasses import replace

import torch

from data.packing import Batch, pack
from data.render import IGNORE_INDEX, Document
from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.generate import generate
from model.hub import resolve
from training import loop, setup
from training.config import Config
from training.documents import read
from training.machine import free, mebibytes, resident
from training.optim import make_optimizers
from training.precision import Precision, pick_device, pick_precision
from training.progress import say
from training.rehearsal import PARTS, Rehearsal, largest

PROCESS = "process"
MARGIN = 1.3  # runs were seen to take a quarter more than planned beside the process
DOLL_LAYERS, DOLL_WORDS, REMAINDERS = 2, 2**14, 32


def plan(cfg: Config) -> None:
    """Prints what the run will take of this machine, and the largest batch that fits where it does not; needs the rows and the base's config.json and
    tokenizer.json, and writes nothing."""
    device = pick_device(cfg.train.device)
    precision = Precision(pick_precision(cfg.train.precision, device), device)
    reader, data = read(cfg, resolve(cfg.model.name, cfg.model.revision, weights=False))
    base = setup.without_weights(reader)
    say("rehearsing the run without its numbers: some seconds, more for a large base")
    process = 0
    if device.type == "cpu":
        micro_batches = setup.build_plan(cfg, setup.build_loader(cfg, data.documents)).total_steps * cfg.train.gradient_accumulation_steps
        warm_up(cfg, base.model.config, micro_batches, precision)
        process = resident()
    room = free(device)
    rehearsal = Rehearsal(cfg, base, data, precision)
    phases = [rehearsal.loading, rehearsal.steps(cfg.train), *rehearsal.evaluations()]
    worst = max(phases, key=lambda f: f.total)
    say(f"\nmost is taken in {worst.phase}, in {precision.name} on {device}:")
    for part in PARTS:
        say(f"  {part:20}{mebibytes(worst.parts.get(part, 0)):>12}")
    if process:
        say(f"  {PROCESS:20}{mebibytes(process):>12}   interpreter, libraries and rows, measured in this one")
    say(f"  {'in all':20}{mebibytes(worst.total + process):>12}\n  {'free':20}{mebibytes(room):>12}")
    if worst.total * MARGIN + process <= room:
        say("it fits")
    else:
        say(_remedy(rehearsal, int((room - process) / MARGIN)))


def _remedy(rehearsal: Rehearsal, room: int) -> str:
    """The largest batch whose steps fit into `room` bytes beside the process, with as many samples a step as before."""
    cfg, best = rehearsal.cfg, largest(rehearsal, room)
    t, name = cfg.train, "max_tokens" if cfg.train.max_tokens else "batch_size"
    if best is None:
        return (f"it does not fit, not even one row at a time: lower data.max_length (now {cfg.data.max_length}) or adapter.r, keep the base in bfloat16, "
                "or take a smaller model")
    if best == t:
        return "training fits, but what comes around it does not: lower train.eval_samples or generate.max_new_tokens"
    now, size = getattr(t, name), getattr(best, name)
    steps = -(-now * t.gradient_accumulation_steps // size)
    return (f"it does not fit; the largest batch that does is train.{name} = {size} (now {now}), with train.gradient_accumulation_steps = {steps} "
            f"(now {t.gradient_accumulation_steps}) for a step of as many samples")


def warm_up(cfg: Config, shape: Gemma3Config, micro_batches: int, precision: Precision) -> None:
    """Trains a doll, two layers of the base's widths with few words, and lets it answer: that loads the libraries' code and what they keep.

    In bfloat16 oneDNN compiles kernels for the remainders of lengths by its blocks, so each comes once, or as many as the run has micro-batches.
    """
    doll = Gemma3ForCausalLM(replace(shape, num_hidden_layers=DOLL_LAYERS, layer_types=[SLIDING, FULL], vocab_size=DOLL_WORDS))
    doll.reset_parameters(seed=0)
    doll.to(precision.base_dtype(cfg.model.dtype, trains_all=cfg.adapter.type == "full"))
    setup.add_adapters(doll, replace(cfg, adapter=replace(cfg.adapter, init_from="", target_modules=["all-linear"])))
    trained = [p for p in doll.parameters() if p.requires_grad]
    optimizers = make_optimizers(doll, cfg.train.optimizer, cfg.train.learning_rate, cfg.train.weight_decay)
    for n in range(min(REMAINDERS, micro_batches) if precision.dtype == torch.bfloat16 else 2):
        loop.train_step(doll, setup.OBJECTIVES[cfg.train.objective], [_length(n)], trained, optimizers, precision, 0.0, cfg.train.max_grad_norm)
    with precision.autocast():
        generate(doll, [[1] * (50 + 9 * n) for n in range(8)], max_new_tokens=16, stop_ids=())


def _length(n: int) -> Batch:
    """Documents of three lengths which, like their sum, have the n-th of all remainders by REMAINDERS."""
    return pack([Document([1] * m, [1] * (m - 1) + [IGNORE_INDEX], "doll") for m in (33 + 5 * n % 32, 65 + 3 * n % 32, 97 + 7 * n % 32)])

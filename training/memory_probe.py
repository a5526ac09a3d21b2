"""The memory probe: measures the peak memory of some training steps, with random weights, in a new process.

The probe runs the largest micro-batches, evaluations and prompts and reads the peak memory of its process; on
CUDA, that of the allocator. Counting tensors would not give the peak on a CPU, where the heap has gaps,
operators allocate inside, and oneDNN keeps bfloat16 kernels for each shape.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from math import log2
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from common.device import Precision, pick_device
from common.machine import peak_memory
from data.packing import Batch
from data.render import Document
from generation.generate import generate
from model.quantized import all_weights
from model.tokenizer import Tokenizer
from training import build, evaluation, loop
from training.build import BaseModel
from training.config import Config, Train
from training.dataset import TrainingData
from training.optim import Optimizers, make_optimizers

# Seconds after which no further training step begins. In float32 the largest step decides (docs/log.md).
SECONDS = {"fp32": 3, "bf16": 20, "fp16": 20}
# Seconds after which no larger micro-batch is tried; its peak is extrapolated from the last two.
MOST_SECONDS = 16
MOST_DOUBLINGS = 3  # The growth of the peak is extended to at most 2^3 times the steps that were done.
NEW_TOKENS = 2  # of each completion
ROWS = 64  # prompts that are decoded together: generation's default


@dataclass
class Probe:
    """Peak memory in bytes that the probe measured; `failed` is the phase in which memory ran out, or ""."""

    parts: dict[str, int] = field(default_factory=dict)  # bytes that can be counted
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (rows or tokens of a micro-batch, peak)
    phases: dict[str, int] = field(default_factory=dict)  # peak at the end of each phase
    failed: str = ""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def heaviest(self) -> str:
        """Returns the name of the first phase with the highest peak."""
        return next(name for name, peak in self.phases.items() if peak == self.peak)

    def largest(self, room: int) -> int:
        """Returns the largest size of a micro-batch that fits into `room` bytes, interpolated; 0 for none."""
        fitting = [0, *(size for size, peak in self.sizes if peak <= room)]
        for (low, below), (high, above) in zip(self.sizes, self.sizes[1:], strict=False):
            if below <= room < above:
                return max(fitting[-1], low + int((high - low) * (room - below) / (above - below)))
        return max(fitting)


def probe(cfg: Config, room: int) -> Probe:
    """Runs the probe in a new process; if Linux kills that for lack of memory, returns the results so far.

    A micro-batch whose predicted peak exceeds `room` bytes is not run.
    """
    context = multiprocessing.get_context("spawn")  # a fork would lack OpenMP's threads
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(cfg, room, sender), daemon=True)
    # The child inherits this: Ctrl-C ends the parent, which kills it.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    sender.close()
    found = Probe(phases={"loading": 0}, failed="loading")
    try:
        while True:  # the child sends what it knows after each phase
            found = receiver.recv()
            if isinstance(found, Exception):
                raise found
    except EOFError:
        process.join()
        if process.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the memory probe ended with code {process.exitcode}") from None
        return found
    finally:
        process.kill()


def _work(cfg: Config, room: int, sender: Connection) -> None:
    """Runs in the child process: sends a Probe after each phase, or the exception that ended the probe."""
    with suppress(OSError):  # where memory runs out, Linux kills this process and not the user's others
        Path("/proc/self/oom_score_adj").write_text("1000")
    found = Probe(phases={"loading": 0}, failed="loading")
    try:
        for found in _phases(replace(cfg, model=replace(cfg.model, init="random")), room):
            sender.send(found)
    except Exception as e:
        if isinstance(e, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(e):
            sender.send(found)  # torch's error on a CPU is a RuntimeError
        else:
            e.add_note(traceback.format_exc())
            sender.send(e)


def _phases(cfg: Config, room: int) -> Iterator[Probe]:
    """Yields one growing Probe, after loading, each measured training size, evaluation and completions."""
    found = Probe()
    device = pick_device(cfg.train.device)
    precision = Precision(cfg.train.precision, device)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        base, data = build.load_base(cfg, precision)
    found.parts["base weights"] = sum(w.nbytes for w in all_weights(base.model).values())
    build.add_adapters(base.model, cfg)
    trainable = sum(p.nbytes for p in build.trainable_weights(base.model).values())
    found.parts["base weights"] -= trainable if cfg.adapter.type == "full" else 0
    if build.resolve_compile(base.model, cfg, data.documents, device).train.compile:
        base.model.compile_layers()
    t = cfg.train
    optimizers = make_optimizers(base.model, t.optimizer, t.learning_rate, t.weight_decay, t.adam_beta2)
    found.phases["loading"] = peak_memory(device)
    found.parts |= {"trainable parameters": trainable, "gradients": trainable}
    found.parts["optimizer state"] = trainable * (2 if t.optimizer == "adamw" else 1)
    found.failed = "training"
    yield found
    for _ in _train(cfg, base, data, optimizers, room, found):
        yield found
    if found.failed:
        return
    found.failed = "evaluation"
    objective = build.make_objective(cfg)
    split = [evaluation.groups(v.documents, objective.per_sample) for v in data.validation]
    for documents in (max(groups, key=_tokens) for groups in split):
        if _exceeds_training(cfg, base, data, documents):
            evaluation.mean_loss(base.model, objective, documents, precision)
    found.phases["evaluation"], found.failed = peak_memory(device), "completions"
    yield found
    optimizers.clear()  # the run has ended its training by then
    for prompts in longest_prompts(cfg, base.tokenizer, data):
        _complete(cfg, base, prompts, precision)
    found.phases["completions"], found.failed = peak_memory(device), ""
    yield found


def _train(
    cfg: Config, base: BaseModel, data: TrainingData, optimizers: Optimizers, room: int, found: Probe
) -> Iterator[Probe]:
    """Measures the largest micro-batch of each size, then the first steps of the run; yields after each size.

    Stops at a size whose predicted peak exceeds `room` bytes. After MOST_SECONDS it extrapolates the peak.
    """
    objective, precision, clip = build.make_objective(cfg), base.precision, cfg.train.max_grad_norm

    def step(micro_batches: list[Batch]) -> int:
        largest = [objective.largest_batch(batch) for batch in micro_batches]
        loop.train_step(base.model, objective, largest, optimizers, precision, 0.0, clip)
        base.model.zero_grad(set_to_none=True)
        return peak_memory(precision.device)

    loader = build.build_loader(cfg, data.documents)
    schedule = build.build_schedule(cfg, loader)
    batches = schedule.total_steps * cfg.train.gradient_accumulation_steps
    wanted, start, slow = sizes(cfg.train, data), _seconds(), False
    for size, train in wanted:
        slow = len(found.sizes) > 1 and _seconds() - start > MOST_SECONDS
        size = wanted[-1][0] if slow else size
        if slow or (len(found.sizes) > 1 and _predicted(found.sizes, size) > room):
            found.sizes.append((size, _predicted(found.sizes, size)))
            found.phases["training"] = found.sizes[-1][1]
            if found.phases["training"] > room:
                yield found
                return
            break
        smaller = build.build_loader(replace(cfg, train=train), data.documents)
        done = smaller.plan(0)[: -(-batches * wanted[-1][0] // size)]  # those that a short run gets to
        heaviest = smaller.batch(max(done, key=lambda group: _tokens([data.documents[i] for i in group])))
        found.sizes.append((size, step([heaviest] * min(2, cfg.train.gradient_accumulation_steps))))
        found.phases["training"] = found.sizes[-1][1]
        yield found
    peaks, start, seconds = [found.phases["training"]], _seconds(), SECONDS[precision.name]
    for batch in loader.batches(0):
        if slow or len(peaks) > batches or _seconds() - start > seconds:
            break
        peaks.append(step([batch]))
    found.phases["training"] = peaks[-1] if precision.name == "fp32" else extended(peaks, batches)
    found.failed = ""
    yield found


def _seconds() -> float:
    """Returns the processor time of this thread in seconds; other processes do not change it."""
    return time.thread_time()


def extended(peaks: list[int], steps: int) -> int:
    """Returns the predicted peak after `steps` steps, from `peaks`: before the steps and after each of them.

    Each doubling of the steps is taken to add as much as the last measured one did (docs/log.md).
    """
    done = len(peaks) - 1
    doublings = min(MOST_DOUBLINGS, log2(max(1, steps / max(1, done))))
    return peaks[-1] + int(doublings * (peaks[-1] - peaks[done // 2]))


def sizes(train: Train, data: TrainingData) -> list[tuple[int, Train]]:
    """Returns [(size of a micro-batch, `train` with this size)], doubling up to the size in `train`.

    Sizes are samples, from 1. If train.max_tokens is set they are tokens, from the longest sample.
    """
    name, smallest = "batch_size", 1
    if train.max_tokens:
        name, smallest = "max_tokens", max(len(d.input_ids) for d in data.documents)
    wanted = getattr(train, name)
    found, size = [wanted], smallest
    while size < wanted:
        found.insert(-1, size)
        size *= 2
    return [(size, replace(train, **{name: size})) for size in found]


def _predicted(known: list[tuple[int, int]], size: int) -> int:
    """Returns the peak in bytes at `size`, on the line through the last two known (size, peak)."""
    (a, low), (b, high) = known[-2:]
    return high + (high - low) * (size - b) // (b - a)


def _tokens(documents: list[Document]) -> int:
    return sum(len(d.input_ids) for d in documents)


def _exceeds_training(cfg: Config, base: BaseModel, data: TrainingData, documents: list[Document]) -> bool:
    """Returns whether an evaluation of the documents may take more memory than a training step.

    An evaluation holds the activations of one layer at a time, a training step those of all layers.
    """
    groups = build.build_loader(cfg, data.documents).plan(0)
    heaviest = max(_tokens([data.documents[i] for i in group]) for group in groups)
    layers = 1 if cfg.train.gradient_checkpointing else base.model.config.num_hidden_layers
    return _tokens(documents) > layers * heaviest


def longest_prompts(cfg: Config, tokenizer: Tokenizer, data: TrainingData) -> list[list[list[int]]]:
    """Returns the ROWS longest prompts of each validation set and of generate.prompts, as token ids."""
    sets = [[e[0] for e in map(evaluation.last_exchange, v.samples) if e] for v in data.validation]
    sets.append([(("user", prompt),) for prompt in cfg.generate.prompts])
    rendered = [[tokenizer.render_prompt(messages) for messages in one] for one in sets]
    return [sorted(prompts, key=len)[-ROWS:] for prompts in rendered if prompts]


class _Enough(Exception):
    """Ends generation once the KV cache is allocated and NEW_TOKENS of each completion are decoded."""


def _complete(cfg: Config, base: BaseModel, prompts: list[list[int]], precision: Precision) -> None:
    """Decodes NEW_TOKENS for each prompt, in a KV cache that is as large as for whole completions."""
    tokens = count(1)

    def on_token(row: int, token: int) -> None:
        if next(tokens) >= NEW_TOKENS * len(prompts):
            raise _Enough

    settings: dict[str, Any] = asdict(cfg.generate)
    del settings["prompts"]
    with suppress(_Enough), precision.autocast():
        generate(base.model, prompts, stop_ids=(), on_token=on_token, **settings)

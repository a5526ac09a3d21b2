"""Steps of a run done for real in a process of their own, with random weights: what they take is measured.

On a CPU no count of tensors (training/ledger.py) tells that.  The C library's heap has gaps between tensors of unlike sizes, which grow with every step that is
unlike the last; operators take memory inside; and in bfloat16 oneDNN keeps kernels for the shapes that it has met.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from common.device import Precision, pick_device
from common.machine import peak_memory
from common.progress import bar
from generation.generate import generate
from training import evaluation, loop, setup
from training.config import Config
from training.dataset import TrainingData
from training.optim import make_optimizers
from training.rehearsal import longest_groups, longest_prompts, steps_of

STEPS = 96  # micro-batches; the run's first break up the heap before the heaviest come.  A count, for what fits into a time hangs on the machine's other work
SECONDS, FEWEST = 120, 8  # after which no other of them begins, but so many are done at the least
TOKENS = 16  # of each answer


def in_its_own_process(work: Callable[[Config], int], cfg: Config) -> int | None:
    """work(cfg), computed in a new process; None where memory ran out.  What work raises is raised; RuntimeError where the process dies otherwise."""
    context = multiprocessing.get_context("spawn")  # a fork would lack OpenMP's threads
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_tell, args=(work, cfg, sender), daemon=True)
    before = signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # which the new process inherits: Ctrl-C is for this one, and it ends that
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        sender.close()
        found = receiver.recv()
        process.join()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"the trial's process ended with code {process.exitcode}") from None
        return None
    finally:
        process.kill()
    if isinstance(found, Exception):
        raise found
    return found


def _tell(work: Callable[[Config], int], cfg: Config, sender) -> None:
    with suppress(OSError):  # where memory runs out Linux takes this process, and not the user's others
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        sender.send(work(cfg))
    except Exception as e:
        if isinstance(e, MemoryError) or "allocate memory" in str(e):  # torch's is a RuntimeError
            sender.send(None)
        else:
            e.add_note(traceback.format_exc())
            sender.send(e)


def peak(cfg: Config) -> int:
    """Loads, trains, evaluates and answers as the run will, and returns this process's largest size in bytes."""
    cfg = replace(cfg, model=replace(cfg.model, init="random"))
    device = pick_device(cfg.train.device)
    precision = Precision(cfg.train.precision, device)
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):  # the plan has said what there is to say of the rows
        base, data = setup.build_base(cfg, precision)
    setup.add_adapters(base.model, cfg)
    setup.compile_where_it_pays(base.model, cfg, data.documents, device)
    optimizers = make_optimizers(
        base.model, cfg.train.optimizer, cfg.train.learning_rate, cfg.train.weight_decay
    )
    _train(cfg, base, data, optimizers, precision)
    for group in longest_groups(data):
        evaluation.mean_loss(base.model, setup.OBJECTIVES[cfg.train.objective], group, precision)
    del optimizers  # as in the run, where training is over now
    for prompts in longest_prompts(cfg, base.tokenizer, data):
        _answer(cfg, base, prompts, precision)
    return peak_memory(device)


def _train(cfg: Config, base: setup.Base, data: TrainingData, optimizers: list, precision: Precision) -> None:
    """The first steps of the run, and then those of its heaviest that were not among them."""
    loader = setup.build_loader(cfg, data.documents)
    steps, heaviest = steps_of(loader, setup.build_plan(cfg, loader))
    trained = list(setup.trained_weights(base.model).values())

    def train(step: tuple) -> None:
        window = [loader.batch(group) for group in step]
        loop.train_step(
            base.model,
            setup.OBJECTIVES[cfg.train.objective],
            window,
            trained,
            optimizers,
            precision,
            0.0,
            cfg.train.max_grad_norm,
        )
        base.model.zero_grad(set_to_none=True)

    train(steps[0])  # compiles, where that is wanted
    start, done, most = time.perf_counter(), 1, min(STEPS, len(steps))
    with bar(most, "trying", "step", initial=1) as progress:
        while done < most and (done < FEWEST or time.perf_counter() - start < SECONDS):
            train(steps[done])
            done += 1
            progress.update()
        for step in heaviest.difference(steps[:done]):
            train(step)


class _Enough(Exception):
    """The cache is made and steps were taken."""


def _answer(cfg: Config, base: setup.Base, prompts: list[list[int]], precision: Precision) -> None:
    """The answers' first TOKENS tokens, in a cache for all that they may get."""
    tokens, g = count(1), cfg.generate

    def hear(row: int, token: int) -> None:
        if next(tokens) >= TOKENS * len(prompts):
            raise _Enough

    with suppress(_Enough), precision.autocast():
        generate(
            base.model,
            prompts,
            max_new_tokens=g.max_new_tokens,
            stop_ids=(),
            temperature=g.temperature,
            top_k=g.top_k,
            top_p=g.top_p,
            on_token=hear,
        )

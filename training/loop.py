"""The loop: it adds up gradients over micro-batches, scales them once, steps, and keeps what a resume needs.

One optimiser step is a window of `accumulate` micro-batches, the last of an epoch maybe fewer.  The objective returns a sum of losses
and the number of tokens it is over; the gradients of the sums are added up and divided by all tokens of the window at once, so a token
weighs the same however the batch is cut.  (The mean of micro-batch means would favour tokens in micro-batches with few of them.)
"""

import math
import signal
import time
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch

from training.optim import lr_factor

MAX_BAD_STEPS = 3  # non-finite steps in a row that stop the run


@dataclass
class State:
    """Where a run stands: what a checkpoint holds beside tensors."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    batch: int = 0  # micro-batches of this epoch that are done
    bad_steps: int = 0  # non-finite steps in a row
    best_loss: float = math.inf
    best_step: int = -1
    stale: int = 0  # evaluations since the best one
    evaluated: int = -1  # step of the last evaluation
    tokens: int = 0
    seconds: float = 0.0


class Stopped(Exception):
    """The run was asked to stop and its checkpoint is saved."""


class Diverged(RuntimeError):
    """Several steps in a row were not finite."""


@dataclass
class Plan:
    """The loop's numbers."""

    total_steps: int
    batches_per_epoch: int
    accumulate: int
    learning_rate: float
    lr_scheduler: str
    warmup_steps: int
    max_grad_norm: float
    eval_every: int
    save_every: int
    patience: int


@dataclass
class Hooks:
    """What the loop calls: each is a plain function."""

    on_step: callable
    evaluate: callable  # (step) -> the validation loss that decides, None without validation data
    keep_best: callable
    save: callable  # writes a checkpoint of the state
    on_skip: callable = field(default=lambda message: None)


def fit(model, objective, loader, optimizers, precision, plan: Plan, state: State, hooks: Hooks) -> None:
    """Trains until plan.total_steps or early stopping, evaluates and saves; raises Stopped after SIGINT or SIGTERM, Diverged after MAX_BAD_STEPS
    bad steps in a row."""
    trained = [p for p in model.parameters() if p.requires_grad]
    device = precision.device
    with _StopSignal() as stop:
        while not _done(state, plan):
            batches = iter(loader.batches(state.epoch, state.batch))
            while not _done(state, plan):
                start = time.perf_counter()
                if not (window := list(islice(batches, plan.accumulate))):
                    break
                rate = plan.learning_rate * lr_factor(
                    state.step, plan.total_steps, plan.warmup_steps, plan.lr_scheduler
                )
                record = train_step(
                    model, objective, window, trained, optimizers, precision, rate, plan.max_grad_norm
                )
                state.step, state.batch = state.step + 1, state.batch + len(window)
                _judge(model, objective, window, record, state, precision, hooks)
                seconds = time.perf_counter() - start
                state.tokens, state.seconds = state.tokens + record["tokens"], state.seconds + seconds
                epoch = state.epoch + state.batch / plan.batches_per_epoch
                hooks.on_step(
                    {
                        "step": state.step,
                        "epoch": round(epoch, 4),
                        **record,
                        "tokens_per_second": round(record["tokens"] / seconds, 1),
                        "seconds": round(seconds, 4),
                    }
                )
                if plan.eval_every and state.step % plan.eval_every == 0 and state.step < plan.total_steps:
                    _evaluate(hooks, state)
                if stop.asked or (plan.save_every and state.step % plan.save_every == 0):
                    hooks.save()
                if stop.asked:
                    raise Stopped
            if not _done(state, plan):
                state.epoch, state.batch = state.epoch + 1, 0
        if device.type == "cuda":
            torch.cuda.synchronize()
        if state.evaluated < state.step:
            hooks.save()  # the training is safe before the evaluation writes the adapter
            _evaluate(hooks, state)
        hooks.save()
        if stop.asked:
            raise Stopped


def _done(state: State, plan: Plan) -> bool:
    return state.step >= plan.total_steps or 0 < plan.patience <= state.stale


def train_step(
    model, objective, window, trained, optimizers, precision, rate: float, max_grad_norm: float
) -> dict:
    """One optimiser step over the micro-batches of `window`; the record has the mean loss, the gradient's norm before clipping, and "applied".

    Nothing is applied where the loss or the norm is not finite.  The one wait for the device is the reading of loss and norm at the end.
    """
    model.train()
    total, weight, tokens, streamed = 0.0, 0, 0, 0
    for batch in window:
        batch = objective.prepare(model, _move(batch, precision.device))
        with precision.autocast():
            loss_sum, count, _ = objective.loss(model, batch)
        precision.scaler.scale(loss_sum).backward()
        total, weight, tokens, streamed = (
            total + loss_sum.detach(),
            weight + count,
            tokens + batch.num_tokens,
            streamed + len(batch.tokens),
        )
    assert weight, "data/render.py leaves out documents without supervision"
    for optimizer in optimizers:
        precision.scaler.unscale_(optimizer)
    grads = [p.grad for p in trained if p.grad is not None]
    torch._foreach_div_(grads, float(weight))
    norm = torch.nn.utils.get_total_norm(grads)
    loss, norm_value = (
        torch.stack((torch.as_tensor(total, device=norm.device).float() / weight, norm.float()))
    ).tolist()
    applied = math.isfinite(loss) and math.isfinite(norm_value)
    if applied:
        if max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            precision.scaler.step(optimizer)
    if precision.scaler.is_enabled():
        precision.scaler.update()
    return {
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm_value,
        "tokens": tokens,
        "stream_tokens": streamed,
        "supervised_tokens": weight,
        "applied": applied,
    }


def _judge(model, objective, window, record: dict, state: State, precision, hooks: Hooks) -> None:
    """Clears the gradients; counts and explains a step that was not applied."""
    if record.pop("applied"):
        state.bad_steps = 0
        model.zero_grad(set_to_none=True)
        return
    state.bad_steps += 1
    culprit = _first_bad_gradient(model) if math.isfinite(record["loss"]) else "the loss"
    model.zero_grad(set_to_none=True)
    culprit = first_bad_layer(model, objective, window, precision) or culprit
    ids = [i for batch in window for i in batch.ids]
    hooks.on_skip({"step": state.step, "skipped": True, "layer": culprit, "samples": ids})
    if state.bad_steps >= MAX_BAD_STEPS and not (
        precision.scaler.is_enabled() and precision.scaler.get_scale() > 1
    ):
        hooks.save()
        raise Diverged(
            f"the loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row; the first bad place is {culprit}; the weights are as "
            f"before those steps, and in the newest checkpoint. Samples of the last step: {', '.join(ids[:8])}. "
            "Lower train.learning_rate, or look at these rows"
        )


def _first_bad_gradient(model) -> str:
    for name, p in reversed(list(model.named_parameters())):  # backward runs from the last layer to the first
        if p.grad is not None and not torch.isfinite(p.grad).all():
            return f"the gradient of {name}"
    return "the gradients' norm"  # each of them is finite, the sum of their squares is not


@torch.no_grad()
def first_bad_layer(model, objective, window, precision) -> str | None:
    """Runs the window again with a hook on every module; the first whose weights or output hold a NaN or infinity is named."""
    found: list[str] = []
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"the weight {name}"

    def look(name):
        def hook(_, __, output):
            if not found and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                found.append(f"the output of {name}")

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if n]
    try:
        for batch in window:
            with precision.autocast():
                objective.loss(model, _move(batch, precision.device))
    finally:
        for h in handles:
            h.remove()
    return found[0] if found else None


def _evaluate(hooks: Hooks, state: State) -> None:
    """Evaluates and keeps the best; without validation data the latest counts as the best, and the first is kept even where its loss is NaN."""
    loss = hooks.evaluate(state.step)
    state.evaluated = state.step
    if loss is None or loss < state.best_loss or state.best_step < 0:
        state.best_loss, state.best_step, state.stale = (
            loss if loss is not None and math.isfinite(loss) else math.inf,
            state.step,
            0,
        )
        hooks.keep_best()
    else:
        state.stale += 1


def _move(batch, device):
    if device.type != "cuda":
        return batch
    return batch.pin_memory().to(device, non_blocking=True)


class _StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag that is read between steps; a second one acts at once."""

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self):
        for s in (signal.SIGINT, signal.SIGTERM):
            self.before[s] = signal.signal(s, self._note)
        return self

    def _note(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def state_dict(state: State) -> dict:
    """The counters as JSON; infinity, which JSON lacks, as null."""
    return {k: None if v == math.inf else v for k, v in asdict(state).items()}


def state_from(values: dict) -> State:
    return State(**{k: math.inf if v is None else v for k, v in values.items()})

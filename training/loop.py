"""The training loop: optimizer steps with gradient accumulation, evaluations and checkpoints.

For each micro-batch the objective returns the sum of the losses and its weight, such as the number of
supervised tokens. The gradients of these sums are added up and divided by the weight of the whole step, so
every token weighs the same, however the step is cut into micro-batches.
"""

import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch

from common.device import Precision
from common.errors import stop_signals
from data.loader import Loader
from data.packing import Batch
from model.gemma3 import Gemma3ForCausalLM
from training import anomalies
from training.anomalies import MAX_BAD_STEPS, Diverged
from training.config import Train
from training.objectives.objective import Objective, Totals
from training.optim import Optimizers, lr_factor

SAVE_SECONDS = 600  # Where train.save_every is 0, a power failure costs about this much training at most.


@dataclass
class State:
    """The progress of a training run: counters and the best metrics, which a checkpoint stores as JSON."""

    step: int = 0  # optimizer steps done
    epoch: int = 0
    batch: int = 0  # micro-batches of this epoch that are done
    bad_steps: int = 0  # steps in a row that were not applied
    losses: list[float] = field(default_factory=list)  # of the last steps
    best: dict[str, float] = field(default_factory=dict)  # the best evaluation's metrics
    best_step: int = -1
    stale: int = 0  # evaluations since the best one
    evaluated: int = -1  # step of the last evaluation
    tokens: int = 0
    seconds: float = 0.0


class Stopped(Exception):
    """Raised after SIGINT, SIGTERM or SIGHUP, when a checkpoint has been saved."""


@dataclass(frozen=True)
class Schedule:
    """Number of steps, and when to evaluate, save and end, by `train`, the config's [train] section."""

    total_steps: int
    batches_per_epoch: int
    train: Train

    def lr(self, step: int) -> float:
        t = self.train
        return t.learning_rate * lr_factor(step, self.total_steps, t.warmup_steps, t.lr_scheduler)

    def done(self, state: State) -> bool:
        return state.step >= self.total_steps or 0 < self.train.early_stopping_patience <= state.stale

    def evaluates(self, step: int) -> bool:
        every = self.train.eval_every
        return every > 0 and step % every == 0 and step < self.total_steps

    def due(self, state: State) -> bool:
        """Returns whether a step since the last evaluation is one of those to evaluate after."""
        return any(map(self.evaluates, range(max(state.evaluated, 0) + 1, state.step + 1)))

    def saves(self, steps: range, seconds: float) -> bool:
        """Returns whether to save after these steps, `seconds` of training after the last save."""
        every = self.train.save_every
        return any(step % every == 0 for step in steps) if every else seconds > SAVE_SECONDS


@dataclass
class Hooks:
    """Functions that the training loop calls, for output and for files."""

    on_step: Callable[[dict], None]
    evaluate: Callable[[int], dict | None]  # step -> metrics that select the best weights; None without data
    keep_best: Callable[[], None]
    save: Callable[[], None]  # writes a checkpoint of the state
    # a record, and what else is known of a step that was not applied
    on_skip: Callable[[dict, dict], None] = field(default=lambda record, more: None)


def fit(
    model: Gemma3ForCausalLM,
    objective: Objective,
    loader: Loader,
    optimizers: Optimizers,
    precision: Precision,
    schedule: Schedule,
    state: State,
    hooks: Hooks,
) -> None:
    """Trains until the last step or early stopping, with evaluations and checkpoints also at the end.

    Raises Stopped after SIGINT, SIGTERM or SIGHUP (the terminal was closed), and Diverged after MAX_BAD_STEPS
    steps in a row that were not applied, if a weight is not finite, or if the loss ran away (anomalies.py).
    """
    saved = state.seconds
    with _StopSignal() as stop:
        if schedule.due(state):  # a reward failed in this evaluation, and the run was saved without it
            _evaluate(model, objective, hooks, state)
        while not schedule.done(state):
            batches = iter(loader.batches(state.epoch, state.batch))
            accumulate = schedule.train.gradient_accumulation_steps
            while not schedule.done(state) and (micro_batches := list(islice(batches, accumulate))):
                start, before = time.perf_counter(), state.step
                prepared = [objective.prepare(model, batch, before) for batch in micro_batches]
                prepared = [_move(batch, precision.device) for batch in prepared]
                state.batch += len(micro_batches)  # a batch whose reward fails comes again at the resume
                for _ in range(min(objective.steps_per_batch, schedule.total_steps - before)):
                    lr, clip = schedule.lr(state.step), schedule.train.max_grad_norm
                    record = train_step(model, objective, prepared, optimizers, precision, lr, clip)
                    state.step += 1
                    if record.pop("applied"):
                        state.bad_steps = 0
                        model.zero_grad(set_to_none=True)
                    else:
                        refuse_step(model, objective, prepared, record, state, precision, hooks)
                    now = time.perf_counter()
                    _record(record, now - start, schedule, state, hooks)
                    start = now
                    if not (state.bad_steps or objective.scores_answers):
                        _watch_loss(record["loss"], state, hooks, schedule.train.divergence_factor)
                # A checkpoint between two steps on the same batches would need these batches.
                if schedule.due(state):
                    _evaluate(model, objective, hooks, state)
                if stop.asked or schedule.saves(range(before + 1, state.step + 1), state.seconds - saved):
                    hooks.save()
                    saved = state.seconds
                if stop.asked:
                    raise Stopped
            if not schedule.done(state):
                state.epoch, state.batch = state.epoch + 1, 0
        if precision.device.type == "cuda":
            torch.cuda.synchronize()
        if state.evaluated < state.step:
            hooks.save()  # the training is safe before the evaluation writes the adapter
            _evaluate(model, objective, hooks, state)
        hooks.save()
        if stop.asked:
            raise Stopped


def _record(record: dict, seconds: float, schedule: Schedule, state: State, hooks: Hooks) -> None:
    """Adds tokens and seconds of a step to `state`, and passes its record with the speed to hooks.on_step."""
    state.tokens, state.seconds = state.tokens + record["tokens"], state.seconds + seconds
    epoch = round(state.epoch + state.batch / schedule.batches_per_epoch, 4)
    speed = {"tokens_per_second": round(record["tokens"] / seconds, 1), "seconds": round(seconds, 4)}
    hooks.on_step({"step": state.step, "epoch": epoch, **record, **speed})


def train_step(
    model: Gemma3ForCausalLM,
    objective: Objective,
    micro_batches: list[Batch],
    optimizers: Optimizers,
    precision: Precision,
    lr: float,
    max_grad_norm: float,
) -> dict:
    """Does one optimizer step over the micro-batches and returns its record, a dict.

    The record has mean loss (nats) and metrics, learning rate, norm of the gradient before clipping, and
    numbers of tokens. If loss or norm is not finite, the weights stay unchanged and "applied" is False.
    """
    model.train()
    totals, weight, tokens, stream_tokens, supervised = Totals(), 0.0, 0, 0, 0
    for batch in micro_batches:
        batch = _move(batch, precision.device)
        with precision.autocast():
            loss_sum, count, metrics = objective.loss(model, batch)
        precision.scaler.scale(loss_sum).backward()
        totals.add({"loss": (loss_sum, count)} | metrics)
        weight, supervised = weight + count, supervised + batch.num_targets
        tokens, stream_tokens = tokens + batch.num_tokens, stream_tokens + len(batch.tokens)
    assert weight, "data/render.py leaves out documents without supervision"
    for optimizer in optimizers:
        precision.scaler.unscale_(optimizer)  # type: ignore[arg-type]
    trainable = [p for p in model.parameters() if p.requires_grad]
    grads = [p.grad for p in trainable if p.grad is not None]
    torch._foreach_div_(grads, float(weight))
    norm = torch.nn.utils.get_total_norm(grads)
    totals.add({"grad_norm": (norm, 1)})
    figures = totals.means()
    loss, norm_value = figures.pop("loss"), figures.pop("grad_norm")
    applied = math.isfinite(loss) and math.isfinite(norm_value)
    if applied:
        if max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(trainable, max_grad_norm, norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            precision.scaler.step(optimizer)  # type: ignore[arg-type]
    if precision.scaler.is_enabled():
        precision.scaler.update()
    return {
        "loss": loss,
        **figures,
        "learning_rate": lr,
        "grad_norm": norm_value,
        "tokens": tokens,
        "stream_tokens": stream_tokens,
        "supervised_tokens": supervised,
        "applied": applied,
    }


def refuse_step(
    model: Gemma3ForCausalLM,
    objective: Objective,
    micro_batches: list[Batch],
    record: dict,
    state: State,
    precision: Precision,
    hooks: Hooks,
) -> None:
    """Reports a step that was not applied, and clears its gradients.

    Raises Diverged if a weight is not finite, or after MAX_BAD_STEPS such steps in a row.
    """

    def forward(batch: Batch) -> None:
        with precision.autocast():
            objective.loss(model, _move(batch, precision.device))

    state.bad_steps += 1
    norms = anomalies.gradient_norms(model)
    model.zero_grad(set_to_none=True)
    weight = anomalies.bad_weight(model)
    culprit = "the loss" if not math.isfinite(record["loss"]) else anomalies.bad_gradient(norms)
    ids = [i for batch in micro_batches for i in batch.ids]
    output = None if weight else anomalies.bad_output(model, forward, micro_batches)
    culprit, ids = (weight, ids) if weight else output or (culprit, ids)
    found = {"step": state.step, "skipped": True, "layer": culprit, "samples": ids}
    last = {"last_good_step": state.step - state.bad_steps}
    hooks.on_skip(found, {"loss": record["loss"], **last, "grad_norms": norms})
    if weight:
        raise Diverged(f"{weight} is not finite, so that no step can be right; {_kept(state)}")
    can_scale_less = precision.scaler.is_enabled() and precision.scaler.get_scale() > 1
    if state.bad_steps >= MAX_BAD_STEPS and not can_scale_less:
        hooks.save()
        raise Diverged(
            f"the loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row; the first bad place is "
            f"{culprit}; the weights are as before those steps, and in the newest checkpoint. "
            f"Samples of the last step: {', '.join(ids[:8])}. Lower train.learning_rate, or check these rows"
        )


def _watch_loss(loss: float, state: State, hooks: Hooks, factor: float) -> None:
    """Keeps the last losses; raises Diverged, with a checkpoint, if they ran away."""
    state.losses = [*state.losses, loss][-anomalies.RECENT - anomalies.BEFORE :]
    if anomalies.ran_away(state.losses, factor):
        hooks.save()
        raise Diverged(
            f"the loss ran away: {loss:.4g} in step {state.step}, over {factor:g} times the median of the "
            f"{anomalies.BEFORE} steps before (train.divergence_factor); {_kept(state)}"
        )


def _kept(state: State) -> str:
    best = (
        f"the best weights are kept, those of step {state.best_step}"
        if state.best_step >= 0
        else ("no weights were kept, as there was no evaluation yet (train.eval_every)")
    )
    return f"{best}. Start anew with a lower train.learning_rate"


def _evaluate(model: Gemma3ForCausalLM, objective: Objective, hooks: Hooks, state: State) -> None:
    """Evaluates, and keeps the weights if they are the best so far, or if there is no validation data.

    Raises Diverged if a weight is not finite: such weights are never the best.
    """
    if weight := anomalies.bad_weight(model, trainable=True):
        raise Diverged(f"{weight} is not finite after step {state.step}; {_kept(state)}")
    metrics = hooks.evaluate(state.step)
    state.evaluated = state.step
    if metrics is None or state.best_step < 0 or objective.better(metrics, state.best):
        state.best, state.best_step, state.stale = metrics or {}, state.step, 0
        hooks.keep_best()
    else:
        state.stale += 1


def _move(batch: Batch, device: torch.device) -> Batch:
    if batch.tokens.device.type == device.type:
        return batch
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


class _StopSignal:
    """Context in which the first of the signals only sets `asked`; a second one has its usual effect."""

    def __init__(self):
        self.asked, self.before = False, {}

    def __enter__(self):
        for s in stop_signals():
            self.before[s] = signal.signal(s, self._note)
        return self

    def _note(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for s, handler in self.before.items():
            signal.signal(s, handler)


def state_dict(state: State) -> dict:
    """Returns the fields of `state` as JSON values; a NaN or infinity in `best` becomes None (null)."""
    values = asdict(state)
    return values | {"best": {k: v if math.isfinite(v) else None for k, v in state.best.items()}}


def state_from(values: dict) -> State:
    """Returns the State from the values that state_dict returned."""
    return State(**values | {"best": {k: math.nan if v is None else v for k, v in values["best"].items()}})

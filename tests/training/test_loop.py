"""training/loop.py: what a step adds up, which steps are skipped, when the loop evaluates, saves, stops."""

import json
import math
import os
import signal

import pytest
import torch

from common.device import Precision
from data.loader import Loader
from data.packing import pack
from model.loss import reference_token_log_probs
from tests.makers import documents, tiny_model
from training import anomalies, loop
from training.config import Train
from training.objectives.sft import SupervisedFineTuning
from training.optim import make_optimizers

CPU = Precision("fp32", torch.device("cpu"))
SFT = SupervisedFineTuning()
CUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]  # (documents in a micro-batch, micro-batches in a step)


def schedule(total_steps: int = 4, batches_per_epoch: int = 4, **changes) -> loop.Schedule:
    return loop.Schedule(total_steps, batches_per_epoch, Train(**{"learning_rate": 1e-2} | changes))


class Watch:
    """Hooks that record their calls; `losses` are what the evaluations return in turn."""

    def __init__(self, losses=()):
        self.losses, self.best = list(losses), 0
        self.steps, self.evaluations, self.saves, self.skips, self.more = [], [], [], [], []

    def hooks(self, state, on_step=None) -> loop.Hooks:
        return loop.Hooks(
            on_step or self.steps.append,
            self.evaluate,
            self.keep_best,
            lambda: self.saves.append(loop.state_dict(state)),
            lambda record, more: (self.skips.append(record), self.more.append(more)),
        )

    def evaluate(self, step):
        self.evaluations.append(step)
        return {"loss": self.losses.pop(0)} if self.losses else None

    def keep_best(self):
        self.best += 1


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def fit(model, docs, watch=None, state=None, batch_size=1, objective=SFT, on_step=None, **changes):
    """Runs the loop over `docs` in their order and returns its hooks' records."""
    watch, state = watch or Watch(), state or loop.State()
    loader = Loader(docs, batch_size, seed=0, shuffle=False)
    optimizers = make_optimizers(model, "adamw", 1e-2, 0.0)
    settings = schedule(**{"batches_per_epoch": len(loader)} | changes)
    loop.fit(model, objective, loader, optimizers, CPU, settings, state, watch.hooks(state, on_step))
    return watch


# --- every token weighs the same however the batch is cut


def full_batch_gradients(model, docs):
    """Returns the mean loss over all supervised tokens of `docs`, from one pass, and its gradients."""
    batch = pack(docs)
    hidden = model(batch.tokens, batch.position_ids, batch.cu_seqlens)
    log_probs = reference_token_log_probs(hidden[batch.target_positions], model.head_weight, batch.targets)
    loss = -log_probs.sum() / batch.num_targets
    gradients = torch.autograd.grad(loss, list(trained(model).values()))
    return loss.item(), dict(zip(trained(model), gradients, strict=True))


def worst(gradients, expected) -> float:
    """Returns the largest error of any tensor's gradient, relative to the tensor's largest entry."""
    return max(((gradients[n] - e).abs().max() / e.abs().max()).item() for n, e in expected.items())


@pytest.mark.fault("accumulation")
@pytest.mark.parametrize("batch_size, accumulate", CUTS)
def test_accumulated_gradients_are_those_of_the_real_full_batch(batch_size, accumulate):
    docs = documents(8, seed=3)
    assert len({len(d.input_ids) for d in docs}) > 4 and max(len(d.input_ids) for d in docs) > 16
    model = tiny_model(dtype=torch.float64)
    loss, expected = full_batch_gradients(model, docs)
    micro_batches = list(Loader(docs, batch_size, seed=0, shuffle=False).batches(0))
    assert len(micro_batches) == accumulate
    record = loop.train_step(model, SFT, micro_batches, [], CPU, 1e-2, 0.0)
    assert record["loss"] == pytest.approx(loss, abs=1e-5)
    assert worst({n: p.grad for n, p in trained(model).items()}, expected) < 1e-10


@pytest.mark.fault("accumulation")
def test_the_losses_of_a_run_do_not_depend_on_how_its_batches_are_cut():
    docs = documents(20, seed=4)  # steps of 8, 8 and 4 documents
    runs = []
    for b, a in CUTS:
        steps = fit(tiny_model(), docs, batch_size=b, gradient_accumulation_steps=a, total_steps=6).steps
        runs.append([r["loss"] for r in steps])
    for losses in runs[1:]:
        assert losses == pytest.approx(runs[0], abs=1e-5)
    assert runs[0][3] < runs[0][0]


def test_a_short_step_at_the_end_of_an_epoch_is_taken_and_weighs_its_own_tokens(monkeypatch):
    docs = documents(5, seed=5)
    model = tiny_model(dtype=torch.float64)
    loss, expected = full_batch_gradients(model, docs[4:])
    step, gradients = loop.train_step, {}

    def train_step(*args):
        record = step(*args)
        gradients.update({n: p.grad.clone() for n, p in trained(model).items()})
        return record

    monkeypatch.setattr(loop, "train_step", train_step)
    at = loop.State(step=2, batch=4)  # two steps of two micro-batches are done
    (record,) = fit(
        model, docs, state=at, gradient_accumulation_steps=2, total_steps=3, max_grad_norm=0.0
    ).steps
    assert record["loss"] == pytest.approx(loss, abs=1e-5) and record["tokens"] == len(docs[4].input_ids)
    assert record["supervised_tokens"] == pack(docs[4:]).num_targets
    assert worst(gradients, expected) < 1e-10


def test_an_epoch_takes_each_document_once_and_the_next_one_follows():
    docs = documents(5, seed=6)
    watch = fit(tiny_model(), docs, batch_size=2, gradient_accumulation_steps=2, total_steps=4)
    tokens = [len(d.input_ids) for d in docs]
    assert [r["tokens"] for r in watch.steps] == [sum(tokens[:4]), tokens[4]] * 2
    assert [r["epoch"] for r in watch.steps] == [round(2 / 3, 4), 1, round(5 / 3, 4), 2]
    assert [r["learning_rate"] for r in watch.steps] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])


def test_the_norm_is_recorded_before_clipping_and_the_step_is_taken_after():
    micro_batches, models = [pack(documents(3))], [tiny_model(), tiny_model()]
    for model, limit in zip(models, (0.0, 1e-3), strict=True):
        record = loop.train_step(model, SFT, micro_batches, [], CPU, 1e-2, limit)
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained(model).values()])).item()
        assert record["grad_norm"] > 1e-2
        assert norm == pytest.approx(limit or record["grad_norm"], rel=1e-2)


# --- a step that is not finite


def overflow(model):
    """Fills a weight with finite values whose products overflow."""
    model.model.layers[3].mlp.up_proj.base_layer.weight.data.fill_(3e38)


def poisoned(bad, factor=math.nan):
    """Returns sft with `factor` times the loss for batches with a document whose line number is in `bad`."""

    class Poisoned(SupervisedFineTuning):
        def loss(self, model, batch):
            total, count, more = super().loss(model, batch)
            return (
                (total * factor if any(i.split(":")[1] in bad for i in batch.ids) else total),
                count,
                more,
            )

    return Poisoned()


class BadGradient(torch.autograd.Function):
    """The identity, with gradients of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


@pytest.mark.fault("NaN")
def test_a_step_that_overflows_changes_no_weight_and_names_the_layer_and_the_samples():
    model = tiny_model()
    overflow(model)
    before = weights(model)
    watch = fit(model, documents(4), batch_size=2, gradient_accumulation_steps=2, total_steps=1)
    (skip,), (record,) = watch.skips, watch.steps
    assert skip == {
        "step": 1,
        "skipped": True,
        "layer": "the output of model.layers.3.mlp.up_proj.base_layer",
        "samples": ["rows.jsonl:1", "rows.jsonl:2"],  # the first of two micro-batches
    }
    assert watch.more[0]["last_good_step"] == 0 and not math.isfinite(record["loss"])
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_a_step_that_was_not_applied_leaves_no_trace_in_what_follows():
    """Neither in the weights nor in the optimizer's moments. The learning rate depends on the step, so it is
    constant here.
    """
    docs = documents(3, seed=7)
    with_it, without = tiny_model(), tiny_model()
    watch = fit(with_it, docs, objective=poisoned({"1"}), total_steps=3, lr_scheduler="constant")
    fit(without, docs[1:], total_steps=2, lr_scheduler="constant")
    assert [s["step"] for s in watch.skips] == [1] and watch.skips[0]["samples"] == ["rows.jsonl:1"]
    assert all(torch.equal(p, q) for p, q in zip(with_it.parameters(), without.parameters(), strict=True))


@pytest.mark.fault("NaN")
def test_a_finite_loss_with_nan_gradients_is_not_applied_and_the_gradient_is_named():
    model = tiny_model()
    before = weights(model)
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: BadGradient.apply(output))
    watch = fit(model, documents(2), batch_size=2, total_steps=1)
    assert math.isfinite(watch.steps[0]["loss"]) and math.isnan(watch.steps[0]["grad_norm"])
    assert watch.skips[0]["layer"].startswith("the gradient of model.layers.2.mlp.down_proj.lora_")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    norms = watch.more[0]["grad_norms"]  # by layer: those of later layers are right
    assert next(iter(norms)).startswith("model.layers.") and math.isnan(list(norms.values())[-1])
    assert all(math.isfinite(norm) for name, norm in norms.items() if ".layers.3." in name)


@pytest.mark.fault("NaN")
def test_a_weight_that_is_not_finite_is_named_and_stops_the_run_at_once_without_a_checkpoint():
    model, watch = tiny_model(), Watch()
    model.model.layers[1].self_attn.k_norm.weight.data[3] = math.inf
    with pytest.raises(loop.Diverged, match=r"the weight model.layers.1.self_attn.k_norm.weight is not"):
        fit(model, documents(3), watch, total_steps=3)
    (skip,) = watch.skips
    assert skip["layer"] == "the weight model.layers.1.self_attn.k_norm.weight"
    assert not watch.saves and not watch.best


@pytest.mark.fault("NaN")
def test_weights_that_an_update_made_infinite_are_never_the_best():
    model, watch = tiny_model(), Watch([2.0, math.nan])

    def spoil(record):
        watch.steps.append(record)
        if record["step"] == 4:
            next(iter(trained(model).values())).data.fill_(math.inf)

    with pytest.raises(loop.Diverged, match="after step 4; the best weights are kept, those of step 2"):
        fit(model, documents(4), watch, on_step=spoil, total_steps=4, eval_every=2)
    assert watch.best == 1 and watch.evaluations == [2]


def test_three_bad_steps_in_a_row_stop_the_run_with_a_checkpoint():
    model, watch = tiny_model(), Watch()
    overflow(model)
    with pytest.raises(loop.Diverged, match=r"3 steps in a row.*up_proj.*rows.jsonl:3.*train.learning_rate"):
        fit(model, documents(8), watch, total_steps=8)
    assert len(watch.skips) == 3 and [s["step"] for s in watch.saves] == [3]


def test_two_bad_steps_and_a_good_one_do_not_stop_the_run():
    watch = fit(tiny_model(), documents(6), objective=poisoned({"1", "2", "4", "5"}), total_steps=6)
    assert [s["step"] for s in watch.skips] == [1, 2, 4, 5] and len(watch.steps) == 6


# --- a loss that runs away


def test_a_loss_runs_away_where_five_are_over_ten_times_the_median_of_the_fifty_before():
    steady = [1.0, 3.0] * 25
    assert anomalies.ran_away([*steady, 19.0, 21.0, 1.0, 21.0, 21.0], 10)
    assert not anomalies.ran_away([*steady, 19.0, 21.0, 1.0, 20.0, 21.0], 10)  # their median is 20
    assert not anomalies.ran_away([*steady, 900.0, 900.0, 1.0, 2.0, 3.0], 10)  # two hard batches
    assert not anomalies.ran_away([*steady[1:], *[900.0] * 5], 10) and not anomalies.ran_away([9e9] * 99, 0)


@pytest.mark.fault("divergence")
def test_a_loss_that_runs_away_stops_the_run_with_a_checkpoint_and_says_what_is_kept(monkeypatch):
    monkeypatch.setattr(anomalies, "RECENT", 3)
    monkeypatch.setattr(anomalies, "BEFORE", 3)
    watch, model, objective = Watch([2.0]), tiny_model(), poisoned({"5", "6", "7"}, 10.0)
    expected = r"ran away: .* in step 6, over 2 times the median of the 3 steps.*those of step 4"
    with pytest.raises(loop.Diverged, match=expected):
        fit(
            model, documents(9), watch, None, 1, objective, total_steps=9, eval_every=4, divergence_factor=2.0
        )
    assert [save["step"] for save in watch.saves] == [6] and len(watch.saves[0]["losses"]) == 6


# --- evaluations


def evaluated(losses, state=None, **changes) -> Watch:
    """Runs the loop over four documents, with evaluations that return `losses`."""
    return fit(tiny_model(), documents(4), Watch(losses), state, **changes)


def test_evaluations_get_their_step_and_the_last_step_has_one_too():
    watch = evaluated([3.0, 2.0, 1.0], total_steps=5, eval_every=2)
    assert watch.evaluations == [2, 4, 5] and watch.best == 3


def test_the_last_step_is_evaluated_once():
    assert evaluated([3.0, 2.0], total_steps=4, eval_every=2).evaluations == [2, 4]


def test_training_stops_after_as_many_evaluations_without_improvement_as_its_patience():
    state, settings = loop.State(), {"total_steps": 9, "eval_every": 1, "early_stopping_patience": 2}
    watch = evaluated([3.0, 2.0, 2.5, 2.0, 1.0], state, **settings)
    assert watch.evaluations == [1, 2, 3, 4] and watch.best == 2
    assert (state.step, state.best_step, state.best) == (4, 2, {"loss": 2.0})
    resumed = evaluated([1.0], loop.state_from(watch.saves[-1]), **settings)
    assert resumed.steps == resumed.evaluations == []


def test_a_first_evaluation_without_a_finite_loss_is_kept_until_there_is_a_better_one():
    state = loop.State()
    watch = evaluated([math.nan, math.nan, 5.0], state, total_steps=3, eval_every=1)
    assert watch.best == 2 and state.best_step == 3


def test_without_validation_the_latest_weights_are_the_best():
    state = loop.State()
    assert evaluated([], state, total_steps=4, eval_every=2).best == 2 and state.best_step == 4


# --- saving and stopping


def test_checkpoints_are_saved_when_due_and_at_the_end():
    saves = fit(tiny_model(), documents(4), batch_size=2, total_steps=5, save_every=2).saves
    at_the_end = [(5, 2, 1)] * 2  # one before the last evaluation and one after
    assert [(s["step"], s["epoch"], s["batch"]) for s in saves] == [(2, 0, 2), (4, 1, 2), *at_the_end]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(number):
    watch = Watch()

    def on_step(record):
        watch.steps.append(record)
        if record["step"] == 2:
            os.kill(os.getpid(), number)

    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(loop.Stopped):
        fit(tiny_model(), documents(4), watch, on_step=on_step)
    assert len(watch.steps) == 2 and [s["step"] for s in watch.saves] == [2]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_acts_at_once():
    watch = Watch()

    def on_step(record):
        watch.steps.append(record)
        # raise_signal returns after the handler; two signals sent from outside may arrive as one.
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # A shell makes its background jobs ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tiny_model(), documents(4), watch, on_step=on_step)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(watch.steps) == 1 and watch.saves == []


def test_a_signal_during_the_last_evaluation_is_not_lost():
    watch = Watch()
    watch.keep_best = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(loop.Stopped):
        fit(tiny_model(), documents(4), watch)
    assert [s["step"] for s in watch.saves] == [4, 4]


def test_the_state_survives_json():
    for state in (loop.State(), loop.State(3, 1, 2, 1, [0.5], {"loss": 2.5}, 3, 1, 3, 99, 1.25)):
        assert loop.state_from(json.loads(json.dumps(loop.state_dict(state), allow_nan=False))) == state

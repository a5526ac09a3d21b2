"""training/optim.py: AdamW, the learning rate schedule, and the optimizer and decay of each parameter."""

import subprocess
import sys

import pytest
import torch

from tests.folders import ROOT
from tests.makers import tiny_model
from training.optim import AdamW, lr_factor, make_optimizers


def factors(kind, warmup=2, total=6):
    return [lr_factor(step, total, warmup, kind) for step in range(total)]


HALF = 2**0.5 / 2  # the cosine of 45 degrees
AFTER_WARMUP = {
    "linear": [3 / 4, 1 / 2, 1 / 4],
    "cosine": [(1 + HALF) / 2, 1 / 2, (1 - HALF) / 2],
    "constant": [1, 1, 1],
}


@pytest.mark.parametrize("kind", AFTER_WARMUP)
def test_the_lr_rises_linearly_in_the_warm_up_and_then_follows_its_schedule(kind):
    assert factors(kind) == pytest.approx([1 / 3, 2 / 3, 1, *AFTER_WARMUP[kind]])


def test_without_warm_up_the_first_step_has_the_full_lr_and_the_last_one_some():
    assert factors("linear", warmup=0, total=4) == [1, 0.75, 0.5, 0.25]
    assert factors("cosine", warmup=0, total=1) == factors("linear", warmup=0, total=1) == [1]


def test_a_run_shorter_than_its_warm_up_only_rises():
    assert factors("linear", warmup=9, total=3) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_shrinks_matrices_and_leaves_vectors(name):
    model = tiny_model(adapted=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
            p.grad = torch.zeros_like(p)
    for optimizer in make_optimizers(model, name, learning_rate=0.5, weight_decay=0.1):
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.flatten()[0].item() == pytest.approx(0.95 if p.ndim == 2 else 1.0), name


def test_the_magnitudes_of_dora_are_vectors_and_do_not_decay():
    (optimizer,) = make_optimizers(tiny_model(type="dora"), "adamw", 1e-3, 0.1)
    decay = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def held_by(optimizer, model) -> set[str]:
    """Returns the names of the parameters in the optimizer's groups."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else():
    model = tiny_model(adapted=False)
    adamw, muon = (held_by(optimizer, model) for optimizer in make_optimizers(model, "muon", 1e-3, 0.1))
    names = {n for n, _ in model.named_parameters()}
    assert muon == {n for n in names if n.startswith("model.layers.") and n.endswith("_proj.weight")}
    assert adamw == names - muon and "model.embed_tokens.weight" in adamw


def test_frozen_weights_are_in_no_optimizer():
    model = tiny_model()
    held = set.union(*(held_by(optimizer, model) for optimizer in make_optimizers(model, "muon", 1e-3, 0.0)))
    assert held == {n for n, _ in model.named_parameters() if "lora_" in n}


def steps_of(optimizer, params, count: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def fresh_params() -> list[torch.Tensor]:
    return [torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)), torch.nn.Parameter(torch.ones(4))]


def test_the_first_adamw_step_is_the_sign_of_the_gradient_times_the_lr():
    """m / sqrt(v) = g / |g| after one step, and the decay subtracts 0.1 * 0.5 of the weight."""
    (p,) = params = [torch.nn.Parameter(torch.tensor([1.0, 1.0]))]
    p.grad = torch.tensor([3.0, -0.2])
    AdamW([{"params": params, "weight_decay": 0.5}], lr=0.1).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.85, 1.05]))


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_adamw_is_pytorchs_to_the_last_bit(beta2):
    ours, theirs = fresh_params(), fresh_params()
    steps_of(AdamW([{"params": ours, "weight_decay": 0.1}], lr=0.01, beta2=beta2), ours, 20)
    settings = {"weight_decay": 0.1, "betas": (0.9, beta2), "fused": True}
    steps_of(torch.optim.AdamW(theirs, lr=0.01, **settings), theirs, 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_adamw_goes_on_from_a_saved_state_as_if_it_had_never_stopped():
    def build(params):
        pairs = ((params[:1], 0.1), (params[1:], 0.0))
        return AdamW([{"params": some, "weight_decay": decay} for some, decay in pairs], lr=0.01)

    straight, stopped = fresh_params(), fresh_params()
    first, second = build(straight), build(stopped)
    steps_of(first, straight, 3)
    steps_of(second, stopped, 3)
    saved, third = second.state_dict(), build(stopped)
    third.load_state_dict(saved)
    steps_of(first, straight, 3, seed=1)
    steps_of(third, stopped, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))
    assert second.state[stopped[0]]["step"] == 3, "the new optimizer wrote into the saved state"


def test_a_parameter_without_a_gradient_stays_as_it_is():
    params = fresh_params()
    optimizer = AdamW([{"params": params, "weight_decay": 0.1}], lr=0.01)
    params[0].grad = torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(params[1], torch.ones(4)) and params[1] not in optimizer.state


def test_no_compiler_is_imported_for_a_first_step():
    """Importing torch._dynamo takes over a second; loading and training a model must not need it."""
    program = """if True:
        import sys, torch
        from data.packing import pack
        from data.render import Document
        from lora.inject import inject
        from model.hub import TINY
        from model.weights import load_model
        from training import loop
        from training.objectives.sft import SupervisedFineTuning
        from training.optim import make_optimizers
        from common.device import Precision

        model = load_model(TINY, torch.bfloat16)
        inject(model, r=4, lora_alpha=8, target_modules=["q_proj"], seed=0)
        batch, sft = pack([Document([2, 300, 301], [300, 301, 1], "row")]), SupervisedFineTuning()
        optimizers = make_optimizers(model, "adamw", 1e-3, 0.1)
        bf16 = Precision("bf16", torch.device("cpu"))
        assert loop.train_step(model, sft, [batch], optimizers, bf16, 1e-3, 1.0)["applied"]
        assert "torch._dynamo" not in sys.modules, "imported"
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

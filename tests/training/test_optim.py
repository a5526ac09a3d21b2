"""training/optim.py: the rate's way by hand, and which weights go to which optimiser with which decay."""

import pytest
import torch

from tests.makers import tiny_model
from training.optim import lr_factor, make_optimizers


def factors(kind, warmup=2, total=6):
    return [lr_factor(step, total, warmup, kind) for step in range(total)]


def test_the_linear_rate_rises_in_thirds_and_falls_in_quarters():
    assert factors("linear") == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 1 / 2, 1 / 4])


def test_the_cosine_rate_falls_in_half_a_cosine():
    half = 2**0.5 / 2
    assert factors("cosine") == pytest.approx([1 / 3, 2 / 3, 1, (1 + half) / 2, 1 / 2, (1 - half) / 2])


def test_the_constant_rate_stays_after_the_warm_up():
    assert factors("constant") == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_without_warm_up_the_first_step_has_the_full_rate_and_the_last_one_some():
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


def test_muon_takes_the_matrices_of_the_layers_and_nothing_else():
    model = tiny_model(adapted=False)
    adamw, muon = make_optimizers(model, "muon", 1e-3, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    held = [{names[id(p)] for group in optimizer.param_groups for p in group["params"]} for optimizer in (adamw, muon)]
    assert held[1] == {n for n in names.values() if n.startswith("model.layers.") and n.endswith("_proj.weight")}
    assert held[0] == set(names.values()) - held[1] and "model.embed_tokens.weight" in held[0]


def test_frozen_weights_are_in_no_optimiser():
    model = tiny_model()
    held = {id(p) for optimizer in make_optimizers(model, "muon", 1e-3, 0.0) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in model.named_parameters() if "lora_" in n}

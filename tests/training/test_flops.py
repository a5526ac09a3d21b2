"""training/flops.py: a count by hand, PyTorch's own counter on real steps, and the known GPUs' peaks."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.packing import pack
from data.render import IGNORE_INDEX, Document
from lora.inject import inject
from model.gemma3 import Gemma3ForCausalLM
from tests.makers import tiny_config
from training.flops import peak_flops, step_flops
from training.objectives.sft import SupervisedFineTuning

LAYERS, WIDTH, VOCABULARY = 6, 32, 300
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def model_that(trains: str) -> Gemma3ForCausalLM:
    model = Gemma3ForCausalLM(tiny_config(num_hidden_layers=LAYERS, hidden_size=WIDTH, vocab_size=VOCABULARY))
    model.reset_parameters(seed=0)
    if trains == "adapters":
        inject(model, r=4, lora_alpha=4, target_modules=["all-linear"], seed=0)
    return model


def test_a_frozen_and_a_trained_matrix_by_hand():
    model = model_that("adapters").requires_grad_(False)
    # A layer has q (32 x 32), k and v (32 x 16) before its attention, and o (32 x 32), gate, up and down
    # (32 x 48) after it. An adapter of rank 4 adds 4 (in + out) parameters to each.
    before = 32 * 32 + 2 * 32 * 16 + 4 * (64 + 2 * 48)
    after = 32 * 32 + 3 * 32 * 48 + 4 * (64 + 3 * 80)
    frozen = 4 * (10 * (6 * before + 5 * after) + 3 * after + 3 * 300 * 32)
    assert step_flops(model, tokens=10, targets=3) == frozen
    # The gradient of a trained matrix is one more product, of 4 x 32 for each token.
    model.model.layers[0].mlp.gate_proj.lora_A.requires_grad_(True)
    assert step_flops(model, tokens=10, targets=3) == frozen + 2 * 10 * 4 * 32


@pytest.mark.parametrize("trains", ["adapters", "everything"])
def test_the_count_is_that_of_pytorchs_counter(trains):
    model = model_that(trains).train()
    supervised = [IGNORE_INDEX] * 20 + list(range(4, 24))
    batch = pack([Document([2 + i for i in range(40)], supervised, str(n)) for n in range(3)])

    def in_place(_, a, b, out_shape=None, **settings):
        """Counts the addmm_ of lora/fused.py, which the counter does not know."""
        return 2 * a[0] * a[1] * b[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        SupervisedFineTuning().loss(model, batch)[0].backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op).split(".")[-1] in ("mm", "addmm", "addmm_"))
    if trains == "adapters":  # The first layer's input needs no gradient: these products are skipped.
        first = model.model.layers[0].self_attn
        matrices = [
            p for m in (first.q_proj, first.k_proj, first.v_proj) for p in (m.base_layer.weight, m.lora_A)
        ]
        difference = -sum(2 * 120 * p.numel() for p in matrices)
    else:  # A loss whose head trains computes its logits again in the backward pass.
        difference = 2 * 60 * model.head_weight.numel()
    assert products == step_flops(model, tokens=120, targets=60) + difference


CARDS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA RTX A1000": None,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 4090 D": None,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 3090 Ti": None,
}


@pytest.mark.parametrize("name", CARDS)
def test_the_peak_of_a_gpu_by_its_name(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(GPU, torch.bfloat16) == peak_flops(GPU, torch.float16) == CARDS[name]
    assert peak_flops(GPU, torch.float32) is None and peak_flops(CPU, torch.bfloat16) is None

"""training/flops.py: a count by hand, PyTorch's own counter on real steps, and which GPUs' promises are
known.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.packing import pack
from data.render import Document
from lora.inject import inject
from model.gemma3 import Gemma3ForCausalLM
from tests.makers import tiny_config
from training.flops import peak_flops, step_flops
from training.objectives.sft import SupervisedFineTuning

LAYERS, WIDTH, VOCABULARY = 6, 32, 300


def model_that(trains: str) -> Gemma3ForCausalLM:
    model = Gemma3ForCausalLM(tiny_config(num_hidden_layers=LAYERS, hidden_size=WIDTH, vocab_size=VOCABULARY))
    model.reset_parameters(seed=0)
    if trains == "adapters":
        inject(
            model,
            type="lora",
            r=4,
            lora_alpha=4,
            lora_dropout=0.0,
            use_rslora=False,
            target_modules=["all-linear"],
            seed=0,
        )
    return model


def test_a_frozen_and_a_trained_matrix_by_hand():
    model = model_that("adapters").requires_grad_(False)
    # a layer has q (32 x 32), k and v (32 x 16) before its attention, and o (32 x 32), gate, up and down (32
    # x 48) behind it; rank 4 adds 4 (in + out) each
    before = 32 * 32 + 2 * 32 * 16 + 4 * (64 + 2 * 48)
    behind = 32 * 32 + 3 * 32 * 48 + 4 * (64 + 3 * 80)
    assert step_flops(model, tokens=10, targets=3) == 4 * (
        10 * (6 * before + 5 * behind) + 3 * behind + 3 * 300 * 32
    )
    model.model.layers[0].mlp.gate_proj.lora_A.requires_grad_(
        True
    )  # its gradient is one product more, of 4 x 32 for each token
    assert (
        step_flops(model, tokens=10, targets=3)
        == 4 * (10 * (6 * before + 5 * behind) + 3 * behind + 3 * 300 * 32) + 2 * 10 * 4 * 32
    )


@pytest.mark.parametrize("trains", ["adapters", "everything"])
def test_the_count_is_that_of_pytorchs_counter(trains):
    model = model_that(trains)
    supervised = [-100] * 20 + list(range(4, 24))
    batch = pack([Document([2 + i for i in range(40)], supervised, str(n)) for n in range(3)])
    model.train()
    in_place = {
        torch.ops.aten.addmm_: lambda _, a, b, out_shape=None, **settings: 2 * a[0] * a[1] * b[1]
    }  # lora.fused's, which the counter does not know
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        total, *_ = SupervisedFineTuning().loss(model, batch)
        total.backward()
    products = {
        name: n
        for name, n in counter.get_flop_counts()["Global"].items()
        if str(name).split(".")[-1] in ("mm", "addmm", "addmm_")
    }
    if (
        trains == "adapters"
        # Nobody needs the gradient of the first layer's input, which only B's part of the way back does not
        # serve.
    ):
        first = model.model.layers[0].self_attn
        beside = -sum(
            2 * 120 * p.numel()
            for m in (first.q_proj, first.k_proj, first.v_proj)
            for p in (m.base_layer.weight, m.lora_A)
        )
    # A loss whose head trains works its logits out anew in the backward pass, which is no use of the model.
    else:
        beside = 2 * 60 * model.head_weight.numel()
    assert sum(products.values()) == step_flops(model, tokens=120, targets=60) + beside


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
    assert (
        peak_flops(torch.device("cuda"), torch.bfloat16)
        == peak_flops(torch.device("cuda"), torch.float16)
        == CARDS[name]
    )
    assert (
        peak_flops(torch.device("cuda"), torch.float32) is None
        and peak_flops(torch.device("cpu"), torch.bfloat16) is None
    )

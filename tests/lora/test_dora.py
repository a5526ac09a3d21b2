"""lora/dora.py: an example by hand, parity with PEFT, and the invariants of the magnitude."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora.dora import DoRALinear
from tests.lora.test_layer import copy_to_peft


def trained(layer: DoRALinear) -> DoRALinear:
    """Fills lora_B with random values and scales the magnitudes by random factors."""
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(layer.lora_B, generator=generator)
    magnitude = layer.lora_magnitude_vector.data
    magnitude *= 1 + torch.rand(magnitude.shape, generator=generator)
    return layer


def pair_with_peft(bias=True, dtype=torch.float32, lora_dropout=0.0):
    """Returns our DoRA layer and PEFT's over the same nn.Linear(6, 5), with the same parameters."""
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=bias).to(dtype)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True, lora_dropout=lora_dropout)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    ours = trained(DoRALinear(base, 4, 8, lora_dropout))
    copy_to_peft(ours, theirs)
    return ours, theirs


def test_the_layer_of_an_example_by_hand():
    base = nn.Linear(2, 2)
    layer = DoRALinear(base, r=1, lora_alpha=1)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 4], [0, 2]]))
        base.bias.copy_(torch.tensor([10.0, 20]))
        layer.lora_A.copy_(torch.tensor([[1.0, 0]]))
        layer.lora_B.copy_(torch.tensor([[2.0], [0]]))
        layer.lora_magnitude_vector.copy_(torch.tensor([10.0, 1]))
    # W + B A = [[3, 4], [0, 2]]; the norms of its rows are 5 and 2, so the gains are 10 / 5 and 1 / 2.
    torch.testing.assert_close(layer.row_norms(), torch.tensor([5.0, 2]))
    torch.testing.assert_close(layer.merged_weight(), torch.tensor([[6.0, 8], [0, 1]]))
    torch.testing.assert_close(layer(torch.tensor([1.0, 1])), torch.tensor([24.0, 21]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_equal_pefts(bias, lora_dropout, training):
    ours, theirs = pair_with_peft(bias, lora_dropout=lora_dropout)
    x = torch.randn(2, 7, 6)
    torch.manual_seed(3)
    y = ours.train(training)(x)
    torch.manual_seed(3)
    expected = theirs.train(training)(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for name in ("lora_A", "lora_B", "lora_magnitude_vector"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name)["default"].weight.grad)


def test_output_over_a_bfloat16_base_equals_pefts():
    ours, theirs = pair_with_peft(dtype=torch.bfloat16)
    x = torch.randn(7, 6, dtype=torch.bfloat16)
    y = ours(x)
    assert y.dtype == torch.bfloat16 and ours.lora_magnitude_vector.dtype == torch.float32
    torch.testing.assert_close(y, theirs(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(dtype):
    base = nn.Linear(6, 5).to(dtype)
    x = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(DoRALinear(base, 4, 8)(x), base(x))


def test_norms_of_the_merged_weights_rows_are_the_magnitudes():
    layer = trained(DoRALinear(nn.Linear(6, 5), 4, 8))
    torch.testing.assert_close(layer.merged_weight().norm(dim=1), layer.lora_magnitude_vector.detach())


def test_no_gradient_flows_through_the_norm():
    layer = trained(DoRALinear(nn.Linear(6, 5, bias=False), 4, 8))
    x = torch.randn(7, 6)
    layer(x).sum().backward()
    gain = (layer.lora_magnitude_vector / layer.row_norms()).detach()
    # With the norm constant, d sum(y) / dB = scaling * gain * sum over tokens of A x.
    expected = layer.scaling * gain[:, None] * (x @ layer.lora_A.detach().T).sum(0)
    torch.testing.assert_close(layer.lora_B.grad, expected)


def test_under_autocast_the_norm_is_still_float32():
    layer = trained(DoRALinear(nn.Linear(6, 5), 4, 8))
    expected = layer.row_norms()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.row_norms(), expected)
        assert layer(torch.randn(3, 6)).dtype == torch.bfloat16


def test_a_disabled_adapter_equals_its_base():
    layer = trained(DoRALinear(nn.Linear(6, 5), 4, 8))
    x = torch.randn(3, 6)
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))

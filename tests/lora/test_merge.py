"""lora/merge.py: an example by hand, parity with merge_and_unload of PEFT, and with the unmerged model."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora.inject import adapters, inject, load_adapter_state
from lora.merge import merge, merged
from model.quantized import QuantizedLinear, QuantizedWeight, dequantized
from tests.lora.test_layer import copy_to_peft


def make_model(dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(dtype)


def adapted(model: nn.Module, type="lora", scale=1.0, **settings) -> nn.Module:
    """Injects adapters with a random lora_B into the model."""
    inject(model, type=type, target_modules="all-linear", seed=1, **{"r": 3, "lora_alpha": 6} | settings)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=scale)
        if type == "dora":
            layer.lora_magnitude_vector.data *= 1.5
    return model


X = torch.linspace(-1, 1, 18).view(3, 6)


def test_the_weight_and_the_norm_of_an_example_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[1.0, 0], [0, 1]])
    inject(model, r=1, lora_alpha=2, target_modules=["0"], seed=1)
    load_adapter_state(model, {"0.lora_A": torch.tensor([[3.0, 4]]), "0.lora_B": torch.tensor([[1.0], [0]])})
    # scaling B A = 2 * [[3, 4], [0, 0]]; its Frobenius norm is sqrt(36 + 64).
    assert merge(model) == {"0": 10.0}
    assert model[0].weight.tolist() == [[7, 8], [0, 1]]


PATTERNS = {"rank_pattern": {"2": 1}, "alpha_pattern": {"0": 1}}


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, PATTERNS])
@pytest.mark.parametrize("type", ["lora", "dora"])
def test_merged_model_equals_adapter_model(type, settings):
    model = adapted(make_model(), type, **settings)
    expected = model(X)
    norms = merge(model)
    assert [layer.__class__ for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-5)
    assert list(norms) == ["0", "2"] and all(norm > 0 for norm in norms.values())


@pytest.mark.parametrize("type", ["lora", "dora"])
def test_merged_weights_equal_pefts(type):
    model = make_model()
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], use_dora=type == "dora")
    theirs = get_peft_model(copy.deepcopy(model), config)
    for name, layer in adapters(adapted(model, type)).items():
        copy_to_peft(layer, theirs.base_model.model.get_submodule(name))
    merge(model)
    expected = theirs.merge_and_unload()
    for name in ("0.weight", "0.bias", "2.weight"):
        torch.testing.assert_close(model.get_parameter(name), expected.get_parameter(name))


def test_a_bfloat16_weight_is_rounded_once_from_the_float32_sum():
    model = adapted(make_model(torch.bfloat16))
    before, delta = model[0].base_layer.weight.clone(), model[0].delta_weight()
    norms = merge(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, (before.float() + delta).bfloat16())
    assert norms["0"] == pytest.approx((model[0].weight.float() - before.float()).norm().item())


def test_an_untrained_adapter_is_not_merged_unless_allowed():
    model = make_model()
    inject(model, r=3, lora_alpha=6, target_modules="all-linear", seed=1)
    with pytest.raises(ValueError, match="none of 2 weights would change"):
        merge(model)
    assert len(adapters(model)) == 2
    assert merge(model, allow_zero=True) == {"0": 0.0, "2": 0.0}
    assert not adapters(model)


def test_a_delta_that_is_lost_in_rounding_is_reported():
    model = adapted(make_model(torch.bfloat16), scale=1e-9)
    with pytest.raises(ValueError, match="load the base in float32"):
        merge(model)


def test_an_adapter_with_nan_is_not_merged_and_the_weights_stay():
    model = adapted(make_model())
    before = model[0].base_layer.weight.clone()
    model[2].lora_A.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not be finite: 2"):
        merge(model)
    assert torch.equal(model[0].base_layer.weight, before)


def test_a_model_without_adapters_has_nothing_to_merge():
    with pytest.raises(ValueError, match="no adapters"):
        merge(make_model())


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("type", ["lora", "dora"])
def test_inside_the_block_a_layer_is_one_product_and_afterwards_as_before(type, quantized):
    model = make_model()
    if quantized:
        weight = QuantizedWeight.zeros(5, 32, "q8_0", torch.float32)
        weight.blocks.random_(0, 60, generator=torch.Generator().manual_seed(1))
        model = nn.Sequential(nn.Linear(6, 32), QuantizedLinear(weight))
    model = adapted(model, type)
    expected = model(X)
    for layer in adapters(model).values():
        layer.adapter_product = None  # would raise an error if it was called
    with torch.no_grad(), merged(model, 10**9) as unused, dequantized(model, 10**9, unused):
        assert all(getattr(layer, "dense", None) is None for layer in model.modules())  # no second copy
        torch.testing.assert_close(model(X), expected.detach(), rtol=1e-5, atol=1e-5)
    for layer in adapters(model).values():
        del layer.adapter_product
    assert torch.equal(model(X), expected)


def test_merged_changes_nothing_where_it_would_round_or_take_too_much_memory():
    for dtype, room in ((torch.bfloat16, 10**9), (torch.float32, 10)):
        model, x = adapted(make_model(dtype)), X.to(dtype)
        with torch.no_grad():
            expected = model(x)
            with merged(model, room):
                assert torch.equal(model(x), expected)
                assert not any("forward" in vars(layer) for layer in adapters(model).values())
    model = adapted(make_model())
    with torch.autocast("cpu"), merged(model, 10**9):
        assert not any("forward" in vars(layer) for layer in adapters(model).values())

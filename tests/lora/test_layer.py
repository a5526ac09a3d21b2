"""lora/layer.py: an example by hand, parity with PEFT in each dtype, and a fresh or disabled adapter."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lora.layer import LoRALinear


def trained(layer: LoRALinear) -> LoRALinear:
    """Fills lora_B with random values."""
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    return layer


def copy_to_peft(ours: LoRALinear, theirs: nn.Module) -> None:
    """Copies the adapter's parameters to PEFT's layer."""
    for name, p in ours.named_parameters(recurse=False):
        getattr(theirs, name)["default"].weight.data.copy_(p.data)


def pair_with_peft(dtype=torch.float32, use_rslora=False, lora_dropout=0.0):
    """Returns our LoRA layer and PEFT's over the same nn.Linear(6, 5), with the same A and B."""
    torch.manual_seed(0)
    base, settings = nn.Linear(6, 5).to(dtype), {"use_rslora": use_rslora, "lora_dropout": lora_dropout}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], **settings)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model[0]
    ours = trained(LoRALinear(base, 4, 8, lora_dropout, use_rslora))
    copy_to_peft(ours, theirs)
    return ours, theirs


def test_the_product_of_an_example_by_hand():
    base = nn.Linear(2, 3)
    layer = LoRALinear(base, r=1, lora_alpha=4)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        base.bias.copy_(torch.tensor([0.0, 0, 5]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [0], [-1]]))
    # W x + b = [3, 5, 13]; A x = 13; scaling = 4 / 1; scaling B A x = [52, 0, -52].
    torch.testing.assert_close(layer(torch.tensor([3.0, 5])), torch.tensor([55.0, 5, -39]))
    torch.testing.assert_close(layer.delta_weight(), torch.tensor([[4.0, 8], [0, 0], [-4, -8]]))


def test_rslora_divides_by_the_root_of_r():
    assert LoRALinear(nn.Linear(2, 2), r=16, lora_alpha=8).scaling == 0.5
    assert LoRALinear(nn.Linear(2, 2), r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6)])
def test_output_and_gradients_equal_pefts(dtype, shape, use_rslora):
    ours, theirs = pair_with_peft(dtype, use_rslora)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    y, expected = ours(x), theirs(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["default"].weight.grad)


def test_under_autocast_the_product_runs_in_autocasts_dtype_as_pefts_does():
    ours, theirs = pair_with_peft()
    x = torch.randn(7, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), theirs(x)
        assert ours.adapter_product(ours.adapter_input(x)).dtype == torch.bfloat16
        assert ours.adapter_input(x.bfloat16()).dtype == torch.bfloat16, "autocast would undo a cast"
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_adapters_stay_float32_and_the_base_frozen_when_the_base_is_bfloat16():
    layer = LoRALinear(nn.Linear(4, 4).bfloat16(), 2, 4)
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.delta_weight().dtype == torch.float32
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing(dtype):
    base = nn.Linear(6, 5).to(dtype)
    x = torch.randn(3, 6, dtype=dtype)
    assert torch.equal(LoRALinear(base, 4, 8)(x), base(x))


def test_a_disabled_adapter_equals_its_base():
    layer = trained(LoRALinear(nn.Linear(6, 5), 4, 8))
    x = torch.randn(3, 6)
    assert not torch.equal(layer(x), layer.base_layer(x))
    layer.enabled = False
    assert torch.equal(layer(x), layer.base_layer(x))


def test_dropout_applies_to_the_adapters_input_only_and_only_in_training():
    ours, theirs = pair_with_peft(lora_dropout=0.5)
    x = torch.randn(7, 6)
    torch.manual_seed(3)
    y = ours.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(y, theirs.train()(x))
    without = LoRALinear.adapter_product(ours, x) + ours.base_layer(x)
    assert not torch.allclose(y, without)
    torch.testing.assert_close(ours.eval()(x), without)


def test_first_weights_depend_on_the_seed_and_not_on_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = LoRALinear(nn.Linear(4, 4, device="meta").to_empty(device="cpu"), 2, 4, seed=7).lora_A
    torch.rand(5)
    b = LoRALinear(nn.Linear(4, 4), 2, 4, seed=7).lora_A
    assert torch.equal(a, b)
    assert not torch.equal(a, LoRALinear(nn.Linear(4, 4), 2, 4, seed=8).lora_A)
    torch.set_rng_state(before)
    LoRALinear(nn.Linear(4, 4, device="meta"), 2, 4)
    assert torch.equal(before, torch.get_rng_state())


def test_merged_weight_equals_base_and_adapter():
    layer = trained(LoRALinear(nn.Linear(6, 5), 4, 8))
    x = torch.randn(3, 6)
    y = nn.functional.linear(x, layer.merged_weight(), layer.base_layer.bias)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-5)

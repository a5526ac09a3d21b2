"""lora/fused.py: an example by hand, equality with the plain sum, finite differences, where it applies."""

import pytest
import torch
from torch import nn

from lora.fused import FusedLoRA
from lora.layer import LoRALinear
from tests.lora.test_layer import trained


def layer(dtype=torch.float32, bias: bool = False, **settings) -> LoRALinear:
    torch.manual_seed(0)
    return trained(LoRALinear(nn.Linear(6, 5, bias=bias).to(dtype), 4, 8, **settings))


def plain(self: LoRALinear, x: torch.Tensor) -> torch.Tensor:
    return self.base_layer(x) + self.adapter_product(self.adapter_input(x))


def gradients(y: torch.Tensor, x: torch.Tensor, of: LoRALinear) -> tuple:
    return torch.autograd.grad(y.square().sum(), (x, of.lora_A, of.lora_B))


def test_the_product_and_its_gradients_of_an_example_by_hand():
    values = ([[3.0, 5]], [[1.0, 0], [0, 1]], [[1.0, 2]], [[1.0], [-1]])
    x, w, a, b = (torch.tensor(v, requires_grad=True) for v in values)
    y = FusedLoRA.apply(x, w, a, b, 4.0)  # A x = 13, scaling A x = 52
    assert y.tolist() == [[55, -47]]
    y.backward(torch.tensor([[1.0, 2]]))  # g = (1, 2), B^T g = -1, scaling B^T g = -4
    assert x.grad.tolist() == [[1 - 4, 2 - 8]]
    assert (a.grad.tolist(), b.grad.tolist()) == ([[-12, -20]], [[52], [104]])


@pytest.mark.parametrize("shape", [(7, 6), (2, 7, 6), (6,)])
def test_it_equals_the_plain_sum(shape):
    ours = layer().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert ours.fused_dtype(x) == torch.float64
    y, expected = ours(x), plain(ours, x)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    for got, wanted in zip(gradients(y, x, ours), gradients(expected, x, ours), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-11, rtol=1e-11)


def test_gradients_are_those_of_finite_differences():
    ours = layer().double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight, inputs = ours.base_layer.weight, (x, ours.lora_A, ours.lora_B)
    assert torch.autograd.gradcheck(lambda x, a, b: FusedLoRA.apply(x, weight, a, b, 2.0), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_no_further_from_the_exact_sum_than_the_plain_one(dtype):
    ours, exact = layer(dtype), layer(dtype).double()
    x = torch.randn(200, 6)
    wanted = plain(exact, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y, other = ours(x), plain(ours, x)
    assert y.dtype == torch.bfloat16 and (y - wanted).norm() <= 1.05 * (other - wanted).norm()
    y.float().sum().backward()
    assert ours.lora_A.grad.dtype == ours.lora_B.grad.dtype == torch.float32
    assert ours.base_layer.weight.grad is None


def test_dropout_a_bias_mixed_dtypes_and_no_grad_use_the_plain_sum():
    x = torch.randn(7, 6)
    assert layer().train().fused_dtype(x) == torch.float32
    assert layer(lora_dropout=0.1).eval().fused_dtype(x) == torch.float32
    assert layer(lora_dropout=0.1).train().fused_dtype(x) is None
    assert layer(bias=True).fused_dtype(x) is None
    # Over a bfloat16 base, the adapter computes in float32, as PEFT's does.
    assert layer(torch.bfloat16).fused_dtype(x.bfloat16()) is None
    with torch.no_grad():
        assert layer().fused_dtype(x) is None

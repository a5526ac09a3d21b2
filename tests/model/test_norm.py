"""model/norm.py: an example by hand, parity with the reference and transformers, and invariants."""

import pytest
import torch

from model.norm import Gemma3RMSNorm, reference_rms_norm


def norm_with(weight: list[float], eps: float = 0.0) -> Gemma3RMSNorm:
    norm = Gemma3RMSNorm(len(weight), eps)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
    return norm


def test_the_norm_by_hand():
    # mean([1, 49]) = 25, so x is divided by 5, which gives [0.2, 1.4]. 1 + weight = [1, 3].
    torch.testing.assert_close(norm_with([0.0, 2.0])(torch.tensor([[1.0, 7.0]])), torch.tensor([[0.2, 4.2]]))


def test_eps_is_added_under_the_root():
    y = norm_with([0.0, 0.0], eps=75.0)(torch.tensor([1.0, 7.0]))
    torch.testing.assert_close(y, torch.tensor([0.1, 0.7]))  # sqrt(25 + 75) = 10


def test_the_product_with_the_weight_is_rounded_last():
    # 1.4 * 13 = 18.2 is 18.25 in bfloat16. If 1.4 were rounded first, to 1.3984375, the product 18.18 would
    # be 18.125.
    x, norm = torch.tensor([[1.0, 7.0]], dtype=torch.bfloat16), norm_with([0.0, 12.0]).bfloat16()
    assert norm(x)[0, 1].item() == reference_rms_norm(x, norm.weight, 0.0)[0, 1].item() == 18.25


# the fast norm


def random_input(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """x (7, 3, 24), weight (24,)."""
    generator = torch.Generator().manual_seed(0)
    x, weight = 5 * torch.randn(7, 3, 24, generator=generator), torch.randn(24, generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


def fast(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    norm = Gemma3RMSNorm(len(weight), eps)
    return torch.func.functional_call(norm, {"weight": weight}, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_fast_norm_equals_the_reference_with_gradients(dtype):
    x, weight = random_input(dtype)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    outputs = fast(x, weight, 0.5), reference_rms_norm(x, weight, 0.5)
    results = [(y, *torch.autograd.grad(y, (x, weight), upstream)) for y in outputs]
    one_bit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps)
    torch.testing.assert_close(*results, atol=one_bit / 10, rtol=one_bit)


def test_its_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(lambda x, weight: fast(x, weight, 0.5), random_input())


def test_a_frozen_weight_gets_no_gradient_and_the_input_the_same_one():
    x, weight = random_input()
    (trained,) = torch.autograd.grad(fast(x, weight, 0.5).square().sum(), x)
    (frozen,) = torch.autograd.grad(fast(x, weight.detach(), 0.5).square().sum(), x)
    assert torch.equal(frozen, trained)


def test_it_keeps_its_inputs_and_one_value_a_row():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        fast(*random_input(torch.float32), 0.5)
    assert sorted(kept) == sorted([7 * 3, 24, 7 * 3 * 24])


# transformers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_equal_transformers(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm as Reference

    x, weight = random_input(dtype)
    theirs = Reference(24, 1e-6)
    theirs.weight = torch.nn.Parameter(weight.detach())
    pairs = (fast(x, weight, 1e-6), weight), (theirs(x), theirs.weight)
    results = [(y, *torch.autograd.grad(y.float().square().sum(), (x, w))) for y, w in pairs]
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(*results, atol=tolerance, rtol=tolerance)


# invariants


def test_a_fresh_norm_gives_a_mean_square_of_one():
    x = 100 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 30
    torch.testing.assert_close(Gemma3RMSNorm(64)(x).square().mean(-1), torch.ones(5))


def test_the_length_of_the_input_does_not_matter():
    norm, x = norm_with([0.5, -0.5, 0.0]), torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(norm(x), norm(1024 * x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_activations_do_not_overflow(dtype):
    x = torch.full((4,), 6e4, dtype=dtype)  # The square exceeds float16's largest value, 65504.
    assert torch.equal(Gemma3RMSNorm(4)(x), torch.ones(4, dtype=dtype))

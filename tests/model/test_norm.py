"""model/norm.py: a root mean square of five by hand, the same bits as transformers in every precision, and what a norm must not depend on."""

import pytest
import torch

from model.norm import Gemma3RMSNorm


def norm_with(weight: list[float], eps: float = 0.0) -> Gemma3RMSNorm:
    norm = Gemma3RMSNorm(len(weight), eps)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weight))
    return norm


def test_the_norm_written_here_by_hand():
    # mean([1, 49]) = 25, so x / 5 = [0.2, 1.4]; 1 + weight = [1, 3]
    torch.testing.assert_close(norm_with([0.0, 2.0])(torch.tensor([[1.0, 7.0]])), torch.tensor([[0.2, 4.2]]))


def test_eps_is_added_under_the_root():
    # 25 + 75 = 100, so x / 10
    torch.testing.assert_close(norm_with([0.0, 0.0], eps=75.0)(torch.tensor([1.0, 7.0])), torch.tensor([0.1, 0.7]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_equal_transformers_to_the_bit(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm as Reference

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, generator=generator)
    ours, theirs = norm_with(weight.tolist(), 1e-6).to(dtype), Reference(24, 1e-6).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 3, 24, generator=generator).to(dtype)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(x_ours), theirs(x_theirs)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert y.dtype == dtype
    assert torch.equal(y, expected) and torch.equal(x_ours.grad, x_theirs.grad) and torch.equal(ours.weight.grad, theirs.weight.grad)


def test_a_fresh_norm_gives_a_mean_square_of_one():
    x = 100 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 30
    torch.testing.assert_close(Gemma3RMSNorm(64)(x).square().mean(-1), torch.ones(5))


def test_the_length_of_the_input_does_not_matter():
    norm, x = norm_with([0.5, -0.5, 0.0]), torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(norm(x), norm(1024 * x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_activations_do_not_overflow(dtype):
    x = torch.full((4,), 6e4, dtype=dtype)  # the square is past float16's 65504
    assert torch.equal(Gemma3RMSNorm(4)(x), torch.ones(4, dtype=dtype))

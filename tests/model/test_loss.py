"""model/loss.py: two words by hand, the chunked loss against the slow one and transformers', its gradients, and what it holds in memory."""

import math

import pytest
import torch

from model.loss import linear_cross_entropy, reference_linear_cross_entropy
from tests.makers import needs_compiler
from tests.model.test_attention import Largest

S, D, V = 11, 6, 37  # supervised positions, hidden size, vocabulary


def example(dtype=torch.float64, weight_trains: bool = True):
    """hidden (S, D), weight (V, D), targets (S,); logits of about 3, so that a softcap of 2 is felt."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(S, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (S,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(weight_trains), targets


def value_and_gradients(loss, *weights):
    return loss.detach(), *torch.autograd.grad(loss, weights)


def test_the_loss_of_two_words_written_here_by_hand():
    # logits (0, ln 3), so the words have 1/4 and 3/4; the second is right: -ln(3/4).  dL/dlogits = (1/4, 3/4 - 1)
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    total, losses = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    total.backward()
    torch.testing.assert_close(total, torch.tensor(0.287682), atol=1e-6, rtol=0)
    torch.testing.assert_close(losses, torch.tensor([0.287682]), atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden.grad, torch.tensor([[-0.25 * math.log(3), 0.0]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[0.25, 0.0], [-0.25, 0.0]]))


def test_a_softcap_of_two_by_hand():
    # 2 tanh(1.234774 / 2) = ln 3: the same loss as above, and its gradient shrinks by 1 - (ln 3 / 2)^2 = 0.698263
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [1.234774, 0.0]], requires_grad=True)
    total, _ = linear_cross_entropy(hidden, weight, torch.tensor([1]), softcap=2.0)
    total.backward()
    torch.testing.assert_close(total, torch.tensor(0.287682), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        weight.grad, torch.tensor([[0.25, 0.0], [-0.25 * 0.698263, 0.0]]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_loss_is_transformers(softcap):
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight, targets = example(torch.float32)
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = S * ForCausalLMLoss(
        logits[None], None, V, shift_labels=targets[None]
    )  # transformers' is a mean
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, softcap)[0], expected)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, V, 100, None])
def test_value_and_gradients_equal_the_references_whatever_the_chunk(chunk, softcap):
    hidden, weight, targets = example()
    total, losses = linear_cross_entropy(hidden, weight, targets, softcap, chunk)
    expected = value_and_gradients(
        reference_linear_cross_entropy(hidden, weight, targets, softcap), hidden, weight
    )
    for got, wanted in zip(value_and_gradients(total, hidden, weight), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(losses.sum(), expected[0], atol=1e-10, rtol=1e-10)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_compiled_loss_is_the_plain_one(softcap, dtype):
    hidden, weight, targets = example(dtype, weight_trains=False)
    runs = [
        value_and_gradients(
            linear_cross_entropy(hidden, weight, targets, softcap, 10, compiled=compiled)[0], hidden
        )
        for compiled in (False, True)
    ]
    torch.testing.assert_close(
        *runs, atol=0.01 if dtype == torch.bfloat16 else 1e-5, rtol=1e-5
    )  # bfloat16's last digit, of gradients about 1


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_finite_differences(softcap):
    hidden, weight, targets = example()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets, softcap, chunk=4)[0], (hidden, weight)
    )


def test_each_positions_loss_is_its_own_and_carries_no_gradient():
    hidden, weight, targets = example()
    _, losses = linear_cross_entropy(hidden, weight, targets, chunk=4)
    alone = [reference_linear_cross_entropy(hidden[i : i + 1], weight, targets[i : i + 1]) for i in range(S)]
    torch.testing.assert_close(losses, torch.stack(alone).detach())
    assert not losses.requires_grad


def test_a_scaled_loss_has_scaled_gradients():
    hidden, weight, targets = example()
    once = value_and_gradients(linear_cross_entropy(hidden, weight, targets)[0], hidden, weight)
    thrice = value_and_gradients(3 * linear_cross_entropy(hidden, weight, targets)[0], hidden, weight)
    for x, y in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * x, y)


def test_no_supervised_position_is_a_loss_of_zero():
    hidden, weight, targets = example()
    total, losses = linear_cross_entropy(hidden[:0], weight, targets[:0])
    _, _, dw = value_and_gradients(total, hidden, weight)
    assert total.item() == 0 and losses.shape == (0,) and not dw.any()


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_the_same_one():
    hidden, weight, targets = example()
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    frozen_hidden, frozen, _ = example(weight_trains=False)
    linear_cross_entropy(frozen_hidden, frozen, targets)[0].backward()
    assert frozen.grad is None and torch.equal(frozen_hidden.grad, hidden.grad)


def test_frozen_hidden_states_leave_the_weight_its_gradient():
    hidden, weight, targets = example()
    linear_cross_entropy(hidden, weight, targets)[0].backward()
    _, other, _ = example()
    linear_cross_entropy(hidden.detach(), other, targets)[0].backward()
    assert torch.equal(other.grad, weight.grad)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_multiplies_in_bfloat16_and_sums_in_float32(weight_dtype):
    hidden, weight, targets = example(torch.float32)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    exact = value_and_gradients(
        reference_linear_cross_entropy(hidden, weight.float(), targets), hidden, weight
    )
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = linear_cross_entropy(hidden, weight, targets, chunk=4)
        slow = reference_linear_cross_entropy(hidden, weight, targets)
    assert total.dtype == losses.dtype == torch.float32
    torch.testing.assert_close(total, slow, atol=1e-4, rtol=1e-5)
    loss, dh, dw = value_and_gradients(total, hidden, weight)
    assert dh.dtype == torch.float32 and dw.dtype == weight_dtype
    for got, wanted in zip((loss, dh, dw.float()), (exact[0], exact[1], exact[2].float()), strict=True):
        assert (got - wanted).norm() < 0.02 * wanted.norm()


# memory


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_largest_thing_made_is_one_chunks_logits(softcap):
    hidden, weight, targets = example(weight_trains=False)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets, softcap, chunk=9)[0].backward()
    assert largest.elements == S * 9
    with Largest() as largest:
        reference_linear_cross_entropy(hidden, weight, targets, softcap).backward()
    assert largest.elements >= S * V, "the slow one makes all of them"


def test_without_gradients_none_are_worked_out():
    hidden, weight, targets = example()
    with torch.no_grad(), Largest() as largest:
        total, _ = linear_cross_entropy(hidden, weight, targets, chunk=1)
    assert largest.elements == S < S * D, "a gradient of the hidden states has S * D"
    torch.testing.assert_close(total, reference_linear_cross_entropy(hidden, weight, targets).detach())


def test_the_default_chunk_is_16_mb_of_logits_on_a_cpu_and_never_a_handful_of_words(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "model.loss._ChunkedLoss.apply",
        lambda *args: seen.append(args[-1]) or (torch.zeros(()), torch.zeros(1)),
    )
    for supervised in (0, 1, 1024, 10**6):
        linear_cross_entropy(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(supervised))
    assert seen == [2**22, 2**22, 4096, 128] and 1024 * 4096 * 4 == 16 * 2**20


def test_logits_that_grow_from_chunk_to_chunk_do_not_overflow():
    hidden, weight = (
        torch.ones(1, 1, requires_grad=True),
        torch.arange(0.0, 4000.0, 500.0)[:, None],
    )  # exp(500) is no float32
    total, _ = linear_cross_entropy(hidden, weight, torch.tensor([6]), chunk=1)
    total.backward()
    assert (
        total.item() == 500 and hidden.grad.item() == 500
    )  # the last word's 3,500 has all the weight; the target's is 3,000

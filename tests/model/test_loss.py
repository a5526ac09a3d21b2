"""model/loss.py: two entries by hand, parity with the reference and transformers, gradients, memory."""

import math

import pytest
import torch

from model.loss import reference_token_log_probs, token_log_probs, vocab_chunk_size
from tests.makers import needs_compiler
from tests.model.test_attention import Largest

S, D, V = 11, 6, 37  # supervised positions, hidden size, vocabulary


def example(dtype=torch.float64, weight_trains: bool = True):
    """hidden (S, D), weight (V, D), targets (S,); the logits are about 3, so that a softcap of 2 matters."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(S, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (S,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(weight_trains), targets


def value_and_gradients(log_probs, *inputs, upstream=None):
    """The (S,) log-probabilities, and the gradients of sum_s upstream_s log p_s."""
    upstream = torch.ones_like(log_probs) if upstream is None else upstream
    return log_probs.detach(), *torch.autograd.grad(log_probs, inputs, upstream)


def unequal_weights(dtype=torch.float64) -> torch.Tensor:
    """(S,) gradients of single tokens as dpo and grpo have them: all differ, some are negative, one is 0."""
    return torch.linspace(-2, 3, S, dtype=dtype)


def test_two_vocabulary_entries_by_hand():
    # The logits (0, ln 3) give p = (1/4, 3/4). The second entry is the target: log p = ln(3/4), and
    # d log p / d logits = (-1/4, 1 - 3/4).
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    log_probs, correct = token_log_probs(hidden, weight, torch.tensor([1]))
    log_probs.backward()
    torch.testing.assert_close(log_probs, torch.tensor([-0.287682]), atol=1e-6, rtol=0)
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.25 * math.log(3), 0.0]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[-0.25, 0.0], [0.25, 0.0]]))
    assert correct.tolist() == [True] and not correct.requires_grad


def test_a_softcap_of_two_by_hand():
    # 2 tanh(1.234774 / 2) = ln 3: log p as above, and its gradient shrinks by 1 - (ln 3 / 2)^2 = 0.698263.
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [1.234774, 0.0]], requires_grad=True)
    log_probs, _ = token_log_probs(hidden, weight, torch.tensor([1]), softcap=2.0)
    log_probs.backward()
    torch.testing.assert_close(log_probs, torch.tensor([-0.287682]), atol=1e-6, rtol=0)
    expected = torch.tensor([[-0.25, 0.0], [0.25 * 0.698263, 0.0]])
    torch.testing.assert_close(weight.grad, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_sum_is_transformers_loss(softcap):
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight, targets = example(torch.float32)
    logits = hidden @ weight.t()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    mean = ForCausalLMLoss(logits[None], None, V, shift_labels=targets[None])
    torch.testing.assert_close(-token_log_probs(hidden, weight, targets, softcap)[0].sum(), S * mean)


@pytest.mark.parametrize("upstream", [None, unequal_weights()], ids=["sft", "a weight a token"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, V, 100, None])
def test_values_and_gradients_equal_the_reference_whatever_the_chunk(chunk, softcap, upstream):
    hidden, weight, targets = example()
    chunked, _ = token_log_probs(hidden, weight, targets, softcap, chunk)
    reference = reference_token_log_probs(hidden, weight, targets, softcap)
    pairs = (value_and_gradients(x, hidden, weight, upstream=upstream) for x in (chunked, reference))
    torch.testing.assert_close(*pairs, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_gets_the_references_gradient_whether_or_not_it_is_the_embedding(tied, softcap):
    """A tied head gets its gradient on two paths: as the head, and as the embedding of the hidden states."""
    _, weight, targets = example()
    own = torch.randn(V, D, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
    embedding, grads = weight if tied else own, []
    for function in (lambda *a: token_log_probs(*a, chunk=4)[0], reference_token_log_probs):
        log_probs = function(torch.tanh(embedding[targets.flip(0)]), weight, targets, softcap)
        grads.append(torch.autograd.grad(log_probs, (weight, embedding), unequal_weights()))
    torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_a_target_is_correct_where_it_has_the_largest_logit(chunk, softcap):
    hidden, weight, targets = example()
    best = (hidden @ weight.t()).argmax(-1)
    targets = torch.where(torch.arange(S) % 2 == 0, best, targets)
    _, correct = token_log_probs(hidden, weight, targets, softcap, chunk)
    assert torch.equal(correct, best == targets) and 0 < correct.sum() < S


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_compiled_form_equals_the_plain_one(softcap, dtype):
    hidden, weight, targets = example(dtype, weight_trains=False)
    runs = []
    for compiled in (False, True):
        log_probs, _ = token_log_probs(hidden, weight, targets, softcap, 10, compiled=compiled)
        runs.append(value_and_gradients(log_probs, hidden))
    # In bfloat16 the last digit of a gradient of about 1 is 0.008.
    torch.testing.assert_close(*runs, atol=0.01 if dtype == torch.bfloat16 else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_finite_differences(softcap):
    *inputs, targets = example()
    assert torch.autograd.gradcheck(lambda h, w: token_log_probs(h, w, targets, softcap, chunk=4)[0], inputs)


def test_each_position_has_the_value_that_it_has_alone():
    hidden, weight, targets = example()
    log_probs, _ = token_log_probs(hidden, weight, targets, chunk=4)
    alone = [reference_token_log_probs(hidden[i : i + 1], weight, targets[i : i + 1]) for i in range(S)]
    torch.testing.assert_close(log_probs, torch.cat(alone))


def test_no_supervised_position_is_a_sum_of_zero():
    hidden, weight, targets = example()
    log_probs, correct = token_log_probs(hidden[:0], weight, targets[:0])
    _, dw = value_and_gradients(log_probs, weight)
    assert log_probs.shape == correct.shape == (0,) and not dw.any()


def test_a_frozen_weight_gets_no_gradient_and_hidden_states_the_same_one():
    hidden, weight, targets = example()
    token_log_probs(hidden, weight, targets)[0].sum().backward()
    frozen_hidden, frozen, _ = example(weight_trains=False)
    token_log_probs(frozen_hidden, frozen, targets)[0].sum().backward()
    assert frozen.grad is None and torch.equal(frozen_hidden.grad, hidden.grad)


def test_frozen_hidden_states_leave_the_weight_its_gradient():
    hidden, weight, targets = example()
    token_log_probs(hidden, weight, targets)[0].sum().backward()
    _, other, _ = example()
    token_log_probs(hidden.detach(), other, targets)[0].sum().backward()
    assert torch.equal(other.grad, weight.grad)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_multiplies_in_bfloat16_and_sums_in_float32(weight_dtype):
    hidden, weight, targets = example(torch.float32)
    weight = weight.detach().to(weight_dtype).requires_grad_()
    exact = value_and_gradients(reference_token_log_probs(hidden, weight.float(), targets), hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = token_log_probs(hidden, weight, targets, chunk=4)
        reference = reference_token_log_probs(hidden, weight, targets)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, reference, atol=1e-4, rtol=1e-4)
    found, dh, dw = value_and_gradients(log_probs, hidden, weight)
    assert dh.dtype == torch.float32 and dw.dtype == weight_dtype
    for got, wanted in zip((found, dh, dw.float()), (exact[0], exact[1], exact[2].float()), strict=True):
        assert (got - wanted).norm() < 0.02 * wanted.norm()


# memory


@pytest.mark.parametrize("weight_trains", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_the_largest_tensor_is_the_logits_of_one_chunk(softcap, weight_trains):
    hidden, weight, targets = example(weight_trains=weight_trains)
    with Largest() as largest:
        token_log_probs(hidden, weight, targets, softcap, chunk=9)[0].sum().backward()
    assert largest.elements == (max(S * 9, V * D) if weight_trains else S * 9)  # dL/dW itself has V * D
    with Largest() as largest:
        reference_token_log_probs(hidden, weight, targets, softcap).sum().backward()
    assert largest.elements >= S * V, "the reference makes all of them"


def test_without_gradients_none_are_computed():
    hidden, weight, targets = example()
    with torch.no_grad(), Largest() as largest:
        log_probs, _ = token_log_probs(hidden, weight, targets, chunk=1)
    assert largest.elements == S < S * D, "a gradient of the hidden states has S * D"
    torch.testing.assert_close(log_probs, reference_token_log_probs(hidden, weight, targets).detach())


def test_the_default_chunk_is_16_mib_of_logits_on_a_cpu_and_at_least_128_entries():
    sizes = [vocab_chunk_size(positions, "cpu") for positions in (0, 1, 1024, 10**6)]
    assert sizes == [2**22, 2**22, 4096, 128] and 1024 * 4096 * 4 == 16 * 2**20


def test_logits_that_grow_from_chunk_to_chunk_do_not_overflow():
    # exp(500) overflows float32. The last entry, with a logit of 3,500, has all the probability; the target
    # has 3,000.
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.arange(0.0, 4000.0, 500.0)[:, None]
    log_probs, _ = token_log_probs(hidden, weight, torch.tensor([6]), chunk=1)
    log_probs.backward()
    assert log_probs.item() == -500 and hidden.grad.item() == -500

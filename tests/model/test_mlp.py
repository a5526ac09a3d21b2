"""model/mlp.py: one product by hand, parity with transformers, and that tokens do not see each other."""

import torch

from model.mlp import Gemma3MLP


def random_mlp() -> Gemma3MLP:
    torch.manual_seed(0)
    return Gemma3MLP(12, 20)


def test_the_product_written_here_by_hand():
    mlp = Gemma3MLP(2, 1)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
        mlp.up_proj.weight.copy_(torch.tensor([[0.0, 1.0]]))
        mlp.down_proj.weight.copy_(torch.tensor([[1.0], [2.0]]))
    # gate(x) = 1, up(x) = 3; gelu_tanh(1) = 0.5 (1 + tanh(sqrt(2 / pi) (1 + 0.044715))) = 0.841192, where the
    # exact gelu is 0.841345
    torch.testing.assert_close(
        mlp(torch.tensor([[1.0, 3.0]])), torch.tensor([[2.523576, 5.047151]]), atol=1e-5, rtol=0
    )


def test_output_and_gradients_equal_transformers():
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP as Reference

    ours, theirs = (
        random_mlp(),
        Reference(Gemma3TextConfig(hidden_size=12, intermediate_size=20, num_attention_heads=4)),
    )
    theirs.load_state_dict(ours.state_dict())
    x = 3 * torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(x_ours), theirs(x_theirs)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_each_token_is_worked_on_alone():
    mlp, x, order = (
        random_mlp(),
        torch.randn(6, 12, generator=torch.Generator().manual_seed(1)),
        torch.tensor([3, 0, 5, 1, 4, 2]),
    )
    torch.testing.assert_close(mlp(x[order]), mlp(x)[order])


def test_nothing_in_gives_nothing_out():
    assert torch.equal(random_mlp()(torch.zeros(3, 12)), torch.zeros(3, 12)), "there are no biases"

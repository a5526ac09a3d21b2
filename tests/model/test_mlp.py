"""model/mlp.py: one product by hand, parity with transformers, and that tokens do not see each other."""

import torch

from model.mlp import Gemma3MLP


def random_mlp() -> Gemma3MLP:
    torch.manual_seed(0)
    return Gemma3MLP(12, 20)


def random_input() -> torch.Tensor:
    """(9, 12)"""
    return 3 * torch.randn(9, 12, generator=torch.Generator().manual_seed(1))


def test_the_product_by_hand():
    mlp = Gemma3MLP(2, 1)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(torch.tensor([[1.0, 0.0]]))
        mlp.up_proj.weight.copy_(torch.tensor([[0.0, 1.0]]))
        mlp.down_proj.weight.copy_(torch.tensor([[1.0], [2.0]]))
    # gate(x) = 1 and up(x) = 3. gelu_tanh(1) = 0.5 (1 + tanh(sqrt(2 / pi) (1 + 0.044715))) = 0.841192; the
    # exact gelu is 0.841345.
    y, expected = mlp(torch.tensor([[1.0, 3.0]])), torch.tensor([[2.523576, 5.047151]])
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_output_and_gradients_equal_transformers():
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP as Reference

    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 4}
    ours, theirs = random_mlp(), Reference(Gemma3TextConfig(**sizes))
    theirs.load_state_dict(ours.state_dict())
    results = []
    for mlp in (ours, theirs):
        x = random_input().requires_grad_()
        y = mlp(x)
        y.square().sum().backward()
        results.append({"y": y, "x": x.grad} | {n: p.grad for n, p in mlp.named_parameters()})
    torch.testing.assert_close(*results)


def test_each_token_is_mapped_alone():
    mlp, x, order = random_mlp(), random_input(), torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(mlp(x[order]), mlp(x)[order])


def test_zero_maps_to_zero_because_there_are_no_biases():
    assert torch.equal(random_mlp()(torch.zeros(3, 12)), torch.zeros(3, 12))

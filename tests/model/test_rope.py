"""model/rope.py: angles and a rotation by hand, parity with transformers, and invariants."""

import pytest
import torch

from model.config import FULL, SLIDING
from model.rope import rope_angles, rotate

THETAS = {FULL: 1e6, SLIDING: 1e4}


COS = [
    [1.0, 1.0, 1.0, 1.0],
    [0.540302, 0.995004, 0.540302, 0.995004],
    [-0.416147, 0.980067, -0.416147, 0.980067],
]
SIN = [
    [0.0, 0.0, 0.0, 0.0],
    [0.841471, 0.099833, 0.841471, 0.099833],
    [0.909297, 0.198669, 0.909297, 0.198669],
]


def test_the_angles_by_hand():
    # D = 4 has two pairs, with the frequencies 100^(-0/4) = 1 and 100^(-2/4) = 0.1: at position 2 they are
    # rotated by 2 and by 0.2 radians.
    angles = rope_angles(torch.tensor([0, 1, 2]), head_dim=4, theta=100.0)
    torch.testing.assert_close(angles, (torch.tensor(COS), torch.tensor(SIN)), atol=1e-6, rtol=0)


def test_linear_scaling_by_eight_gives_position_8_the_angles_of_1():
    scaled = rope_angles(torch.tensor([8, 16]), 4, 100.0, linear_factor=8.0)
    torch.testing.assert_close(scaled, rope_angles(torch.tensor([1, 2]), 4, 100.0))


def test_a_rotation_of_the_first_pair_by_90_degrees_by_hand():
    # The pairs of (1, 2, 3, 4) are (1, 3) and (2, 4). The rotation turns (1, 3) into (-3, 1).
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])  # (T, H, D)
    cos, sin = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert rotate(x, cos, sin).tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]


@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_angles_and_rotated_vectors_equal_transformers(kind, factor):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, apply_rotary_pos_emb

    stretched = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    parameters = {
        FULL: stretched | {"rope_theta": THETAS[FULL]},
        SLIDING: {"rope_type": "default", "rope_theta": THETAS[SLIDING]},
    }
    cfg = Gemma3TextConfig(num_hidden_layers=6, head_dim=16, rope_parameters=parameters)
    reference = Gemma3RotaryEmbedding(cfg)
    positions = torch.tensor([0, 1, 2, 511, 512, 4096, 131_071])
    q = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(0))
    expected = reference(q, positions[None], kind)
    cos, sin = rope_angles(positions, 16, THETAS[kind], factor if kind == FULL else 1.0)
    # One bit of a frequency is 0.008 radians at position 131,071.
    assert torch.equal(cos, expected[0][0]) and torch.equal(sin, expected[1][0])
    heads_first = q.transpose(0, 1)[None]  # (1, H, T, D)
    rotated, _ = apply_rotary_pos_emb(heads_first, heads_first, cos[None], sin[None])
    torch.testing.assert_close(rotate(q, cos, sin), rotated[0].transpose(0, 1))


def test_position_0_rotates_nothing_and_no_position_changes_a_length():
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, *rope_angles(torch.tensor([0, 1, 7, 100, 5000]), 8, 1e4))
    assert torch.equal(rotated[0], x[0]) and not torch.equal(rotated[1], x[1])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_the_product_of_query_and_key_depends_on_their_distance_only():
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> torch.Tensor:
        at_i, at_j = (rope_angles(torch.tensor([position]), 8, 1e4) for position in (i, j))
        return (rotate(q, *at_i) * rotate(k, *at_j)).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=0)
    assert (score(9, 4) - score(4, 9)).abs() > 0.1, "the direction counts"

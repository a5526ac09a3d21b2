"""model/rope.py: angles and a quarter turn by hand, transformers' own tables, and that only the distance of
two tokens counts.
"""

import pytest
import torch

from model.config import FULL, SLIDING
from model.rope import rope_angles, rotate

THETAS = {FULL: 1e6, SLIDING: 1e4}


def test_the_angles_written_here_by_hand():
    # D = 4 has two pairs; their frequencies are 100^(-0/4) = 1 and 100^(-2/4) = 0.1: position 2 turns them by
    # 2 and by 0.2 radians
    cos, sin = rope_angles(torch.tensor([0, 1, 2]), head_dim=4, theta=100.0)
    torch.testing.assert_close(
        cos,
        torch.tensor(
            [
                [1.0, 1.0, 1.0, 1.0],
                [0.540302, 0.995004, 0.540302, 0.995004],
                [-0.416147, 0.980067, -0.416147, 0.980067],
            ]
        ),
        atol=1e-6,
        rtol=0,
    )
    torch.testing.assert_close(
        sin,
        torch.tensor(
            [
                [0.0, 0.0, 0.0, 0.0],
                [0.841471, 0.099833, 0.841471, 0.099833],
                [0.909297, 0.198669, 0.909297, 0.198669],
            ]
        ),
        atol=1e-6,
        rtol=0,
    )


def test_linear_scaling_by_eight_puts_position_8_where_1_was():
    scaled, plain = (
        rope_angles(torch.tensor([8, 16]), 4, 100.0, linear_factor=8.0),
        rope_angles(torch.tensor([1, 2]), 4, 100.0),
    )
    for x, expected in zip(scaled, plain, strict=True):
        torch.testing.assert_close(x, expected)


def test_a_quarter_turn_of_the_first_pair_by_hand():
    # the pairs of (1, 2, 3, 4) are (1, 3) and (2, 4); a quarter turn of the first makes it (-3, 1)
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])  # (T, H, D)
    cos, sin = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    assert rotate(x, cos, sin).tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]


@pytest.mark.parametrize("factor", [1.0, 8.0])
@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_angles_and_turned_vectors_equal_transformers(kind, factor):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding, apply_rotary_pos_emb

    stretched = {"rope_type": "linear", "factor": factor} if factor != 1 else {"rope_type": "default"}
    parameters = {
        FULL: stretched | {"rope_theta": THETAS[FULL]},
        SLIDING: {"rope_type": "default", "rope_theta": THETAS[SLIDING]},
    }
    reference = Gemma3RotaryEmbedding(
        Gemma3TextConfig(num_hidden_layers=6, head_dim=16, rope_parameters=parameters)
    )
    positions = torch.tensor([0, 1, 2, 511, 512, 4096, 131_071])
    q = torch.randn(7, 3, 16, generator=torch.Generator().manual_seed(0))
    expected = reference(q, positions[None], kind)
    cos, sin = rope_angles(positions, 16, THETAS[kind], factor if kind == FULL else 1.0)
    for ours, theirs in zip((cos, sin), expected, strict=True):
        assert torch.equal(ours, theirs[0]), "a last bit of a frequency is 0.008 radians at position 131,071"
    turned, _ = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], q.transpose(0, 1)[None], cos[None], sin[None]
    )  # (1, H, T, D)
    torch.testing.assert_close(rotate(q, cos, sin), turned[0].transpose(0, 1))


def test_position_0_turns_nothing_and_no_position_changes_a_length():
    x = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *rope_angles(torch.tensor([0, 1, 7, 100, 5000]), 8, 1e4))
    assert torch.equal(turned[0], x[0]) and not torch.equal(turned[1], x[1])
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_the_product_of_query_and_key_depends_on_their_distance_only():
    q, k = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(i: int, j: int) -> torch.Tensor:
        return (
            rotate(q, *rope_angles(torch.tensor([i]), 8, 1e4))
            * rotate(k, *rope_angles(torch.tensor([j]), 8, 1e4))
        ).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), atol=1e-4, rtol=0)
    assert (score(9, 4) - score(4, 9)).abs() > 0.1, "the direction counts"

"""model/attention.py: masks written out, the fast kernels against the slow one at every edge of the window,
transformers' module, and memory.

T tokens, H query heads, K key/value heads, D head_dim, W window.
"""

import math
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention import (
    MAX_PLAIN_KEYS,
    Gemma3Attention,
    PackedAttention,
    band_attention,
    band_mask,
    document_attention,
    document_index,
    masked_attention,
    plain_is_faster,
    reference_attention,
    varlen_is_possible,
)
from model.config import FULL, SLIDING
from model.rope import rope_angles

W = 8
LENGTHS = [
    [1],
    [W - 1],
    [W],
    [W + 1],
    [2 * W],
    [2 * W + 1],
    [40],
    [3, W, W + 1, 1],
    [W, W],
    [1, W - 1, W + 2],
    [5, 23, 8, 2, 17],
    [16, 1, 16],
]


class Largest(TorchDispatchMode):
    """Records the most elements that any tensor has which is made inside the `with`, by the backward pass
    too.
    """

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):  # neither a view nor written in place
            made = [
                x.numel()
                for x in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(x, torch.Tensor)
            ]
            self.elements = max([self.elements, *made])
        return out


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def random_qkv(total: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8):
    """q (T, H, D), k and v (T, K, D), with scores of about 4 so that every token's place in a mask is felt."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        2 * torch.randn(total, n, head_dim, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )


def band(q, k, v, lengths: list[int], scale: float, window: int = W):
    return band_attention(q, k, v, band_mask(bounds(lengths), sum(lengths), window), window, scale)


def who_sees_whom(attend, total: int) -> list[list[int]]:
    """The mask that attend(q, k, v) acts by: scores are all 0 and token j's value is the j-th unit vector, so
    row i is spread over what i sees.
    """
    zeros, units = torch.zeros(total, 1, total), torch.eye(total)[:, None]
    return (attend(zeros, zeros, units)[:, 0] > 0).int().tolist()


@pytest.fixture(params=["fused", "plain"])
def kernel(request, monkeypatch):
    """Both ways to multiply, whichever this device and type of numbers would choose."""
    monkeypatch.setattr("model.attention.plain_is_faster", lambda q, keys: request.param == "plain")


def written_out_varlen(q, k, v, starts, key_starts, longest, most_keys, *, scale, window_size, enable_gqa):
    """What torch.nn.attention.varlen.varlen_attn computes, as FlashAttention's README has it; a GPU's kernel
    itself is held to reference_attention below.
    """
    bounds, key_bounds = starts.tolist(), key_starts.tolist()
    queries, keys = ([b - a for a, b in pairwise(x)] for x in (bounds, key_bounds))
    assert (
        starts.dtype == key_starts.dtype == torch.int32
        and longest == max(queries)
        and most_keys >= max(keys)
        and window_size[1] == 0
        and enable_gqa
    )
    out = []
    for i, (n, m) in enumerate(zip(queries, keys, strict=True)):
        q_, k_, v_ = (
            x[s[i] : s[i + 1]].transpose(0, 1) for x, s in ((q, bounds), (k, key_bounds), (v, key_bounds))
        )
        back = (
            torch.arange(n)[:, None] + m - n - torch.arange(m)
        )  # (n, m) how far before query i's own place key j lies
        seen = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else m))
        k_, v_ = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k_, v_))  # (H, m, D)
        out.append(((q_ @ k_.mT * scale).masked_fill(~seen, -math.inf).softmax(-1) @ v_).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture(params=["fused", "plain", "one launch"])
def way(request, monkeypatch):
    """All ways that a stream may take, whichever this device and type of numbers would choose."""
    monkeypatch.setattr("model.attention.plain_is_faster", lambda q, keys: request.param == "plain")
    monkeypatch.setattr("model.attention.varlen_is_possible", lambda v: request.param == "one launch")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", written_out_varlen)


# by hand


def test_the_number_of_each_tokens_document():
    assert document_index(torch.tensor([0, 2, 3, 6]), 6).tolist() == [0, 0, 1, 2, 2, 2]
    assert document_index(torch.tensor([0, 3]), 3).tolist() == [0, 0, 0]


def test_two_tokens_written_here_by_hand():
    # scores of token 1: 2 * 0 * 0.5 = 0 and 2 * ln 3 * 0.5 = ln 3, so its weights are 1/4 and 3/4; token 0
    # sees itself only
    q, k = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[math.log(3), 0.0]]])
    v = torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]]])
    y = reference_attention(q, k, v, torch.tensor([0, 2]), scale=0.5)
    torch.testing.assert_close(y, torch.tensor([[[4.0, 0.0]], [[1.0, 6.0]]]))
    later = torch.tensor([[[False, True], [False, False]]])
    torch.testing.assert_close(masked_attention(q[None], k[None], v[None], later, scale=0.5)[0], y)


def test_a_softcap_of_two_by_hand():
    # 2 tanh(1.234774 / 2) = ln 3: the same weights, 1/4 and 3/4
    q, k = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[1.234774, 0.0]]])
    v = torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]]])
    y = reference_attention(q, k, v, torch.tensor([0, 2]), scale=0.5, softcap=2.0)
    torch.testing.assert_close(y, torch.tensor([[[4.0, 0.0]], [[1.0, 6.0]]]))


CAUSAL_IN_TWO_DOCUMENTS = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0, 0],
    [0, 0, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0],
    [0, 0, 1, 1, 1, 1, 0],
    [0, 0, 1, 1, 1, 1, 1],
]
WINDOW_OF_3_IN_TWO_DOCUMENTS = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [0, 0, 1, 0, 0, 0, 0],
    [0, 0, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0],
    [0, 0, 0, 1, 1, 1, 0],
    [0, 0, 0, 0, 1, 1, 1],
]


def test_the_mask_of_a_full_layer_over_documents_of_2_and_5_tokens(kernel):
    assert (
        who_sees_whom(lambda q, k, v: reference_attention(q, k, v, bounds([2, 5]), 1.0), 7)
        == CAUSAL_IN_TWO_DOCUMENTS
    )
    assert (
        who_sees_whom(lambda q, k, v: document_attention(q, k, v, [2, 5], 1.0), 7) == CAUSAL_IN_TWO_DOCUMENTS
    )


def test_the_mask_of_a_sliding_layer_with_a_window_of_3_over_documents_of_2_and_5_tokens(kernel):
    assert (
        who_sees_whom(lambda q, k, v: reference_attention(q, k, v, bounds([2, 5]), 1.0, window=3), 7)
        == WINDOW_OF_3_IN_TWO_DOCUMENTS
    )
    assert (
        who_sees_whom(lambda q, k, v: band(q, k, v, [2, 5], 1.0, window=3), 7) == WINDOW_OF_3_IN_TWO_DOCUMENTS
    )


def test_the_band_of_a_document_of_3_tokens_and_a_window_of_2():
    # two blocks of two queries; each looks at the two keys before its block and at its own two. The fourth
    # token is filling and sees itself.
    assert band_mask(torch.tensor([0, 3]), 3, 2)[:, 0].int().tolist() == [
        [[0, 0, 1, 0], [0, 0, 1, 1]],
        [[0, 1, 1, 0], [0, 0, 0, 1]],
    ]


# an opening of 3 tokens, 2 tokens of a first document behind it and 2 of a second
CAUSAL_BEHIND_AN_OPENING = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0],
    [1, 1, 1, 0, 0, 1, 0],
    [1, 1, 1, 0, 0, 1, 1],
]
WINDOW_OF_3_BEHIND_AN_OPENING = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [0, 1, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0],
    [0, 1, 1, 0, 0, 1, 0],
    [0, 0, 1, 0, 0, 1, 1],
]


@pytest.mark.parametrize("reference", [True, False])
def test_two_documents_see_the_shared_prefix_before_them_and_not_each_other(reference, way):
    attend = PackedAttention(
        bounds([3, 2, 2]), 7, window=3, scale=1.0, reference=reference, shared_prefix=[-1, 0, 0]
    )
    assert who_sees_whom(lambda q, k, v: attend(0, q, k, v, sliding=False), 7) == CAUSAL_BEHIND_AN_OPENING
    assert who_sees_whom(lambda q, k, v: attend(0, q, k, v, sliding=True), 7) == WINDOW_OF_3_BEHIND_AN_OPENING


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: reference_attention(q, k, v, bounds([1]), 1.0),
        lambda q, k, v: document_attention(q, k, v, [1], 1.0),
        lambda q, k, v: band(q, k, v, [1], 1.0),
    ],
    ids=["reference", "document", "band"],
)
def test_neighbouring_query_heads_share_a_key_head(attend, kernel):
    q, k, v = (
        torch.zeros(1, 4, 8),
        torch.zeros(1, 2, 8),
        torch.tensor([10.0, 20.0])[None, :, None].expand(1, 2, 8),
    )
    assert attend(q, k, v)[0, :, 0].tolist() == [10, 10, 20, 20]


# the fast ones equal the slow one


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("window", [1, 2, W, 13, 20, 100])
@pytest.mark.parametrize(
    "lengths, shared_prefix",
    [([20, 3, 9], [-1, 0, 0]), ([4, 5, 16, 1, 30, 7, 2], [-1, 0, -1, -1, 2, 2, -1]), ([2, 1], [-1, 0])],
    ids=str,
)
def test_attention_behind_shared_prefixes_equals_the_reference_and_so_do_its_gradients(
    lengths, shared_prefix, window, sliding, way
):
    results = []
    for reference in (True, False):
        q, k, v = random_qkv(sum(lengths))
        y = PackedAttention(
            bounds(lengths), sum(lengths), window, 0.3, reference=reference, shared_prefix=shared_prefix
        )(0, q, k, v, sliding)
        results.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for reference, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 2, 3, W, 13, 100])
@pytest.mark.parametrize("lengths", [[29], [3, 13, 14, 1], [12, 2]], ids=str)
def test_the_band_holds_the_window_and_not_one_token_more(lengths, window, kernel):
    number = [d for d, n in enumerate(lengths) for _ in range(n)]
    total = len(number)
    expected = [
        [int(number[i] == number[j] and 0 <= i - j < window) for j in range(total)] for i in range(total)
    ]
    assert (
        who_sees_whom(lambda q, k, v: reference_attention(q, k, v, bounds(lengths), 1.0, window), total)
        == expected
    )
    assert who_sees_whom(lambda q, k, v: band(q, k, v, lengths, 1.0, window), total) == expected


def assert_equal_with_gradients(fast, reference, qkv):
    y, expected = fast(*qkv), reference(*qkv)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for got, wanted in zip(
        torch.autograd.grad(y, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_document_attention_equals_reference_attention_with_gradients(lengths, heads, kv_heads, kernel):
    assert_equal_with_gradients(
        lambda q, k, v: document_attention(q, k, v, lengths, 0.3),
        lambda q, k, v: reference_attention(q, k, v, bounds(lengths), 0.3),
        random_qkv(sum(lengths), heads, kv_heads),
    )


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (4, 1), (2, 2)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_band_attention_equals_reference_attention_with_gradients(lengths, heads, kv_heads, kernel):
    assert_equal_with_gradients(
        lambda q, k, v: band(q, k, v, lengths, 0.3),
        lambda q, k, v: reference_attention(q, k, v, bounds(lengths), 0.3, W),
        random_qkv(sum(lengths), heads, kv_heads),
    )


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_equals_reference_attention_whichever_kernel_it_chooses(lengths, sliding):
    qkv = random_qkv(sum(lengths))
    attend = PackedAttention(bounds(lengths), sum(lengths), W, 0.3)
    expected = reference_attention(*qkv, bounds(lengths), 0.3, W if sliding else None)
    torch.testing.assert_close(attend(0, *qkv, sliding), expected, atol=1e-5, rtol=1e-5)
    assert ("band" in vars(attend)) == (sliding and max(lengths) > W), (
        "made only where a document outgrows the window"
    )


@pytest.mark.parametrize("sliding", [False, True])
def test_packed_attention_with_a_softcap_or_asked_for_the_reference_is_the_reference(sliding):
    qkv, window = random_qkv(20), W if sliding else None
    capped = PackedAttention(bounds([20]), 20, W, 0.3, softcap=1.5)
    assert torch.equal(capped(0, *qkv, sliding), reference_attention(*qkv, bounds([20]), 0.3, window, 1.5))
    reference = PackedAttention(bounds([20]), 20, W, 0.3, reference=True)
    assert torch.equal(reference(0, *qkv, sliding), reference_attention(*qkv, bounds([20]), 0.3, window))


# transformers' module


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_the_module_equals_transformers_with_gradients(kind, bias, way):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention as Reference

    total, sizes = (
        3 * W + 3,
        {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    )
    cfg = Gemma3TextConfig(
        **sizes,
        num_hidden_layers=1,
        layer_types=[kind],
        sliding_window=W,
        query_pre_attn_scalar=12,
        attention_bias=bias,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    theirs, ours = Reference(cfg, 0), Gemma3Attention(24, 4, 2, 8, cfg.rms_norm_eps, bias)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)  # norm weights and biases too, which are zero at first
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(total, 24)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    cos, sin = rope_angles(torch.arange(total), 8, 1e4)
    distance = torch.arange(total)[:, None] - torch.arange(total)[None, :]
    hidden = (distance < 0) | (distance >= (W if kind == SLIDING else total))
    mask = torch.zeros(total, total).masked_fill(hidden, float("-inf"))
    expected = theirs(x_theirs[None], (cos[None], sin[None]), mask[None, None])[0][0]
    y = ours.output(
        PackedAttention(bounds([total]), total, W, 12**-0.5)(
            0, *ours.project(x_ours, cos, sin), kind == SLIDING
        )
    )
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-4, rtol=1e-4)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, atol=1e-3, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


# a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_launch_on_a_gpu_equals_reference_attention_with_gradients_and_nothing_waits_for_it(
    dtype, head_dim, sliding
):
    lengths, shared_prefix = [4, 5, 160, 1, 300, 7, 2], [-1, 0, -1, -1, 2, 2, -1]
    values = [x.detach().to("cuda", dtype) for x in random_qkv(sum(lengths), head_dim=head_dim)]
    results = []
    for reference in (True, False):
        q, k, v = ((x.double() if reference else x.clone()).requires_grad_() for x in values)
        torch.cuda.set_sync_debug_mode("default" if reference else "error")
        try:
            attend = PackedAttention(
                bounds(lengths).pin_memory(),
                sum(lengths),
                100,
                head_dim**-0.5,
                reference=reference,
                shared_prefix=shared_prefix,
                device=q.device,
            )
            y = attend(0, q, k, v, sliding)
            results.append((y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for exact, fast in zip(*results, strict=True):
        assert (fast - exact).abs().max() <= 2 ** (-6 if dtype == torch.bfloat16 else -9) * exact.abs().max()


def test_one_launch_is_for_half_precision_on_a_gpu_since_ampere(monkeypatch):
    def possible(device="cuda", dtype=torch.bfloat16, head_dim=256, capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        return varlen_is_possible(
            SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(9, 1, head_dim))
        )

    assert possible() and possible(dtype=torch.float16, head_dim=8, capability=(9, 0))
    assert not any(
        (
            possible("cpu"),
            possible(dtype=torch.float32),
            possible(head_dim=264),
            possible(head_dim=12),
            possible(capability=(7, 5)),
        )
    )


# memory

LONG, NARROW = 2048, 16


def test_plain_products_are_for_bfloat16_on_a_cpu_and_for_few_keys():
    q = torch.zeros(3, 1, 8)
    assert plain_is_faster(q.bfloat16(), MAX_PLAIN_KEYS) and not plain_is_faster(
        q.bfloat16(), MAX_PLAIN_KEYS + 1
    )
    assert not plain_is_faster(q, 1) and not plain_is_faster(q.to("meta", torch.bfloat16), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_document_attention_makes_nothing_larger_than_its_input(dtype):
    q, k, v = (x.to(dtype) for x in random_qkv(LONG))
    with Largest() as largest:
        document_attention(q, k, v, [LONG], 0.3).sum().backward()
    assert largest.elements == q.numel() < LONG * LONG


def test_band_attention_makes_nothing_larger_than_two_windows_a_token_and_head(kernel):
    q, k, v = random_qkv(LONG)
    with Largest() as largest:
        band(q, k, v, [LONG], 0.3, NARROW).sum().backward()
    assert largest.elements <= LONG * 2 * NARROW * 4 < LONG * LONG


def test_slow_attention_makes_the_square():
    q, k, v = random_qkv(256)
    with Largest() as largest:
        reference_attention(q, k, v, bounds([256]), 0.3, NARROW).sum().backward()
    assert largest.elements >= 4 * 256 * 256

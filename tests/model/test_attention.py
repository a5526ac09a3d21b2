"""model/attention.py: masks by hand, the fast forms against the reference, transformers' module, and memory.

T tokens, H query heads, K key/value heads, D head_dim, W window.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree
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
from tests.makers import bounds

W = 8
ONE_DOCUMENT = [[1], [W - 1], [W], [W + 1], [2 * W], [2 * W + 1], [40]]
LENGTHS = [*ONE_DOCUMENT, [3, W, W + 1, 1], [W, W], [1, W - 1, W + 2], [5, 23, 8, 2, 17], [16, 1, 16]]


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that is made inside the `with`, in the backward pass too."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):  # neither a view nor written in place
            tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


def random_qkv(total: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 8):
    """q (T, H, D), k and v (T, K, D), with scores of about 4, so that each entry of a mask counts."""
    generator, counts = torch.Generator().manual_seed(0), (heads, kv_heads, kv_heads)
    return tuple(2 * torch.randn(total, n, head_dim, generator=generator).requires_grad_() for n in counts)


def additive_mask(total: int, window: int) -> torch.Tensor:
    """(T, T) 0 where token i sees token j and -inf elsewhere, as transformers wants it."""
    distance = torch.arange(total)[:, None] - torch.arange(total)
    return torch.zeros(total, total).masked_fill((distance < 0) | (distance >= window), -math.inf)


def band(q, k, v, lengths: list[int], scale: float, window: int = W):
    return band_attention(q, k, v, band_mask(bounds(lengths), sum(lengths), window), window, scale)


def mask_of(attend, total: int) -> list[list[int]]:
    """Returns the mask that attend(q, k, v) applies.

    All scores are 0 and token j's value is the j-th unit vector, so row i is above 0 where token i sees.
    """
    zeros, units = torch.zeros(total, 1, total), torch.eye(total)[:, None]
    return (attend(zeros, zeros, units)[:, 0] > 0).int().tolist()


@pytest.fixture(params=["fused", "plain"])
def kernel(request, monkeypatch):
    """Both kernels, whichever of them this device and dtype would choose."""
    monkeypatch.setattr("model.attention.plain_is_faster", lambda q, keys: request.param == "plain")


def written_out_varlen(q, k, v, starts, key_starts, longest, most_keys, *, scale, window_size, enable_gqa):
    """Computes torch.nn.attention.varlen.varlen_attn, as FlashAttention's README defines it.

    A GPU's kernel itself is compared with reference_attention below.
    """
    assert starts.dtype == key_starts.dtype == torch.int32 and window_size[1] == 0 and enable_gqa
    queries, keys = starts.diff().tolist(), key_starts.diff().tolist()
    assert longest == max(queries) and most_keys >= max(keys)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))  # (T, H, D)
    out = []
    for q_, k_, v_ in zip(q.split(queries), k.split(keys), v.split(keys), strict=True):
        n, m = len(q_), len(k_)
        back = torch.arange(n)[:, None] + m - n - torch.arange(m)  # (n, m) tokens from key j to query i
        seen = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else m))
        scores = torch.einsum("ihd,jhd->hij", q_, k_) * scale
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weights, v_))
    return torch.cat(out)


@pytest.fixture(params=["fused", "plain", "one launch"])
def form(request, monkeypatch):
    """All forms of attention over a stream, whichever this device and dtype would choose."""
    monkeypatch.setattr("model.attention.plain_is_faster", lambda q, keys: request.param == "plain")
    monkeypatch.setattr("model.attention.varlen_is_possible", lambda v: request.param == "one launch")
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", written_out_varlen)


# by hand


def test_the_index_of_each_tokens_document():
    assert document_index(torch.tensor([0, 2, 3, 6]), 6).tolist() == [0, 0, 1, 2, 2, 2]
    assert document_index(torch.tensor([0, 3]), 3).tolist() == [0, 0, 0]


def two_tokens(score: float):
    """q, k and v (2, 1, 2); with scale 0.5 token 1 has the scores 0 and `score`, and token 0 sees itself."""
    q, k = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]]), torch.tensor([[[0.0, 0.0]], [[score, 0.0]]])
    return q, k, torch.tensor([[[4.0, 0.0]], [[0.0, 8.0]]])


# The scores 0 and ln 3 give token 1 the weights 1/4 and 3/4.
TWO_TOKENS = torch.tensor([[[4.0, 0.0]], [[1.0, 6.0]]])


def test_two_tokens_by_hand():
    q, k, v = two_tokens(math.log(3))
    y = reference_attention(q, k, v, torch.tensor([0, 2]), scale=0.5)
    torch.testing.assert_close(y, TWO_TOKENS)
    hidden = torch.tensor([[[False, True], [False, False]]])
    torch.testing.assert_close(masked_attention(q[None], k[None], v[None], hidden, scale=0.5)[0], y)


def test_a_softcap_of_two_by_hand():
    # 2 tanh(1.234774 / 2) = ln 3
    y = reference_attention(*two_tokens(1.234774), torch.tensor([0, 2]), scale=0.5, softcap=2.0)
    torch.testing.assert_close(y, TWO_TOKENS)


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
    for attend in (
        lambda q, k, v: reference_attention(q, k, v, bounds([2, 5]), 1.0),
        lambda q, k, v: document_attention(q, k, v, [2, 5], 1.0),
    ):
        assert mask_of(attend, 7) == CAUSAL_IN_TWO_DOCUMENTS


def test_the_mask_of_a_sliding_layer_with_a_window_of_3_over_documents_of_2_and_5_tokens(kernel):
    for attend in (
        lambda q, k, v: reference_attention(q, k, v, bounds([2, 5]), 1.0, window=3),
        lambda q, k, v: band(q, k, v, [2, 5], 1.0, window=3),
    ):
        assert mask_of(attend, 7) == WINDOW_OF_3_IN_TWO_DOCUMENTS


def test_the_band_of_a_document_of_3_tokens_and_a_window_of_2():
    # There are two blocks of two queries. A block has the two keys before it and its own two. The fourth
    # token is padding and sees itself.
    assert band_mask(torch.tensor([0, 3]), 3, 2)[:, 0].int().tolist() == [
        [[0, 0, 1, 0], [0, 0, 1, 1]],
        [[0, 1, 1, 0], [0, 0, 0, 1]],
    ]


# A shared prefix of 3 tokens, then 2 tokens of a first document and 2 of a second.
CAUSAL_AFTER_A_PREFIX = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [1, 1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 0, 0],
    [1, 1, 1, 0, 0, 1, 0],
    [1, 1, 1, 0, 0, 1, 1],
]
WINDOW_OF_3_AFTER_A_PREFIX = [
    [1, 0, 0, 0, 0, 0, 0],
    [1, 1, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0, 0],
    [0, 1, 1, 1, 0, 0, 0],
    [0, 0, 1, 1, 1, 0, 0],
    [0, 1, 1, 0, 0, 1, 0],
    [0, 0, 1, 0, 0, 1, 1],
]


@pytest.mark.parametrize("reference", [True, False])
def test_two_documents_see_the_shared_prefix_before_them_and_not_each_other(reference, form):
    prefix = [-1, 0, 0]
    attend = PackedAttention(bounds([3, 2, 2]), 7, 3, scale=1.0, reference=reference, shared_prefix=prefix)
    assert mask_of(lambda q, k, v: attend(0, q, k, v, sliding=False), 7) == CAUSAL_AFTER_A_PREFIX
    assert mask_of(lambda q, k, v: attend(0, q, k, v, sliding=True), 7) == WINDOW_OF_3_AFTER_A_PREFIX


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
    v = torch.tensor([10.0, 20.0])[None, :, None].expand(1, 2, 8)
    assert attend(torch.zeros(1, 4, 8), torch.zeros(1, 2, 8), v)[0, :, 0].tolist() == [10, 10, 20, 20]


# the fast forms equal the reference


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("window", [1, 2, W, 13, 20, 100])
@pytest.mark.parametrize(
    "lengths, shared_prefix",
    [([20, 3, 9], [-1, 0, 0]), ([4, 5, 16, 1, 30, 7, 2], [-1, 0, -1, -1, 2, 2, -1]), ([2, 1], [-1, 0])],
    ids=str,
)
def test_attention_after_shared_prefixes_equals_the_reference_and_so_do_its_gradients(
    lengths, shared_prefix, window, sliding, form
):
    results, total = [], sum(lengths)
    for which in ({"reference": True}, {}):
        qkv = random_qkv(total)
        attend = PackedAttention(bounds(lengths), total, window, 0.3, shared_prefix=shared_prefix, **which)
        y = attend(0, *qkv, sliding)
        results.append((y, *torch.autograd.grad(y.square().sum(), qkv)))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 2, 3, W, 13, 100])
@pytest.mark.parametrize("lengths", [[29], [3, 13, 14, 1], [12, 2]], ids=str)
def test_the_band_holds_the_window_and_not_one_token_more(lengths, window, kernel):
    document = [d for d, n in enumerate(lengths) for _ in range(n)]
    places = range(len(document))
    expected = [[int(document[i] == document[j] and 0 <= i - j < window) for j in places] for i in places]
    for attend in (
        lambda q, k, v: reference_attention(q, k, v, bounds(lengths), 1.0, window),
        lambda q, k, v: band(q, k, v, lengths, 1.0, window),
    ):
        assert mask_of(attend, len(document)) == expected


def assert_equal_with_gradients(fast, reference, qkv):
    upstream = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1))
    results = [(y, *torch.autograd.grad(y, qkv, upstream)) for y in (fast(*qkv), reference(*qkv))]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


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


@pytest.mark.fault("packing")
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_attention_equals_reference_attention_whichever_kernel_it_chooses(lengths, sliding):
    qkv = random_qkv(sum(lengths))
    attend = PackedAttention(bounds(lengths), sum(lengths), W, 0.3)
    expected = reference_attention(*qkv, bounds(lengths), 0.3, W if sliding else None)
    torch.testing.assert_close(attend(0, *qkv, sliding), expected, atol=1e-5, rtol=1e-5)
    assert ("band" in vars(attend)) == (sliding and max(lengths) > W), "only a long document needs the band"


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
def test_the_module_equals_transformers_with_gradients(kind, bias, form):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention as Reference

    total = 3 * W + 3
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    layers = {"num_hidden_layers": 1, "layer_types": [kind], "sliding_window": W}
    settings = {"query_pre_attn_scalar": 12, "attention_bias": bias, "attn_implementation": "eager"}
    cfg = Gemma3TextConfig(**sizes, **layers, **settings)
    torch.manual_seed(0)
    theirs, ours = Reference(cfg, 0), Gemma3Attention(24, 4, 2, 8, cfg.rms_norm_eps, bias)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)  # The weights of norms and the biases are zero at first.
    ours.load_state_dict(theirs.state_dict())
    x_theirs = torch.randn(total, 24, requires_grad=True)
    x_ours = x_theirs.detach().clone().requires_grad_()
    cos, sin = rope_angles(torch.arange(total), 8, 1e4)
    mask = additive_mask(total, W if kind == SLIDING else total)
    expected = theirs(x_theirs[None], (cos[None], sin[None]), mask[None, None])[0][0]
    attend = PackedAttention(bounds([total]), total, W, 12**-0.5)
    y = ours.output(attend(0, *ours.project(x_ours, cos, sin), kind == SLIDING))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-4, rtol=1e-4)
    got, wanted = ({n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-4)


# a GPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_launch_on_a_gpu_equals_reference_attention_with_gradients_and_nothing_waits_for_it(
    dtype, head_dim, sliding
):
    lengths = [4, 5, 160, 1, 300, 7, 2]
    settings = {"shared_prefix": [-1, 0, -1, -1, 2, 2, -1], "device": torch.device("cuda", 0)}
    values = [x.detach().to("cuda", dtype) for x in random_qkv(sum(lengths), head_dim=head_dim)]
    results = []
    for reference in (True, False):
        qkv = [(x.double() if reference else x.clone()).requires_grad_() for x in values]
        torch.cuda.set_sync_debug_mode("default" if reference else "error")
        try:
            cu_seqlens = bounds(lengths).pin_memory()
            settings["reference"] = reference
            attend = PackedAttention(cu_seqlens, sum(lengths), 100, head_dim**-0.5, **settings)
            y = attend(0, *qkv, sliding)
            results.append((y, *torch.autograd.grad(y, qkv, torch.ones_like(y))))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for exact, fast in zip(*results, strict=True):
        assert (fast - exact).abs().max() <= 2 ** (-6 if dtype == torch.bfloat16 else -9) * exact.abs().max()


def test_one_launch_is_for_half_precision_on_a_gpu_since_ampere(monkeypatch):
    def possible(device="cuda", dtype=torch.bfloat16, head_dim=256, capability=(8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        v = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(9, 1, head_dim))
        return varlen_is_possible(v)

    assert possible() and possible(dtype=torch.float16, head_dim=8, capability=(9, 0)) and possible("meta")
    assert not possible("cpu") and not possible(dtype=torch.float32) and not possible(capability=(7, 5))
    assert not possible(head_dim=264) and not possible(head_dim=12)


def test_plain_products_are_for_bfloat16_on_a_cpu_and_for_few_keys():
    q = torch.zeros(3, 1, 8)
    assert plain_is_faster(q.bfloat16(), MAX_PLAIN_KEYS)
    assert not plain_is_faster(q.bfloat16(), MAX_PLAIN_KEYS + 1)
    assert not plain_is_faster(q, 1) and not plain_is_faster(q.to("meta", torch.bfloat16), 1)


# memory

LONG, NARROW = 2048, 16


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


def test_reference_attention_makes_the_square():
    q, k, v = random_qkv(256)
    with Largest() as largest:
        reference_attention(q, k, v, bounds([256]), 0.3, NARROW).sum().backward()
    assert largest.elements >= 4 * 256 * 256

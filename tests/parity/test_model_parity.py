"""Our Gemma 3, loaded from what transformers saved, is transformers' Gemma 3: logits, gradients of every
weight, greedy text, for all five sizes.

Documents outgrow the window and lie in one packed stream for us; transformers reads them one by one.
"""

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F

from generation.generate import generate
from model.config import FULL, SLIDING
from model.loss import token_log_probs
from model.weights import load_model
from tests.parity.checkpoints import (
    MULTIMODAL,
    SHAPES,
    WINDOW,
    reference_logits,
    reference_model,
    text_parameters,
)

LENGTHS = [3 * WINDOW, 5, WINDOW + 1, WINDOW]


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    """(folder, transformers' model) of one size."""
    reference, folder = reference_model(request.param), tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return folder, reference


@pytest.fixture(scope="module")
def pair(saved):
    """(ours, transformers') of one size."""
    return load_model(saved[0], torch.float32).eval(), saved[1]


def stream() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens (T,), position_ids (T,), cu_seqlens of the four documents."""
    # Token 0 is left out: transformers calls it padding and gives its embedding no gradient.
    tokens = torch.randint(1, 128, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    return (
        tokens,
        torch.cat([torch.arange(n) for n in LENGTHS]),
        torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32),
    )


def test_the_shapes_meet_what_the_published_models_have():
    for name, text in SHAPES.items():
        assert (
            len(text["layer_types"]) > 6
            and FULL in text["layer_types"][:-1]
            and SLIDING in text["layer_types"]
        ), name
    assert {
        n: (s["num_attention_heads"], s["num_key_value_heads"]) for n, s in SHAPES.items() if n != "softcaps"
    } == {"270m": (4, 1), "1b": (4, 1), "4b": (8, 4), "12b": (16, 8), "27b": (32, 16)}
    assert [n for n, s in SHAPES.items() if "factor" in s["rope_parameters"][FULL]] == list(MULTIMODAL)
    assert SHAPES["27b"]["query_pre_attn_scalar"] == 168 != SHAPES["27b"]["head_dim"]


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ours, reference = pair
    tokens, position_ids, cu_seqlens = stream()
    logits = ours.logits(ours(tokens, position_ids, cu_seqlens))
    expected = torch.cat([reference_logits(reference, text) for text in tokens.split(LENGTHS)])
    assert expected.std() > 0.5, "so that 1e-4 says something"
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_loss_and_gradients_of_all_weights_equal_transformers(pair):
    ours, reference = pair
    tokens, position_ids, cu_seqlens = stream()
    last = cu_seqlens[1:] - 1
    predicting = torch.ones(len(tokens), dtype=torch.bool).index_fill_(0, last.long(), False).nonzero()[:, 0]
    hidden = ours(tokens, position_ids, cu_seqlens)[predicting]
    softcap = ours.config.final_logit_softcapping
    loss = -token_log_probs(hidden, ours.head_weight, tokens[predicting + 1], softcap, chunk=10)[0].sum()
    expected = sum(
        F.cross_entropy(reference_logits(reference, text)[:-1], text[1:], reduction="sum")
        for text in tokens.split(LENGTHS)
    )
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    weights, theirs = dict(ours.named_parameters()), text_parameters(reference)
    assert weights.keys() == theirs.keys()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    wanted = torch.autograd.grad(expected, [theirs[name] for name in weights])
    errors = {
        name: ((g - w).norm() / w.norm()).item()
        for name, g, w in zip(weights, gradients, wanted, strict=True)
    }
    assert max(errors.values()) < 1e-4, max(errors.items(), key=lambda item: item[1])


@torch.no_grad()
def test_64_greedy_tokens_equal_transformers(pair):
    """One pass suffices: each of our tokens must be transformers' greedy choice after those before."""
    ours, reference = pair
    prompts = list(stream()[0].split(LENGTHS))
    completions = generate(ours, [p.tolist() for p in prompts], max_new_tokens=64, stop_ids=())
    for prompt, completion in zip(prompts, completions, strict=True):
        text = torch.cat([prompt, torch.tensor(completion.token_ids)])
        assert (
            reference_logits(reference, text)[len(prompt) - 1 : -1].argmax(-1).tolist()
            == completion.token_ids
        )
        assert len(completion.token_ids) == 64 and len(set(completion.token_ids)) >= 10, (
            "a text worth comparing"
        )


@torch.no_grad()
def test_bfloat16_logits_are_as_near_to_float32_as_transformers_are(saved):
    folder, exact = saved
    ours, reference = (
        load_model(folder, torch.bfloat16).eval(),
        type(exact).from_pretrained(folder, dtype=torch.bfloat16).eval(),
    )
    reference.set_attn_implementation("eager")
    tokens, position_ids, cu_seqlens = stream()
    logits = ours.logits(ours(tokens, position_ids, cu_seqlens))
    rounded, expected = (
        torch.cat([reference_logits(model, text).float() for text in tokens.split(LENGTHS)])
        for model in (reference, exact)
    )
    error, reference_error = (
        (logits - expected).norm() / expected.norm(),
        (rounded - expected).norm() / expected.norm(),
    )
    assert error < 1.5 * reference_error and error < 0.15, (error, reference_error)

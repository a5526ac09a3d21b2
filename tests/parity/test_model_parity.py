"""Our Gemma 3 equals transformers' in logits, gradients and greedy text, in the shapes of all five sizes.

Our model reads four documents in one packed stream, and transformers reads them one by one. Some are longer
than the window.
"""

import pytest
import torch
import torch.nn.functional as F

from generation.generate import generate
from model.config import FULL, SLIDING
from model.loss import token_log_probs
from model.weights import load_model
from tests import makers
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
    # Token 0 is left out: transformers treats it as padding and gives its embedding no gradient.
    return makers.stream(LENGTHS, range(1, 128), seed=1)


def their_logits(reference, tokens: torch.Tensor) -> torch.Tensor:
    """(T, V) logits of the four documents."""
    return torch.cat([reference_logits(reference, text) for text in tokens.split(LENGTHS)])


def test_the_shapes_have_the_layers_heads_and_scales_of_the_published_models():
    for name, text in SHAPES.items():
        kinds = text["layer_types"]
        assert len(kinds) > 6 and FULL in kinds[:-1] and SLIDING in kinds, name
    heads = {n: (s["num_attention_heads"], s["num_key_value_heads"]) for n, s in SHAPES.items()}
    del heads["softcaps"]
    assert heads == {"270m": (4, 1), "1b": (4, 1), "4b": (8, 4), "12b": (16, 8), "27b": (32, 16)}
    assert [n for n, s in SHAPES.items() if "factor" in s["rope_parameters"][FULL]] == list(MULTIMODAL)
    assert SHAPES["27b"]["query_pre_attn_scalar"] == 168 != SHAPES["27b"]["head_dim"]


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ours, reference = pair
    tokens, *packing = stream()
    logits, expected = ours.logits(ours(tokens, *packing)), their_logits(reference, tokens)
    assert expected.std() > 0.5, "otherwise 1e-4 would be a wide tolerance"
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
    for name, g, w in zip(weights, gradients, wanted, strict=True):
        assert (g - w).norm() / w.norm() < 1e-4, name


@torch.no_grad()
def test_64_greedy_tokens_equal_transformers(pair):
    """One pass of transformers over our text suffices: each token must have the largest logit."""
    ours, reference = pair
    prompts = stream()[0].split(LENGTHS)
    completions = generate(ours, [p.tolist() for p in prompts], max_new_tokens=64, stop_ids=())
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = completion.token_ids
        expected = reference_logits(reference, torch.cat([prompt, torch.tensor(ids)])).argmax(-1)
        assert expected[len(prompt) - 1 : -1].tolist() == ids
        assert len(ids) == 64 and len(set(ids)) >= 10, "the text has too few different tokens to compare"


@torch.no_grad()
def test_bfloat16_logits_are_as_near_to_float32_as_transformers_are(saved):
    folder, exact = saved
    ours = load_model(folder, torch.bfloat16).eval()
    reference = type(exact).from_pretrained(folder, dtype=torch.bfloat16).eval()
    reference.set_attn_implementation("eager")
    tokens, *packing = stream()
    expected = their_logits(exact, tokens)
    both = ours.logits(ours(tokens, *packing)), their_logits(reference, tokens).float()
    error, reference_error = ((logits - expected).norm() / expected.norm() for logits in both)
    assert error < 1.5 * reference_error and error < 0.15, (error, reference_error)

"""model/gemma3.py: a layer by hand, transformers' layer, and packing (parity/ has the whole model)."""

import random

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from data.packing import pack
from data.render import IGNORE_INDEX, Document
from model.attention import PackedAttention
from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3DecoderLayer, Gemma3ForCausalLM
from model.loss import token_log_probs
from model.rope import rope_angles
from tests import makers
from tests.makers import needs_compiler, tiny_config
from tests.model.test_attention import Largest, additive_mask
from training.objectives.sft import SupervisedFineTuning

WINDOW = tiny_config().sliding_window  # 16 tokens; two of the six layers are global
LENGTHS = [40, 5, WINDOW, WINDOW + 1, 1, 35]
VOCABULARY = 61


def small_model(**changes) -> Gemma3ForCausalLM:
    """A random model whose norm weights are random too; in a fresh model they are zero."""
    model = Gemma3ForCausalLM(tiny_config(vocab_size=VOCABULARY, **changes))
    model.reset_parameters(seed=0, std=0.3)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    return model


def stream(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return makers.stream(lengths, range(VOCABULARY))


def edited(tokens: torch.Tensor, where) -> torch.Tensor:
    """Returns a copy whose tokens at `where` are others."""
    other = tokens.clone()
    other[where] = (other[where] + 7) % VOCABULARY
    return other


# by hand


def test_a_layer_of_one_token_by_hand():
    # One token attends to itself, so with identities for v_proj and o_proj attention returns its input. The
    # norm divides x = [1, 7] by its root mean square of 5, post_attention_layernorm doubles the result, and
    # x + 2 * [0.2, 1.4] = [1.4, 9.8].
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    layer = Gemma3DecoderLayer(Gemma3Config(2, 3, 1, **heads, layer_types=[FULL], rms_norm_eps=0.0), 0)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
        layer.self_attn.v_proj.weight.copy_(torch.eye(2))
        layer.self_attn.o_proj.weight.copy_(torch.eye(2))
        layer.post_attention_layernorm.weight.fill_(1.0)
    for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm, layer.post_feedforward_layernorm):
        norm.eps = 1e-6  # The input of these norms is zero here.
    angles, attend = rope_angles(torch.tensor([0]), 2, 1e4), PackedAttention(torch.tensor([0, 1]), 1, 4, 1.0)
    y = layer(torch.tensor([[1.0, 7.0]]), *angles, attend)
    torch.testing.assert_close(y, torch.tensor([[1.4, 9.8]]))


@pytest.mark.parametrize("dtype, expected", [(torch.float32, 31.622776), (torch.bfloat16, 31.5)])
def test_the_embeddings_scale_is_rounded_before_it_multiplies(dtype, expected):
    # sqrt(640) = 25.298 is 25.25 in bfloat16. 1.25 * 25.25 = 31.5625 rounds to 31.5; without the rounding of
    # the scale, 1.25 * 25.298 = 31.62 would round to 31.625.
    model = Gemma3ForCausalLM(Gemma3Config(640, 1, 0, vocab_size=3)).to(dtype)
    torch.nn.init.constant_(model.model.embed_tokens.weight, 1.25)
    seen = []
    model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.tensor([2]), torch.tensor([0]), torch.tensor([0, 1]))
    torch.testing.assert_close(seen[0], torch.full((1, 640), expected, dtype=dtype), atol=1e-5, rtol=0)


def test_logits_are_products_with_the_embedding_and_softcapped_by_hand():
    model = Gemma3ForCausalLM(Gemma3Config(2, 1, 0, vocab_size=2, final_logit_softcapping=2.0))
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    # hidden W^T = [2, 3]; 2 tanh(2 / 2) = 1.523188 and 2 tanh(3 / 2) = 1.810297
    logits = model.logits(torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(logits, torch.tensor([[1.523188, 1.810297]]), atol=1e-6, rtol=0)


def test_an_untied_head_has_its_own_weight():
    tied, untied = small_model(), small_model(tie_word_embeddings=False)
    assert tied.head_weight is tied.model.embed_tokens.weight and untied.head_weight is untied.lm_head.weight
    assert untied.state_dict().keys() - tied.state_dict().keys() == {"lm_head.weight"}


# transformers' layer


@pytest.mark.parametrize("kind", [FULL, SLIDING])
def test_a_layer_equals_transformers_with_gradients(kind):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer as Reference

    cfg, total = tiny_config(num_hidden_layers=1, layer_types=[kind]), 40
    torch.manual_seed(0)
    theirs = Reference(Gemma3TextConfig(**cfg.to_json(), attn_implementation="eager"), 0)
    ours = Gemma3DecoderLayer(cfg, 0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    x_theirs = torch.randn(total, cfg.hidden_size, requires_grad=True)
    x_ours = x_theirs.detach().clone().requires_grad_()
    cos, sin = rope_angles(torch.arange(total), cfg.head_dim, 1e4)
    mask = additive_mask(total, WINDOW if kind == SLIDING else total)
    y = ours(x_ours, cos, sin, PackedAttention(torch.tensor([0, total]), total, WINDOW, cfg.attention_scale))
    expected = theirs(x_theirs[None], (cos[None], sin[None]), mask[None, None])[0]
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-4, rtol=1e-4)


# packing


@pytest.mark.fault("packing")
@torch.no_grad()
def test_packed_documents_equal_each_alone():
    model, (tokens, position_ids, cu_seqlens) = small_model(), stream(LENGTHS)
    packed = model(tokens, position_ids, cu_seqlens).split(LENGTHS)
    alone = [model(text, *stream([len(text)])[1:]) for text in tokens.split(LENGTHS)]
    torch.testing.assert_close(packed, tuple(alone), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [LENGTHS, [3, WINDOW, 9]], ids=["past the window", "within the window"])
def test_the_fast_pass_equals_the_reference(lengths):
    model, batch = small_model(), stream(lengths)
    torch.testing.assert_close(model(*batch), model(*batch, reference=True), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("document", range(len(LENGTHS)))
def test_editing_one_document_leaves_the_others_the_same_to_the_last_bit(document, dtype):
    model, (tokens, *packing) = small_model().to(dtype), stream(LENGTHS)
    other = edited(tokens, slice(*packing[1][document : document + 2].tolist()))
    before, after = (model(t, *packing).split(LENGTHS) for t in (tokens, other))
    same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
    assert same == [d != document for d in range(len(LENGTHS))]


@torch.no_grad()
def test_editing_a_token_leaves_the_tokens_before_it_the_same_to_the_last_bit():
    model, (tokens, *packing) = small_model(), stream([50])
    before, after = (model(t, *packing) for t in (tokens, edited(tokens, 33)))
    assert torch.equal(before[:33], after[:33]) and not (before[33:] == after[33:]).all(-1).any()


@torch.no_grad()
def test_local_layers_alone_see_a_window_further_back_with_each_layer_and_not_one_token_more():
    window, layers = 4, 6
    model = small_model(layer_types=[SLIDING] * layers, sliding_window=window)
    tokens, *packing = stream([40])
    changed = (model(tokens, *packing) != model(edited(tokens, 10), *packing)).any(-1).nonzero()[:, 0]
    assert changed.tolist() == list(range(10, 10 + layers * (window - 1) + 1))


@pytest.mark.parametrize("length", [1, 10, 3 * WINDOW])
def test_another_document_at_the_end_changes_neither_hidden_states_nor_gradients(length):
    model, targets = small_model(), torch.tensor([3, 1, 4])
    runs = []
    for lengths in (LENGTHS, [*LENGTHS, length]):
        tokens, *packing = stream(lengths)
        tokens = torch.cat([stream(LENGTHS)[0], torch.zeros_like(tokens[sum(LENGTHS) :])])
        hidden = model(tokens, *packing)[: sum(LENGTHS)]
        loss = -token_log_probs(hidden[[5, 39, 60]], model.head_weight, targets)[0].sum()
        runs.append((hidden.detach(), loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)


def test_a_stream_of_2048_tokens_makes_no_square():
    model, total = small_model(), 2048
    with Largest() as largest:
        model(*stream([total])).sum().backward()
    assert largest.elements <= total * 2 * WINDOW * model.config.num_attention_heads < total * total


# shared prefixes, and positions without output


def shared_and_plain() -> tuple:
    """The same nine documents with and without shared prefixes: one of 20 tokens and one of 17, which are
    more than the window, for three documents each.
    """
    rng, rows = random.Random(0), []

    def draw(count: int) -> list[int]:
        return [rng.randrange(VOCABULARY) for _ in range(count)]

    for start in (draw(20), draw(17), []):
        for _ in range(3):
            ids = start + draw(rng.randint(2, 40))
            first = len(start) + (len(ids) - len(start)) // 2
            labels = [IGNORE_INDEX] * first + ids[first + 1 :] + [IGNORE_INDEX]
            rows.append(Document(ids, labels, str(len(rows))))
    rng.shuffle(rows)
    shared, plain = pack(rows, share_prefix=True), pack(rows)
    assert len(shared.tokens) == len(plain.tokens) - 2 * 20 - 2 * 17
    return shared, plain


def loss_and_gradients(model, batch) -> list[torch.Tensor]:
    loss, weight, _ = SupervisedFineTuning().loss(model, batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss.detach() / weight, *(g / weight for g in gradients)]


def test_a_shared_prefix_changes_no_loss_in_float32():
    shared, plain = (SupervisedFineTuning().loss(small_model(), batch) for batch in shared_and_plain())
    assert abs((shared[0] / shared[1] - plain[0] / plain[1]).item()) < 1e-5 and shared[1] == plain[1]


def test_a_shared_prefix_changes_no_gradient_in_float64():
    model = small_model().double()
    shared, plain = (loss_and_gradients(model, batch) for batch in shared_and_plain())
    torch.testing.assert_close(shared, plain, atol=1e-10, rtol=1e-10)


def test_a_shared_prefix_is_the_same_for_the_reference_attention():
    batch, model = shared_and_plain()[0], small_model()
    packed = batch.tokens, batch.position_ids, batch.cu_seqlens
    fast = model(*packed, shared_prefix=batch.shared_prefix)
    reference = model(*packed, reference=True, shared_prefix=batch.shared_prefix)
    torch.testing.assert_close(fast, reference, atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_less():
    kept, results, model, batch = [], [], small_model().train(), shared_and_plain()[0]
    for gradient_checkpointing in (False, True):
        model.model.gradient_checkpointing, sizes = gradient_checkpointing, []
        with saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss, _, _ = SupervisedFineTuning().loss(model, batch)
        results.append((loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))))
        kept.append(sum(sizes))
    torch.testing.assert_close(*results, atol=0, rtol=0)
    assert kept[1] < 0.2 * kept[0]


def test_the_last_layer_at_output_positions_gives_the_hidden_states_of_the_whole_pass_there():
    model, positions, packed = small_model(), torch.tensor([3, 40, 41, 90]), stream(LENGTHS)
    whole, seen = model(*packed), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    few = model(*packed, output_positions=positions)
    assert seen == [sum(LENGTHS)] * 5 + [4], "the last layer's MLP runs at the output positions only"
    torch.testing.assert_close(few, whole[positions], atol=1e-6, rtol=1e-6)
    assert few.shape == (4, 32)


# fresh weights and compilation


def test_fresh_weights_come_from_the_seed_and_out_projections_are_smaller():
    weights = []
    for seed in (0, 0, 1):
        model = Gemma3ForCausalLM(tiny_config())
        model.reset_parameters(seed, std=0.02)
        weights.append(dict(model.named_parameters()))
    first, again, other = weights
    for name, p in first.items():
        assert torch.equal(p, again[name]) and (p.ndim == 1 or not torch.equal(p, other[name])), name
        small = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = 0 if p.ndim == 1 else 0.02 / 12**0.5 if small else 0.02
        assert abs(p.std().item() - expected) <= 0.1 * expected, name


def test_compiled_halves_run_in_training_only(monkeypatch):
    calls = []

    def compile_(half, dynamic):
        return lambda *args: calls.append(half.__name__) or half(*args)

    monkeypatch.setattr(torch, "compile", compile_)
    model, batch = small_model(), stream([20])
    expected = model(*batch)
    model.compile_layers()
    assert torch.equal(model.train()(*batch), expected)
    assert calls == ["before_attention", "after_attention"] * 6
    assert torch.equal(model.eval()(*batch), expected) and len(calls) == 12


@needs_compiler
def test_compiled_halves_have_the_plain_ones_losses_and_gradients_and_one_compilation_serves_every_length():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = small_model(), small_model()
    compiled.compile_layers()
    counted = []
    for lengths, rows in (([30, 12], [2, 7, 41]), ([17], [3, 16]), ([5, 40, 3], [0, 4, 9, 20, 33])):
        runs, targets = [], torch.arange(len(rows))
        for model in (plain, compiled):
            hidden = model.train()(*stream(lengths), output_positions=torch.tensor(rows))
            loss = -token_log_probs(hidden, model.head_weight, targets)[0].sum()
            runs.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)
        counted.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counted[0] and counted == [counted[0]] * 3

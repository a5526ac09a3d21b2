"""model/quantized.py: an example by hand, parity with the dense model, and what is kept in memory."""

import copy
import gc
import math

import pytest
import torch
from torch import nn

from exporting.gguf_model import write_model
from exporting.merged import MergedCheckpoint
from generation.sampling import greedy
from ggml.blocks import dequantize
from lora.inject import adapter_state, adapters, inject, unwrap
from lora.merge import merge
from lora.peft_io import load_adapter, save_adapter
from model.gemma3 import Gemma3ForCausalLM
from model.hub import resolve
from model.loss import token_log_probs
from model.quantized import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, all_weights, set_quantized
from model.weights import Checkpoint, load_model, save_model
from tests.folders import make_model, shake
from tests.makers import stream, tiny_config

KINDS = ["q8_0", "q4_k", "nf4"]  # blocks of 32, 256 and 64 weights
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"head_dim": 64, "layer_types": ["sliding_attention", "full_attention"]}
STREAM = stream([20, 3, 17], range(6, 300))
TARGETS = STREAM[0].roll(-1)
# {case: (settings of the adapters, whether gradient checkpointing is on)}
CASES = {
    "lora": ({}, False),
    "lora, dropout": ({"lora_dropout": 0.3}, False),
    "lora, checkpointing": ({}, True),
    "lora, dropout, checkpointing": ({"lora_dropout": 0.3}, True),
    "dora": ({"type": "dora"}, False),
    "dora, dropout": ({"type": "dora", "lora_dropout": 0.3}, False),
    "dora, checkpointing": ({"type": "dora"}, True),
}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A model of two layers with biases, whose head is or is not its embedding."""
    path = tmp_path_factory.mktemp("base")
    config = tiny_config(**SIZES, attention_bias=True, tie_word_embeddings=request.param)
    model = Gemma3ForCausalLM(config)
    model.reset_parameters(0, std=0.1)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    save_model(model, path, torch.float32)
    return path


@pytest.fixture(scope="module")
def gguf_base(tmp_path_factory):
    sizes = {name: size for name, size in SIZES.items() if name != "layer_types"}
    return make_model(tmp_path_factory.mktemp("gguf"), query_pre_attn_scalar=64, **sizes)


def pair(folder, kind: str, dtype=torch.float64):
    """Returns a quantized model, and a dense one with the weights that its blocks stand for."""
    ours, dense = load_model(folder, dtype, quantize=kind), load_model(folder, dtype)
    quantized = {n: w for n, w in all_weights(ours).items() if isinstance(w, QuantizedWeight)}
    assert quantized
    for name, weight in quantized.items():
        dense.get_parameter(name).data.copy_(weight.to(dtype))
    return ours, dense


def train(model, case: str, dtype=torch.float64):
    """Adds adapters to a model for the case, and makes it ready to train."""
    settings, checkpointing = CASES[case]
    inject(model, **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "seed": 1} | settings)
    shake(model, 0.1)
    for layer in adapters(model).values():
        for p in layer.parameters(recurse=False):
            p.data = p.data.to(dtype)
    model.model.gradient_checkpointing = checkpointing
    return model.train()


def log_probs(model):
    """The log-probabilities of all targets, in chunks of 100 vocabulary entries."""
    return token_log_probs(model(*STREAM), model.head_weight, TARGETS, chunk=100)[0]


def loss_and_gradients(model):
    torch.manual_seed(3)
    loss = -log_probs(model).sum()
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_a_product_and_its_gradient_of_an_example_by_hand():
    scale = torch.tensor([0.5], dtype=torch.float16).view(torch.uint8)
    levels = torch.zeros(2, 32, dtype=torch.int8)
    levels[0, 0], levels[0, 1], levels[1, 1] = 4, -6, 2  # W[:, :2] = [[2, -3], [0, 1]]
    blocks = torch.cat((scale.expand(2, 2), levels.view(torch.uint8)), 1)
    layer = QuantizedLinear(
        QuantizedWeight(blocks, "q8_0", torch.float32), nn.Parameter(torch.tensor([10.0, 20]))
    )
    assert (layer.in_features, layer.out_features) == (32, 2)
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 1] = 5, 7
    y = layer(x.requires_grad_())
    assert y.tolist() == [[2 * 5 - 3 * 7 + 10, 7 + 20]]
    y.backward(torch.tensor([[1.0, 2]]))
    assert x.grad[0, :3].tolist() == [2, -3 + 2, 0]
    rows = QuantizedEmbedding(layer.quantized)(torch.tensor([1, 0, 1]))
    assert rows[:, :2].tolist() == [[0, 1], [2, -3], [0, 1]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_dense_models(folder, kind, case):
    ours, dense = (loss_and_gradients(train(model, case)) for model in pair(folder, kind))
    assert ours.keys() == dense.keys() and all(g.abs().sum() > 0 for g in ours.values())
    torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", ["lora", "lora, dropout", "dora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_under_autocast_equal_the_dense_models(folder, kind, base, case):
    models = pair(folder, kind, base)
    for p in (p for m in models for n, p in m.named_parameters() if n.endswith("bias")):
        p.data.zero_()  # The dense product adds its bias before it rounds to bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        ours, dense = (loss_and_gradients(train(model, case, torch.float32)) for model in models)
    assert all(g.dtype == torch.float32 for g in ours.values())
    # DoRA's norms are those of the weights before they are rounded to bfloat16.
    tolerance = 0.05 if case == "dora" and base == torch.bfloat16 else 0.0
    for name, expected in dense.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_greedy_tokens_equal_the_dense_models(folder, kind, monkeypatch):
    monkeypatch.setattr("model.gemma3.HEAD_ROWS", 100)
    monkeypatch.setattr("generation.sampling.CHUNK", 100)
    with torch.no_grad():
        (ours, hidden), (dense, expected) = ((m, m(*STREAM)) for m in pair(folder, kind))
        torch.testing.assert_close(hidden, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.logits(hidden), dense.logits(hidden))
        for rows in (hidden, hidden[:1]):
            assert greedy(rows, ours.head_weight).equal(greedy(rows, dense.head_weight))


@pytest.mark.parametrize("case", ["lora", "lora, dropout", "dora", "dora, dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_dense_is_kept_between_forward_and_backward(folder, kind, case):
    model = train(load_model(folder, torch.float32, quantize=kind), case, torch.float32)
    weights = [w for w in all_weights(model).values() if isinstance(w, QuantizedWeight)]
    dense = {tuple(w.shape) for w in weights} | {tuple(w.shape)[::-1] for w in weights}
    before = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    own = {p.data_ptr() for p in model.parameters()}  # in NF4 the embedding and the head are dense
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        log_probs_ = log_probs(model)
    saved += [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in before]
    kept = [t for t in saved if t.is_floating_point() and tuple(t.shape) in dense]
    assert len(saved) > 50 and not [t.shape for t in kept if t.data_ptr() not in own]
    assert log_probs_.requires_grad


@pytest.mark.parametrize("type", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_model_equals_the_merged_dense_model(folder, dtype, kind, type):
    ours, dense = (train(m, type, torch.float32).eval() for m in pair(folder, kind, dtype))
    norms, expected = merge(ours), merge(dense)
    assert norms.keys() == expected.keys() and min(norms.values()) > 0
    layers = [m for m in ours.model.layers.modules() if isinstance(m, nn.Linear)]
    assert not adapters(ours) and {m.__class__ for m in layers} == {nn.Linear}
    assert all(p.dtype == dtype for p in ours.parameters())
    if dtype == torch.float32:
        torch.testing.assert_close(ours.state_dict(), ours.state_dict() | dense_layers(dense))
    with torch.no_grad():
        hidden, wanted = ours(*STREAM).float(), dense(*STREAM).float()
    assert (hidden - wanted).norm() <= (1e-5 if dtype == torch.float32 else 0.02) * wanted.norm()


def dense_layers(model) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if name.startswith("model.layers.")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_is_not_merged_and_unwrap_gives_the_quantized_layers_back(folder, dtype):
    model = load_model(folder, dtype, quantize="q4_k")
    before = all_weights(model)
    inject(model, r=4, lora_alpha=8, target_modules="all-linear", seed=1)
    with pytest.raises(ValueError, match=f"none of 14 weights would change.*{dtype}"):
        merge(model)
    assert len(adapters(model)) == 14
    unwrap(model)
    assert not adapters(model) and all_weights(model).keys() == before.keys()
    assert isinstance(model.model.layers[1].mlp.up_proj, QuantizedLinear)


def test_a_saved_adapter_loads_into_a_quantized_and_a_dense_base(folder, tmp_path):
    first, dense = pair(folder, "q4_k", torch.float32)
    again = copy.deepcopy(first)
    train(first, "dora", torch.float32)
    save_adapter(first, tmp_path, base_model_name="base")
    load_adapter(again, tmp_path)
    load_adapter(dense, tmp_path)
    torch.testing.assert_close(adapter_state(again), adapter_state(first), rtol=0, atol=0)
    with torch.no_grad():
        expected = first(*STREAM)
        assert again(*STREAM).equal(expected)
        torch.testing.assert_close(dense(*STREAM), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant", ["q8_0", "q6_k", "q5_0", "q4_k"])
def test_blocks_equal_those_of_the_exported_file(gguf_base, quant, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "x.gguf"
    base = MergedCheckpoint(gguf_base)
    write_model(path, base, quant, name="x", origin={}, progress=lambda n: None)
    file = Checkpoint(resolve(str(path)))
    infos = {name: file.gguf.info(name) for name in file.names}
    stored = {name: file.gguf.blocks(name) for name in file.names}
    kept, made = (
        file.load(torch.float32, torch.device("cpu"), "keep"),
        load_model(gguf_base, torch.float32, quantize=quant),
    )
    dense = load_model(resolve(str(path)), torch.float32)
    for model in (kept, made):
        weights = all_weights(model)
        assert weights.keys() == infos.keys()
        for name, weight in weights.items():
            if len(infos[name].shape) == 1:
                continue  # a norm
            assert isinstance(weight, QuantizedWeight)
            assert (weight.type, weight.shape) == (infos[name].type, infos[name].shape)
            assert weight.blocks.equal(stored[name])
            wanted = dequantize(stored[name], infos[name].type)
            assert weight.to(torch.float32).equal(wanted) and dense.get_parameter(name).equal(wanted)
    assert "token_embd.weight" in {i.name for i in infos.values()}


@pytest.mark.parametrize("kind", [*KINDS, "q6_k", "q5_0"])
def test_a_quantized_base_takes_the_bytes_of_its_blocks(folder, kind):
    bits = {"q8_0": 8.5, "q6_k": 6.5625, "q5_k": 5.5, "q5_0": 5.5, "q4_k": 4.5, "nf4": 4.125}
    model = load_model(folder, torch.float32, quantize=kind)
    for name, weight in all_weights(model).items():
        if isinstance(weight, QuantizedWeight):
            groups = math.ceil(weight.numel() / (64 * 256)) + 1 if kind == "nf4" else 0
            assert weight.nbytes == weight.numel() * bits[weight.type] / 8 + 4 * groups
            assert QuantizedWeight.zeros(*weight.shape, weight.type, weight.dtype).nbytes == weight.nbytes
        else:
            matrices = kind == "nf4" and ("embed_tokens" in name or "lm_head" in name)
            assert matrices or weight.ndim == 1, name
    held = sum(b.nbytes for b in model.buffers()) + sum(p.nbytes for p in model.parameters())
    assert held == sum(w.nbytes for w in all_weights(model).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_of_the_model_leaves_the_blocks_as_they_are(folder, kind):
    model = load_model(folder, torch.float32, quantize=kind)
    layer = model.model.layers[0].mlp.up_proj
    before = layer.weight
    model.bfloat16()
    assert layer.weight.equal(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_that_is_not_finite_is_named(tmp_path, kind):
    model = Gemma3ForCausalLM(tiny_config(**SIZES))
    model.reset_parameters(0)
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[5, 3] = torch.inf
    save_model(model, tmp_path, torch.float32)
    with pytest.raises(ValueError, match=f"{tmp_path}: {name}: .*infinity or NaN"):
        load_model(tmp_path, torch.float32, quantize=kind)


def test_rows_that_fill_no_block_stay_dense_in_nf4(tmp_path):
    save_model(Gemma3ForCausalLM(tiny_config(intermediate_size=64)), tmp_path, torch.float32)
    model = load_model(tmp_path, torch.float32, quantize="nf4")
    quantized = {n for n, w in all_weights(model).items() if isinstance(w, QuantizedWeight)}
    assert quantized == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(6)}


def test_set_quantized_replaces_a_layer_and_an_embedding():
    model = Gemma3ForCausalLM(tiny_config(**SIZES, tie_word_embeddings=False))
    zeros = QuantizedWeight.zeros(256, 256, "q8_0", torch.float32)
    for name, kind in (
        ("model.layers.0.mlp.up_proj", QuantizedLinear),
        ("model.embed_tokens", QuantizedEmbedding),
        ("lm_head", QuantizedEmbedding),
    ):
        set_quantized(model, f"{name}.weight", zeros)
        assert type(model.get_submodule(name)) is kind

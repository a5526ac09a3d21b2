"""exporting/gguf_model.py: the bytes of llama.cpp's converter for every shape, and refused models."""

import json

import numpy as np
import pytest
import torch

from exporting.gguf_model import (
    architecture_metadata,
    plan,
    refuse_inexpressible,
    transformed,
    write_model,
)
from exporting.merged import MergedCheckpoint
from ggml.container import GGUFFile
from lora.merge import merge
from lora.peft_io import load_adapter
from model.chat_template import save_tokenizer, stored_template
from model.config import Gemma3Config
from model.gguf_names import gguf_name
from model.hub import TINY
from model.tokenizer import Tokenizer
from model.weights import load_model, save_model
from tests.folders import make_adapter, make_model
from tests.ggml.make_goldens import EXPORTED, GOLDENS, QUANTS, fingerprint, save_checkpoint


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return {}


@pytest.fixture(params=EXPORTED)
def checkpoint(request, checkpoints, tmp_path_factory):
    if request.param not in checkpoints:
        folder = checkpoints[request.param] = tmp_path_factory.mktemp(request.param)
        save_checkpoint(request.param, folder)
        save_tokenizer(Tokenizer(TINY), folder)
    return request.param, checkpoints[request.param]


@pytest.mark.parametrize("quant", QUANTS)
def test_the_file_is_what_the_upstream_converter_writes(checkpoint, quant, tmp_path):
    name, folder = checkpoint
    write_model(
        tmp_path / "x.gguf", MergedCheckpoint(folder), quant, name="x", origin={}, progress=lambda _: None
    )
    assert fingerprint(tmp_path / "x.gguf") == json.loads(GOLDENS.read_text())[name][quant]


def test_names_of_a_layer_by_hand():
    assert gguf_name("model.layers.7.self_attn.q_proj.weight") == "blk.7.attn_q.weight"
    assert gguf_name("model.layers.7.mlp.down_proj.weight") == "blk.7.ffn_down.weight"
    assert gguf_name("model.layers.7.pre_feedforward_layernorm.weight") == "blk.7.ffn_norm.weight"
    assert gguf_name("model.norm.weight") == "output_norm.weight"


def test_norms_gain_one_and_matrices_nothing(tmp_path):
    folder = make_model(tmp_path)
    whole = load_model(folder, torch.float32)
    torch.nn.init.normal_(whole.model.layers[0].input_layernorm.weight)
    save_model(whole, folder, torch.float32)
    model = MergedCheckpoint(folder)
    norm, matrix = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(next(transformed(model, norm))[0], model.read(norm).numpy() + 1)
    assert np.array_equal(np.concatenate(list(transformed(model, matrix))), model.read(matrix).numpy())


def test_a_matrix_in_slices_is_the_matrix(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "exporting.merged.SLICE", 5 * 32 + 7
    )  # five rows of 32, and 6144 is no multiple of five
    model = MergedCheckpoint(make_model(tmp_path))
    name = "model.embed_tokens.weight"
    pieces = list(transformed(model, name))
    assert len(pieces) > 1000 and np.array_equal(np.concatenate(pieces), model.read(name).numpy())


def test_the_embedded_models_own_pattern_of_layers_is_written(tmp_path):
    write_model(
        tmp_path / "x.gguf",
        MergedCheckpoint(TINY),
        "q8_0",
        name="x",
        origin={"run": "r"},
        progress=lambda _: None,
    )
    keys = GGUFFile(tmp_path / "x.gguf").metadata
    assert (
        keys["gemma3.attention.sliding_window_pattern"] == [True, True, False] * 3
        and keys["loupe.run"] == "r"
    )
    assert len(keys["tokenizer.ggml.tokens"]) == 6144 and keys["tokenizer.chat_template"] == stored_template(
        TINY
    )


def test_a_type_per_tensor_is_the_mixes(tmp_path):
    types = {t.name: t.type for t in plan(MergedCheckpoint(TINY), "q4_k_m")}
    assert (
        types["token_embd.weight"] == "q6_k"
        and types["blk.1.attn_q.weight"] == "q4_k"
        and types["blk.1.attn_norm.weight"] == "f32"
    )
    assert types["blk.0.ffn_down.weight"] == "q8_0"  # 640 columns are no multiple of 256


def small(**changes) -> Gemma3Config:
    return Gemma3Config(
        **{
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
        }
        | changes
    )


def test_what_llama_cpp_cannot_express_is_refused_all_at_once():
    with pytest.raises(
        ValueError,
        match="query_pre_attn_scalar is 32.*attn_logit_softcapping is 50.*attention_bias is true.*--to",
    ):
        refuse_inexpressible(
            small(query_pre_attn_scalar=32, attn_logit_softcapping=50.0, attention_bias=True)
        )
    refuse_inexpressible(
        small(num_hidden_layers=62, num_attention_heads=4, query_pre_attn_scalar=16, head_dim=8)
    )
    keys = architecture_metadata(small(num_hidden_layers=1, layer_types=["full_attention"]), "f32", "x")
    assert keys["gemma3.attention.sliding_window_pattern"] == ("[bool]", [False])


def test_an_adapters_share_is_in_the_file(tmp_path):
    base = make_model(tmp_path / "base")
    model, plain = (
        MergedCheckpoint(base, make_adapter(tmp_path / "adapter", base, type="dora")),
        MergedCheckpoint(base),
    )
    name = "model.layers.3.mlp.up_proj.weight"
    whole = load_model(base, torch.float32)
    load_adapter(whole, tmp_path / "adapter")
    merge(whole)
    assert torch.equal(model.read(name), whole.get_parameter(name)) and not torch.equal(
        model.read(name), plain.read(name)
    )

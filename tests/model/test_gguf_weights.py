"""model/gguf_weights.py and gguf_names.py: a GGUF file loads as the model that it was made from."""

import pytest
import torch

import export
from exporting.verify import compare_config
from ggml.container import GGUFFile
from model.gguf_names import gguf_name
from model.gguf_weights import model_of, read_gguf_config, read_rows, read_tensor
from model.weights import load_model
from tests.folders import make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base"), rope_linear_factor=8.0)


@pytest.fixture(scope="module")
def file(tmp_path_factory, base) -> str:
    out = str(tmp_path_factory.mktemp("file") / "x.gguf")
    assert export.main(["--model", base, "--to", "gguf", "--quant", "f32", "--out", out]) == 0
    return out


def load_gguf(path):
    opened = GGUFFile(path)
    return model_of(read_gguf_config(opened), lambda name: read_tensor(opened, name))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.12.self_attn.q_norm.weight", "blk.12.attn_q_norm.weight"),
        ("model.layers.0.post_feedforward_layernorm.weight", "blk.0.post_ffw_norm.weight"),
    ],
)
def test_names_are_llama_cpps(ours, theirs):
    assert gguf_name(ours) == theirs


def test_a_float32_file_loads_as_the_model_it_was_made_from(base, file):
    expected, found = load_model(base, torch.float32), load_gguf(file)
    compare_config(found.config, expected.config)
    for (name, p), q in zip(expected.named_parameters(), found.parameters(), strict=True):
        # The file stores 1 + weight for a norm, and the sum is rounded.
        torch.testing.assert_close(q, p, rtol=0, atol=1e-7 if name.endswith("norm.weight") else 0.0)


def test_rows_of_a_tensor_equal_those_of_the_whole_tensor(file):
    whole, opened = load_gguf(file), GGUFFile(file)
    name = "model.layers.2.mlp.up_proj.weight"
    torch.testing.assert_close(read_rows(opened, name, 3, 9), whole.get_parameter(name)[3:9], rtol=0, atol=0)
    assert read_tensor(opened, "model.norm.weight").shape == whole.model.norm.weight.shape


def test_missing_keys_have_llama_cpps_defaults(file):
    opened = GGUFFile(file)
    for key in ("gemma3.rope.freq_base_swa", "gemma3.rope.scaling.factor", "gemma3.attention.sliding_window"):
        opened.metadata.pop(key, None)
    config = read_gguf_config(opened)
    assert config.rope_local_base_freq == 1e4 and config.rope_linear_factor == 1.0
    assert set(config.layer_types) == {"full_attention"}

"""model/gguf_weights.py and gguf_names.py: a GGUF file loads as the model that it was made from."""

import json

import gguf
import numpy as np
import pytest
import torch

import evaluate
import export
import generate
from exporting.verify import compare_config
from ggml.blocks import TYPES, type_named
from ggml.container import GGUFFile, TensorInfo, write_gguf
from model.gguf_names import gguf_name
from model.gguf_weights import model_of, read_gguf_config, read_rows, read_tensor
from model.hub import resolve
from model.quantized import all_weights
from model.weights import load_model
from tests.folders import make_model
from tests.ggml.ggml import ggml_quantize
from tests.model.gguf_files import VAL, make_gguf


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


# Files whose matrices have blocks of 256 weights


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    folder = tmp_path_factory.mktemp("wide")
    return make_model(folder, **sizes, query_pre_attn_scalar=64, max_position_embeddings=1024)


def dequantized(file: GGUFFile, name: str) -> np.ndarray:
    """A tensor in float32, by the gguf package."""
    tensor, data = file.tensors[name], np.asarray(file.data(name))
    stored = {"f32": np.float32, "f16": np.float16}.get(tensor.type, np.uint8)
    kind = gguf.GGMLQuantizationType(type_named(tensor.type).ggml_id)
    return gguf.quants.dequantize(data.view(stored), kind).astype(np.float32).reshape(tensor.shape)


def retyped(source, path, type: str) -> GGUFFile:
    """Writes a file again with the matrices of the layers in another type, quantized by llama.cpp."""
    file = GGUFFile(source)
    types = {n: type if "blk." in n and len(t.shape) > 1 else t.type for n, t in file.tensors.items()}
    infos = [TensorInfo(t.name, t.shape, types[t.name]) for t in file.tensors.values()]
    metadata = {key: (file.kinds[key], value) for key, value in file.metadata.items()}

    def read(name: str) -> list[np.ndarray]:
        if types[name] == file.tensors[name].type:
            return [np.asarray(file.data(name))]
        return [ggml_quantize(dequantized(file, name), type_named(type).ggml_id)]

    write_gguf(path, metadata, infos, read)
    return GGUFFile(path)


# The other IQ types need an importance matrix, or seconds: tests/ggml/test_quantize.py has blocks of each.
LLAMA_CPP_WRITES = (*TYPES, "iq3_xxs", "iq4_nl", "iq4_xs", "tq1_0", "tq2_0")


@pytest.mark.parametrize("type", LLAMA_CPP_WRITES)
def test_a_file_of_each_type_loads_as_the_gguf_package_dequantizes_it(wide, tmp_path, type):
    file = retyped(make_gguf(tmp_path / "f32.gguf", "f32", wide), tmp_path / "x.gguf", type)
    folder = resolve(str(file.path))
    for quantize in ("none", "keep"):
        model = load_model(folder, torch.float32, quantize=quantize)
        weights = {name: w[:] for name, w in all_weights(model).items()}
        expected = {name: torch.from_numpy(dequantized(file, gguf_name(name))) for name in weights}
        for name, weight in weights.items():
            minus = 1.0 if name.endswith("norm.weight") else 0.0
            assert torch.equal(weight, expected[name] - minus), (quantize, name)
    assert file.tensors["blk.1.ffn_up.weight"].type == type


def loss_of(model: str, capsys) -> float:
    words = ["--data", VAL, "--limit", "2", "--loss-only", "--json", "--dtype", "float32"]
    assert evaluate.main(["--model", model, *words]) == 0
    return json.loads(capsys.readouterr().out)["loss"]


@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_k_m"])
def test_a_file_has_the_loss_of_its_dequantized_file_and_a_float32_file_that_of_its_folder(
    wide, tmp_path, capsys, quant
):
    path = make_gguf(tmp_path / "x.gguf", quant, wide)
    file = GGUFFile(path)
    infos = [TensorInfo(t.name, t.shape, "f32") for t in file.tensors.values()]
    metadata = {key: (file.kinds[key], value) for key, value in file.metadata.items()}
    dense = tmp_path / "dense.gguf"
    write_gguf(dense, metadata, infos, lambda name: [np.atleast_2d(dequantized(file, name)).view(np.uint8)])
    capsys.readouterr()
    found, base = loss_of(str(path), capsys), loss_of(wide, capsys)
    assert found == pytest.approx(loss_of(str(dense), capsys), abs=1e-6)
    assert abs(found - base) < 1e-6 if quant == "f32" else abs(found - base) > 1e-5


def test_a_file_answers_and_is_exported_as_its_folder(base, file, tmp_path, capsys):
    def answer(model: str) -> str:
        words = ["--prompt", "Mask Anna.", "--max-new-tokens", "8", "--dtype", "float32"]
        assert generate.main(["--model", model, *words]) == 0
        return capsys.readouterr().out

    out = tmp_path / "folder"
    assert export.main(["--model", file, "--to", "safetensors", "--out", str(out)]) == 0
    again = make_gguf(tmp_path / "again.gguf", "f32", file)
    assert GGUFFile(again).digest("blk.0.ffn_up.weight") == GGUFFile(file).digest("blk.0.ffn_up.weight")
    capsys.readouterr()
    assert answer(file) == answer(base) == answer(str(again))

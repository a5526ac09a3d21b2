"""GGUF files that are damaged, that lie, or that hold something else: exit code 2, one line, no traceback."""

from pathlib import Path

import numpy as np
import pytest

import export
import generate
import train
from ggml.container import GGUFFile, TensorInfo, write_gguf
from model.gguf_weights import KEYS
from model.hub import TINY
from model.tokenizer import Tokenizer
from tests.folders import ROOT
from tests.model.gguf_files import VAL, loaded, make_gguf, refused, reshaped, rewritten

OTHER_ARCHITECTURES = ["llama", "gemma2", "gemma3n", "gemma-embedding", "gemma4"]
OTHER_TOKENIZERS = ["gpt2", "bert", "t5", "none"]
NO_SIZES = [
    ("u32", 0),
    ("u32", 2**31),
    ("u64", 2**63),
    ("i32", -4),
    ("str", "x"),
    ("[u32]", [1]),
    ("f32", 1.5),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The embedded base as a GGUF file of each type."""
    folder = tmp_path_factory.mktemp("files")
    return {quant: make_gguf(folder / f"{quant}.gguf", quant) for quant in ("f32", "q8_0")}


V = Tokenizer(TINY).vocab_size
SIX = {"gemma3.attention.sliding_window_pattern": ("u32", 6)}
KEY, TOKENIZER = "gemma3.", "tokenizer.ggml."
BAD_KEYS = [
    *(({"general.architecture": ("str", name)}, [repr(name), "Gemma 3"]) for name in OTHER_ARCHITECTURES),
    ({"general.architecture": ("str", "clip")}, ["mmproj", "language model"]),
    ({"general.type": ("str", "mmproj")}, ["mmproj", "language model"]),
    ({"general.type": ("str", "adapter")}, ["adapter", "--adapter"]),
    *(
        ({TOKENIZER + "model": ("str", name)}, ["tokenizer.ggml.model", repr(name)])
        for name in OTHER_TOKENIZERS
    ),
    ({TOKENIZER + "scores": ("[f32]", [0.0])}, ["scores", "different lengths"]),
    ({TOKENIZER + "token_type": ("[i32]", [])}, ["0 token_type", "different lengths"]),
    ({TOKENIZER + "tokens": ("[i32]", [1] * V)}, ["tokenizer.ggml.tokens", "another type"]),
    ({TOKENIZER + "tokens": ("[str]", ["a"] * V)}, ["tokenizer.ggml.tokens has an entry twice"]),
    ({TOKENIZER + "tokens": ("[str]", [str(i) for i in range(V)])}, ["has no <bos>, <eos>"]),
    ({TOKENIZER + "scores": ("[str]", ["a"] * V)}, ["tokenizer.ggml.scores", "another type"]),
    ({TOKENIZER + "token_type": ("[str]", ["a"] * V)}, ["tokenizer.ggml.token_type", "another type"]),
    ({TOKENIZER + "bos_token_id": ("u32", 10**6)}, ["tokenizer.ggml.bos_token_id is 1000000", f"{V:,}"]),
    ({TOKENIZER + "eot_token_id": ("str", "x")}, ["tokenizer.ggml.eot_token_id is 'x'"]),
    ({TOKENIZER + "add_space_prefix": ("str", "x")}, ["tokenizer.ggml.add_space_prefix is 'x'"]),
    *(({KEY + "block_count": value}, ["gemma3.block_count is"]) for value in NO_SIZES),
    *(({KEY + "embedding_length": value}, ["gemma3.embedding_length is"]) for value in NO_SIZES),
    *(({KEY + "attention.head_count": value}, ["gemma3.attention.head_count is"]) for value in NO_SIZES),
    ({KEY + "attention.head_count": ("u32", 2**20)}, ["num_attention_heads 1048576 times head_dim"]),
    ({KEY + "attention.head_count_kv": ("u32", 3)}, ["num_key_value_heads 3"]),
    ({KEY + "attention.sliding_window": ("i32", -1)}, ["gemma3.attention.sliding_window is -1"]),
    ({KEY + "attention.sliding_window_pattern": ("str", "x")}, ["sliding_window_pattern is 'x'"]),
    (
        {KEY + "attention.sliding_window_pattern": ("[bool]", [True])},
        ["sliding_window_pattern has 1 entries"],
    ),
    ({KEY + "rope.scaling.type": ("str", "yarn")}, ["gemma3.rope.scaling.type is 'yarn'"]),
    ({KEY + "rope.freq_base": ("f32", float("nan"))}, ["gemma3.rope.freq_base is nan"]),
    ({KEY + "feed_forward_length": ("u32", 3)}, ["misshapen: blk.0.ffn", "the header makes it", "more"]),
    ({KEY + "block_count": ("u32", 8)}, ["sliding_window_pattern has 9 entries, and the model 8 layers"]),
    ({KEY + "block_count": ("u32", 8)} | SIX, ["unexpected: blk.8.", "more"]),
    ({KEY + "block_count": ("u32", 99)} | SIX, ["missing: model.layers.9.", "more"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD_KEYS)
def test_a_file_of_another_kind_or_with_an_impossible_key_ends_a_command_with_2_and_one_line(
    files, tmp_path, capsys, changes, words
):
    path = rewritten(files["q8_0"], tmp_path / "x.gguf", changes)
    said = refused(capsys, loaded(path))
    assert str(path) in said and all(word in said for word in words), said


@pytest.mark.parametrize("key", [f"gemma3.{key}" for key in KEYS.values()] + ["tokenizer.ggml.tokens"])
def test_a_missing_key_is_named(files, tmp_path, capsys, key):
    path = rewritten(files["q8_0"], tmp_path / "x.gguf", drop=(key,))
    assert f"{path}: has no {key}" in refused(capsys, loaded(path))


def test_every_command_refuses_a_file_alike(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(rewritten(files["q8_0"], tmp_path / "x.gguf", {"general.architecture": ("str", "llama")}))
    words = [["--model", path, "--prompt", "x"], ["--model", path, "--to", "peft", "--out", "out"]]
    keys = {"model.name": path, "run.dir": "run", "data.train": VAL, "data.validation": "[]"}
    settings = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    said = [
        refused(capsys, loaded(Path(path))),
        refused(capsys, generate.main(words[0])),
        refused(capsys, export.main(words[1])),
        refused(capsys, train.main(["--config", str(ROOT / "small.toml"), *settings])),
    ]
    assert len(set(said)) == 1 and f"{path}: general.architecture is 'llama'" in said[0]


@pytest.mark.parametrize(
    "part", ["nothing", "counts", "keys", "vocabulary", "tensors", "data", "last tensor"]
)
def test_a_file_that_ends_within_a_part_is_named(files, tmp_path, capsys, part):
    content, file = files["q8_0"].read_bytes(), GGUFFile(files["q8_0"])
    first_tensor = content.index(next(iter(file.tensors)).encode())
    ends = {
        "nothing": 0,
        "counts": 12,
        "keys": content.index(b"gemma3.block_count") + 5,
        "vocabulary": content.index(b"tokenizer.ggml.tokens") + 1000,
        "tensors": (first_tensor + file.data_start) // 2,
        "data": file.data_start,
        "last tensor": len(content) - 40,
    }
    path = tmp_path / "cut.gguf"
    path.write_bytes(content[: ends[part]])
    assert str(path) in refused(capsys, loaded(path))


def test_a_file_that_was_cut_off_after_a_first_look_is_named(files, tmp_path, capsys):
    path = tmp_path / "x.gguf"
    path.write_bytes(files["q8_0"].read_bytes())
    assert loaded(path) == 0
    capsys.readouterr()
    path.write_bytes(files["q8_0"].read_bytes()[:-40])
    assert f"{path}: is cut off" in refused(capsys, loaded(path))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "blk.0.ffn_up.weight",
            lambda s: s[::-1],
            ["misshapen: blk.0.ffn_up.weight is", "the header makes it"],
        ),
        ("blk.0.ffn_up.weight", lambda s: (s[0] * s[1],), ["misshapen: blk.0.ffn_up.weight is"]),
        (
            "token_embd.weight",
            lambda s: (s[0] // 2, 2 * s[1]),
            ["token_embd.weight has", f"vocab_size is {V}"],
        ),
        ("output_norm.weight", lambda s: (1, *s), ["misshapen: output_norm.weight is (1, "]),
        ("output_norm.weight", lambda s: (*s, 1), ["misshapen: output_norm.weight is"]),
    ],
)
def test_a_shape_that_lies_is_named(files, tmp_path, capsys, name, change, words):
    old = GGUFFile(files["f32"]).tensors[name]
    new = TensorInfo(name, change(old.shape), old.type)
    path = reshaped(files["f32"], tmp_path / "x.gguf", name, new)
    said = refused(capsys, loaded(path))
    assert str(path) in said and all(word in said for word in words), said


@pytest.mark.parametrize("name", ["blk.99.ffn_up.weight", "blk.0.ffn_other.weight", "model.norm.weight"])
def test_a_tensor_of_another_name_is_named_or_the_one_that_is_missing(files, tmp_path, capsys, name):
    old = GGUFFile(files["f32"]).tensors["blk.0.ffn_up.weight"]
    path = reshaped(files["f32"], tmp_path / "x.gguf", old.name, TensorInfo(name, old.shape, old.type))
    assert "missing: model.layers.0.mlp.up_proj.weight" in refused(capsys, loaded(path))


def test_a_tensor_too_many_is_named(files, tmp_path, capsys):
    file = GGUFFile(files["f32"])
    last = list(file.tensors.values())[-1]
    wrong = TensorInfo("blk.99.ffn_up.weight", last.shape, last.type)
    infos = [*file.tensors.values(), wrong]
    path, metadata = tmp_path / "x.gguf", {k: (file.kinds[k], v) for k, v in file.metadata.items()}
    write_gguf(path, metadata, infos, lambda n: [np.asarray(file.data(last.name if n == wrong.name else n))])
    assert "unexpected: blk.99.ffn_up.weight" in refused(capsys, loaded(path))


@pytest.mark.parametrize("number", [4, 5, 9, 15, 24, 26, 28, 99, 2**32 - 1])
def test_a_type_that_holds_no_weights_or_does_not_exist_is_refused_by_its_number(
    files, tmp_path, capsys, number
):
    """4 and 5 were removed from ggml; Q8_1 (9), Q8_K (15), I8 (24), I32 (26) and F64 (28) hold no weights."""
    content = files["f32"].read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # behind the number of dimensions and two of them
    path = tmp_path / "x.gguf"
    path.write_bytes(content[:at] + number.to_bytes(4, "little") + content[at + 4 :])
    said = refused(capsys, loaded(path))
    assert f"blk.0.ffn_up.weight has the type {number}" in said

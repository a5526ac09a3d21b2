"""exporting/verify.py finds each mistake of an exporter that is simulated here, and then no file is left."""

import numpy as np
import pytest
import torch

import export
import exporting.gguf_model as writer
import exporting.gguf_vocab as vocabulary
import exporting.merged as merged
import exporting.verify as verify
from data.render import IGNORE_INDEX, Document
from exporting.llama_cpp import Llama
from ggml.container import GGUFFile
from model.chat_template import stored_template
from model.gemma3 import Gemma3ForCausalLM
from model.gguf_weights import model_of, read_gguf_config
from model.hub import TINY
from model.weights import load_model
from tests.folders import make_adapter, make_model


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base"), rope_linear_factor=8.0)


def exported(tmp_path, base, adapter, quant="q8_0") -> int:
    return export.main(
        [
            "--model",
            base,
            "--adapter",
            adapter,
            "--to",
            "gguf",
            "--quant",
            quant,
            "--out",
            str(tmp_path / "x.gguf"),
        ]
    )


def changed(**changes):
    """Returns a write_gguf that changes keys: {end of a key: new value, or None to remove the key}."""

    def write(path, metadata, tensors, read):
        for end, value in changes.items():
            key = next(key for key in metadata if key.endswith("." + end))
            metadata = (
                {k: v for k, v in metadata.items() if k != key}
                if value is None
                else metadata | {key: (metadata[key][0], value)}
            )
        return whole_gguf(path, metadata, tensors, read)

    return write


def transposed(model, name):
    rows = list(whole_transformed(model, name))
    yield (
        np.ascontiguousarray(rows[0].T).reshape(rows[0].shape)
        if "layers.2.self_attn.o_proj" in name
        else rows[0]
    )


def without_one(model, name):
    for rows in whole_transformed(model, name):
        yield rows - 1 if name == "model.layers.3.post_attention_layernorm.weight" else rows


@torch.no_grad()
def with_doubled_scale(self, name):
    path = name.removesuffix(".weight")
    if path in self.layers:
        layer = self.layer(path)
        layer.scaling *= 2
        return layer.merged_weight()
    return self.checkpoint.read(name).float()


def with_wrong_scores(raw, rows):
    tokens, scores, types = whole_vocabulary(raw, rows)
    return tokens, [score if score <= -1000 else -score for score in scores], types


def flip(where):
    """Returns a write_gguf that flips a bit of the tensor `where`, or of the header for None."""

    def write(part, *args):
        digests = whole_gguf(part, *args)
        file, raw = GGUFFile(part), bytearray(part.read_bytes())
        at = (
            file.data_start + file.tensors[where].offset + 5
            if where
            else raw.index(b"tokenizer.chat_template") + 200
        )
        raw[at] ^= 1
        part.write_bytes(raw)
        return digests

    return write


whole_transformed, whole_gguf, whole_vocabulary = writer.transformed, writer.write_gguf, vocabulary.vocabulary
WRITE = "exporting.gguf_model.write_gguf"
MISTAKES = {
    "no + 1 on a norm": (
        "exporting.gguf_model.transformed",
        without_one,
        "blk.3.post_attention_norm.weight is the first tensor that differs",
    ),
    "no window": (WRITE, changed(sliding_window=None), "sliding_window is 1 in the file and 8"),
    "a window off by one": (WRITE, changed(sliding_window=9), "sliding_window is 9 in the file and 8"),
    "no scaling": (WRITE, changed(factor=None), "rope_linear_factor is 1.0 in the file and 8.0"),
    "wrong scores": (
        "exporting.gguf_vocab.vocabulary",
        with_wrong_scores,
        "is tokenized differently from token",
    ),
    "no scores": (WRITE, changed(scores=None), "is tokenized differently from token"),
    "no token types": (WRITE, changed(token_type=None), "is tokenized differently from token"),
    "no add_space_prefix": (WRITE, changed(add_space_prefix=None), "is tokenized differently from token 0"),
    "a template that trims nothing": (
        "exporting.gguf_model.chat_template",
        lambda tokenizer: stored_template(TINY).replace("| trim", ""),
        "tokenizer.chat_template renders ",
    ),
    "no template": (
        WRITE,
        changed(chat_template=None),
        "tokenizer.chat_template renders '' where Loupe trains",
    ),
    "no end of a turn": (WRITE, changed(eot_token_id=None), "eot_token_id is None in the file and 106 in"),
    "another end of text": (WRITE, changed(eos_token_id=2), "eos_token_id is 2 in the file and 1 in"),
    "a flipped bit": (
        WRITE,
        flip("blk.4.ffn_gate.weight"),
        "blk.4.ffn_gate.weight is the first part whose bytes on the disk differ",
    ),
    "a flipped bit in the header": (
        WRITE,
        flip(None),
        "the header is the first part whose bytes on the disk differ",
    ),
    "a transposed matrix": (
        "exporting.gguf_model.transformed",
        transposed,
        "blk.2.attn_output.weight is the first tensor that differs",
    ),
    "a LoRA scale off by two": (
        "exporting.merged.MergedCheckpoint.read",
        with_doubled_scale,
        "merged against adapter: max",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_caught_and_leaves_no_file(tmp_path, base, adapter, capsys, monkeypatch, what):
    place, mistake, message = MISTAKES[what]
    monkeypatch.setattr(place, mistake)
    assert exported(tmp_path, base, adapter) == 1
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.fault("chat template")
def test_turns_that_llama_cpp_renders_otherwise_are_found(tmp_path, base, adapter, capsys, monkeypatch):
    """CONVERSATIONS as llama.cpp gets them have another text than as the tokenizer does."""

    def post(server, path, body):
        if path == "/apply-template":
            body = {"messages": [m | {"content": m["content"] + "!"} for m in body["messages"]]}
        return whole_post(server, path, body)

    whole_post = Llama.post
    monkeypatch.setattr(Llama, "post", post)
    words = ["--model", base, "--adapter", adapter, "--to", "gguf", "--quant", "f32", "--verify", "llama.cpp"]
    assert export.main([*words, "--out", str(tmp_path / "x.gguf")]) == 1
    err = capsys.readouterr().err
    assert "llama.cpp renders [('user', 'Hello')]" in err and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> str:
    """A model whose rows are multiples of 256 weights."""
    return make_model(
        tmp_path_factory.mktemp("wide"), hidden_size=256, intermediate_size=256, num_hidden_layers=8
    )


@pytest.mark.parametrize("quant", export.QUANTS)
def test_every_type_passes_and_says_how_far_it_is(tmp_path, wide, capsys, monkeypatch, quant):
    monkeypatch.setattr(
        "exporting.merged.SLICE", 1000 * 256
    )  # the embedding takes seven slices, the last one short
    monkeypatch.setattr("exporting.verify.SLICE", 1000 * 256)
    assert exported(tmp_path, wide, make_adapter(tmp_path / "adapter", wide), quant) == 0
    said = capsys.readouterr().out
    assert (
        "merged against adapter " in said
        and "file against adapter " in said
        and said.count("max |delta log p|") == 2
    )
    file = GGUFFile(tmp_path / "x.gguf")
    assert file.metadata["loupe.verified"] == "yes" and quant.removesuffix("_m") in {
        tensor.type for tensor in file.tensors.values()
    }


def test_what_was_not_compared_says_so_in_the_file_and_on_the_screen(tmp_path, base, adapter, capsys):
    words = [
        "--model",
        base,
        "--adapter",
        adapter,
        "--to",
        "gguf",
        "--no-verify",
        "--out",
        str(tmp_path / "x.gguf"),
    ]
    assert export.main(words) == 0
    assert (
        "not verified" in capsys.readouterr().out
        and GGUFFile(tmp_path / "x.gguf").metadata["loupe.verified"] == "no"
    )


def test_what_is_judged_has_a_label_a_limit_and_texts_that_both_programs_read_alike():
    ids, none = list(range(1500)), [IGNORE_INDEX] * 1500
    late = Document(ids, none[:1200] + [5] + none[1201:], "late")
    early = Document(ids, none[:3] + [5, 6] + none[5:], "early")
    found = verify.held_out([Document(ids, none, "none"), late, early], ["a", "\u2581"], limit=2000)
    assert (
        len(found.tokens) == verify.CONTEXT
        and found.positions.tolist() == [3, 4]
        and found.cu_seqlens.tolist() == [0, 1024]
        and found.texts == ["a"]
    )
    assert verify.held_out([late], [], 2000) is None
    many = verify.held_out([Document(ids[:900], early.labels[:900], "short")] * 5, [], 2000)
    assert (
        len(many.tokens) == 1800
        and many.position_ids[900] == 0
        and many.positions.tolist() == [3, 4, 903, 904]
    )
    assert many.prompts() == [ids[:4], ids[:5]] * 2


def sample(length=40) -> verify.HeldOut:
    tokens = torch.randint(200, 6000, (length,), generator=torch.Generator().manual_seed(1))
    bounds = torch.tensor([0, 25, length], dtype=torch.int32)
    position_ids = torch.cat([torch.arange(25), torch.arange(length - 25)])
    return verify.HeldOut(tokens, position_ids, bounds, torch.arange(length), [])


def test_the_trained_model_and_the_merged_one_say_what_the_adapter_says(base, adapter):
    from lora.peft_io import load_adapter

    whole, s = load_model(base, torch.float32), sample()
    load_adapter(whole, adapter)
    with torch.no_grad():
        expected = whole.logits(whole(s.tokens, s.position_ids, s.cu_seqlens)).log_softmax(-1)
    model = merged.MergedCheckpoint(base, adapter)
    trained = verify.log_probs(verify.trained_model(model), s)
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5)
    one = verify.log_probs(model_of(model.config, model.read), s)
    torch.testing.assert_close(one, expected, rtol=0, atol=1e-4)


def test_the_architecture_is_read_back_from_the_keys(tmp_path, base, adapter):
    assert exported(tmp_path, base, adapter, "f32") == 0
    found, model = read_gguf_config(GGUFFile(tmp_path / "x.gguf")), merged.MergedCheckpoint(base)
    verify.compare_config(found, model.config)
    assert (
        Gemma3ForCausalLM(found).config.layer_types == model.config.layer_types
        and found.rope_linear_factor == 8.0
    )


def test_a_distribution_against_itself_differs_by_nothing_and_against_another_by_hand():
    p = torch.tensor([[0.5, 0.5]]).log()
    q = torch.tensor([[0.25, 0.75]]).log()
    assert verify.difference("x", p, p, (0, 0)).within_bound("").agreement == 1
    found = verify.difference("x", p, q, (1, 1))
    assert found.within_bound("") is found
    assert found.max_delta == pytest.approx(np.log(2)) and found.mean_kl == pytest.approx(
        0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    )
    for bad in (verify.difference("x", p, p * float("nan"), (9, 9)), verify.difference("x", p, q, (1, 0.1))):
        with pytest.raises(verify.NotTheSame, match="^x: max .delta log p. .* .bound .*; why$"):
            bad.within_bound("why")

"""export.py from a base that is a GGUF file: it stays as it is, or has a printed price if quantized again."""

import json
import re
from pathlib import Path

import pytest
import torch

import export
from exporting.llama_cpp import llama
from exporting.merged import MergedCheckpoint
from exporting.verify import LORA_BOUND, comparison_sample, difference, log_probs, trained_model
from ggml.container import GGUFFile
from model.hub import resolve
from model.tokenizer import Tokenizer
from model.weights import load_model
from tests.folders import logits, make_adapter, make_model

TINY_BOUND = (1.8, 0.01)  # A larger vocabulary has less likely tokens: verify.LORA_BOUND is wider.
Q4 = ("--to", "gguf", "--quant", "q4_k_m", "--no-verify")


def exported(out: Path, *words: object) -> Path:
    assert export.main([*map(str, words), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("alice") / "base.gguf", "--model", "tiny", *Q4)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> str:
    return make_adapter(tmp_path_factory.mktemp("alice") / "adapter", str(resolve(str(base))), scale=0.2)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base, adapter) -> Path:
    out = tmp_path_factory.mktemp("out") / "lora.gguf"
    return exported(out, "--model", base, "--adapter", adapter, "--to", "gguf-lora")


def test_llama_cpp_with_the_base_file_and_the_lora_computes_what_was_trained(base, adapter, lora):
    folder = resolve(str(base))
    model, tokenizer = MergedCheckpoint(folder, Path(adapter)), Tokenizer(folder)
    sample = comparison_sample([], tokenizer, model.config.max_position_embeddings)
    trained, few = log_probs(trained_model(model), sample), sample.prompts()[:12]
    found = {}
    for name, beside in (("lora", lora), ("alone", None)):
        with llama(base, model.config.vocab_size, beside) as server:
            theirs = server.next_log_probs(few, tokenizer.encode("a")[0])
        found[name] = difference(name, trained[: len(few)], theirs, TINY_BOUND)
    found["lora"].within_bound("")
    assert found["alone"].mean_kl > 50 * found["lora"].mean_kl


def test_verify_compares_the_lora_beside_its_base_and_refuses_a_base_that_llama_cpp_cannot_load(
    tmp_path, base, adapter, capsys, monkeypatch
):
    words = ("--adapter", adapter, "--to", "gguf-lora", "--verify", "llama.cpp")
    exported(tmp_path / "lora.gguf", "--model", base, *words)
    assert "llama.cpp against adapter" in capsys.readouterr().out
    monkeypatch.setattr("exporting.lora_gguf.LORA_BOUND", (0.0, 0.0))
    assert export.main(["--model", str(base), *words, "--out", str(tmp_path / "x.gguf")]) == 1
    assert not (tmp_path / "x.gguf").exists() and "llama.cpp" in capsys.readouterr().err
    assert export.main(["--model", "tiny", *words, "--out", str(tmp_path / "x.gguf")]) == 2
    assert "is not a GGUF file" in capsys.readouterr().err


def test_ollamas_folder_has_the_base_file_as_it_is_and_the_adapter_beside_it(tmp_path, base, adapter, lora):
    before = base.read_bytes()
    words = ("--model", base, "--adapter", adapter, "--to", "ollama")
    folder = exported(tmp_path / "pii", *words)
    assert {file.name for file in folder.iterdir()} == {"Modelfile", "model.gguf", "lora.gguf"}
    assert (folder / "model.gguf").read_bytes() == before
    modelfile = (folder / "Modelfile").read_text().splitlines()
    assert "FROM ./model.gguf" in modelfile and "ADAPTER ./lora.gguf" in modelfile
    ours, theirs = GGUFFile(folder / "lora.gguf"), GGUFFile(lora)
    assert [ours.data(name).tobytes() for name in ours.tensors] == [
        theirs.data(name).tobytes() for name in theirs.tensors
    ]
    merged = exported(tmp_path / "merged", *words, "--quant", "q8_0", "--no-verify")
    assert {file.name for file in merged.iterdir()} == {"Modelfile", "model.gguf"}
    assert "ADAPTER" not in (merged / "Modelfile").read_text() and base.read_bytes() == before


def test_a_dora_adapter_is_merged_for_ollama(tmp_path, base):
    dora = make_adapter(tmp_path / "dora", str(resolve(str(base))), type="dora")
    words = ("--model", base, "--adapter", dora, "--to", "ollama", "--no-verify")
    folder = exported(tmp_path / "pii", *words)
    assert {file.name for file in folder.iterdir()} == {"Modelfile", "model.gguf"}


def test_the_price_of_quantizing_again_is_that_of_the_base_exported_alone(tmp_path, base, adapter, capsys):
    words = ("--to", "gguf", "--quant", "q4_0", "--out")
    adapted = ["--model", str(base), "--adapter", adapter, *words, str(tmp_path / "a.gguf")]
    assert export.main(adapted) == 0
    printed = re.search(
        r"base quantized again +max \|delta log p\| (\S+) .* mean KL (\S+)", capsys.readouterr()[0]
    )
    alone = exported(tmp_path / "b.gguf", "--model", base, *words[:-1], "--no-verify")
    folder = resolve(str(base))
    sample = comparison_sample([], Tokenizer(folder), 2048)
    was, now = (log_probs(load_model(f, torch.float32), sample) for f in (folder, resolve(str(alone))))
    price = difference("", was, now, LORA_BOUND)
    assert printed and float(printed[1]) == float(f"{price.max_delta:.2g}")
    assert float(printed[2]) == float(f"{price.mean_kl:.2g}") > 1e-4


def test_peft_loads_the_adapter_as_its_card_says_and_computes_our_logits(tmp_path, monkeypatch):
    usual = {
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    made = make_model(tmp_path / "folder", num_hidden_layers=6, **usual)
    base = exported(tmp_path / "base.gguf", "--model", made, "--to", "gguf", "--quant", "q8_0", "--no-verify")
    adapter = make_adapter(tmp_path / "adapter", str(resolve(str(base))))
    card = exported(tmp_path / "mine", "--model", base, "--adapter", adapter, "--to", "peft") / "README.md"
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.S)
    assert code and 'gguf_file="base.gguf"' in code[1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code[1], names)
    tokens = torch.arange(5, 45)
    with torch.no_grad():
        theirs = names["model"](tokens[None]).logits[0]
    ours = logits(trained_model(MergedCheckpoint(resolve(str(base)), Path(adapter))), tokens)
    assert (ours - theirs).abs().max() < 1e-3


def test_a_base_that_transformers_would_read_wrongly_is_said_in_the_card(tmp_path, base, adapter):
    folder = exported(tmp_path / "mine", "--model", base, "--adapter", adapter, "--to", "peft")
    assert "transformers cannot read `base.gguf` as it is" in (folder / "README.md").read_text()


@pytest.mark.parametrize("to", ["peft", "safetensors", "gguf-lora", "gguf", "ollama"])
def test_no_export_names_the_folder_of_the_base(tmp_path, base, adapter, to):
    out = exported(tmp_path / "mine", "--model", base, "--adapter", adapter, "--to", to)
    files = [out] if out.is_file() else [f for f in out.iterdir() if f.name != "model.gguf"]
    for file in files:
        assert str(base.parent).encode() not in file.read_bytes(), file
    if to == "peft":
        assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "base.gguf"


def test_no_layout_that_holds_the_base_in_a_folder_of_a_folder_is_replaced(tmp_path, capsys):
    layout = tmp_path / "layout"
    base = exported(layout / "blobs" / "sha256" / "base.gguf", "--model", "tiny", *Q4)
    (layout / "oci-layout").write_text("{}")
    words = ["--model", str(base), "--to", "oci", "--out", str(layout), "--force"]
    assert export.main(words) == 2 and base.exists()
    assert "layout holds blobs/sha256/base.gguf, which no export wrote" in capsys.readouterr().err


def test_a_model_folder_may_hold_its_gguf_file_as_a_link(tmp_path, base):
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in resolve(str(base)).glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    (tmp_path / "base.gguf").write_bytes(base.read_bytes())
    (folder / "model.gguf").symlink_to("../base.gguf")
    out = exported(tmp_path / "pii", "--model", folder, "--to", "ollama")
    assert (out / "model.gguf").read_bytes() == base.read_bytes()


def test_a_base_is_never_replaced_nor_the_export_that_it_lies_in(tmp_path, capsys):
    earlier = exported(
        tmp_path / "pii", "--model", "tiny", "--to", "ollama", "--quant", "q8_0", "--no-verify"
    )
    base = earlier / "model.gguf"
    before = base.read_bytes()
    for out, to in ((base, "gguf"), (earlier, "ollama")):
        assert export.main(["--model", str(base), "--to", to, "--out", str(out), "--force"]) == 2
        assert "is the source of the export, or holds it" in capsys.readouterr().err
    assert base.read_bytes() == before

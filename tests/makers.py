"""A tiny model folder with a tokenizer of characters, token streams, documents, rows, and a run's config."""

import json
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import AddedToken, decoders, models
from torch import nn

from common.device import Precision, missing_to_compile
from data.render import IGNORE_INDEX, Document
from generation.load import LoadedModel
from lora.inject import adapters, inject
from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.hub import TINY
from model.tokenizer import Tokenizer
from model.weights import load_model, save_model

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
VOCABULARY = SPECIAL + [f"<0x{i:02X}>" for i in range(256)] + [chr(i) for i in range(32, 127)]

needs_compiler = pytest.mark.skipif(
    missing_to_compile(torch.device("cpu")) is not None,
    reason="torch.compile needs a C++ compiler and Python's headers",
)


def tiny_config(**changes) -> Gemma3Config:
    """Six layers, local and global, and a window of 16 tokens, which the documents here exceed."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "vocab_size": len(VOCABULARY),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "max_position_embeddings": 512,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
    }
    return Gemma3Config(**(sizes | changes))


def tiny_model(
    seed: int = 0, adapted: bool = True, dtype: torch.dtype = torch.float32, **settings
) -> Gemma3ForCausalLM:
    """A random model, with adapters whose lora_B is not zero, so that every adapter weight has a gradient."""
    model = Gemma3ForCausalLM(tiny_config())
    model.reset_parameters(seed, std=0.1)
    if adapted:
        inject(model, **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "seed": seed} | settings)
        generator = torch.Generator().manual_seed(seed)
        for layer in adapters(model).values():
            nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
    return model.to(dtype)


def embedded(precision: str, seed: int = 0) -> LoadedModel:
    """The embedded base on the CPU, with adapters that change its output."""
    how = Precision(precision, torch.device("cpu"))
    model = load_model(TINY, how.dtype, how.device, "none")
    inject(model, r=8, lora_alpha=8, target_modules="all-linear", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B, std=0.01, generator=generator)
    return LoadedModel(model, Tokenizer(TINY), TINY, how)


def bounds(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens (documents + 1,) of documents of these lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def stream(lengths: list[int], ids: range, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens (T,) drawn from `ids`, position_ids (T,) and cu_seqlens of documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(ids.start, ids.stop, (sum(lengths),), generator=generator)
    return tokens, torch.cat([torch.arange(n) for n in lengths]), bounds(lengths)


def documents(count: int, seed: int = 0, shortest: int = 3, longest: int = 40) -> list[Document]:
    """Random documents of unequal lengths, of which unequal parts are supervised."""
    rng, out = random.Random(seed), []
    for n in range(count):
        ids = [rng.randrange(len(SPECIAL), len(VOCABULARY)) for _ in range(rng.randint(shortest, longest))]
        prompt = rng.randrange(len(ids) - 1)
        labels = [IGNORE_INDEX] * prompt + ids[prompt + 1 :] + [IGNORE_INDEX]
        out.append(Document(ids, labels, f"rows.jsonl:{n + 1}"))
    return out


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer.json of Gemma's control tokens, a token per character, and bytes for the rest."""
    vocab = {t: i for i, t in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, seed: int = 0) -> Path:
    """Writes a model folder in float32."""
    save_model(tiny_model(seed, adapted=False), folder, torch.float32)
    write_tokenizer(folder)
    return folder


def rows(count: int, seed: int = 0) -> list[dict]:
    """Prompts with two numbers each and responses of unequal lengths."""
    rng, out = random.Random(seed), []
    for n in range(count):
        prompt = f"Count to {n} from {rng.randrange(100)}."
        out.append({"prompt": prompt, "response": " ".join(map(str, range(rng.randint(1, 12))))})
    return out


SCRIPTS = (
    "مرحبا بالعالم، كيف حالك؟ هذا نص عربي طويل",
    "שלום עולם, מה שלומך היום?",
    "日本語の文章です。東京は大きい都市です。",
    "Привет, мир! Как дела сегодня?",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "한국어 문장입니다. 안녕하세요",
    "ภาษาไทยไม่มีช่องว่าง",
    "Γειά σου Κόσμε",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🏳️\u200d🌈👩\u200d👩\u200d👧\u200d👦😀🇨🇭",
    "e\u0301ﬁ½ ﷺ\u00a0\u200b\u200d\ufeff",
    "\u202eabc\u202c",
)
CONTROL_TEXT = (
    "<bos> <eos> <pad> <unk> <mask> <start_of_turn>user\n <end_of_turn> <0x41> <unused7> [multimodal] <b> "
    "</table> <code> <h1> <start_of_image> <image_soft_token> [@BOS@] &amp;"
).split(" ")
BLANKS = [blank * n for n in range(1, 40) for blank in " \n\t"]
BLANKS += ["\r\n", "\n \n", "\t \t", "  \n\n  ", "\u2028", "\u3000"]


def texts(count: int, sources: list[str], seed: int = 1) -> list[str]:
    """Draws texts of one to six parts: `sources`, other scripts, control tokens, blanks, any characters."""
    rng = random.Random(seed)

    def part_of(texts: Sequence[str]) -> str:
        text = rng.choice(texts)
        start = rng.randrange(len(text))
        return text[start : start + rng.randint(1, 200)]

    def characters() -> str:
        ends = (0x80, 0x800, 0x3000, 0x10000, 0x20000, 0x10FFFF)
        drawn = (rng.randrange(1, rng.choice(ends)) for _ in range(rng.randint(1, 30)))
        # Halves of a surrogate pair are no text.
        return "".join(" " if 0xD800 <= c < 0xE000 else chr(c) for c in drawn)

    kinds = [lambda: part_of(sources), lambda: part_of(SCRIPTS), lambda: rng.choice(CONTROL_TEXT)]
    kinds += [lambda: rng.choice(BLANKS), characters]
    return [
        "".join(kind() for kind in rng.choices(kinds, (9, 3, 2, 3, 1), k=rng.randint(1, 6)))
        for _ in range(count)
    ]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


CONFIG = """
[model]
name = "base"
dtype = "float32"
[adapter]
r = 4
lora_alpha = 8
lora_dropout = 0.1
[data]
train = "train.jsonl"
validation = "val.jsonl"
[train]
epochs = 4
batch_size = 2
gradient_accumulation_steps = 2
learning_rate = 1e-2
precision = "fp32"
device = "cpu"
log_every = 1
eval_samples = 1
save_every = 2
[generate]
max_new_tokens = 2
"""


def write_run(folder: Path, train: int = 13, val: int = 3) -> Path:
    """Writes base/, train.jsonl, val.jsonl and tiny.toml, with which train.py runs in `folder`.

    13 rows are 4 steps an epoch, the last one of a single row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "base")
    write_jsonl(folder / "train.jsonl", rows(train))
    write_jsonl(folder / "val.jsonl", rows(val, seed=1))
    (folder / "tiny.toml").write_text(CONFIG, encoding="utf-8")
    return folder

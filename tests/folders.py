"""Small folders for the tests of the scripts: a random model, its adapters, rows, and broken adapters."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lora.inject import inject
from lora.peft_io import save_adapter
from model.chat_template import save_tokenizer
from model.config import FULL, SLIDING, Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.hub import TINY
from model.tokenizer import Tokenizer
from model.weights import load_model, save_model

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 7  # Gemma's pattern, five local layers and a global one, and one more local layer
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MASK = "Mask all PII in the following text. Return ONLY the redacted text.\n\nText:\n"
ROWS = [
    {
        "prompt": MASK + "Write to Anna Muster, 8001 Zürich.",
        "response": "Write to [GIVENNAME_1] [SURNAME_1], [ZIPCODE_1] [CITY_1].",
    },
    {
        "prompt": MASK + "Il señor Gómez llamó al 0171 555 123.",
        "response": "Il señor [SURNAME_1] llamó al [TELEPHONENUM_1].",
    },
]
# A vision part for transformers' multimodal Gemma 3, as small as it can be.
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": " Et en français ? "},
        {"role": "assistant", "content": "Quatre.\nC'est tout. "},
    ]
}


def make_model(folder: Path, seed: int = 0, **changes) -> str:
    """Writes a random float32 model with the embedded model's tokenizer and a window of 8 tokens."""
    sizes = {
        "vocab_size": Tokenizer(TINY).vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "max_position_embeddings": 256,
    } | changes
    kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(sizes["num_hidden_layers"])]
    model = Gemma3ForCausalLM(Gemma3Config(**sizes, layer_types=kinds))
    model.reset_parameters(seed, std=0.1)
    save_model(model, folder, torch.float32)
    save_tokenizer(Tokenizer(TINY), folder)
    return str(folder)


def make_adapter(folder: Path, base: str, scale: float = 0.1, **settings) -> str:
    """Writes an adapter for the model in `base`, with all weights changed at random by up to `scale`."""
    model = load_model(base, torch.float32)
    inject(model, **{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "seed": 1} | settings)
    shake(model, scale)
    save_adapter(model, folder, base_model_name=base)
    return str(folder)


def shake(model: torch.nn.Module, scale: float) -> None:
    """Adds to each adapter weight, ours or PEFT's, a random value of up to scale * max(1, mean |weight|)."""
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            signed = 2 * torch.rand(p.shape, generator=generator) - 1
            p.data += scale * max(1.0, p.abs().mean().item()) * signed


def write_rows(path: Path, rows: list) -> str:
    """Writes a JSONL file."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _make_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def _cut_rank(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    first = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {first: tensors[first][:2].clone()}, path)


def _cut_file(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


# {fault: (function that breaks an adapter folder, part of the error message)}
BROKEN = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "model.safetensors does not exist"),
    "a pickle": (_make_pickle, "is a pickle, which can run any code"),
    "wrong shapes": (_cut_rank, "shape (2, 32), the model's is (4, 32)"),
    "half a file": (_cut_file, "is not a whole safetensors file"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
}


def make_broken_adapter(folder: Path, base: str, fault: str) -> tuple[str, str]:
    """Writes an adapter, breaks it, and returns its folder and a part of the error message."""
    make_adapter(folder, base, target_modules=["q_proj"])
    break_, message = BROKEN[fault]
    break_(folder)
    return str(folder), message


def logits(model: Gemma3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """(T,) ids of one document -> (T, V) logits."""
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    with torch.no_grad():
        return model.logits(model(tokens, torch.arange(len(tokens)), cu_seqlens))


def run_script(*words: str) -> subprocess.CompletedProcess:
    """Runs a script with its arguments in a process of its own, as a user starts it, but offline."""
    command, env = [sys.executable, *words], os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def help_seconds(script: str) -> float:
    """Returns the processor time of `script --help` in seconds, which other processes do not change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_script(script, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--model" in done.stdout, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

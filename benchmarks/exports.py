"""Measures the seconds and the peak memory of export.py --to gguf.

    python benchmarks/exports.py [--quant q4_k_m] [--no-verify] [--shape NAME]

One model has the 270M shape with random bfloat16 weights. The other has 4 GB of zeros in a sparse file, and
shows the memory only.
"""

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model.chat_template import save_tokenizer  # noqa: E402
from model.config import FULL, SLIDING, Gemma3Config  # noqa: E402
from model.gemma3 import Gemma3ForCausalLM  # noqa: E402
from model.hub import TINY  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402
from model.weights import save_model  # noqa: E402

# hidden_size, intermediate_size, layers, query heads, key/value heads
SHAPES = {"270M": (640, 2048, 18, 4, 1), "4 GB": (2560, 10_240, 14, 8, 4)}


def config(name: str) -> Gemma3Config:
    hidden, intermediate, layers, heads, kv_heads = SHAPES[name]
    return Gemma3Config(
        vocab_size=262_144,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=[FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)],
    )


def make_random(folder: Path, config: Gemma3Config) -> None:
    model = Gemma3ForCausalLM(config)
    model.reset_parameters(seed=0)
    save_model(model, folder, torch.bfloat16)


def make_sparse(folder: Path, config: Gemma3Config) -> None:
    """Writes the safetensors header, followed by zeros that take no room on the disk."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    header, end = {}, 0
    for name, p in model.named_parameters():
        start, end = end, end + 2 * math.prod(p.shape)
        header[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config.to_json() | {"dtype": "bfloat16"}))


def make_tokenizer(folder: Path) -> None:
    """Writes tiny's tokenizer, filled up to 262,144 vocabulary entries with pieces that no text contains."""
    save_tokenizer(Tokenizer(TINY), folder)
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = raw["model"]["vocab"]
    vocab |= {f"\ue000{i}": i for i in range(len(vocab), 262_144)}
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")


def make(name: str, folder: Path) -> None:
    (make_random if name == "270M" else make_sparse)(folder, config(name))
    make_tokenizer(folder)


def in_a_process(function, *arguments) -> None:
    """Calls the function in a process of its own: a child's peak counts its parent's memory at the start."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def export_command(model: Path, quant: str, out: Path) -> list[str]:
    """Returns the command line that exports the folder `model` to the GGUF file `out`."""
    to_gguf = ["--to", "gguf", "--quant", quant, "--out", str(out)]
    return [sys.executable, "export.py", "--model", str(model), *to_gguf]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    args = parser.parse_args()
    for name in args.shape or SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "model")
            in_a_process(make, name, folder)
            size = (folder / "model.safetensors").stat().st_size
            command = export_command(folder, args.quant, Path(scratch, "x.gguf"))
            start = time.perf_counter()
            process = subprocess.Popen(command + ["--no-verify"] * args.no_verify, cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"the export of {name} failed")
            seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
        done = f"{name}: {size / 1e9:.2f} GB to {args.quant} in {seconds:.1f} s"
        print(f"{done}, peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

"""Measures what an export costs: seconds and peak memory of export.py --to gguf, in a process of its own.

    python benchmarks/exporting.py [--quant q4_k_m] [--no-verify] [--shape NAME]

One model has the 270M shape with random bfloat16 weights; the other has 4 GB of weights that are a hole in
the file (all zeros) and shows the memory only.
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

from model.config import FULL, SLIDING, Gemma3Config  # noqa: E402
from model.gemma3 import Gemma3ForCausalLM  # noqa: E402
from model.hub import TINY  # noqa: E402
from model.weights import copy_tokenizer, save_model  # noqa: E402

SHAPES = {
    "270M": {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
    "4 GB": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 14,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}


def config(shape: dict) -> Gemma3Config:
    kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(shape["num_hidden_layers"])]
    return Gemma3Config(
        **shape,
        vocab_size=262_144,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=kinds,
    )


def make_random(folder: Path, shape: dict) -> None:
    model = Gemma3ForCausalLM(config(shape))
    model.reset_parameters(seed=0)
    save_model(model, folder, torch.bfloat16)


def make_sparse(folder: Path, shape: dict) -> None:
    """The safetensors header, and behind it nothing that takes room on the disk."""
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config(shape))
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
    (folder / "config.json").write_text(json.dumps(config(shape).to_json() | {"dtype": "bfloat16"}))


def make_tokenizer(folder: Path) -> None:
    """The embedded model's tokenizer with as many more pieces as Gemma's has, which no text contains."""
    copy_tokenizer(TINY, folder)
    raw = json.loads((TINY / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = raw["model"]["vocab"]
    vocab |= {f"\ue000{i}": i for i in range(len(vocab), 262_144)}
    (folder / "tokenizer.json").write_text(json.dumps(raw, ensure_ascii=False), encoding="utf-8")


def make(name: str, folder: Path) -> None:
    (make_random if name == "270M" else make_sparse)(folder, SHAPES[name])
    make_tokenizer(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and peak memory of an export to GGUF.")
    parser.add_argument("--quant", default="q4_k_m")
    parser.add_argument("--no-verify", action="store_true")
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    args = parser.parse_args()
    for name in args.shape or SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "model")
            # in a process of its own: a child's peak counts what its parent held when it was started
            maker = multiprocessing.get_context("spawn").Process(target=make, args=(name, folder))
            maker.start()
            maker.join()
            size = (folder / "model.safetensors").stat().st_size
            words = [
                sys.executable,
                "export.py",
                "--model",
                str(folder),
                "--to",
                "gguf",
                "--quant",
                args.quant,
                "--out",
                str(Path(scratch, "x.gguf")),
            ]
            start = time.perf_counter()
            process = subprocess.Popen(words + ["--no-verify"] * args.no_verify, cwd=ROOT)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                sys.exit(f"the export of {name} failed")
            seconds, peak = time.perf_counter() - start, usage.ru_maxrss * 1024
        print(
            f"{name}: {size / 1e9:.2f} GB to {args.quant} in {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()

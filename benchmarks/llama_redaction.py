"""Compares the redactions of an exported file in llama.cpp with those of the adapter in Loupe.

    python benchmarks/llama_redaction.py --run runs/small [--quant q8_0] [--data FILE] [--limit 300]

Exports the run, lets llama.cpp answer each row greedily, and prints its entity F1 next to the one that
evaluate.py prints. It needs xllamacpp.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Entity F1 of a run's export in llama.cpp, and of its adapter here."
    )
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--data", default="assets/samples/val.jsonl")
    parser.add_argument("--limit", type=int, default=300)
    args = parser.parse_args()
    from training.config import load_config

    model = load_config(args.run / "config.toml").model.name
    words = [
        sys.executable,
        "evaluate.py",
        "--model",
        model,
        "--adapter",
        str(args.run / "adapter"),
        "--data",
        args.data,
        "--limit",
        str(args.limit),
        "--json",
    ]
    ours = json.loads(subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    theirs = in_llama_cpp(args, model)
    for key in ("entity_f1", "leak_rate", "exact_match"):
        pair = f"llama.cpp {args.quant} {theirs[key]:.4f}   evaluate.py {ours[key]:.4f}"
        print(f"{key:12} {pair}   difference {theirs[key] - ours[key]:+.4f}")


def in_llama_cpp(args, model: str) -> dict:
    """The measures of llama.cpp's answers to the rows."""
    from tqdm import tqdm

    from data.rows import read_samples
    from exporting.llama_cpp import llama
    from model.hub import resolve
    from model.tokenizer import Tokenizer
    from tasks import redaction
    from training.evaluation import Answers, last_exchange, measures

    tokenizer = Tokenizer(resolve(model))
    exchanges = [last_exchange(sample) for sample in read_samples(args.data)[0][: args.limit]]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "x.gguf")
        subprocess.run(
            [
                sys.executable,
                "export.py",
                "--run",
                str(args.run),
                "--to",
                "gguf",
                "--quant",
                args.quant,
                "--out",
                str(file),
            ],
            cwd=ROOT,
            check=True,
        )
        with llama(file, tokenizer.vocab_size, context=2048) as server:
            texts = [
                server.complete(tokenizer.render_prompt(messages), 512)["content"]
                for messages, _ in tqdm(exchanges, "llama.cpp")
            ]
    return measures(
        Answers([messages[-1][1] for messages, _ in exchanges], [gold for _, gold in exchanges], texts),
        redaction,
    )


if __name__ == "__main__":
    main()

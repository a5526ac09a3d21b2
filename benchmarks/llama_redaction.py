"""Compares the redactions of an exported run in llama.cpp with those of its adapter in Loupe.

    python benchmarks/llama_redaction.py --run runs/small [--quant q8_0] [--data FILE] [--limit 300]

Exports the run, lets llama.cpp answer each row greedily, and prints its measures next to evaluate.py's. If
the base is a GGUF file and --quant is not given, llama.cpp runs this file with the exported LoRA beside it,
and the difference of the log-probabilities at some held-out positions is printed too. If Go is installed,
Ollama's template renders the prompts, and their token ids are compared with Loupe's. It needs xllamacpp.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from operator import eq
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# Ollama tokenizes the whole prompt at once, after <bos>.
AS_OLLAMA = {"add_special": True, "parse_special": True}
KEYS = ("entity_f1", "leak_rate", "exact_match")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--quant", help="merge, and quantize to this type (default q8_0 without a GGUF base)")
    parser.add_argument("--data", default="assets/samples/val.jsonl")
    parser.add_argument("--limit", type=int, default=300)
    args = parser.parse_args()
    from model.hub import resolve
    from model.weights import gguf_files
    from training.config import load_config

    name = load_config(args.run / "config.toml").model.name
    base = [link.resolve() for link in gguf_files(resolve(name))] if not args.quant else []
    words = ["--model", name, "--adapter", args.run / "adapter", "--data", args.data]
    ours = json.loads(call("evaluate.py", *words, "--limit", args.limit, "--json"))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "x.gguf")
        to = ["--to", "gguf-lora"] if base else ["--to", "gguf", "--quant", args.quant or "q8_0"]
        call("export.py", "--run", args.run, *to, "--out", out)
        file, lora = (base[0], out) if base else (out, None)
        if lora:
            print(log_prob_difference(name, args.run / "adapter", file, lora, args.data))
        theirs = in_llama_cpp(file, lora, args.data, args.limit)
    for key in KEYS:
        pair = f"llama.cpp {theirs[key]:.4f}   evaluate.py {ours[key]:.4f}"
        print(f"{key:12} {pair}   difference {theirs[key] - ours[key]:+.4f}")


def call(*words: object) -> str:
    """Runs a script of Loupe and returns what it prints on stdout."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def in_llama_cpp(file: Path, lora: Path | None, data: str | Path, limit: int) -> dict:
    """Returns the measures of the greedy responses to the first rows of `data`."""
    from tqdm import tqdm

    from data.rows import read_samples
    from exporting.llama_cpp import llama
    from model.hub import resolve
    from model.tokenizer import Tokenizer
    from tasks import redaction
    from tests.exporting.make_ollama_golden import render as ollama_prompts
    from training.evaluation import Answers, last_exchange, measures

    tokenizer = Tokenizer(resolve(str(file)))
    exchanges = [last_exchange(sample) for sample in read_samples(data)[0][:limit]]
    asked = [tokenizer.render_prompt(messages) for messages, _ in exchanges]
    with llama(file, tokenizer.vocab_size, lora, context=2048) as server:
        if shutil.which("go"):
            rendered = ollama_prompts([messages for messages, _ in exchanges])
            ids = [server.post("/tokenize", {"content": text} | AS_OLLAMA)["tokens"] for text in rendered]
            print(f"Ollama's prompts equal Loupe's: {sum(map(eq, ids, asked))} of {len(asked)}")
        texts = [server.complete(ids, 512)["content"] for ids in tqdm(asked, "llama.cpp")]
    prompts, golds = [messages[-1][1] for messages, _ in exchanges], [gold for _, gold in exchanges]
    return measures(Answers(prompts, golds, texts), redaction)


def log_prob_difference(name: str, adapter: Path, file: Path, lora: Path, data: str):
    """Compares llama.cpp's log-probabilities with the adapter's on its own base, at held-out positions."""
    from data.rows import read_samples
    from exporting.llama_cpp import llama
    from exporting.merged import MergedCheckpoint
    from exporting.verify import LORA_BOUND, comparison_sample, difference, log_probs, trained_model
    from model.hub import resolve
    from model.tokenizer import Tokenizer

    folder = resolve(name)
    model, tokenizer = MergedCheckpoint(folder, adapter), Tokenizer(folder)
    sample = comparison_sample(read_samples(data)[0], tokenizer, model.config.max_position_embeddings)
    trained = log_probs(trained_model(model), sample)
    with llama(file, tokenizer.vocab_size, lora, context=len(sample.tokens) + 16) as server:
        theirs = server.next_log_probs(sample.prompts(), tokenizer.encode("a")[0])
    return difference("llama.cpp against adapter", trained, theirs, LORA_BOUND)


if __name__ == "__main__":
    main()

"""Trains one recipe on a base in several block types, and on the file that will be served.

    python benchmarks/bases.py [--config small.toml] [--steps 100] [--rows 300] [--seeds 1 2 3] [--folder DIR]

First table: the recipe on the base as it is and quantized (model.quantize), measured by evaluate.py on the
same quantized base. Second table: what llama.cpp answers with the file that would be shipped, which is either
the adapter of the first base, merged and then quantized to Q4_K_M; or an adapter that was trained on the
base's Q4_K_M file, beside that file. Runs and figures stay in the folder, and a second call makes only what
is missing. It needs xllamacpp.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.llama_redaction import call, in_llama_cpp  # noqa: E402

TYPES = ("none", "q8_0", "q4_k", "nf4")
FILES = ("val", "val_unseen")
KEYS = {"loss": "{:.4f}", "entity_f1": "{:.1%}", "leak_rate": "{:.1%}"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="small.toml", help="the recipe (default %(default)s)")
    add("--steps", type=int, default=100, help="optimizer steps of each run (default %(default)s)")
    add("--rows", type=int, default=300, help="rows of each validation file (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add("--folder", type=Path, default=ROOT / "runs" / "bases")
    return parser.parse_args()


def rows_file(name: str) -> str:
    return f"assets/samples/{name}.jsonl"


class Bases:
    """The runs of one recipe, one for each base and seed, and their figures."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.jsonl"
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.known = {(r["kind"], r["seed"], r["data"]): r for r in map(json.loads, lines)}

    def train(self, kind: str, seed: int, *settings: str) -> Path:
        """Returns the folder of a run, which it trains unless that is done."""
        run = self.folder / f"{kind}-{seed}"
        if not (run / "manifest.json").exists():
            words = [f"run.dir={run}", f"run.seed={seed}", f"train.max_steps={self.args.steps}", *settings]
            words += ["data.validation=[]", "data.validation_fraction=0", "generate.prompts=[]"]
            options = [option for word in words for option in ("--set", word)]
            call("train.py", "--config", self.args.config, *options)
        return run

    def note(self, kind: str, seed: int, data: str, measure, *about) -> None:
        """Writes the figures that measure(*about) returns, unless they are known."""
        if (kind, seed, data) not in self.known:
            figures = {key: value for key, value in measure(*about).items() if key in KEYS}
            self.known[kind, seed, data] = {"kind": kind, "seed": seed, "data": data, **figures}
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.known[kind, seed, data]) + "\n")

    def evaluated(self, run: Path, model: str, type: str, data: str) -> dict:
        words = ["--model", model, "--adapter", run / "adapter", "--quantize", type]
        words += ["--data", rows_file(data), "--limit", self.args.rows, "--json"]
        return json.loads(call("evaluate.py", *words))

    def quantized(self, model: str, seed: int) -> None:
        """Trains and measures on each type of base."""
        for type in TYPES:
            run = self.train(type, seed, f"model.quantize={type}")
            for data in FILES:
                self.note(type, seed, data, self.evaluated, run, model, type, data)

    def served(self, model: str, seed: int) -> None:
        """Measures both ways to a Q4_K_M file in llama.cpp."""
        base, merged = self.folder / "base.gguf", self.folder / f"merged-{seed}.gguf"
        lora = self.folder / f"lora-{seed}.gguf"
        gguf = ["--to", "gguf", "--quant", "q4_k_m", "--no-verify", "--out"]
        if not base.exists():
            call("export.py", "--model", model, *gguf, base)
        run = self.train("file", seed, f"model.name={base}", "model.quantize=keep")
        if not merged.exists():
            call("export.py", "--run", self.folder / f"none-{seed}", *gguf, merged)
        if not lora.exists():
            call("export.py", "--run", run, "--to", "gguf-lora", "--out", lora)
        for data in FILES:
            rows = ROOT / rows_file(data), self.args.rows
            self.note("then quantized", seed, data, in_llama_cpp, merged, None, *rows)
            self.note("on the file", seed, data, in_llama_cpp, base, lora, *rows)

    def table(self, kinds: tuple[str, ...], keys: tuple[str, ...]) -> str:
        """Returns the means over the seeds, with the least and the largest, as Markdown."""
        columns = [(data, key) for data in FILES for key in keys]
        head = ["", *(f"{data}, {key.replace('_', ' ')}" for data, key in columns)]
        lines = [head, ["---", *["---:"] * len(columns)]]
        for kind in kinds:
            line = [kind]
            for data, key in columns:
                found = [self.known[kind, seed, data][key] for seed in self.args.seeds]
                form = KEYS[key].format
                line.append(f"{form(statistics.mean(found))} ({form(min(found))} to {form(max(found))})")
            lines.append(line)
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    args = parse()
    from training.config import load_config

    bases, model = Bases(args), load_config(ROOT / args.config).model.name
    for seed in args.seeds:
        bases.quantized(model, seed)
        bases.served(model, seed)
    print(bases.table(TYPES, ("loss", "entity_f1", "leak_rate")), end="\n\n")
    print(bases.table(("then quantized", "on the file"), ("entity_f1", "leak_rate")))


if __name__ == "__main__":
    main()

"""Times decoding on the 270M shape in Loupe, transformers and llama.cpp.

    python benchmarks/decoding.py [--dtype bfloat16|float32] [--rounds 3] [--only file|steps|refill]
                                  [--batch 1 ...] [--rows 64]

The job "file" answers 64 rows of assets/samples/val.jsonl; transformers pads them in batches of 8. In float32
the token ids of the two are compared. The job "steps" prints tokens/s for 1, 8 and 32 rows: the time for 120
new tokens minus the time for 20. llama.cpp (xllamacpp) has the same weights, exported, and reads its prompt
again each time. "refill" times Loupe alone: 128 completions of unequal length, 32 at once, where a new prompt
takes the slot of a row that is done, and where a batch waits for its longest row.

The weights are random. Norms are set so that each token depends on the whole text and no completion ends
early, so every program generates the same number of tokens. Programs take turns, and the medians of all
rounds are printed. Each has a process of its own: in one process OpenMP counts the threads of all and puts
them to sleep between products.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.exporting import make  # noqa: E402
from common.device import Precision  # noqa: E402
from data.rows import read_prompts  # noqa: E402
from generation.generate import generate  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402
from model.weights import load_model, save_model  # noqa: E402

NEW, SHORT, LONG = (
    110,
    20,
    120,
)  # new tokens: of a redaction, and the two counts whose difference is 100 steps


class Ours:
    def __init__(self, folder: Path, dtype: torch.dtype):
        self.model = load_model(folder, dtype, torch.device("cpu"))
        self.precision = Precision("bf16" if dtype == torch.bfloat16 else "fp32", torch.device("cpu"))

    def answer(self, prompts: list[list[int]], count: int, batch_size: int = 64) -> list[list[int]]:
        with self.precision.autocast():
            return [
                c.token_ids
                for c in generate(
                    self.model, prompts, max_new_tokens=count, stop_ids=(), batch_size=batch_size
                )
            ]

    @torch.no_grad()
    def apart(self, text: list[int], one: int, other: int) -> float:
        """Returns the distance of two ids' logits after the text, in standard deviations of all logits."""
        logits = self.model.logits(
            self.model(torch.tensor(text), torch.arange(len(text)), torch.tensor([0, len(text)]))[-1]
        )
        return abs((logits[one] - logits[other]) / logits.std()).item()


class Transformers:
    """generation.generate as its users write it: padded on the left, one batch after the other."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None

    def answer(self, prompts: list[list[int]], count: int, batch_size: int = 8) -> list[list[int]]:
        said = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
            )
            said += out[:, width:].tolist()
        return said


class LlamaCpp:
    """A server with as many places as there are prompts, asked for all at once."""

    def __init__(self, file: Path, places: int):
        import xllamacpp as x

        p = x.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel, p.n_gpu_layers, p.verbosity = (
            str(file),
            1024 * places,
            places,
            0,
            0,
        )
        p.warmup = p.fit_params = False
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = x.Server(p)
        self.address = self.server.listening_address

    def answer(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._one(prompt, count), prompts))

    def _one(self, prompt: list[int], count: int) -> list[int]:
        body = {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_tokens": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            self.address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=600
        ) as answer:
            return json.load(answer)["tokens"]


class Apart:
    """A contestant in a process of its own, for as long as the `with` lasts."""

    def __init__(self, *contestant):
        """Its class, and what that is made with."""
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _make, contestant)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()

    def ask(self, method: str, *arguments) -> tuple[float, object]:
        """How long a method of it takes in its process, and what that returns."""
        return self.pool.submit(_ask, method, *arguments).result()


def _make(kind, *arguments) -> None:
    global contestant
    contestant = kind(*arguments)


def _ask(method: str, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    said = getattr(contestant, method)(*arguments)
    return time.perf_counter() - start, said


def look_at_few(folder: Path) -> None:
    """Doubles queries and keys.

    With random weights attention is nearly uniform, and each row repeats one id.
    """
    model = load_model(folder, torch.bfloat16, torch.device("cpu"))
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.data.fill_(1.0)  # the gain is 1 + weight
    save_model(model, folder, torch.bfloat16)


def whole_file(contestants: dict, prompts: list[list[int]], rounds: int, exact: bool) -> None:
    """64 redactions from prompts to ids."""
    taken, said = {name: [] for name in contestants}, {}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            seconds, said[name] = contestant.ask("answer", prompts, NEW)
            taken[name].append(seconds)
    ours, theirs = (statistics.median(taken[name]) for name in ("Loupe", "transformers"))
    figures = f"Loupe {ours:.1f} s, transformers {theirs:.1f} s (ratio {theirs / ours:.2f})"
    print(f"file of {len(prompts)} rows, {NEW} new tokens each: {figures}", flush=True)
    if exact:
        kinds, parted = [len(set(row)) for row in said["Loupe"]], []
        for prompt, a, b in zip(prompts, said["Loupe"], said["transformers"], strict=True):
            if a != b:
                same = next(i for i in range(NEW) if a[i] != b[i])
                parted.append(contestants["Loupe"].ask("apart", prompt + a[:same], a[same], b[same])[1])
        same, different = len(prompts) - len(parted), f"{min(kinds)} to {max(kinds)} different ids"
        print(f"    the same greedy ids in {same} of {len(prompts)} rows (a row has {different})")
        if parted:
            print(f"    the others part where logits are at most {max(parted):.1e} standard deviations apart")


def steps(contestants: dict, prompts: list[list[int]], rounds: int) -> None:
    """Tokens/s of len(prompts) rows that grow together."""
    rates = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            less, more = (contestant.ask("answer", prompts, count)[0] for count in (SHORT, LONG))
            rates[name].append(len(prompts) * (LONG - SHORT) / (more - less))
    ours = statistics.median(rates["Loupe"])
    others = "   ".join(
        f"{name} {statistics.median(r):.1f} (ratio {ours / statistics.median(r):.2f})"
        for name, r in rates.items()
        if name != "Loupe"
    )
    print(f"batch {len(prompts):2}: tokens/s Loupe {ours:.1f}   {others}", flush=True)


def refill(ours: Ours, prompts: list[list[int]], rounds: int) -> None:
    """Seconds for all prompts in one call, and in one call after the other."""
    taken = {"refilled": [], "batch by batch": []}
    for _ in range(rounds):
        for how, size in (("refilled", len(prompts)), ("batch by batch", 32)):
            start = time.perf_counter()
            with ours.precision.autocast():
                for i in range(0, len(prompts), size):
                    generate(
                        ours.model,
                        prompts[i : i + size],
                        max_new_tokens=512,
                        max_new_ratio=0.5,
                        stop_ids=(),
                        batch_size=32,
                    )
            taken[how].append(time.perf_counter() - start)
    print(
        f"{len(prompts)} answers of unequal length, 32 at once: "
        + ", ".join(f"{how} {statistics.median(t):.1f} s" for how, t in taken.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Decoding here, in transformers and in llama.cpp.")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["file", "steps", "refill"])
    parser.add_argument("--rows", type=int, default=64, help="of the file; refill takes twice as many")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--model", type=Path, help="a folder to use instead of making one")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as processes:
        folder = args.model or Path(scratch, "model")
        if not args.model:
            make("270M", folder)
            look_at_few(folder)
        tokenizer = Tokenizer(folder)
        prompts = [
            tokenizer.render_prompt(s.messages) for s in read_prompts(ROOT / "assets/samples/val.jsonl")
        ]
        if args.only == "refill":
            return refill(Ours(folder, dtype), prompts[: 2 * args.rows], args.rounds)
        contestants = {
            name: processes.enter_context(Apart(kind, folder, dtype))
            for name, kind in (("Loupe", Ours), ("transformers", Transformers))
        }
        print(
            f"{args.dtype}, {torch.get_num_threads()} threads, "
            f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens",
            flush=True,
        )
        for contestant in contestants.values():
            contestant.ask("answer", prompts[:1], 2)
        if args.only != "steps":
            whole_file(contestants, prompts[: args.rows], args.rounds, exact=dtype == torch.float32)
        if args.only != "file":
            file = Path(scratch, "model.gguf")
            quant = "bf16" if dtype == torch.bfloat16 else "f32"
            words = [
                sys.executable,
                "export.py",
                "--model",
                str(folder),
                "--to",
                "gguf",
                "--quant",
                quant,
                "--out",
                str(file),
                "--no-verify",
            ]
            subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            for batch in args.batch or [1, 8, 32]:
                with Apart(LlamaCpp, file, batch) as llama:
                    steps(contestants | {"llama.cpp": llama}, prompts[:batch], args.rounds)


if __name__ == "__main__":
    main()

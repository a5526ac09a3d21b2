"""Times decoding on the 270M shape in Loupe, transformers and llama.cpp.

    python benchmarks/decoding.py [--dtype bfloat16|float32] [--rounds 3] [--only file|steps|refill]
                                  [--batch 1 ...] [--rows 64]

"file" answers 64 rows of assets/samples/val.jsonl with Loupe and transformers, which pads batches of 8. In
float32 it compares their token ids. "steps" prints tokens/s for 1, 8 and 32 rows: the time for 120 new tokens
minus the time for 20. llama.cpp (xllamacpp) has the same weights, exported, and reads its prompt again each
time. "refill" times Loupe alone: 128 completions of unequal length in 32 slots, with a new prompt in each
free slot, and with batches that wait for their longest row.

The weights are random. No program stops at an end token, so all generate the same number of tokens, and the
norms are set so that each token depends on the whole text. Programs take turns; the medians of the rounds are
printed. Each program has a process of its own: in one process OpenMP counts the threads of all of them and
lets its own sleep between products.
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

from benchmarks.exports import export_command, make  # noqa: E402
from common.device import Precision  # noqa: E402
from data.rows import read_prompts  # noqa: E402
from generation.generate import generate  # noqa: E402
from model.tokenizer import Tokenizer  # noqa: E402
from model.weights import load_model, save_model  # noqa: E402

# New tokens of a redaction, and of the two runs whose difference in time is that of 100 steps.
NEW, SHORT, LONG = 110, 20, 120


class Ours:
    def __init__(self, folder: Path, dtype: torch.dtype):
        self.model = load_model(folder, dtype, torch.device("cpu"))
        self.precision = Precision("bf16" if dtype == torch.bfloat16 else "fp32", torch.device("cpu"))

    def answer(self, prompts: list[list[int]], count: int, batch_size: int = 64) -> list[list[int]]:
        settings = {"max_new_tokens": count, "stop_ids": (), "batch_size": batch_size}
        with self.precision.autocast():
            return [completion.token_ids for completion in generate(self.model, prompts, **settings)]

    @torch.no_grad()
    def logit_distance(self, text: list[int], one: int, other: int) -> float:
        """Returns the distance of two ids' logits after the text, in standard deviations of all logits."""
        hidden = self.model(torch.tensor(text), torch.arange(len(text)), torch.tensor([0, len(text)]))
        logits = self.model.logits(hidden[-1])
        return abs((logits[one] - logits[other]) / logits.std()).item()


class Transformers:
    """transformers' generate on batches that are padded on the left, one after the other."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.model.generation_config.eos_token_id = None

    def answer(self, prompts: list[list[int]], count: int, batch_size: int = 8) -> list[list[int]]:
        completions, greedy = [], {"do_sample": False, "pad_token_id": 0}
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(p)) + p for p in part])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part])
            inputs = {"input_ids": ids, "attention_mask": mask}
            completions += self.model.generate(**inputs, max_new_tokens=count, **greedy)[:, width:].tolist()
        return completions


class LlamaCpp:
    """A server with as many slots as there are prompts, which all arrive at once."""

    def __init__(self, file: Path, slots: int):
        import xllamacpp as x

        p = x.CommonParams()
        p.model.path, p.n_ctx, p.n_parallel = str(file), 1024 * slots, slots
        p.n_gpu_layers = p.verbosity = 0
        p.warmup = p.fit_params = False
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = torch.get_num_threads()
        self.server = x.Server(p)
        self.address = self.server.listening_address

    def answer(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda prompt: self._one(prompt, count), prompts))

    def _one(self, prompt: list[int], count: int) -> list[int]:
        body = {"prompt": prompt, "n_predict": count, "temperature": 0}
        body |= {"ignore_eos": True, "return_tokens": True, "cache_prompt": False}
        header, data = {"Content-Type": "application/json"}, json.dumps(body).encode()
        request = urllib.request.Request(self.address + "/completion", data, header)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=600) as response:
            return json.load(response)["tokens"]


class Worker:
    """One of the classes above in a process of its own, which ends with the `with` block."""

    def __init__(self, kind: type, *arguments):
        """Makes kind(*arguments) in the process."""
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), _make, (kind, *arguments))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pool.shutdown()

    def ask(self, method: str, *arguments) -> tuple[float, object]:
        """Calls a method in the process; returns its seconds and its result."""
        return self.pool.submit(_ask, method, *arguments).result()


def _make(kind, *arguments) -> None:
    global program
    program = kind(*arguments)


def _ask(method: str, *arguments) -> tuple[float, object]:
    start = time.perf_counter()
    result = getattr(program, method)(*arguments)
    return time.perf_counter() - start, result


def sharpen_attention(folder: Path) -> None:
    """Doubles queries and keys; else attention is nearly uniform, and each row repeats one id."""
    model = load_model(folder, torch.bfloat16, torch.device("cpu"))
    for layer in model.model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.weight.data.fill_(1.0)  # The gain is 1 + weight.
    save_model(model, folder, torch.bfloat16)


def whole_file(workers: dict[str, Worker], prompts: list[list[int]], rounds: int, exact: bool) -> None:
    """Prints the seconds from all prompts to all ids, and with `exact` compares the ids."""
    taken, ids = {name: [] for name in workers}, {}
    for _ in range(rounds):
        for name, worker in workers.items():
            seconds, ids[name] = worker.ask("answer", prompts, NEW)
            taken[name].append(seconds)
    ours, theirs = (statistics.median(taken[name]) for name in ("Loupe", "transformers"))
    figures = f"Loupe {ours:.1f} s, transformers {theirs:.1f} s (ratio {theirs / ours:.2f})"
    print(f"file of {len(prompts)} rows, {NEW} new tokens each: {figures}", flush=True)
    if exact:
        kinds, distances = [len(set(row)) for row in ids["Loupe"]], []
        for prompt, a, b in zip(prompts, ids["Loupe"], ids["transformers"], strict=True):
            if a != b:
                same = next(i for i in range(NEW) if a[i] != b[i])
                question = prompt + a[:same], a[same], b[same]
                distances.append(workers["Loupe"].ask("logit_distance", *question)[1])
        same, different = len(prompts) - len(distances), f"{min(kinds)} to {max(kinds)} different ids"
        print(f"    the same greedy ids in {same} of {len(prompts)} rows (a row has {different})")
        if distances:
            print("    at the first different id of the other rows, the two logits are at most ", end="")
            print(f"{max(distances):.1e} standard deviations apart")


def steps(workers: dict[str, Worker], prompts: list[list[int]], rounds: int) -> None:
    """Prints the tokens/s of len(prompts) rows that grow together."""
    speeds = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            less, more = (worker.ask("answer", prompts, count)[0] for count in (SHORT, LONG))
            speeds[name].append(len(prompts) * (LONG - SHORT) / (more - less))
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    ours = medians.pop("Loupe")
    others = "   ".join(
        f"{name} {median:.1f} (ratio {ours / median:.2f})" for name, median in medians.items()
    )
    print(f"batch {len(prompts):2}: tokens/s Loupe {ours:.1f}   {others}", flush=True)


def refill(ours: Ours, prompts: list[list[int]], rounds: int) -> None:
    """Prints the seconds for all prompts in one call, and for one call per batch."""
    taken = {"refilled": [], "batch by batch": []}
    settings = {"max_new_tokens": 512, "max_new_ratio": 0.5, "stop_ids": (), "batch_size": 32}
    for _ in range(rounds):
        for how, size in (("refilled", len(prompts)), ("batch by batch", 32)):
            start = time.perf_counter()
            with ours.precision.autocast():
                for i in range(0, len(prompts), size):
                    generate(ours.model, prompts[i : i + size], **settings)
            taken[how].append(time.perf_counter() - start)
    seconds = ", ".join(f"{how} {statistics.median(t):.1f} s" for how, t in taken.items())
    print(f"{len(prompts)} responses of unequal length, 32 at once: {seconds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["file", "steps", "refill"])
    parser.add_argument("--rows", type=int, default=64, help="rows of the file; refill takes twice as many")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--model", type=Path, help="a folder to use instead of making one")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as processes:
        folder = args.model or Path(scratch, "model")
        if not args.model:
            make("270M", folder)
            sharpen_attention(folder)
        tokenizer = Tokenizer(folder)
        rows = read_prompts(ROOT / "assets/samples/val.jsonl")
        prompts = [tokenizer.render_prompt(row.messages) for row in rows]
        if args.only == "refill":
            return refill(Ours(folder, dtype), prompts[: 2 * args.rows], args.rounds)
        workers = {"Loupe": Worker(Ours, folder, dtype), "transformers": Worker(Transformers, folder, dtype)}
        lengths = f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
        print(f"{args.dtype}, {torch.get_num_threads()} threads, {lengths}", flush=True)
        for worker in workers.values():
            processes.enter_context(worker).ask("answer", prompts[:1], 2)
        if args.only != "steps":
            whole_file(workers, prompts[: args.rows], args.rounds, exact=dtype == torch.float32)
        if args.only != "file":
            file = Path(scratch, "model.gguf")
            command = export_command(folder, "bf16" if dtype == torch.bfloat16 else "f32", file)
            subprocess.run([*command, "--no-verify"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            for batch in args.batch or [1, 8, 32]:
                with Worker(LlamaCpp, file, batch) as llama:
                    steps(workers | {"llama.cpp": llama}, prompts[:batch], args.rounds)


if __name__ == "__main__":
    main()

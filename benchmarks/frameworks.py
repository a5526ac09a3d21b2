"""Compares Loupe with its peers on one training step of the same job.

    python benchmarks/frameworks.py [--only NAME ...] [--rounds 5] [--steps 3] [--device cuda] [--markdown]

The job: Gemma 3's 270M shape with random bf16 weights, LoRA of rank 128 on all seven projections, 8 lab-like
rows a step (lab_like.py makes both, once), AdamW. Programs take turns, `--rounds` times. Each turn is a
process of its own: a first step on one batch, then the timed steps on the batch of the round, which is the
same for all programs. The peers (peers.py) run in an environment of their own. This script makes it in
runs/benchmark/peers; to use another one, name its Python with --peers-python:

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch==2.13.0 transformers peft trl accelerate datasets \
        bitsandbytes

tokens/s      tokens of the rows (no padding) over the seconds of the median step; the median of the rounds
x Loupe's, x compiled's    seconds of a step over those of Loupe's plain and compiled step in the same round
                           and precision, on a base that is not quantized; the median of the rounds
peak memory   the largest resident size of the process, or of the allocator on a GPU
first step    seconds from the start of the process to the end of its first optimizer step; the peers' rows
              are tokenized before
of ceiling    tokens/s as a share of those of the matrix products of Loupe's step alone, which take turns with
              further steps in Loupe's process; a peer is also compared with Loupe's products
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from benchmarks.lab_like import BATCH  # noqa: E402

OURS = ("loupe", "loupe-compiled", "loupe-q8_0", "loupe-q4_k", "loupe-nf4")
OURS += ("loupe-fp32", "loupe-fp32-compiled", "loupe-fp32-q8_0", "loupe-fp32-q4_k", "loupe-fp32-nf4")
PEERS = (
    "hf-patched",
    "hf-bf16",
    "hf-nf4",
    "hf-autocast",
    "hf-fp32",
    "hf-fp32-nf4",
    "trl",
    "trl-padding-free",
)
QUANTIZED = ("q8_0", "q4_k", "nf4")
PACKAGES = ["torch==2.13.0", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes"]
LABELS = {
    "loupe": "Loupe",
    "loupe-compiled": "Loupe, compiled",
    "loupe-q8_0": "Loupe, Q8_0",
    "loupe-q4_k": "Loupe, Q4_K",
    "loupe-nf4": "Loupe, NF4",
    "loupe-fp32": "Loupe, float32",
    "loupe-fp32-compiled": "Loupe, float32, compiled",
    "loupe-fp32-q8_0": "Loupe, float32, Q8_0",
    "loupe-fp32-q4_k": "Loupe, float32, Q4_K",
    "loupe-fp32-nf4": "Loupe, float32, NF4",
    "hf-patched": "transformers + PEFT, bf16, head at supervised positions",
    "hf-bf16": "transformers + PEFT, bf16",
    "hf-nf4": "transformers + PEFT + bitsandbytes, bf16, NF4",
    "hf-autocast": "transformers + PEFT, autocast",
    "hf-fp32": "transformers + PEFT, float32",
    "hf-fp32-nf4": "transformers + PEFT + bitsandbytes, float32, NF4",
    "trl": "TRL SFTTrainer, defaults",
    "trl-padding-free": "TRL SFTTrainer, padding-free",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, names = parser.add_argument, OURS + PEERS
    only = f"may be repeated: {', '.join(names)}"
    add("--only", action="append", choices=names, metavar="NAME", help=only)
    add("--rounds", type=int, default=5)
    add("--batch", type=int, default=BATCH, help="rows per step (default %(default)s)")
    add("--steps", type=int, default=3, help="Loupe's timed steps per round")
    add("--peer-steps", type=int, default=1, help="a peer's timed steps per round")
    device = "cuda is the first device of CUDA_VISIBLE_DEVICES"
    add("--device", default="cpu", choices=["cpu", "cuda"], help=device)
    peak = "the GPU's dense bf16 peak, for MFU (NVIDIA's data sheet: H100 SXM and H200 989)"
    add("--peak-tflops", type=float, default=989, help=peak)
    key = "a key of Loupe's config; may be repeated"
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=key)
    folder = "folder of the model, the rows and results.jsonl"
    add("--folder", type=Path, default=ROOT / "runs" / "benchmark", help=folder)
    add("--peers-python", type=Path, help="interpreter of an environment with the peers")
    add("--append", action="store_true", help="add to the results that are in the folder")
    add("--markdown", action="store_true", help="print a Markdown table, as in docs/benchmarks.md")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Makes the model, the rows and the peers' environment where they are missing."""
    args.folder = args.folder.resolve()
    if not (args.folder / "tokens.json").is_file():
        # This process does not load torch: the peak of a child counts the memory of its parent at the start.
        subprocess.run([sys.executable, HERE / "lab_like.py", args.folder], check=True)
    if not args.peers_python and set(args.only or PEERS) & set(PEERS):
        args.peers_python = args.folder / "peers" / "bin" / "python"
        if not args.peers_python.exists():
            subprocess.run([sys.executable, "-m", "venv", args.folder / "peers"], check=True)
            install = ["-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *PACKAGES]
            subprocess.run([args.peers_python, *install], check=True)


def take_turn(name: str, number: int, args: argparse.Namespace) -> dict | None:
    """Runs one program for one round; returns its figures, or None (and prints its error) if it fails."""
    command: list = [args.peers_python, HERE / "peers.py", name, args.folder, "--steps", args.peer_steps]
    if name in OURS:
        command = [sys.executable, HERE / "ours.py", name, args.folder, "--steps", args.steps]
        command += [word for override in args.set for word in ("--set", override)]
    command += ["--round", number, "--device", args.device, "--batch", args.batch, "--started", time.time()]
    # With several devices, TRL would train on all of them.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": gpu}
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | settings, "cwd": ROOT}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run([str(word) for word in command], stderr=errors, **pipes)
        if done.returncode:
            errors.seek(0)
            print(f"{name} failed with exit code {done.returncode}:", errors.read()[-3000:], file=sys.stderr)
            return None
    return {"name": name, "round": number} | json.loads(done.stdout.splitlines()[-1])


def warn(results: list[dict]) -> None:
    """Prints on stderr the figures that are not to be trusted.

    Other processes used the machine, or the first loss differs from Loupe's, although a fresh adapter changes
    nothing.
    """
    for r in results:
        if max(r["others"]) > 0.1:
            busy = f"other processes kept {max(r['others']):.1f} cores busy in one of its steps"
            print(f"{r['name']}, round {r['round']}: {busy}", file=sys.stderr)
    losses = {r["name"]: r["losses"][0] for r in results}
    for name, loss in losses.items():
        if name.endswith(QUANTIZED):
            continue
        if "loupe" in losses and abs(loss - losses["loupe"]) > 0.001 * losses["loupe"]:
            both = f"the first loss is {loss:.4f}, and Loupe's is {losses['loupe']:.4f}"
            print(f"{name}: {both}: not the same job", file=sys.stderr)


def summarise(results: list[dict], args: argparse.Namespace) -> list[dict]:
    """Returns the table's row of each program, in the order of OURS + PEERS."""
    rows = json.loads((args.folder / "tokens.json").read_text())
    # By (name, round): tokens/s, tokens/s of the products alone, FLOPs of a token.
    speeds, ceilings, work = {}, {}, {}
    for r in results:
        batch = rows[r["round"] * args.batch : (r["round"] + 1) * args.batch]
        tokens = sum(len(row["input_ids"]) for row in batch)
        key = r["name"], r["round"]
        speeds[key] = tokens / statistics.median(r["seconds"])
        if r["name"] in OURS:
            ceilings[key], work[key] = tokens / r["ceiling"], r["flops"] / tokens

    def median(values):
        values = list(values)
        return statistics.median(values) if values else None

    def pairs(name, reference, values):
        """Returns (name's tokens/s, the reference's value) of each round that both have."""
        rounds = [n for other, n in speeds if other == name and (reference, n) in values]
        return [(speeds[name, n], values[reference, n]) for n in rounds]

    table = []
    for name in OURS + PEERS:
        mine = [r for r in results if r["name"] == name]
        if not mine:
            continue
        loupe = "loupe-fp32" if "fp32" in name else "loupe"
        reference = name if name in OURS else loupe
        used = median(own * flops for own, flops in pairs(name, loupe, work))
        row = {"name": name, "rounds": len(mine), "speed": median(speeds[name, r["round"]] for r in mine)}
        plain_and_compiled = [pairs(name, other, speeds) for other in (loupe, f"{loupe}-compiled")]
        row["times"] = [median(theirs / own for own, theirs in both) for both in plain_and_compiled]
        row["peak"], row["first"] = (median(r[key] for r in mine) for key in ("peak", "first_step"))
        row["share"] = median(own / ceiling for own, ceiling in pairs(name, reference, ceilings))
        table.append(row | {"mfu": used and used / args.peak_tflops / 1e12})
    return table


def show(table: list[dict], args: argparse.Namespace) -> None:
    """Prints the table, as text or as Markdown, without its empty columns."""
    lines = [["", *"tokens/s,x Loupe's,x compiled's,peak memory,first step,of ceiling,MFU,rounds".split(",")]]
    for row in table:
        line = [LABELS[row["name"]], f"{row['speed']:,.0f}", *(_cell(x, ".2f") for x in row["times"])]
        line += [f"{row['peak'] / 1e9:.1f} GB", f"{row['first']:.1f} s", _cell(row["share"], ".0%")]
        lines.append([*line, _cell(row["mfu"] if args.device != "cpu" else None, ".1%"), str(row["rounds"])])
    filled = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in filled] for line in lines]
    if args.markdown:
        lines.insert(1, ["---", *["---:"] * (len(filled) - 1)])
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(filled))]
    for line in lines:
        cells = [cell.rjust(width + 2) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print(line[0].ljust(widths[0]) + "".join(cells))


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def versions(results: list[dict]) -> str:
    """Returns the devices and the packages of all processes."""
    return ", ".join(dict.fromkeys(fact for r in results for fact in r["versions"]))


def main() -> None:
    args = parse()
    prepare(args)
    file, names = args.folder / "results.jsonl", args.only or OURS + PEERS
    lines = file.read_text().splitlines() if args.append and file.exists() else []
    results = [json.loads(line) for line in lines]
    first = 1 + max((r["round"] for r in results if r["name"] in names), default=0)
    failed = False
    with open(file, "a" if args.append else "w") as log:
        for number in range(first, first + args.rounds):
            for name in names:
                turn = take_turn(name, number, args)
                failed |= turn is None
                if turn:
                    results.append(turn)
                    log.write(json.dumps(turn) + "\n")
                    log.flush()
                    seconds = " ".join(f"{s:.2f}" for s in turn["seconds"])
                    print(f"round {number}: {name}: {seconds} s a step", file=sys.stderr)
    warn(results)
    show(summarise(results, args), args)
    print("\n" + versions(results))
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Compares Loupe with its peers on one training step of the same job.

    python benchmarks/frameworks.py [--only NAME ...] [--rounds 5] [--steps 3] [--device cuda] [--markdown]

The job: Gemma 3's 270M shape with random bf16 weights, LoRA of rank 128 on all seven projections, 8 lab-like
rows a step (lab_like.py makes both, once), AdamW. Programs take turns, `--rounds` times. Each turn is a
process of its own: a first step on one batch, then the timed steps on the batch of the round, which is the
same for all. The peers (peers.py) run in an environment of their own, which this script makes in
runs/benchmark/peers; or make one and name its Python with --peers-python:

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch==2.13.0 transformers peft trl accelerate datasets

tokens/s      tokens of the rows (prompt, response and turns; no padding) over the seconds of the median step
              of each round; then the median of the rounds
x Loupe's, x compiled's    seconds of a step over those of Loupe's plain and compiled step in the same round;
                           the median
peak memory   the largest resident size of the process, or of the allocator on a GPU
first step    seconds from the start of the process to the end of its first optimizer step; the peers' rows
              are tokenized before
of ceiling    tokens/s as a share of what Loupe's step would reach with its matrix products alone, timed in
              its process in turn with further steps; the share of a peer is also of Loupe's products (float32
              ones for a float32 peer)
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

OURS = ("loupe", "loupe-compiled", "loupe-fp32", "loupe-fp32-compiled")
PEERS = ("hf-patched", "hf-bf16", "hf-autocast", "hf-fp32", "trl", "trl-padding-free")
PACKAGES = ["torch==2.13.0", "transformers", "peft", "trl", "accelerate", "datasets"]
LABELS = {
    "loupe": "Loupe",
    "loupe-compiled": "Loupe, compiled",
    "loupe-fp32": "Loupe, float32",
    "loupe-fp32-compiled": "Loupe, float32, compiled",
    "hf-patched": "transformers + PEFT, bf16, head at supervised positions",
    "hf-bf16": "transformers + PEFT, bf16",
    "hf-autocast": "transformers + PEFT, autocast",
    "hf-fp32": "transformers + PEFT, float32",
    "trl": "TRL SFTTrainer, defaults",
    "trl-padding-free": "TRL SFTTrainer, padding-free",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokens/s, memory and start-up of Loupe and its peers on one fine-tuning job."
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=OURS + PEERS,
        metavar="NAME",
        help=f"may be repeated: {', '.join(OURS + PEERS)}",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=BATCH, help="rows of a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="Loupe's timed steps in a round")
    parser.add_argument("--peer-steps", type=int, default=1, help="a peer's timed steps in a round")
    parser.add_argument(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="cuda is the first that CUDA_VISIBLE_DEVICES leaves",
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989,
        help="the GPU's dense bf16 peak, for MFU (NVIDIA's data sheet: H100 SXM and H200 989)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="a key of Loupe's config; may be repeated",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=ROOT / "runs" / "benchmark",
        help="where the model, the rows and results.jsonl are",
    )
    parser.add_argument("--peers-python", type=Path, help="interpreter of an environment with the peers")
    parser.add_argument(
        "--append", action="store_true", help="keep the results that are in the folder and add to them"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the table as docs/benchmarks.md has it"
    )
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Makes the model, the rows and the peers' environment where they are missing."""
    args.folder = args.folder.resolve()
    if not (args.folder / "tokens.json").is_file():
        # All that loads torch runs in a process of its own: the peak of a child counts what its parent held
        # at the start.
        subprocess.run([sys.executable, HERE / "lab_like.py", args.folder], check=True)
    if not args.peers_python and set(args.only or PEERS) & set(PEERS):
        args.peers_python = args.folder / "peers" / "bin" / "python"
        if not args.peers_python.exists():
            constraints = ["-c", str(ROOT / "constraints.txt")]
            subprocess.run([sys.executable, "-m", "venv", args.folder / "peers"], check=True)
            subprocess.run(
                [args.peers_python, "-m", "pip", "install", "-q", *constraints, *PACKAGES], check=True
            )


def take_turn(name: str, number: int, args: argparse.Namespace) -> dict | None:
    """Runs one program for one round; returns its figures, or None (and prints its error) if it fails."""
    python, script, steps = (
        (sys.executable, "ours.py", args.steps)
        if name in OURS
        else (args.peers_python, "peers.py", args.peer_steps)
    )
    command = [
        str(python),
        str(HERE / script),
        name,
        str(args.folder),
        "--round",
        str(number),
        "--steps",
        str(steps),
        "--device",
        args.device,
    ]
    command += ["--batch", str(args.batch)]
    command += [word for override in (args.set if name in OURS else []) for word in ("--set", override)]
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # one, or TRL would spread over all
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": gpu,
    }
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            [*command, "--started", repr(time.time())],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        if done.returncode:
            errors.seek(0)
            print(
                f"{name} failed with exit code {done.returncode}:\n{errors.read()[-3000:]}", file=sys.stderr
            )
            return None
    return {"name": name, "round": number} | json.loads(done.stdout.splitlines()[-1])


def warn(results: list[dict]) -> None:
    """Prints on stderr which figures not to trust.

    Either other processes used the machine, or the first loss is not Loupe's (a fresh adapter changes
    nothing).
    """
    for r in results:
        if max(r["others"]) > 0.1:
            busy = f"other processes kept {max(r['others']):.1f} cores busy in one of its steps"
            print(f"{r['name']}, round {r['round']}: {busy}", file=sys.stderr)
    losses = {r["name"]: r["losses"][0] for r in results}
    for name, loss in losses.items():
        if "loupe" in losses and abs(loss - losses["loupe"]) > 0.001 * losses["loupe"]:
            print(
                f"{name}: the first loss is {loss:.4f} and Loupe's {losses['loupe']:.4f}: not the same job",
                file=sys.stderr,
            )


def summarise(results: list[dict], args: argparse.Namespace) -> list[dict]:
    """A row of the table for each contestant, in the contestants' order."""
    rows = json.loads((args.folder / "tokens.json").read_text())
    speeds, ceilings, work = (
        {},
        {},
        {},
    )  # all by (name, round): tokens/s, tokens/s of the products alone, FLOPs of a token
    for r in results:
        tokens = sum(
            len(row["input_ids"]) for row in rows[r["round"] * args.batch : (r["round"] + 1) * args.batch]
        )
        key = r["name"], r["round"]
        speeds[key] = tokens / statistics.median(r["seconds"])
        if r["name"] in OURS:
            ceilings[key], work[key] = tokens / r["ceiling"], r["flops"] / tokens

    def middle(values):
        values = list(values)
        return statistics.median(values) if values else None

    def pairs(name, reference, values):
        """(name's tokens/s, the reference's value) in each of the rounds that both have."""
        return [
            (speeds[name, n], values[reference, n])
            for other, n in speeds
            if other == name and (reference, n) in values
        ]

    table = []
    for name in OURS + PEERS:
        mine = [r for r in results if r["name"] == name]
        if mine:
            reference = name if name in OURS else "loupe-fp32" if name == "hf-fp32" else "loupe"
            used = middle(
                speeds[key] * work["loupe", key[1]]
                for key in speeds
                if key[0] == name and ("loupe", key[1]) in work
            )
            table.append(
                {
                    "name": name,
                    "rounds": len(mine),
                    "speed": middle(speeds[name, r["round"]] for r in mine),
                    "times": [
                        middle(theirs / own for own, theirs in pairs(name, other, speeds))
                        for other in ("loupe", "loupe-compiled")
                    ],
                    "peak": middle(r["peak"] for r in mine),
                    "first": middle(r["first_step"] for r in mine),
                    "share": middle(own / ceiling for own, ceiling in pairs(name, reference, ceilings)),
                    "mfu": used and used / args.peak_tflops / 1e12,
                }
            )
    return table


def show(table: list[dict], args: argparse.Namespace) -> None:
    """Prints the table, as text or as Markdown, without the columns that nobody has a figure for."""
    lines = [
        [
            "",
            "tokens/s",
            "x Loupe's",
            "x compiled's",
            "peak memory",
            "first step",
            "of ceiling",
            "MFU",
            "rounds",
        ]
    ]
    for row in table:
        lines.append(
            [
                LABELS[row["name"]],
                f"{row['speed']:,.0f}",
                *(_cell(times, ".2f") for times in row["times"]),
                f"{row['peak'] / 1e9:.1f} GB",
                f"{row['first']:.1f} s",
                _cell(row["share"], ".0%"),
                _cell(row["mfu"] if args.device != "cpu" else None, ".1%"),
                str(row["rounds"]),
            ]
        )
    filled = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    lines = [[line[i] for i in filled] for line in lines]
    if args.markdown:
        lines.insert(1, ["---", *["---:"] * (len(filled) - 1)])
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
        return
    widths = [max(len(line[i]) for line in lines) for i in range(len(filled))]
    for line in lines:
        print(
            line[0].ljust(widths[0])
            + "".join(cell.rjust(width + 2) for cell, width in zip(line[1:], widths[1:], strict=True))
        )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def versions(results: list[dict]) -> str:
    """What the figures are of: the machine and the packages, as the processes found them."""
    return ", ".join(dict.fromkeys(fact for r in results for fact in r["versions"]))


def main() -> None:
    args = parse()
    prepare(args)
    file = args.folder / "results.jsonl"
    results = (
        [json.loads(line) for line in file.read_text().splitlines()] if args.append and file.exists() else []
    )
    first = 1 + max((r["round"] for r in results if r["name"] in (args.only or OURS + PEERS)), default=0)
    failed = False
    with open(file, "a" if args.append else "w") as log:
        for number in range(first, first + args.rounds):
            for name in args.only or OURS + PEERS:
                turn = take_turn(name, number, args)
                failed |= turn is None
                if turn:
                    results.append(turn)
                    log.write(json.dumps(turn) + "\n")
                    log.flush()
                    print(
                        f"round {number}: {name}: {' '.join(f'{s:.2f}' for s in turn['seconds'])} s a step",
                        file=sys.stderr,
                    )
    warn(results)
    show(summarise(results, args), args)
    print("\n" + versions(results))
    sys.exit(failed)


if __name__ == "__main__":
    main()

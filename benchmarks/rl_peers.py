"""Compares Loupe with TRL on optimizer steps of DPO and of GRPO on a CPU.

    python benchmarks/rl_peers.py [--only NAME ...] [--rounds 3] [--steps 3] [--markdown]

The jobs: Gemma 3's 270M shape with random weights in float32, LoRA of rank 16 on all seven projections,
AdamW, no gradient checkpointing. Prompts have about 200 tokens.

dpo    2 pairs a step; both answers have about 100 tokens: the redacted text and the text as it is
grpo   1 prompt a step; 8 completions of at most 64 tokens at temperature 1, beta 0, a reward by length. A
       random model hardly ever ends a turn: nearly all completions have 64 tokens in both programs.

Programs take turns, `--rounds` times. Each turn is a process of its own: a first step, then the timed steps,
on rows of the round, which are the same for all programs. Loupe's turn is `python train.py --config FILE`,
and its seconds and peak memory are those of its metrics.jsonl. TRL's turn is rl_trl.py, in the environment
that frameworks.py makes for the peers (or --peers-python).

s/step        seconds of the median step, sampling included; the median of the rounds
x Loupe's     seconds of a step over those of Loupe's in the same round; the median of the rounds
peak memory   the largest resident size of the process
whole run     seconds of the process, from the start of Python to its end. Loupe and trl-dpo-precomputed
              compute the reference's log-probabilities before the first step, trl-dpo does in each step.
              Loupe keeps them in the user's cache and reads them if a round is repeated.
"""

import argparse
import inspect
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

from benchmarks import frameworks  # noqa: E402

LABELS = {
    "loupe-dpo": "Loupe, DPO",
    "trl-dpo": "TRL DPOTrainer",
    "trl-dpo-precomputed": "TRL DPOTrainer, precompute_ref_log_probs",
    "loupe-grpo": "Loupe, GRPO",
    "trl-grpo": "TRL GRPOTrainer",
}
ROWS = {"dpo": 2, "grpo": 1}  # of a step
PROMPT_TOKENS, ANSWER_TOKENS = (180, 220), (80, 120)  # shortest and longest
RANK, LEARNING_RATE = 16, 1e-5
BETA, GENERATIONS, COMPLETION_TOKENS = 0.1, 8, 64
CONFIG = f"""[run]
dir = {{run}}

[model]
name = {{model}}

[adapter]
r = {RANK}
lora_alpha = {RANK}
target_modules = ["all-linear"]

[data]
train = {{rows}}
validation_fraction = 0

[train]
objective = {{objective}}
max_steps = {{steps}}
batch_size = {{batch}}
learning_rate = {LEARNING_RATE}
precision = "fp32"
compile = false
shuffle = false
device = "cpu"
"""
SECTIONS = {
    "dpo": f"\n[dpo]\nbeta = {BETA}\n",
    "grpo": f"\n[grpo]\nnum_generations = {GENERATIONS}\nmax_completion_length = {COMPLETION_TOKENS}\n"
    'rewards = ["lengths:length"]\n',
}


def length(completion: str) -> float:
    """The reward: 1 for a completion of 200 characters or more, and less for a shorter one."""
    return min(len(completion) / 200, 1.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    only = f"may be repeated: {', '.join(LABELS)}"
    add("--only", action="append", choices=list(LABELS), metavar="NAME", help=only)
    add("--rounds", type=int, default=3)
    add("--steps", type=int, default=3, help="timed steps per round")
    add("--model", type=Path, help="folder of another model, such as assets/tiny for a trial")
    folder = "folder of the model, the rows and rl-results.jsonl"
    add("--folder", type=Path, default=ROOT / "runs" / "benchmark", help=folder)
    add("--peers-python", type=Path, help="interpreter of an environment with the peers")
    add("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a key of Loupe's config")
    add("--append", action="store_true", help="add to the results that are in the folder")
    add("--markdown", action="store_true", help="print a Markdown table")
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> None:
    """Makes the model, the rows and the peers' environment where they are missing."""
    peers = ["trl"] if any(name.startswith("trl") for name in args.only) else ["loupe"]
    shared = argparse.Namespace(folder=args.folder, peers_python=args.peers_python, only=peers)
    frameworks.prepare(shared)
    args.folder, args.peers_python = shared.folder, shared.peers_python
    args.model = (args.model or args.folder / "model").resolve()


def pairs(folder: Path) -> list[dict]:
    """Returns {"prompt", "chosen", "rejected"} of lab_like.py's rows with the lengths of the jobs."""
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    out = []
    for line, document in zip(lines, json.loads((folder / "tokens.json").read_text()), strict=True):
        row, labels = json.loads(line), document["labels"]
        answer = sum(label != -100 for label in labels)
        prompt = len(labels) - answer
        fits = (
            PROMPT_TOKENS[0] <= prompt <= PROMPT_TOKENS[1] and ANSWER_TOKENS[0] <= answer <= ANSWER_TOKENS[1]
        )
        source = row["prompt"].partition("\n\nText:\n")[2]
        if fits and source != row["response"]:
            out.append({"prompt": row["prompt"], "chosen": row["response"], "rejected": source})
    return out


def rows_of_round(number: int, objective: str, args: argparse.Namespace) -> list[dict]:
    """Returns the rows of the first step and of the timed ones, in order."""
    known, count = pairs(args.folder), (1 + args.steps) * ROWS[objective]
    rows = [known[(number * count + i) % len(known)] for i in range(count)]
    if objective == "grpo":
        return [{"prompt": row["prompt"], "response": row["chosen"]} for row in rows]
    return rows


def loupe(name: str, rows: Path, args: argparse.Namespace) -> dict:
    """Runs train.py; returns the seconds of each timed step and the peak memory in bytes."""
    objective = name.removeprefix("loupe-")
    run, scratch = rows.parent / "run", rows.parent
    values = {"run": run, "model": scratch / "model", "rows": rows, "objective": objective}
    keys = {key: json.dumps(str(value)) for key, value in values.items()}
    text = CONFIG.format(**keys, steps=1 + args.steps, batch=ROWS[objective]) + SECTIONS[objective]
    (scratch / "loupe.toml").write_text(text, encoding="utf-8")
    (scratch / "lengths.py").write_text(inspect.getsource(length), encoding="utf-8")
    command = [sys.executable, "train.py", "--config", scratch / "loupe.toml"]
    process(command + [word for override in args.set for word in ("--set", override)])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record and "eval" not in record]
    assert len(steps) == 1 + args.steps, f"{run}: {len(steps)} steps"
    seconds, peaks = ([step[key] for step in steps] for key in ("seconds", "peak_memory"))
    return {"seconds": seconds[1:], "peak": max(peaks), "versions": ["Loupe"]}


def trl(name: str, rows: Path, args: argparse.Namespace) -> dict:
    """Runs rl_trl.py; returns the same as loupe()."""
    command = [args.peers_python, HERE / "rl_trl.py", name, rows.parent, "--steps", args.steps, "--round", 0]
    command += ["--batch", ROWS[name.split("-")[1]], "--device", "cpu", "--started", time.time()]
    return json.loads(process(command).splitlines()[-1])


def process(command: list) -> str:
    """Runs a command in the repository's folder and returns its stdout; RuntimeError with its last errors."""
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": os.environ | settings, "cwd": ROOT}
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run([str(word) for word in command], stderr=errors, **pipes)
        if done.returncode:
            errors.seek(0)
            raise RuntimeError(f"failed with exit code {done.returncode}:\n{errors.read()[-3000:]}")
    return done.stdout


def take_turn(name: str, number: int, args: argparse.Namespace) -> dict | None:
    """Runs one program for one round; returns its figures, or None (and prints its error) if it fails."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "rows.jsonl")
        Path(scratch, "model").symlink_to(args.model)
        made = rows_of_round(number, name.split("-")[1], args)
        rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        start = time.perf_counter()
        try:
            figures = (loupe if name.startswith("loupe") else trl)(name, rows, args)
        except RuntimeError as e:
            print(f"{name} {e}", file=sys.stderr)
            return None
    return {"name": name, "round": number, "whole": time.perf_counter() - start} | figures


def summarise(results: list[dict]) -> list[dict]:
    """Returns the table's row of each program, in the order of LABELS."""
    seconds = {(r["name"], r["round"]): statistics.median(r["seconds"]) for r in results}
    table = []
    for name in LABELS:
        mine = [r for r in results if r["name"] == name]
        if not mine:
            continue
        reference = f"loupe-{name.split('-')[1]}"
        both = [(seconds[name, r["round"]], seconds.get((reference, r["round"]))) for r in mine]
        times = [own / loupes for own, loupes in both if loupes]
        row = {"name": name, "rounds": len(mine), "seconds": statistics.median(own for own, _ in both)}
        row["times"] = statistics.median(times) if times else None
        table.append(row | {key: statistics.median(r[key] for r in mine) for key in ("peak", "whole")})
    return table


def show(table: list[dict], markdown: bool) -> None:
    """Prints the table, as text or as Markdown."""
    lines = [["", "s/step", "steps/s", "x Loupe's", "peak memory", "whole run", "rounds"]]
    for row in table:
        times = "" if row["times"] is None else f"{row['times']:.2f}"
        line = [LABELS[row["name"]], f"{row['seconds']:.2f}", f"{1 / row['seconds']:.3f}", times]
        lines.append([*line, f"{row['peak'] / 1e9:.1f} GB", f"{row['whole']:.0f} s", str(row["rounds"])])
    if markdown:
        lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
        print("\n".join("| " + " | ".join(line) + " |" for line in lines))
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.rjust(width + 2) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print(line[0].ljust(widths[0]) + "".join(cells))


def main() -> None:
    args = parse()
    args.only = args.only or list(LABELS)
    prepare(args)
    file = args.folder / "rl-results.jsonl"
    lines = file.read_text().splitlines() if args.append and file.exists() else []
    results = [json.loads(line) for line in lines]
    first = 1 + max((r["round"] for r in results if r["name"] in args.only), default=0)
    failed = False
    with open(file, "a" if args.append else "w") as log:
        for number in range(first, first + args.rounds):
            for name in args.only:
                turn = take_turn(name, number, args)
                failed |= turn is None
                if turn:
                    results.append(turn)
                    log.write(json.dumps(turn) + "\n")
                    log.flush()
                    seconds = " ".join(f"{s:.2f}" for s in turn["seconds"])
                    print(f"round {number}: {name}: {seconds} s a step", file=sys.stderr)
    show(summarise(results), args.markdown)
    print("\n" + frameworks.versions(results))
    sys.exit(failed)


if __name__ == "__main__":
    main()

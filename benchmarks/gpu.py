"""Runs everything that needs a GPU, in one command.

    python benchmarks/gpu.py [--only tests|recipe|frameworks] [--pairs 35000] [--steps N] [--folder DIR]

tests       the tests marked cuda: results equal the CPU's, bf16 and fp16 train, attention never waits for the
            GPU
recipe      train.py with configs/lab-pii-270m.toml on the 270M shape with random bf16 weights and lab-like
            rows: seconds of all steps, tokens/s, MFU, the peak of the GPU's allocator, and the loss of the
            first and of the last steps; rows repeat, so the loss falls
frameworks  frameworks.py with 1,000 rows: Loupe, plain and compiled, transformers + PEFT and TRL in turn
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from report.metrics_log import read_metrics  # noqa: E402

# The printed losses are means over this many steps.
LOSS_STEPS = 20
RECIPE = {
    "bf16": ["train.precision=bf16", "train.compile=false"],
    "bf16, compiled": ["train.precision=bf16", "train.compile=true"],
    "bf16, 64 rows a step": ["train.precision=bf16", "train.compile=false", "train.batch_size=64"],
    "fp16": ["train.precision=fp16", "train.force_fp16=true", "train.compile=false"],
}
PROGRAMS = ("loupe", "loupe-compiled", "hf-bf16", "hf-autocast", "trl", "trl-padding-free")


def train(name: str, args: argparse.Namespace) -> str:
    """Trains one variant of the recipe and summarises its metrics.jsonl in one line."""
    run = args.folder / name.replace(", ", "-").replace(" ", "-")
    keys = [f"model.name={args.folder / 'model'}", f"data.train={args.folder / 'rows.jsonl'}"]
    keys += ["data.validation_fraction=0", "train.eval_every=0", "train.save_every=0", "generate.prompts=[]"]
    keys += [f"run.dir={run}", f"train.device={args.device}", f"train.max_steps={args.steps}", *RECIPE[name]]
    command = [sys.executable, "train.py", "--config", "configs/lab-pii-270m.toml"]
    command += [word for key in keys for word in ("--set", key)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        return f"{name:22}  failed with exit code {done.returncode}"
    steps = [r for r in read_metrics(run / "metrics.jsonl")[0] if "loss" in r]
    seconds, losses = sum(r["seconds"] for r in steps), [r["loss"] for r in steps]
    mfu = f"{statistics.median(r['mfu'] for r in steps):.1%}" if "mfu" in steps[0] else "unknown"
    speed, peak = sum(r["tokens"] for r in steps) / seconds, max(r["peak_memory"] for r in steps) / 1e9
    return (
        f"{name:22}  {len(steps):,} steps in {seconds:.1f} s  {speed:,.0f} tokens/s  MFU {mfu}  "
        f"peak {peak:.2f} GB  loss {statistics.mean(losses[:LOSS_STEPS]):.3f} -> "
        f"{statistics.mean(losses[-LOSS_STEPS:]):.3f}"
    )


def python(*command) -> int:
    """Runs a Python program in the repository's folder and returns its exit code."""
    return subprocess.run([sys.executable, *command], cwd=ROOT).returncode


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Runs the tests, the lab's recipe and frameworks.py on a GPU."
    )
    add, parts = parser.add_argument, ("tests", "recipe", "frameworks")
    add("--only", action="append", choices=parts, help="may be repeated")
    add("--pairs", type=int, default=35_000, help="rows of the recipe")
    add("--steps", type=int, default=0, help="steps of the recipe; 0: one epoch")
    add("--rounds", type=int, default=3, help="rounds of frameworks.py")
    add("--device", default="cuda", choices=["cpu", "cuda"])
    add("--peers-python", help="interpreter of an environment with the peers (frameworks.py makes one)")
    add("--folder", type=Path, default=ROOT / "runs" / "gpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    parts, failed, frameworks = args.only or parts, False, args.folder.resolve() / "frameworks"
    args.folder = args.folder.resolve() / f"{args.pairs}-pairs"
    if "tests" in parts:
        failed |= python("-m", "pytest", "-m", "cuda", "-rs") != 0
    if "recipe" in parts:
        if not (args.folder / "tokens.json").is_file():
            if python("benchmarks/lab_like.py", args.folder, "--rows", str(args.pairs)):
                sys.exit("lab_like.py failed")
        for name in RECIPE:
            summary = train(name, args)
            failed |= "failed" in summary
            print(summary, flush=True)
    if "frameworks" in parts:
        command = ["--device", args.device, *"--steps 30 --peer-steps 10 --rounds".split(), str(args.rounds)]
        command += ["--peers-python", args.peers_python] if args.peers_python else []
        command += [word for name in PROGRAMS for word in ("--only", name)]
        failed |= python("benchmarks/frameworks.py", "--folder", frameworks, *command) != 0
    sys.exit(failed)


if __name__ == "__main__":
    main()

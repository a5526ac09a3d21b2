"""Runs everything that needs a GPU, in one command.

    python benchmarks/gpu.py [--only tests|recipe|frameworks] [--pairs 35000] [--steps N] [--folder DIR]

tests       the tests marked cuda: results equal the CPU's, bf16 and fp16 train, attention never waits for the
            GPU
recipe      configs/lab-pii-270m.toml through train.py on the 270M shape with random bf16 weights and lab-like
            pairs: seconds of all steps, tokens/s, MFU, the peak of the GPU's allocator, and the loss of the
            first and the last steps. There are fewer different pairs than rows, so pairs repeat and the loss
            falls
frameworks  frameworks.py: Loupe, plain and compiled, transformers + PEFT and TRL in turn, with 1,000 rows
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

FEW = 20  # steps whose mean loss is shown
RECIPE = {
    "bf16": ["train.precision=bf16", "train.compile=false"],
    "bf16, compiled": ["train.precision=bf16", "train.compile=true"],
    "bf16, 64 rows a step": ["train.precision=bf16", "train.compile=false", "train.batch_size=64"],
    "fp16": ["train.precision=fp16", "train.force_fp16=true", "train.compile=false"],
}
CONTESTANTS = ("loupe", "loupe-compiled", "hf-bf16", "hf-autocast", "trl", "trl-padding-free")


def train(name: str, args: argparse.Namespace) -> str:
    """Trains by one variant of the recipe and says in a line what its metrics.jsonl tells."""
    run = args.folder / name.replace(", ", "-").replace(" ", "-")
    keys = [
        f"model.name={args.folder / 'model'}",
        f"data.train={args.folder / 'rows.jsonl'}",
        "data.validation_fraction=0",
        "train.eval_every=0",
        "train.save_every=0",
        "generate.prompts=[]",
        f"run.dir={run}",
        f"train.device={args.device}",
        f"train.max_steps={args.steps}",
        *RECIPE[name],
    ]
    words = [word for key in keys for word in ("--set", key)]
    done = subprocess.run(
        [sys.executable, "train.py", "--config", "configs/lab-pii-270m.toml", *words],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    if done.returncode:
        return f"{name:22}  failed with exit code {done.returncode}"
    steps = [r for r in read_metrics(run / "metrics.jsonl")[0] if "loss" in r]
    seconds, losses = sum(r["seconds"] for r in steps), [r["loss"] for r in steps]
    mfu = f"{statistics.median(r['mfu'] for r in steps):.1%}" if "mfu" in steps[0] else "unknown"
    speed, peak = sum(r["tokens"] for r in steps) / seconds, max(r["peak_memory"] for r in steps) / 1e9
    return (
        f"{name:22}  {len(steps):,} steps in {seconds:.1f} s  {speed:,.0f} tokens/s  MFU {mfu}  "
        f"peak {peak:.2f} GB  loss {statistics.mean(losses[:FEW]):.3f} -> "
        f"{statistics.mean(losses[-FEW:]):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The tests, the lab's recipe and the frameworks on a GPU.")
    parser.add_argument(
        "--only", action="append", choices=("tests", "recipe", "frameworks"), help="may be repeated"
    )
    parser.add_argument("--pairs", type=int, default=35_000)
    parser.add_argument("--steps", type=int, default=0, help="of the recipe; 0: one epoch")
    parser.add_argument("--rounds", type=int, default=3, help="of the frameworks")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument(
        "--peers-python", help="interpreter of an environment with the peers (frameworks.py makes one)"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    parts, failed, frameworks = (
        args.only or ("tests", "recipe", "frameworks"),
        False,
        args.folder.resolve() / "frameworks",
    )
    args.folder = args.folder.resolve() / f"{args.pairs}-pairs"
    if "tests" in parts:
        failed |= (
            subprocess.run([sys.executable, "-m", "pytest", "-m", "cuda", "-rs"], cwd=ROOT).returncode != 0
        )
    if "recipe" in parts:
        if not (args.folder / "tokens.json").is_file():
            subprocess.run(
                [sys.executable, "benchmarks/lab_like.py", args.folder, "--rows", str(args.pairs)],
                cwd=ROOT,
                check=True,
            )
        for name in RECIPE:
            said = train(name, args)
            failed |= "failed" in said
            print(said, flush=True)
    if "frameworks" in parts:
        peers = ["--peers-python", args.peers_python] if args.peers_python else []
        only = [word for name in CONTESTANTS for word in ("--only", name)]
        command = [
            "benchmarks/frameworks.py",
            "--device",
            args.device,
            "--steps",
            "30",
            "--peer-steps",
            "10",
            "--rounds",
            str(args.rounds),
        ]
        failed |= (
            subprocess.run(
                [sys.executable, *command, "--folder", frameworks, *peers, *only], cwd=ROOT
            ).returncode
            != 0
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()

"""Compares train.py --plan with what the run then takes; each plan and each run is a process of its own.

    python benchmarks/planning.py [--only NUMBER ...] [--steps 16]

The 270M's weights are random, in bfloat16. On a CPU the peak is the largest resident size of the process, on
CUDA the allocator's.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.exporting import make  # noqa: E402

RUNS = [
    ("tiny", "train.precision=bf16", "adapter.r=32", "train.batch_size=4"),
    ("tiny", "train.precision=fp32", "adapter.type=dora", "adapter.r=8", "train.batch_size=8"),
    (
        "tiny",
        "train.precision=bf16",
        "adapter.type=full",
        "train.batch_size=2",
        "train.gradient_accumulation_steps=4",
    ),
    ("tiny", "train.precision=fp32", "adapter.r=64", "train.batch_size=6"),
    (
        "tiny",
        "train.precision=bf16",
        "adapter.type=dora",
        "adapter.r=16",
        "train.batch_size=3",
        "train.gradient_accumulation_steps=2",
    ),
    (
        "tiny",
        "train.precision=fp32",
        "adapter.type=full",
        "train.batch_size=4",
        "train.gradient_accumulation_steps=2",
    ),
    ("tiny", "train.precision=bf16", "adapter.r=8", "train.batch_size=12"),
    (
        "tiny",
        "train.precision=bf16",
        "adapter.r=128",
        "train.batch_size=1",
        "train.gradient_accumulation_steps=8",
    ),
    (
        "tiny",
        "train.precision=fp32",
        "adapter.r=4",
        "train.batch_size=16",
        "train.gradient_checkpointing=true",
    ),
    ("270M", "train.precision=bf16", "adapter.r=16", "train.batch_size=2"),
    (
        "270M",
        "train.precision=fp32",
        "adapter.type=dora",
        "adapter.r=128",
        "train.batch_size=1",
        "train.gradient_accumulation_steps=2",
    ),
    ("270M", "train.precision=bf16", "adapter.type=full", "train.batch_size=4"),
]


def train(base: str, folder: Path, settings: tuple, *words: str) -> str:
    """What train.py prints for small.toml's rows, with few of them to evaluate."""
    small = [
        f"model.name={base}",
        f"run.dir={folder}",
        "train.eval_samples=4",
        "generate.max_new_tokens=8",
        "data.validation=assets/samples/val.jsonl",
    ]
    sets = [word for setting in (*small, *settings) for word in ("--set", setting)]
    return subprocess.run(
        [sys.executable, "train.py", "--config", "small.toml", *sets, *words],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout


def mebibytes(text: str) -> int:
    return int(re.search(r"([\d,]+) MiB", text)[1].replace(",", ""))


def compare(base: str, folder: Path, settings: tuple) -> tuple[int, int, str]:
    """MiB planned, MiB measured, and the phase that the plan takes for the heaviest."""
    plan = train(base, folder, settings, "--plan")
    assert not folder.exists(), "a plan writes nothing"
    train(base, folder, settings)
    measured = json.loads((folder / "manifest.json").read_text())["run"]["peak memory"]
    return (
        mebibytes(plan[plan.index("in all") :]),
        mebibytes(measured),
        re.search(r"most is taken in (\w+)", plan)[1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned and measured peak memory.")
    parser.add_argument("--only", type=int, nargs="*", default=range(1, len(RUNS) + 1))
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"tiny": "tiny", "270M": str(Path(scratch, "270M"))}
        if any(RUNS[i - 1][0] == "270M" for i in args.only):
            maker = multiprocessing.get_context("spawn").Process(
                target=make, args=("270M", Path(folders["270M"]))
            )
            maker.start()
            maker.join()
        for i in args.only:
            name, *settings = RUNS[i - 1]
            planned, measured, phase = compare(
                folders[name], Path(scratch, f"run{i}"), (f"train.max_steps={args.steps}", *settings)
            )
            keys = ", ".join(s.partition(".")[2] for s in settings)
            print(f"{i:>2}  {name}  {keys:77}  planned {planned:>6,} MiB ({phase})  ", end="")
            print(f"measured {measured:>6,} MiB  {100 * (planned / measured - 1):+5.1f}%", flush=True)


if __name__ == "__main__":
    main()

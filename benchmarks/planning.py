"""Compares the memory estimate of train.py --plan with the peak memory of the run.

    python benchmarks/planning.py [--only NUMBER ...] [--steps 16]

Each plan and each run is a process of its own. The 270M's weights are random, in bfloat16. On a CPU the peak
is the largest resident size of the process, on CUDA the allocator's.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.exports import in_a_process, make  # noqa: E402

# The base of each run and its settings; type and r belong to [adapter], the others to [train].
RUNS = [
    "tiny precision=bf16 r=32 batch_size=4",
    "tiny precision=fp32 type=dora r=8 batch_size=8",
    "tiny precision=bf16 type=full batch_size=2 gradient_accumulation_steps=4",
    "tiny precision=fp32 r=64 batch_size=6",
    "tiny precision=bf16 type=dora r=16 batch_size=3 gradient_accumulation_steps=2",
    "tiny precision=fp32 type=full batch_size=4 gradient_accumulation_steps=2",
    "tiny precision=bf16 r=8 batch_size=12",
    "tiny precision=bf16 r=128 batch_size=1 gradient_accumulation_steps=8",
    "tiny precision=fp32 r=4 batch_size=16 gradient_checkpointing=true",
    "270M precision=bf16 r=16 batch_size=2",
    "270M precision=fp32 type=dora r=128 batch_size=1 gradient_accumulation_steps=2",
    "270M precision=bf16 type=full batch_size=4",
]


def train(base: str, folder: Path, settings: list[str], *options: str) -> str:
    """Returns what train.py prints for small.toml's rows, with a short evaluation."""
    short = ["train.eval_samples=4", "generate.max_new_tokens=8", "data.validation=assets/samples/val.jsonl"]
    keys = [f"model.name={base}", f"run.dir={folder}", *short, *settings]
    command = [sys.executable, "train.py", "--config", "small.toml", *options]
    command += [word for key in keys for word in ("--set", key)]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout


def mebibytes(text: str) -> int:
    return int(re.search(r"([\d,]+) MiB", text)[1].replace(",", ""))


def compare(base: str, folder: Path, settings: list[str]) -> tuple[int, int, str]:
    """Returns the MiB of the estimate, the measured MiB, and the phase with the largest estimate."""
    plan = train(base, folder, settings, "--plan")
    assert not folder.exists(), "a plan writes nothing"
    train(base, folder, settings)
    measured = json.loads((folder / "manifest.json").read_text())["run"]["peak memory"]
    phase = re.search(r"most is taken in (\w+)", plan)[1]
    return mebibytes(plan[plan.index("in all") :]), mebibytes(measured), phase


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", type=int, nargs="*", default=range(1, len(RUNS) + 1))
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"tiny": "tiny", "270M": str(Path(scratch, "270M"))}
        if any(RUNS[i - 1].startswith("270M") for i in args.only):
            in_a_process(make, "270M", Path(folders["270M"]))
        for i in args.only:
            name, *keys = RUNS[i - 1].split()
            settings = [("adapter." if key.startswith(("type", "r=")) else "train.") + key for key in keys]
            settings.append(f"train.max_steps={args.steps}")
            planned, measured, phase = compare(folders[name], Path(scratch, f"run{i}"), settings)
            print(f"{i:>2}  {name}  {', '.join(keys):77}  planned {planned:>6,} MiB ({phase})  ", end="")
            print(f"measured {measured:>6,} MiB  {100 * (planned / measured - 1):+5.1f}%", flush=True)


if __name__ == "__main__":
    main()

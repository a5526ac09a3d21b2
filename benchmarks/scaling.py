"""Times Loupe's step as supervised tokens, the instruction and the rank grow.

    python benchmarks/scaling.py [--only supervised|instruction|sharing|rank] [--rounds 3]

Runs the job of frameworks.py in one process, with documents of random ids of the lengths in question. The
points take turns, `--rounds` times; the ranks run one after the other, because each needs its own model.
Prints the medians, the least-squares line seconds = a + b x, and its R2. "sharing" times the lab-like rows
with and without train.share_prefix.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from benchmarks.lab_like import BATCH  # noqa: E402

# Tokens of the instruction, and mean tokens of a text and of a response.
PROMPT, TEXT = 80, 110


def documents(instruction: int, text: int, response: int) -> list:
    """Returns BATCH documents that begin with the same instruction; the response is supervised."""
    from data.render import IGNORE_INDEX, Document

    draw = random.Random(0)
    shared = [draw.randrange(1000, 6000) for _ in range(instruction)]
    rows = []
    for i in range(BATCH):
        ids = shared + [draw.randrange(1000, 6000) for _ in range(text + response)]
        labels = [IGNORE_INDEX] * (instruction + text - 1) + ids[instruction + text :] + [IGNORE_INDEX]
        rows.append(Document(ids, labels, f"row {i}"))
    return rows


def clocked(trainer, batch) -> float:
    """Returns the seconds of a step."""
    import torch

    start = time.perf_counter()
    trainer.step(batch)
    if trainer.run.precision.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(trainer, points: dict, rounds: int) -> dict[int, float]:
    """Maps {x: micro-batch} to {x: median seconds of a step}, without a warm-up step of each."""
    times = {x: [] for x in points}
    for _ in range(1 + rounds):
        for x, batch in points.items():
            times[x].append(clocked(trainer, batch))
    return {x: statistics.median(seconds[1:]) for x, seconds in times.items()}


def fit(times: dict[int, float]) -> tuple[float, float, float]:
    """Returns a, b and R2 of the least-squares line a + b x."""
    x, y = list(times), list(times.values())
    b, a = statistics.linear_regression(x, y)
    return a, b, statistics.correlation(x, y) ** 2


def show(title: str, times: dict[int, float]) -> None:
    (a, b, r2), (first, *_, last) = fit(times), times.values()
    print(f"{title:44}" + "".join(f"{x:>6}: {seconds:.3f} s" for x, seconds in times.items()))
    line = f"{a:.3f} s + {1e3 * b:.3f} ms x, R2 {r2:.4f}; last / first {last / first:.3f}"
    print(" " * 48 + line, flush=True)


def by_supervised(make, args) -> None:
    """Times growing responses; all else is equal."""
    trainer = make([])
    points = {BATCH * n: trainer.batches(documents(PROMPT, TEXT, n), 1)[0] for n in (25, 50, 100, 200, 400)}
    show("supervised tokens", timed(trainer, points, args.rounds))


def by_instruction(make, args) -> None:
    """Times a growing instruction, computed once for the batch or once a row."""
    for share in ("true", "false"):
        trainer = make([f"train.share_prefix={share}"])
        points = {n: trainer.batches(documents(n, TEXT, TEXT), 1)[0] for n in (20, 65, 110, 155, 200)}
        show(f"tokens of the instruction, share_prefix {share}", timed(trainer, points, args.rounds))


def by_sharing(make, args) -> None:
    """Times the lab-like rows with two models in turn; the order changes each round, no batch repeats."""
    both = [make([f"train.share_prefix={share}"]) for share in ("true", "false")]
    batches = [trainer.batches(trainer.data.documents, 1 + args.rounds) for trainer in both]
    times = []
    for n in range(1 + args.rounds):
        order = (0, 1) if n % 2 else (1, 0)
        times.append({i: clocked(both[i], batches[i][n]) for i in order})
    columns = zip(*((t[0], t[1], t[1] / t[0]) for t in times[1:]), strict=True)
    on, off, ratio = (statistics.median(values) for values in columns)
    seconds = f"share_prefix true {on:.3f} s, false {off:.3f} s, false / true {ratio:.3f}"
    print(f"lab-like rows: {seconds}", flush=True)


def by_rank(make, args) -> None:
    """Times growing ranks, one model after the other."""
    times = {}
    for r in (8, 32, 64, 128, 256):
        trainer = make([f"adapter.r={r}"])
        times |= timed(trainer, {r: trainer.batches(documents(PROMPT, TEXT, TEXT), 1)[0]}, args.rounds)
    show("rank", times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = {"supervised": by_supervised, "instruction": by_instruction}
    kinds |= {"sharing": by_sharing, "rank": by_rank}
    parser.add_argument("--only", choices=list(kinds), action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    folder = "folder of frameworks.py's model; it is made if it is missing"
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark", help=folder)
    args = parser.parse_args()
    if not (args.folder / "tokens.json").is_file():
        subprocess.run([sys.executable, HERE / "lab_like.py", args.folder], check=True)
    from benchmarks.ours import Trainer

    def make(overrides: list[str]) -> Trainer:
        return Trainer(args.folder.resolve(), [f"train.device={args.device}", *overrides])

    for kind in args.only or kinds:
        kinds[kind](make, args)


if __name__ == "__main__":
    main()

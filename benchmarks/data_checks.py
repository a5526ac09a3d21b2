"""Measures train.py --check-data: the seconds for many rows, and where the loss ranks planted wrong labels.

    python benchmarks/data_checks.py speed [--rows 35000]
    python benchmarks/data_checks.py noise [--rows 2000] [--share 0.05] [--steps 250]

`speed` checks redactions made of assets/samples, with shuffled words so that they do not repeat. `noise`
changes the labels of a share of made reviews, trains the embedded base on them for some steps,
and ranks the rows.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MARK = "\n\nText:\n"
SETTINGS = ["data.validation_fraction=0", "data.validation=[]", "train.eval_every=0"]


def many_rows(count: int) -> list[dict]:
    """Returns redactions whose text and response have the words of a sample, in one new order."""
    lines = (ROOT / "assets" / "samples" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    samples, rng, rows = [json.loads(line) for line in lines], random.Random(0), []
    for n in range(count):
        instruction, _, text = samples[n % len(samples)]["prompt"].partition(MARK)
        words = text.split(" ")
        rng.shuffle(words)
        masked = [f"[USERNAME_{i}]" if rng.random() < 0.05 else word for i, word in enumerate(words)]
        rows.append({"prompt": f"{instruction}{MARK}{' '.join(words)}", "response": " ".join(masked)})
    return rows


def noisy_rows(count: int, share: float) -> tuple[list[dict], set[int]]:
    """Returns reviews and the numbers (from 1) of those whose label was changed."""
    from assets.samples.make_small import (
        LABELS,
        LANGUAGES,
        WORDING,
        make_clauses,
        make_reviews,
        read_sections,
    )

    rng = random.Random(0)
    clauses = {name: make_clauses(read_sections(WORDING / f"{name}.txt"), rng) for name in LANGUAGES}
    rows = make_reviews(clauses, rng, "train", count)
    wrong = rng.sample(range(count), round(share * count))
    for n in wrong:
        rows[n]["output"] = rng.choice([label for label in LABELS if label != rows[n]["output"]])
    return rows, {n + 1 for n in wrong}


def train_py(*words: str, config: str) -> str:
    """Runs train.py with --set for SETTINGS, and returns its stdout."""
    sets = [word for setting in SETTINGS for word in ("--set", setting)]
    command = [sys.executable, "train.py", "--config", config, *sets, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2:
        sys.exit(done.stderr)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "noise"])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--share", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=250)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        rows, wrong = many_rows(args.rows or 35_000), set()
        if args.what == "noise":
            rows, wrong = noisy_rows(args.rows or 2000, args.share)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.write_text(text, encoding="utf-8")
        data = ["--set", f"data.train={file}"]
        if args.what == "speed":
            started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            train_py(*data, "--set", "data.max_length=2048", "--check-data", config="small.toml")
            seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
            processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            size = f"{len(rows):,} rows, {len(text) / 2**20:.0f} MB"
            print(f"{size}: {processor:.1f} s of a core, {seconds:.1f} s in all")
            return
        run = ["--set", f"run.dir={folder}/run", "--set", f"train.max_steps={args.steps}"]
        train_py(*data, *run, config="configs/classification.toml")
        words = ["--check-data", "--json", "--rank-by", f"{folder}/run/adapter"]
        ranking = json.loads(train_py(*data, *words, config="configs/classification.toml"))["ranking"]
        tenth = [int(row["id"].split(":")[1]) for row in ranking[: len(rows) // 10]]
        share = sum(n in wrong for n in tenth) / len(wrong)
        print(
            f"{len(rows):,} rows, {len(wrong)} wrong labels: {share:.0%} of them in the first tenth by loss"
        )


if __name__ == "__main__":
    main()

"""What runs gained on their validation rows: the reward and the measures before and after training.

    python benchmarks/rl_gain.py RUN [RUN ...]

For runs whose responses are redactions, with the rewards that ship. Each difference has its 95% interval of
the paired bootstrap: 1,000 draws of rows, the same rows before and after. `ended` is taken to be 1.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from report.bootstrap import mean_difference, paired  # noqa: E402
from tasks import redaction  # noqa: E402
from tasks.rewards import DEFAULTS, REWARDS  # noqa: E402

KEYS = ("leak_rate", "entity_f1", "preserved", "over_mask_rate", "exact_match")


def reward(prompt: str, gold: str, text: str) -> float:
    """Returns the weighted sum of the rewards of a redaction."""
    own = {name: weight for name, weight in DEFAULTS["redaction"].items() if name != "ended"}
    return DEFAULTS["redaction"]["ended"] + sum(
        w * REWARDS[name](prompt, text, gold) for name, w in own.items()
    )


def gains(run: Path) -> list[tuple[str, float, float, float, float]]:
    """Returns (measure, before, after, low and high end of the difference) of a run's validation rows."""
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = ([(r["prompt"], r["gold"], r[when]) for r in rows] for when in ("before", "after"))
    was, now = ([reward(*row) for row in side] for side in (before, after))
    found = [("reward", fmean(was), fmean(now), *mean_difference(now, was))]
    (old, new), (_, between) = paired([before, after], redaction)
    return found + [(key, old[key], new[key], *between[key]) for key in KEYS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for run in parser.parse_args().runs:
        print(f"\n{run}")
        for name, was, now, low, high in gains(run):
            print(f"  {name:16}{was:8.3f} ->{now:7.3f}   {now - was:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main()

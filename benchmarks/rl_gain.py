"""What configs/small-dpo.toml and small-grpo.toml gain over their start, by seed, and what a control gains.

    python train.py --config small.toml
    python benchmarks/rl_gain.py [--only dpo grpo] [--seeds 1 2 3] [--rows 200] [--out runs/gain]

Each recipe runs with each seed, and once more as a control. The control of DPO exchanges the chosen and the
rejected answer in a random half of the pairs; that of GRPO exchanges the rewards of a group at random. The
last weights count, not those with the best validation, which would select by what is measured here.

The measures are those of the first `--rows` rows of each of val.jsonl and val_unseen.jsonl in assets/samples,
before and after: no run learns from them. Each difference has its 95% interval of the paired bootstrap, with
1,000 draws of rows.

reward     the mean of the default rewards, of greedy answers and of answers sampled at temperature 1, of
           which each row has several; their mean is the row's reward
preferred  the share of the pairs that tasks.redaction_pairs makes of these rows whose margin became positive;
           before training all margins are 0, so it stands beside one half
others     tasks/redaction.py, of greedy answers, or of the first sampled ones where this is said

Finished runs in `--out` and the answers of an adapter are kept: the program continues where it was stopped.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from generation.load import LoadedModel
    from tasks.measures import Answers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

START = ROOT / "runs" / "small" / "adapter"
HELD_OUT = [ROOT / "assets" / "samples" / name for name in ("val.jsonl", "val_unseen.jsonl")]
KEYS = ("leak_rate", "entity_f1", "preserved", "over_mask_rate", "exact_match")
TEMPERATURES = {"greedy": 0.0, "sampled": 1.0}
ANSWERS = {"greedy": 1, "sampled": 4}  # of each row


def shuffled_reward(
    prompts: list[str], completions: list[str], golds: list[str], ended: list[bool]
) -> list[float]:
    """Returns the default rewards of redactions; those of one prompt are exchanged at random."""
    from training.objectives.rewards import default_rewards

    values, _ = default_rewards("redaction", [])(prompts, completions, golds, ended)
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    found = list(values)
    for group in by_prompt.values():
        order = random.Random(repr([completions[i] for i in group])).sample(group, len(group))
        for i, other in zip(group, order, strict=True):
            found[i] = values[other]
    return found


def train(method: str, seed: int, control: bool, out: Path) -> Path:
    """Returns the adapter of a run of the recipe, which it trains if there is none yet."""
    run = out / f"{method}-{seed}{'-control' if control else ''}"
    sets = [f"run.dir={run}", f"run.seed={seed}", "train.eval_every=0", "train.eval_samples=8"]
    if control and method == "dpo":
        sets.append(f"data.train={exchanged_pairs(seed, out)}")
    if control and method == "grpo":
        sets += ['grpo.rewards=["rl_gain:shuffled_reward"]', f"grpo.rewards_folder={Path(__file__).parent}"]
    if not (run / "manifest.json").exists() or not (run / "report.html").exists():
        words = [word for one in sets for word in ("--set", one)]
        command = [sys.executable, "train.py", "--config", f"configs/small-{method}.toml", *words]
        resume = ["--resume"] if (run / "checkpoints").exists() else []
        subprocess.run([*command, *resume], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return run / "adapter"


def exchanged_pairs(seed: int, out: Path) -> Path:
    """Returns a file with the pairs of the recipe, half of them with exchanged answers."""
    rng, file = random.Random(seed), out / f"pairs-{seed}.jsonl"
    rows = [json.loads(line) for line in (ROOT / "assets/samples/pairs.jsonl").open(encoding="utf-8")]
    for row in rng.sample(rows, len(rows) // 2):
        row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return file


def load(adapter: Path) -> "LoadedModel":
    """Returns the embedded model with an adapter."""
    from generation.load import add_model_arguments, load_for_inference

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    return load_for_inference(parser.parse_args(["--model", "tiny", "--adapter", str(adapter)]))


def answers(adapter: Path, samples: list, how: str, folder: Path) -> "Answers":
    """Returns the answers, one to each sample and then the next, and keeps them in a file of the folder."""
    from common.files import sha256
    from tasks.measures import Answers
    from training.config import Generate
    from training.evaluation import answer

    weights = sha256(adapter / "adapter_model.safetensors")[:16]
    file = folder / f"{how}-{len(samples)}-{weights}.json"
    if not file.exists():
        settings, asked = Generate(max_new_tokens=400, temperature=TEMPERATURES[how]), samples * ANSWERS[how]
        file.write_text(json.dumps(vars(answer(load(adapter), asked, settings, seed=0))), encoding="utf-8")
    return Answers(**json.loads(file.read_text(encoding="utf-8")))


def preferred(adapter: Path, samples: list, out: Path) -> list[bool]:
    """Returns for each pair that is made of the samples whether its margin is positive."""
    from data.rows import read_samples
    from tasks.redaction_pairs import KINDS, pairs
    from training.objectives.dpo import TIE, DirectPreferenceOptimization, reference_log_probs

    start, trained, file = load(START), load(adapter), out / "pairs-held-out.jsonl"
    lines = [json.dumps(pair) for pair in pairs(samples, list(KINDS), seed=0)]
    file.write_text("\n".join(lines), encoding="utf-8")
    made, tokenizer = read_samples(file)[0], start.tokenizer
    documents, _ = DirectPreferenceOptimization().documents(made, tokenizer, 1536, "drop", 10**6)
    before, after = (reference_log_probs(model, documents) for model in (start, trained))
    margins = (after - before) @ before.new_tensor([1.0, -1.0])
    return [margin > TIE[trained.precision.name] for margin in margins.tolist()]


def gains(
    method: str, adapter: Path, samples: list, out: Path
) -> list[tuple[str, float, float, float, float]]:
    """Returns (measure, before, after, low and high end of the difference) of a run."""
    from report.bootstrap import mean_difference, paired
    from tasks import redaction
    from training.objectives.rewards import default_rewards

    found = []
    if method == "dpo":
        hits = preferred(adapter, samples, out)
        found.append(("preferred", 0.5, fmean(hits), *mean_difference(hits, [0.5] * len(hits))))
    for how in ("greedy", "sampled")[: 2 if method == "grpo" else 1]:
        sides = [answers(a, samples, how, f) for a, f in ((START, out), (adapter, adapter.parent))]
        n, rewards = len(samples), default_rewards("redaction", [])
        both = (rewards(s.prompts, s.texts, s.golds, s.ended)[0] for s in sides)
        was, now = ([fmean(values[i::n]) for i in range(n)] for values in both)
        found.append((f"reward, {how}", fmean(was), fmean(now), *mean_difference(now, was)))
        rows = [list(zip(s.prompts, s.golds, s.texts, strict=True))[:n] for s in sides]
        (old, new), (_, between) = paired(rows, redaction)
        keys = KEYS if how == "greedy" else KEYS[:1]
        found += [(f"{key}, {how}", old[key], new[key], *between[key]) for key in keys]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=["dpo", "grpo"], default=["dpo", "grpo"])
    add("--seeds", nargs="+", type=int, default=[1, 2, 3])
    add("--rows", type=int, default=200)
    add("--out", type=Path, default=ROOT / "runs" / "gain")
    args = parser.parse_args()
    args.out = args.out.resolve()
    from data.rows import read_samples

    args.out.mkdir(parents=True, exist_ok=True)
    samples = [sample for file in HELD_OUT for sample in read_samples(file)[0][: args.rows]]
    for method in args.only:
        for control in (False, True):
            for seed in args.seeds:
                adapter = train(method, seed, control, args.out)
                print(f"\n{method}, seed {seed}{', control' if control else ''}")
                for name, was, now, low, high in gains(method, adapter, samples, args.out):
                    print(
                        f"  {name:24}{was:8.3f} ->{now:7.3f}   {now - was:+.3f} [{low:+.3f}, {high:+.3f}]",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

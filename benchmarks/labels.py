"""Compares a trained classifier with the majority class of its training rows, row by row.

    python benchmarks/labels.py --run runs/classification [--draws 1000]

For the run's first validation file it prints the accuracy of the generated responses, of the labels compared
by their log-probabilities, and of the majority class; and the 95% interval of each difference by a paired
bootstrap. It also prints the seconds that both ways of answering take.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--draws", type=int, default=1000)
    args = parser.parse_args()
    from data.rows import read_samples
    from report.bootstrap import mean_difference
    from training.config import load_config

    cfg = load_config(args.run / "config.toml")
    training, samples = read_samples(cfg.data.train)[0], read_samples(cfg.data.validation[0])[0]
    golds = [sample.messages[-1][1].strip() for sample in samples]
    labels = [sample.messages[-1][1].strip() for sample in training]
    majority, _ = Counter(labels).most_common(1)[0]
    answers = answers_of(args.run, cfg, samples, sorted({*labels}))
    guessed = [gold == majority for gold in golds]
    print(f"{len(golds)} rows; always {majority!r}: {sum(guessed) / len(golds):.1%} right")
    for name, (texts, seconds) in answers.items():
        right = [text.strip().casefold() == gold.casefold() for text, gold in zip(texts, golds, strict=True)]
        low, high = mean_difference(right, guessed, args.draws)
        beside = f"{low:+.1%} to {high:+.1%} beside the majority class"
        print(f"{name:10} {sum(right) / len(golds):.1%} right, {beside}, {seconds:.1f} s")


def answers_of(run: Path, cfg, samples: list, labels: list[str]) -> dict[str, tuple[list[str], float]]:
    """Returns {"generated" or "labels": (an answer for each sample, seconds)}."""
    from generation.load import add_model_arguments, load_for_inference
    from training.evaluation import answer, label_log_probs

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    words = ["--model", cfg.model.name, "--adapter", str(run / "adapter")]
    loaded = load_for_inference(parser.parse_args(words))
    prompts = [loaded.tokenizer.render_prompt(sample.messages[:-1]) for sample in samples]
    started = time.perf_counter()
    texts = answer(loaded, samples, cfg.generate, seed=0).texts
    generated = time.perf_counter()
    log_probs = label_log_probs(loaded, prompts, labels)
    compared = time.perf_counter()
    best = [labels[row.index(max(row))] for row in log_probs]
    return {"generated": (texts, generated - started), "labels": (best, compared - generated)}


if __name__ == "__main__":
    main()

"""How good a model is: python evaluate.py --model DIR|hub-id|tiny [--adapter DIR] --data FILE [--limit N]
[--json]
"""

import argparse
import json
import math
import sys

from common.errors import run
from generation.load import LoadedModel, add_model_arguments, load_for_inference

TASKS = ["auto", "redaction", "classification", "translation", "text"]


def main(argv: list[str] | None = None) -> int:
    """rows -> model -> adapter -> loss -> answers -> figures.

    Exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped.
    """
    args = parse_arguments(argv)
    return run(lambda: evaluate(args))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="The loss of a model on a file, and its responses against the file's."
    )
    add_model_arguments(parser)
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help="a JSON array or JSONL, rows as for training")
    add("--limit", type=int, metavar="N", help="take the first N rows only")
    add("--task", default="auto", choices=TASKS, help='what a good response is (default "auto": by the rows)')
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest response (default %(default)s)")
    add("--loss-only", action="store_true", help="no responses, which take most of the time")
    add("--json", action="store_true", help='print one object: {"loss", "tokens", "exact_match", ...}')
    args = parser.parse_args(argv)
    for flag, value in (("--limit", args.limit), ("--max-new-tokens", args.max_new_tokens)):
        if value is not None and value < 1:
            parser.error(f"{flag} is {value}; it must be 1 or more")
    return args


def evaluate(args: argparse.Namespace) -> int:
    from data.rows import read_samples
    from tasks.choose import choose_task

    samples, _ = read_samples(args.data)
    loaded = load_for_inference(args)
    samples, documents, left_out = render(samples[: args.limit], loaded, args.data)
    figures = {
        "model": args.model,
        "adapter": args.adapter,
        "data": args.data,
        "rows": len(samples),
        "rows_left_out": left_out,
    }
    task = choose_task(args.task, samples)
    figures |= loss(documents, loaded)
    if not args.loss_only:
        figures |= answers(samples, loaded, args.max_new_tokens, task)
    print(json.dumps(figures, ensure_ascii=False, allow_nan=False) if args.json else table(figures, task))
    return 0


def render(samples: list, loaded: LoadedModel, file: str) -> tuple[list, list, int]:
    """Returns the samples that fit the model's positions, their documents, and how many are too long."""
    from common.progress import warn
    from data.render import render_all

    cfg = loaded.model.config
    longest = cfg.max_position_embeddings
    documents, counts = render_all(
        samples, loaded.tokenizer, max_length=longest, on_long="drop", vocab_size=cfg.vocab_size
    )
    if counts.dropped:
        warn(
            f"{file}: {counts.dropped} of {len(samples)} rows are left out: the model has {longest} "
            f"positions and the longest row {counts.longest} tokens"
        )
    kept = {d.id for d in documents}
    return [s for s in samples if s.id in kept], documents, counts.dropped


def loss(documents: list, loaded: LoadedModel) -> dict:
    """{"loss": mean over the supervised tokens, "tokens": how many}; raises ValueError where that is no
    number.
    """
    from common.progress import bar
    from training.evaluation import mean_loss
    from training.objectives.sft import SupervisedFineTuning

    progress = bar(len(documents), "loss", "row")
    found = mean_loss(loaded.model, SupervisedFineTuning(), counted(documents, progress), loaded.precision)
    progress.close()
    if not math.isfinite(found["loss"]):
        raise ValueError(
            f"the loss is {found['loss']}: the model's weights or the adapter's are not finite; try --dtype "
            f"float32, or take them anew"
        )
    return {key: found[key] for key in ("loss", "tokens")}


def counted(rows: list, progress):
    """The rows, one after the other, while the bar counts them."""
    for row in rows:
        yield row
        progress.update()


def answers(samples: list, loaded: LoadedModel, max_new_tokens: int, task) -> dict:
    """exact_match and, for redactions, leak_rate, entity_f1, ...

    of the likeliest answers; {} where no row has a response.
    """
    from common.progress import warn
    from training.config import Generate
    from training.evaluation import answer, measures

    said = answer(
        loaded.model,
        loaded.tokenizer,
        samples,
        Generate(max_new_tokens=max_new_tokens),
        loaded.precision,
        seed=0,
    )
    longest = max(map(len, loaded.tokenizer.encode_batch(said.golds)), default=0)
    if longest > max_new_tokens:
        warn(
            f"answers end after {max_new_tokens} tokens and the longest right one has {longest}; with "
            f"--max-new-tokens {longest} it could be given"
        )
    return measures(said, task)


def table(figures: dict, task) -> str:
    """The figures for people, aligned; classes below one another where there are any."""
    from report.metrics_log import figure, present_metrics

    lines = [f"{name:16}{figures[name]}" for name in ("model", "adapter", "data") if figures[name]]
    lines += [f"{'rows':16}{figures['rows']:,}, {figures['tokens']:,} supervised tokens", ""]
    shown = present_metrics(figures)
    lines += [f"{m.label:16}{figure(m, figures[m.key]):>8}" for m in shown]
    if "per_label" in figures:
        support = sum(scores["support"] for scores in figures["per_label"].values())
        rows = figures["per_label"] | {"all": task.overall(figures) | {"support": support}}
        lines += ["", f"{'':20}{'precision':>10}{'recall':>10}{'F1':>10}{'entities':>10}"]
        lines += [
            f"{label:20}"
            + "".join(f"{s[k]:>10.1%}" for k in ("precision", "recall", "f1"))
            + f"{s['support']:>10,}"
            for label, s in rows.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Evaluates a model on a file: its loss, and how its responses compare with the responses of the file.

python evaluate.py --model DIR|hub-id|tiny [--adapter DIR] --data FILE [--limit N] [--json]
python evaluate.py --compare RUN RUN ... [--html FILE] [--json]
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from types import ModuleType

from common.errors import DONE, run
from common.files import moved
from common.progress import bar, warn
from data.render import Document, render_all
from data.rows import Sample, read_samples
from generation.load import LoadedModel, add_model_arguments, load_for_inference
from report.metrics_log import figure, present_metrics
from tasks.choose import TASKS, choose_task


def main(argv: list[str] | None = None) -> int:
    """Prints the loss and the measures of a model on a file; returns the exit code (common/errors.py)."""
    args = parse_arguments(argv)
    return run(lambda: compare_runs(args) if args.compare else evaluate(args))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Returns the options; exits with code 2 if a value is out of range."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="The loss of a model on a file, and its responses against the file's; or, with "
        "--compare, what differs between finished runs.",
    )
    add_model_arguments(parser, required=False)
    add = parser.add_argument
    add("--compare", nargs="+", metavar="RUN", help="compare the folders of finished runs with the first")
    add("--html", metavar="FILE", help="with --compare: also write the comparison as a page")
    add("--data", type=moved, metavar="FILE", help="a JSON array or JSONL as for training")
    add("--limit", type=int, metavar="N", help="take the first N rows only")
    add(
        "--task", default="auto", choices=["auto", *TASKS], help="decides the measures (default: by the rows)"
    )
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest response (default %(default)s)")
    add("--loss-only", action="store_true", help="generate no responses, which takes most of the time")
    add("--json", action="store_true", help='print one object: {"loss", "tokens", "exact_match", ...}')
    args = parser.parse_args(argv)
    _check_compare(parser, args)
    for flag, value in (("--limit", args.limit), ("--max-new-tokens", args.max_new_tokens)):
        if value is not None and value < 1:
            parser.error(f"{flag} is {value}; it must be 1 or more")
    return args


def _check_compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with code 2 if an option does not go with --compare, or if an evaluation lacks one."""
    given = [
        action.option_strings[0]
        for action in parser._actions
        if getattr(args, action.dest, action.default) != action.default
    ]
    if args.compare:
        if others := sorted(set(given) - {"--compare", "--html", "--json"}):
            parser.error(f"--compare reads what the runs have written; leave out {', '.join(others)}")
        return
    if args.html:
        parser.error("--html needs --compare")
    if missing := [flag for flag in ("--model", "--data") if flag not in given]:
        parser.error(f"the following arguments are required: {', '.join(missing)} (or --compare RUN RUN ...)")


def compare_runs(args: argparse.Namespace) -> int:
    """Prints the comparison of finished runs, and writes it as a page if one is named."""
    from report.compare import as_json, as_text, compare
    from report.compare_page import write_comparison

    comparison = compare(args.compare)
    if args.html:
        write_comparison(args.html, comparison)
    text = json.dumps(as_json(comparison), ensure_ascii=False) if args.json else as_text(comparison)
    print(text)
    if args.html and not args.json:
        print(f"\npage: {args.html}")
    return DONE


def evaluate(args: argparse.Namespace) -> int:
    """Prints the loss and the measures."""
    samples, _ = read_samples(args.data)
    task = choose_task(args.task, samples)
    loaded = load_for_inference(args)
    samples, documents, left_out = render(samples[: args.limit], loaded, args.data)
    figures = {"model": args.model, "adapter": args.adapter, "data": args.data}
    figures |= {"rows": len(samples), "rows_left_out": left_out} | loss(documents, loaded)
    if not args.loss_only:
        figures |= measures(samples, loaded, args.max_new_tokens, task)
    print(json.dumps(figures, ensure_ascii=False, allow_nan=False) if args.json else table(figures, task))
    return DONE


def render(samples: list[Sample], loaded: LoadedModel, file: str) -> tuple[list[Sample], list[Document], int]:
    """Returns (samples that fit the model's positions, their documents, number of longer samples)."""
    vocab_size, positions = loaded.model.config.vocab_size, loaded.model.config.max_position_embeddings
    documents, counts = render_all(
        samples, loaded.tokenizer, max_length=positions, on_long="drop", vocab_size=vocab_size
    )
    if counts.dropped:
        warn(
            f"{file}: {counts.dropped} of {len(samples)} rows are left out: the model has {positions} "
            f"positions, and the longest row has {counts.longest} tokens"
        )
    kept = {d.id for d in documents}
    return [s for s in samples if s.id in kept], documents, counts.dropped


def loss(documents: list[Document], loaded: LoadedModel) -> dict:
    """Returns {"loss": mean of -log p over the supervised tokens, in nats, "tokens": number of these tokens}.

    Raises ValueError if the loss is not finite.
    """
    from training.evaluation import mean_loss
    from training.objectives.sft import SupervisedFineTuning

    def counted() -> Iterator[Document]:
        for document in documents:
            yield document
            progress.update()

    with bar(len(documents), "loss", "row") as progress:
        found = mean_loss(loaded.model, SupervisedFineTuning(), counted(), loaded.precision)
    if not math.isfinite(found["loss"]):
        raise ValueError(
            f"the loss is {found['loss']}: the weights of the model or of the adapter are not finite; try "
            "--dtype float32, or download or train these weights again"
        )
    return {key: found[key] for key in ("loss", "tokens")}


def measures(samples: list[Sample], loaded: LoadedModel, max_new_tokens: int, task: ModuleType) -> dict:
    """Generates responses greedily and returns the task's measures of them; returns {} for raw text."""
    from training import evaluation
    from training.config import Generate

    settings = Generate(max_new_tokens=max_new_tokens)
    answers = evaluation.answer(loaded, samples, settings, seed=0)
    longest = max(map(len, loaded.tokenizer.encode_batch(answers.golds)), default=0)
    if longest > max_new_tokens:
        warn(
            f"responses end after {max_new_tokens} tokens, and the longest gold response has {longest}; set "
            f"--max-new-tokens {longest}"
        )
    return evaluation.measures(answers, task)


def table(figures: dict, task: ModuleType) -> str:
    """Returns the figures as an aligned table; for a task with labels, one line per label follows."""
    lines = [f"{name:16}{figures[name]}" for name in ("model", "adapter", "data") if figures[name]]
    lines += [f"{'rows':16}{figures['rows']:,}, {figures['tokens']:,} supervised tokens", ""]
    lines += [f"{m.label:16}{figure(m, figures[m.key]):>8}" for m in present_metrics(figures)]
    if "per_label" in figures:
        support = sum(scores["support"] for scores in figures["per_label"].values())
        rows = figures["per_label"] | {"all": task.overall(figures) | {"support": support}}
        lines += ["", f"{'':20}{'precision':>10}{'recall':>10}{'F1':>10}{'support':>10}"]
        for label, scores in rows.items():
            shares = "".join(f"{scores[key]:>10.1%}" for key in ("precision", "recall", "f1"))
            lines.append(f"{label:20}{shares}{scores['support']:>10,}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

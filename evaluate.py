"""Evaluates a model on a file: its loss, and how its responses compare with the responses of the file.

python evaluate.py --model DIR|hub-id|FILE.gguf|tiny [--adapter DIR] --data FILE [--limit N] [--json]
python evaluate.py --compare RUN RUN ... [--html FILE] [--json]
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from common.errors import DONE, run
from common.files import moved
from common.progress import bar, warn
from data.render import Document, render_all
from data.rows import Sample, read_samples
from generation.load import LoadedModel, add_model_arguments, load_for_inference
from report.metrics_log import confusion_lines, figure, present_metrics
from tasks.choose import TASKS, choose_labels, choose_task
from tasks.classification import wrong_labels

if TYPE_CHECKING:  # --help must not wait for torch.
    from training import evaluation


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
    labels = "the labels of a classification (default: the different responses of the file)"
    add("--labels", nargs="+", default=[], metavar="LABEL", help=labels)
    add("--max-new-tokens", type=int, default=512, metavar="N", help="longest response (default %(default)s)")
    about = "what generates the responses; llama.cpp (of --model FILE.gguf, on the CPU) needs xllamacpp"
    add("--backend", default="loupe", choices=["loupe", "llama.cpp"], help=about)
    add("--loss-only", action="store_true", help="generate no responses, which takes most of the time")
    add("--json", action="store_true", help='print one object: {"loss", "tokens", "exact_match", ...}')
    args = parser.parse_args(argv)
    _check_compare(parser, args)
    for flag, value in (("--limit", args.limit), ("--max-new-tokens", args.max_new_tokens)):
        if value is not None and value < 1:
            parser.error(f"{flag} is {value}; it must be 1 or more")
    if args.backend == "llama.cpp" and args.loss_only:
        parser.error("--loss-only generates no responses, --backend llama.cpp does; leave one of them out")
    if args.labels and args.task not in ("auto", "classification"):
        parser.error(f"--labels are of a classification, not of --task {args.task}; leave one of them out")
    if wrong := wrong_labels(args.labels):
        parser.error(f"--labels {args.labels} {wrong}")
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

    if args.html:
        refuse_page(Path(args.html), args.compare)
    comparison = compare(args.compare)
    if args.html:
        write_comparison(args.html, comparison)
    text = json.dumps(as_json(comparison), ensure_ascii=False) if args.json else as_text(comparison)
    print(text)
    if args.html and not args.json:
        print(f"\npage: {args.html}")
    return DONE


def refuse_page(page: Path, runs: list[str]) -> None:
    """Raises ValueError if `page` is a folder, lies in no folder, or is a file that one of the runs holds."""
    if page.is_dir():
        raise ValueError(f"--html {page} is a folder; name a file")
    if not page.parent.is_dir():
        raise ValueError(f"--html {page}: there is no folder {page.parent}; make it first")
    owners = [run for run in runs if page.resolve().is_relative_to(Path(run).resolve())]
    if owners and page.exists():
        raise ValueError(f"--html {page} is a file of the run {owners[0]}; name another file")


def evaluate(args: argparse.Namespace) -> int:
    """Prints the loss and the measures."""
    samples, _ = read_samples(args.data)
    task = choose_task(args.task, samples, args.labels)
    labels = choose_labels(task, samples, (), args.labels, "--labels")
    if args.backend == "llama.cpp":
        refuse_what_llama_cpp_lacks(args)
    loaded = load_for_inference(args)
    samples, documents, left_out = render(samples[: args.limit], loaded, args.data)
    figures = {"model": args.model, "adapter": args.adapter, "data": args.data}
    figures |= {"backend": args.backend} if args.backend != "loupe" else {}
    figures |= {"rows": len(samples), "rows_left_out": left_out} | loss(documents, loaded, task)
    if not args.loss_only:
        answers = responses(samples, loaded, args.max_new_tokens, args.backend)
        figures |= measures(samples, answers, loaded, task, labels)
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


def loss(documents: list[Document], loaded: LoadedModel, task: ModuleType) -> dict:
    """Returns {"loss": mean of -log p over the supervised tokens, in nats, "tokens": number of these tokens}.

    For chats and raw text, perplexity and bits_per_byte are added.

    Raises ValueError if the loss is not finite.
    """
    from training.evaluation import mean_loss, text_measures
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
    more = text_measures(found, documents, loaded.tokenizer) if task is TASKS["text"] else {}
    return {key: found[key] for key in ("loss", "tokens")} | more


def refuse_what_llama_cpp_lacks(args: argparse.Namespace) -> None:
    """Raises ValueError without xllamacpp, and for a model that llama.cpp cannot load as it is."""
    from exporting.llama_cpp import require
    from model.hub import resolve
    from model.weights import gguf_files

    require("--backend")
    remedy = "export it first: python export.py --model M [--adapter DIR] --to gguf --out FILE.gguf"
    if args.adapter:
        raise ValueError(f"--adapter {args.adapter}: --backend llama.cpp takes a GGUF file alone; {remedy}")
    if not gguf_files(resolve(args.model, args.revision)):
        raise ValueError(f"--model {args.model}: --backend llama.cpp takes a GGUF file; {remedy}")


def responses(
    samples: list[Sample], loaded: LoadedModel, max_new_tokens: int, backend: str
) -> "evaluation.Answers":
    """Generates a response to each conversation greedily, by Loupe or by llama.cpp."""
    from training import evaluation
    from training.config import Generate

    if backend == "loupe":
        answers = evaluation.answer(loaded, samples, Generate(max_new_tokens=max_new_tokens), seed=0)
    else:
        answers = in_llama_cpp(samples, loaded, max_new_tokens)
    longest = max(map(len, loaded.tokenizer.encode_batch(answers.golds)), default=0)
    if longest > max_new_tokens:
        warn(
            f"responses end after {max_new_tokens} tokens, and the longest gold response has {longest}; set "
            f"--max-new-tokens {longest}"
        )
    return answers


def in_llama_cpp(samples: list[Sample], loaded: LoadedModel, max_new_tokens: int) -> "evaluation.Answers":
    """Generates the responses in llama.cpp, from the same token ids as Loupe would."""
    from exporting.llama_cpp import respond
    from model.weights import gguf_files
    from training.evaluation import Answers, last_exchange

    exchanges = [e for e in map(last_exchange, samples) if e]
    prompts = [loaded.tokenizer.render_prompt(messages) for messages, _ in exchanges]
    texts, ended = list[str](), list[bool]()
    if prompts:
        # llama.cpp finds the other parts of a split file beside the first one, not beside our link to it.
        file = gguf_files(loaded.folder)[0].resolve()
        with bar(len(prompts), "llama.cpp", "answer") as progress:
            size = loaded.tokenizer.vocab_size
            texts, ended = respond(file, size, prompts, max_new_tokens, progress.update)
    return Answers([m[-1][1] for m, _ in exchanges], [gold for _, gold in exchanges], texts, ended)


def measures(
    samples: list[Sample],
    answers: "evaluation.Answers",
    loaded: LoadedModel,
    task: ModuleType,
    labels: list[str],
) -> dict:
    """Returns the task's measures of the responses, and of Loupe's own choice of labels; {} for raw text."""
    from training import evaluation

    return evaluation.measures(answers, task, labels) | evaluation.label_measures(loaded, samples, labels)


def table(figures: dict, task: ModuleType) -> str:
    """Returns the figures as an aligned table; for a task with labels, one line per label follows."""
    lines = [
        f"{name:16}{figures[name]}" for name in ("model", "adapter", "data", "backend") if figures.get(name)
    ]
    lines += [f"{'rows':16}{figures['rows']:,}, {figures['tokens']:,} supervised tokens", ""]
    lines += [f"{m.label:16}{figure(m, figures[m.key]):>8}" for m in present_metrics(figures)]
    if "per_label" in figures:
        support = sum(scores["support"] for scores in figures["per_label"].values())
        rows = figures["per_label"] | {"all": task.overall(figures) | {"support": support}}
        lines += ["", f"{'':20}{'precision':>10}{'recall':>10}{'F1':>10}{'support':>10}"]
        for label, scores in rows.items():
            shares = "".join(f"{scores[key]:>10.1%}" for key in ("precision", "recall", "f1"))
            lines.append(f"{label:20}{shares}{scores['support']:>10,}")
    if "confusion" in figures:
        lines += ["", *confusion_lines(figures["confusion"])]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""train.py --check-data: what is wrong with the rows of a config's data files, before a run is spent on them.

The checks read the files, the tokenizer and the model's config; only the ranking of rows by their loss loads
weights. Nothing is trained, and no folder of a run is written.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import torch

from common.device import Precision, pick_device
from common.errors import DONE, FAILED
from common.progress import bar, say
from data import defects
from data.defects import Finding, Found
from data.languages import language
from data.loader import split_validation
from data.packing import pack
from data.render import IGNORE_INDEX, Document
from data.rows import Sample
from lora.peft_io import load_adapter
from model.config import read_config
from model.hub import resolve
from model.tokenizer import Tokenizer
from model.weights import load_model
from report.defects import table, write_defects
from tasks import classification
from tasks import defects as task_defects
from tasks.choose import name_of
from training.build import make_objective
from training.config import Config
from training.dataset import BaseFiles, read_config_rows, refuse_missing_files, render_rows
from training.evaluation import groups
from training.objectives.objective import Objective, target_log_probs

NO_LIMIT = 2**31  # tokens
SAMPLE = 2000  # Of more rows, about so many are tokenized, and those that may be too long.
OF_TURN = 8  # Tokens of a turn besides its text, at most
BASE = "base"  # the value of --rank-by for the base without an adapter


def check_data(cfg: Config, rank_by: str = "", html: str = "", as_json: bool = False) -> int:
    """Prints what is wrong with the rows; returns 1 if something would spoil a run, else 0.

    Args:
        rank_by: "base" or the folder of an adapter, whose loss ranks the rows; "": they are not ranked.
        html: file of a page with the rows; "": none.
        as_json: print one JSON object instead of a table.
    """
    refuse_missing_files(cfg)
    if rank_by and cfg.train.objective != "sft":
        raise ValueError(f"--rank-by needs responses to rank, and train.objective is {cfg.train.objective!r}")
    objective = make_objective(cfg)
    train, validation, bad = _read_all(cfg, objective)
    folder = resolve(cfg.model.name, cfg.model.revision, weights=bool(rank_by))
    base = BaseFiles(folder, read_config(folder), Tokenizer(folder))
    task = task_defects.likely_task(cfg.data.task, train, cfg.data.labels)
    samples = [*train, *validation]
    limit = min(cfg.data.max_length, base.config.max_position_embeddings)
    found: Found = defects.row_defects(train, validation, task is classification)
    found |= task_defects.task_defects(task, samples, cfg.data.labels)
    some = samples[:: -(-len(samples) // SAMPLE)]
    measured = samples if rank_by else list(dict.fromkeys([*some, *_may_exceed(samples, limit)]))
    unlimited = replace(cfg, data=replace(cfg.data, max_length=NO_LIMIT, on_long="drop"))
    documents = render_rows(unlimited, objective, base, measured)[0]
    lengths = _lengths(documents)
    found |= defects.length_defects(lengths, limit)
    found["bad_rows"] = bad
    found["unsupervised"] = {s.id: "" for s in measured if s.id not in lengths}
    tokens = [lengths[s.id][0] for s in some if s.id in lengths]
    trained = {s.id for s in train}
    to_rank = [d for d in documents if d.id in trained and len(d.input_ids) <= limit]
    count = len(samples) + len(bad)
    made = defects.findings(found, count, _limits(cfg))
    languages = Counter(map(language, defects.without_instruction(samples)))
    summary = {
        "files": cfg.data.train + cfg.data.validation,
        "train": len(train),
        "validation": len(validation),
        "task": name_of(task),
        "spoiled": any(finding.spoils for finding in made),
        "tokens": {"max_length": limit, "rows": len(tokens), "percentiles": defects.percentiles(tokens)},
        "languages": {name: n / len(samples) for name, n in languages.most_common()},
        "findings": [_as_json(finding) for finding in made],
        "ranking": _ranking(cfg, base, to_rank, rank_by),
    }
    say(json.dumps(summary, ensure_ascii=False) if as_json else table(summary))
    if html:
        write_defects(Path(html), cfg.run.name, summary, {s.id: s for s in samples}, task)
        if not as_json:
            say(f"page with the rows: {html}")
    return FAILED if summary["spoiled"] else DONE


def _read_all(cfg: Config, objective: Objective) -> tuple[list[Sample], list[Sample], dict[str, str]]:
    """Returns training samples, validation samples, and {"FILE:LINE": message} of the faulty rows."""
    names = [Path(file).name for file in cfg.data.train + cfg.data.validation]
    skipping = replace(cfg, data=replace(cfg.data, on_bad="skip"))

    def read(files: list[str]) -> tuple[list[Sample], list[str]]:
        return read_config_rows(skipping, objective, files)

    def read_one(file: str) -> tuple[list[Sample], list[str]]:
        samples, problems = read([file])
        name = Path(file).name
        if names.count(name) == 1:
            return samples, problems
        # A training file may have the same name, and then the ids would not be unique.
        samples = [replace(s, id=file + s.id.removeprefix(name)) for s in samples]
        return samples, [file + problem.removeprefix(name) for problem in problems]

    train, problems = read(cfg.data.train)
    sets = [read_one(file) for file in cfg.data.validation]
    validation = list(chain.from_iterable(samples for samples, _ in sets))
    if not sets and cfg.data.validation_fraction:
        train, validation = split_validation(train, cfg.data.validation_fraction, cfg.run.seed)
    problems = list(chain(problems, *(more for _, more in sets)))
    return train, validation, dict(problem.split(": ", 1) for problem in problems)


def _may_exceed(samples: Sequence[Sample], limit: int) -> list[Sample]:
    """Returns the samples that may have more than `limit` tokens: a token is a byte of UTF-8 or more."""

    def most(sample: Sample) -> int:
        turns = [text for _, text in sample.messages] if sample.messages else [sample.text or ""]
        turns.append(sample.rejected or "")
        return sum(len(text.encode("utf-8", "surrogatepass")) + OF_TURN for text in turns)

    return [sample for sample in samples if most(sample) > limit]


def _limits(cfg: Config) -> dict[str, tuple[str, float]]:
    """Returns the kinds with the share that spoils a run: the config says what to do with some of them."""
    limits = defects.KINDS | task_defects.KINDS
    on_long = {"error": (defects.ANY, defects.ANY), "drop": (defects.NEVER, defects.NEVER)}
    too_long, cut = on_long.get(cfg.data.on_long, (defects.MANY, defects.ANY))
    bad = defects.ANY if cfg.data.on_bad == "error" else defects.MANY
    for kind, share in (("bad_rows", bad), ("too_long", too_long), ("cut_prompts", cut)):
        limits[kind] = (limits[kind][0], share)
    return limits


def _lengths(documents: Sequence[Document]) -> dict[str, tuple[int, int]]:
    """Returns {id: (tokens, tokens before the first supervised one)}, of a sample's longest document."""
    found: dict[str, tuple[int, int]] = {}
    for document in documents:
        tokens = len(document.input_ids)
        first = next((i for i, label in enumerate(document.labels) if label != IGNORE_INDEX), tokens - 1)
        found[document.id] = max(found.get(document.id, (0, 0)), (tokens, first + 1))
    return found


def _as_json(finding: Finding) -> dict:
    rows = [{"id": id, "note": note} for id, note in finding.rows.items()]
    return {**asdict(finding), "count": len(rows), "rows": rows}


@torch.no_grad()
def _ranking(cfg: Config, base: BaseFiles, documents: Sequence[Document], rank_by: str) -> list[dict]:
    """Returns {"id", "loss"} of each document, the highest mean loss of a supervised token (nats) first."""
    if not rank_by:
        return []
    precision = Precision(cfg.train.precision, pick_device(cfg.train.device))
    dtype = precision.base_dtype(cfg.model.dtype, trains_all=False)
    model = load_model(base.folder, dtype, precision.device, cfg.model.quantize)
    if rank_by != BASE:
        load_adapter(model, rank_by)
    model.eval()
    ranked = []
    with bar(len(documents), "loss", "row") as progress, precision.autocast():
        for group in groups(documents):
            batch = pack(group, share_prefix=True).to(precision.device)
            sums = batch.sums(-target_log_probs(model, batch)[0]).tolist()
            for id, total, count in zip(batch.ids, sums, batch.target_counts, strict=True):
                ranked.append({"id": id, "loss": total / count})
            progress.update(len(group))
    return sorted(ranked, key=lambda row: -row["loss"])

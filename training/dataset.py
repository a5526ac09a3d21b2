"""What a run reads beside the weights: the base's config and tokenizer, and the rows."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from common.errors import listed
from common.files import sha256
from common.progress import say, warn
from data import render, token_cache
from data.checks import brief, examine
from data.loader import split_validation
from data.render import Document
from data.rows import read_samples
from model import tokenizer
from model.config import Gemma3Config, read_config
from model.tokenizer import Tokenizer
from training.config import Config

TOKENS = Path(__file__).resolve().parents[1] / "runs" / ".tokens"


@dataclass
class Reader:
    """What of the base the rows are read with."""

    folder: Path
    config: Gemma3Config
    tokenizer: Tokenizer


@dataclass
class ValidationSet:
    name: str
    samples: list
    documents: list[Document]


@dataclass
class TrainingData:
    documents: list[Document]
    validation: list[ValidationSet]
    files: list[str]
    facts: dict


def read(cfg: Config, folder: Path) -> tuple[Reader, TrainingData]:
    """The config and tokenizer of the base in `folder`, and the documents of a run."""
    reader = Reader(folder, read_config(folder), Tokenizer(folder))
    return reader, build_data(cfg, reader)


def refuse_missing_files(cfg: Config) -> None:
    """Raises ValueError that lists every data file that is not there, with the folder from which it was looked for."""
    files = {"data.train": cfg.data.train, "data.validation": cfg.data.validation}
    missing = [
        f"{key}: {file or repr(file)}: cannot be read: "
        + ("Is a directory" if Path(file).is_dir() else "No such file or directory")
        for key, names in files.items()
        for file in names
        if not Path(file).exists() or Path(file).is_dir()
    ]
    if missing:
        raise ValueError(
            listed("the data is not there:", missing, f"Name JSON or JSONL files, as seen from {Path.cwd()}")
        )


def build_data(cfg: Config, base: Reader) -> TrainingData:
    """Reads, checks, renders and splits the run's files; raises ValueError with all that is wrong in them."""
    train, problems = read_samples(cfg.data.train, cfg.data.format, cfg.data.on_bad)
    sets = []
    for file in cfg.data.validation:
        samples, bad = read_samples([file], cfg.data.format, cfg.data.on_bad)
        alike = sum(Path(file).stem == Path(other).stem for other in cfg.data.validation) > 1
        sets.append((file if alike else Path(file).stem, samples))
        problems += bad
    if not sets and cfg.data.validation_fraction:
        train, held_out = split_validation(train, cfg.data.validation_fraction, cfg.run.seed)
        sets.append(("validation", held_out))
    held_out = [sample for _, samples in sets for sample in samples]
    if cfg.train.eval_samples:
        sets = [(name, samples[: cfg.train.eval_samples]) for name, samples in sets]
    documents, counts = _render(cfg, base, train)
    validation = [_validation_set(cfg, base, *named) for named in sets]
    _refuse_too_long(cfg, base, [documents, *(v.documents for v in validation)])
    report = examine(train, documents, held_out, problems, counts)
    say(brief(report))
    if problems:
        warn(f"{len(problems)} bad rows skipped (data.on_bad = 'skip'); the first: {problems[0]}")
    return TrainingData(documents, validation, [*cfg.data.train, *cfg.data.validation], report)


def _validation_set(cfg: Config, base: Reader, name: str, samples: list) -> ValidationSet:
    """The samples that are measured, loss and answers alike: those that data.on_long leaves."""
    documents, counts = _render(cfg, base, samples)
    if counts.dropped:
        warn(
            f"{name}: {counts.dropped} of {len(samples)} rows are longer than data.max_length and are not measured"
        )
    kept = {d.id for d in documents}
    return ValidationSet(name, [s for s in samples if s.id in kept], documents)


def _refuse_too_long(cfg: Config, base: Reader, sets: list[list[Document]]) -> None:
    """Raises ValueError before training for what the model has no positions for: a prompt needs one more for its answer."""
    positions = base.config.max_position_embeddings
    longest = max((len(d.input_ids) for documents in sets for d in documents), default=0)
    problems = (
        [f"the longest row has {longest} tokens; set data.max_length to {positions}"]
        if longest > positions
        else []
    )
    for i, prompt in enumerate(cfg.generate.prompts, 1):
        length = len(base.tokenizer.render_prompt((("user", prompt),)))
        problems += (
            [f"prompt {i} of generate.prompts has {length} tokens; shorten it to {positions - 1}"]
            if length >= positions
            else []
        )
    if problems:
        raise ValueError(listed(f"{base.folder}: the model has {positions} positions:", problems))


def _render(cfg: Config, base: Reader, samples):
    """The samples' documents and their counts; those of many rows are kept for the next run."""
    how = (
        "all" if cfg.train.objective == "pretrain" else cfg.data.loss_on,
        cfg.data.max_length,
        cfg.data.on_long,
        base.config.vocab_size,
    )

    def others() -> bytes:
        files = [Path(module.__file__) for module in (render, token_cache, tokenizer)] + [
            base.folder / "tokenizer.json"
        ]
        return repr((how, version("tokenizers"))).encode() + b"".join(sha256(f).encode() for f in files)

    return token_cache.stored(
        TOKENS, samples, others, lambda: render.render_all(samples, base.tokenizer, *how)
    )

"""Reads the config and the tokenizer of the base model, and the training and validation data."""

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from common.errors import SHOWN, listed
from common.files import sha256
from common.progress import say, warn
from data import render, token_cache
from data.checks import brief, examine
from data.files import why_unreadable
from data.loader import split_validation
from data.render import Counts, Document
from data.rows import Sample, read_samples
from data.token_cache import Rendered
from model import tokenizer
from model.config import Gemma3Config, read_config
from model.tokenizer import Tokenizer
from tasks import text
from tasks.choose import choose_labels, choose_task
from training.config import Config
from training.objectives.objective import Objective

DATA_FILES = ("data.train", "data.validation", "data.retention")
TOKEN_CACHE = Path(__file__).resolve().parents[1] / "runs" / ".tokens"


@dataclass
class BaseFiles:
    """A base model's folder with its config and tokenizer, without its weights."""

    folder: Path
    config: Gemma3Config
    tokenizer: Tokenizer


@dataclass
class ValidationSet:
    name: str
    samples: list[Sample]
    documents: list[Document]
    task: ModuleType
    labels: list[str] = field(default_factory=list)  # of a classification, as its responses


@dataclass
class TrainingData:
    samples: list[Sample]
    documents: list[Document]
    validation: list[ValidationSet]
    hashes: dict[str, str]  # file -> SHA-256 of what was read
    checks: dict  # data.checks.examine's findings
    left_out: list[Sample]  # training samples without a document: too long, or nothing supervised
    counts: Counts
    retention: list[ValidationSet] = field(default_factory=list)  # general text, measured by its loss only


def read(cfg: Config, objective: Objective, folder: Path) -> tuple[BaseFiles, TrainingData]:
    """Reads config and tokenizer of the base model in `folder`, and the data files that `cfg` names."""
    base = BaseFiles(folder, read_config(folder), Tokenizer(folder))
    return base, build_data(cfg, objective, base)


def refuse_missing_files(cfg: Config) -> None:
    """Raises ValueError that lists every data file that does not exist or is no regular file."""
    named = {key: getattr(cfg.data, key.split(".")[1]) for key in DATA_FILES}
    missing = []
    for key, file in ((key, file) for key, files in named.items() for file in files):
        if why := why_unreadable(Path(file)):
            missing.append(f"{key}: {file or repr(file)}: {why}")
    if missing:
        remedy = f"Name data files, such as JSON or JSONL, as seen from {Path.cwd()}"
        raise ValueError(listed("the data is not there:", missing, remedy))


def build_data(cfg: Config, objective: Objective, base: BaseFiles) -> TrainingData:
    """Reads the data files, splits off validation rows if there is no file of them, tokenizes and checks.

    Raises ValueError if rows are wrong, or if a file changes while it is read.
    """
    hashes = _hashes(cfg)
    train, problems = read_config_rows(cfg, objective, cfg.data.train)
    sets = []
    for file in cfg.data.validation:
        samples, bad = read_config_rows(cfg, objective, [file])
        sets.append((set_name(file, cfg.data.validation), samples))
        problems += bad
    if not sets and cfg.data.validation_fraction:
        train, held_out = split_validation(train, cfg.data.validation_fraction, cfg.run.seed)
        sets.append(("validation", held_out))
    held_out = [sample for _, samples in sets for sample in samples]
    # All rows of a file decide on its task, not only those that are measured.
    tasks = {name: choose_task(cfg.data.task, samples, cfg.data.labels) for name, samples in sets}
    labels = {n: choose_labels(tasks[n], rows, train, cfg.data.labels, "data.labels") for n, rows in sets}
    if cfg.train.eval_samples:
        sets = [(name, samples[: cfg.train.eval_samples]) for name, samples in sets]
    _report_special_tokens(cfg, base, [*train, *held_out])
    documents, counts = render_rows(cfg, objective, base, train)
    rendered = [render_rows(cfg, objective, base, rows) for _, rows in sets]
    pairs = zip(sets, rendered, strict=True)
    validation = [
        _validation_set(name, tasks[name], labels[name], rows, made) for (name, rows), made in pairs
    ]
    _refuse_too_long(cfg, base, [documents, *(v.documents for v in validation)])
    checks = examine(train, documents, held_out, problems, counts)
    say(brief(checks))
    if problems:
        warn(f"{len(problems)} bad rows skipped (data.on_bad = 'skip'); the first: {problems[0]}")
    kept = {d.id for d in documents}
    left_out = [s for s in train if s.id not in kept]
    retention = _retention_sets(cfg, base)
    if changed := [f for f, digest in _hashes(cfg).items() if digest != hashes[f]]:
        raise ValueError(f"{', '.join(changed)}: changed while it was read; start again when it is complete")
    return TrainingData(train, documents, validation, hashes, checks, left_out, counts, retention)


def _hashes(cfg: Config) -> dict[str, str]:
    """Returns {data file: SHA-256}."""
    return {f: sha256(f) for f in cfg.data.train + cfg.data.validation + cfg.data.retention}


def read_config_rows(cfg: Config, objective: Objective, files: list[str]) -> tuple[list[Sample], list[str]]:
    """Returns the samples of files and the problems of the rows that are skipped."""
    try:
        needs_response = bool(objective.needs_response)
        return read_samples(files, cfg.data.format, cfg.data.on_bad, needs_response, cfg.data.columns)
    except ValueError as e:
        if cfg.train.objective != "grpo" or not objective.needs_response:
            raise
        note = "a prompt alone is enough for rewards that do not take `gold`"
        raise ValueError(f"{e}\n{objective.needs_response} need the response of each row; {note}") from None


def _report_special_tokens(cfg: Config, base: BaseFiles, samples: list[Sample]) -> None:
    """Warns if samples spell special tokens of the model, and says what becomes of them."""
    found = render.special_token_rows(samples, base.tokenizer.special_tokens)
    if ids := {id for ids in found.values() for id in ids}:
        first = next(sample.id for sample in samples if sample.id in ids)
        tokens = ", ".join(sorted(found)[:SHOWN])
        is_text = cfg.data.special_tokens == "text"
        what = (
            'stay text (data.special_tokens = "parse" makes tokens of them)' if is_text else "become tokens"
        )
        warn(f"{len(ids)} rows spell special tokens, which {what}: {tokens}; the first is {first}")


def _retention_sets(cfg: Config, base: BaseFiles) -> list[ValidationSet]:
    """Returns the sets of data.retention: up to train.eval_samples rows of each, cut at data.max_length."""
    found, vocab_size = [], base.config.vocab_size
    max_length = min(cfg.data.max_length, base.config.max_position_embeddings)
    for file in cfg.data.retention:
        rows, _ = read_samples([file], cfg.data.format, cfg.data.on_bad, columns=cfg.data.columns)
        samples = rows[: cfg.train.eval_samples or None]
        with base.tokenizer.parsing_special_tokens(cfg.data.special_tokens == "parse"):
            documents, _ = render.render_all(
                samples, base.tokenizer, cfg.data.loss_on, max_length, "truncate", vocab_size
            )
        found.append(ValidationSet(set_name(file, cfg.data.retention), samples, documents, text))
    return found


def set_name(file: str, files: list[str]) -> str:
    """Returns the name of a file without its folder and suffix, or the whole path if two files share it."""
    alike = sum(Path(file).stem == Path(other).stem for other in files) > 1
    return file if alike else Path(file).stem


def _validation_set(
    name: str, task: ModuleType, labels: list[str], samples: list[Sample], rendered: Rendered
) -> ValidationSet:
    """Returns the set without samples that are too long or unsupervised; warns about those too long."""
    documents, counts = rendered
    if counts.dropped:
        warn(f"{name}: {counts.dropped} of {len(samples)} rows exceed data.max_length and are not measured")
    kept = {d.id for d in documents}
    return ValidationSet(name, [s for s in samples if s.id in kept], documents, task, labels)


def _refuse_too_long(cfg: Config, base: BaseFiles, sets: list[list[Document]]) -> None:
    """Raises ValueError if a document or a prompt has more tokens than the model has positions.

    A prompt of generate.prompts must leave one position for its completion.
    """
    positions, problems = base.config.max_position_embeddings, []
    longest = max((len(d.input_ids) for documents in sets for d in documents), default=0)
    if longest > positions:
        problems.append(f"the longest row has {longest} tokens; set data.max_length to {positions}")
    for i, prompt in enumerate(cfg.generate.prompts, 1):
        length = len(base.tokenizer.render_prompt((("user", prompt),)))
        if length >= positions:
            problems.append(
                f"prompt {i} of generate.prompts has {length} tokens; shorten it to {positions - 1}"
            )
    if problems:
        raise ValueError(listed(f"{base.folder}: the model has {positions} positions:", problems))


def render_rows(cfg: Config, objective: Objective, base: BaseFiles, rows: list[Sample]) -> Rendered:
    """Returns the documents of the rows; for 2,000 rows or more they are cached on disk, in TOKEN_CACHE."""
    limits = (cfg.data.max_length, cfg.data.on_long, base.config.vocab_size)

    def depends_on() -> bytes:
        files = [Path(module.__file__ or "") for module in (render, token_cache, tokenizer)]
        hashes = [sha256(f) for f in (*files, base.folder / "tokenizer.json")]
        options = (cfg.train.objective, cfg.data.loss_on, cfg.data.special_tokens, limits)
        return repr((options, version("tokenizers"), hashes)).encode()

    def documents() -> Rendered:
        with base.tokenizer.parsing_special_tokens(cfg.data.special_tokens == "parse"):
            return objective.documents(rows, base.tokenizer, *limits)

    return token_cache.load_or_render(TOKEN_CACHE, rows, depends_on, documents)

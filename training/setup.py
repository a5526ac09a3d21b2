"""From the config to the parts of a run: model with its adapters, documents, loader, the loop's numbers."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from data.doctor import brief, examine
from data.formats import read_samples
from data.loader import Loader, split_validation
from data.render import Document, render_all
from lora.inject import inject
from lora.peft_io import load_adapter
from model.config import read_config
from model.gemma3 import Gemma3ForCausalLM
from model.hub import resolve
from model.tokenizer import Tokenizer
from model.weights import hash_model, load_model
from training.config import Config
from training.loop import Plan
from training.objectives import pretrain, sft
from training.precision import Precision
from training.progress import say, warn

OBJECTIVES = {"sft": sft, "pretrain": pretrain}


@dataclass
class Base:
    """The base model and where it came from."""

    model: Gemma3ForCausalLM
    tokenizer: Tokenizer
    folder: Path
    hash: str


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


def refuse_missing_files(cfg: Config) -> None:
    """Raises ValueError that lists every data file that is not there, with the folder from which it was looked for."""
    files = {"data.train": cfg.data.train, "data.validation": cfg.data.validation}
    missing = [f"  {key}: {file or repr(file)}: cannot be read: " + ("Is a directory" if Path(file).is_dir() else "No such file or directory")
               for key, names in files.items() for file in names if not Path(file).exists() or Path(file).is_dir()]
    if missing:
        raise ValueError("\n".join(["the data is not there:", *missing, f"Name JSON or JSONL files, as seen from {Path.cwd()}"]))


def build_base(cfg: Config, precision: Precision) -> Base:
    """The base in the dtype that the run wants, on its device, with nothing trainable yet."""
    folder = resolve(cfg.model.name, cfg.model.revision)
    dtype = precision.base_dtype(cfg.model.dtype, trains_all=cfg.adapter.type == "full")
    if cfg.model.init == "random":
        tokenizer = Tokenizer(folder)
        model = Gemma3ForCausalLM(read_config(folder)).to(dtype)
        model.reset_parameters(cfg.run.seed)
        return Base(model.to(precision.device), tokenizer, folder, f"random weights of seed {cfg.run.seed}")
    with ThreadPoolExecutor(1) as beside:
        digest = beside.submit(hash_model, folder)
        tokenizer = Tokenizer(folder)
        return Base(load_model(folder, dtype, precision.device), tokenizer, folder, digest.result())


def build_outline(cfg: Config) -> Base:
    """The base as far as it is known without its weights: shapes on the meta device, and the tokenizer."""
    folder = resolve(cfg.model.name, cfg.model.revision, weights=False)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(read_config(folder))
    return Base(model, Tokenizer(folder), folder, hash="")


def add_adapters(model: Gemma3ForCausalLM, cfg: Config) -> int:
    """Makes the config's adapters, or all of the model, trainable; returns how many numbers train."""
    a = cfg.adapter
    if a.type == "full":
        model.requires_grad_(True)
    elif a.init_from:
        loaded = load_adapter(model, a.init_from)
        a.type, a.r, a.lora_alpha = "dora" if loaded.get("use_dora") else "lora", loaded["r"], loaded["lora_alpha"]
        a.use_rslora, a.lora_dropout = loaded.get("use_rslora", False), loaded.get("lora_dropout", 0.0)
    else:
        inject(model, type=a.type, r=a.r, lora_alpha=a.lora_alpha, lora_dropout=a.lora_dropout, use_rslora=a.use_rslora,
               target_modules=a.target_modules, seed=cfg.run.seed)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def build_data(cfg: Config, base: Base) -> TrainingData:
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


def _validation_set(cfg: Config, base: Base, name: str, samples: list) -> ValidationSet:
    """The samples that are measured, loss and answers alike: those that data.on_long leaves."""
    documents, counts = _render(cfg, base, samples)
    if counts.dropped:
        warn(f"{name}: {counts.dropped} of {len(samples)} rows are longer than data.max_length and are not measured")
    kept = {d.id for d in documents}
    return ValidationSet(name, [s for s in samples if s.id in kept], documents)


def _refuse_too_long(cfg: Config, base: Base, sets: list[list[Document]]) -> None:
    """Raises ValueError before training for what the model has no positions for: a prompt needs one more for its answer."""
    positions = base.model.config.max_position_embeddings
    longest = max((len(d.input_ids) for documents in sets for d in documents), default=0)
    problems = [f"the longest row has {longest} tokens; set data.max_length to {positions}"] if longest > positions else []
    for i, prompt in enumerate(cfg.generate.prompts, 1):
        length = len(base.tokenizer.render_prompt((("user", prompt),)))
        problems += [f"prompt {i} of generate.prompts has {length} tokens; shorten it to {positions - 1}"] if length >= positions else []
    if problems:
        raise ValueError(f"{base.folder}: the model has {positions} positions:\n" + "\n".join(problems))


def _render(cfg: Config, base: Base, samples):
    loss_on = "all" if cfg.train.objective == "pretrain" else cfg.data.loss_on
    return render_all(samples, base.tokenizer, loss_on, cfg.data.max_length, cfg.data.on_long, base.model.config.vocab_size)


def build_loader(cfg: Config, documents: list[Document]) -> Loader:
    t = cfg.train
    return Loader(documents, t.batch_size, cfg.run.seed, t.shuffle, t.max_tokens or None, t.share_prefix)


def build_plan(cfg: Config, loader: Loader) -> Plan:
    t = cfg.train
    per_epoch = math.ceil(len(loader) / t.gradient_accumulation_steps)
    steps = math.ceil(round(t.epochs * per_epoch, 6))  # 1.1 * 50 is 55.00000000000001
    return Plan(t.max_steps or steps, len(loader), t.gradient_accumulation_steps, t.learning_rate, t.lr_scheduler,
                t.warmup_steps, t.max_grad_norm, t.eval_every, t.save_every, t.early_stopping_patience)


def trained_weights(model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}

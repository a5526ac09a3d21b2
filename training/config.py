"""The run's config: every key with its type, default and meaning; TOML in, `--set section.key=value` over it, all mistakes in one error."""

import math
import tomllib
import types
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from common.errors import closest


@dataclass
class Run:
    name: str = ""
    """Name of the run; the config file's name where it is empty."""
    dir: str = ""
    """Folder that the run writes; runs/<name> where it is empty."""
    seed: int = 3407
    """Seed of initial adapters, dropout and the order of the data."""


@dataclass
class Model:
    name: str = "tiny"
    """"tiny" (the embedded base), a folder, or a Hugging Face hub id."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type that a frozen base is kept in ("auto": bfloat16 where training computes in it, else float32) and a full run is written in ("auto": bfloat16)."""
    init: Literal["pretrained", "random"] = "pretrained"
    """"random" starts from fresh weights of the folder's config.json: pretraining."""


@dataclass
class Adapter:
    type: Literal["lora", "dora", "full"] = "lora"
    """"lora", "dora", or "full": every weight trains and no adapter is made."""
    r: int = 16
    """Rank."""
    lora_alpha: float = 16
    """Scale: the adapter's output is multiplied with lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    use_rslora: bool = False
    """Scale with lora_alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers to adapt, or "all-linear"."""
    init_from: str = ""
    """A PEFT folder to start from; its type, rank, scale and modules count, not the ones here."""


@dataclass
class Data:
    train: list[str] = field(default_factory=list)
    """Training file or files (JSON array or JSONL)."""
    validation: list[str] = field(default_factory=list)
    """Validation file or files; each is measured before and after, the first one's loss also on the way: it decides which adapter is best."""
    validation_fraction: float = 0.05
    """Share of the training rows held out where no validation file is named; 0: none."""
    format: Literal["auto", "json", "jsonl"] = "auto"
    """File format; "auto" looks at the content."""
    loss_on: Literal["response", "all"] = "response"
    """Which tokens are supervised."""
    max_length: int = 2048
    """Longest sample, in tokens."""
    on_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a longer one."""
    on_bad: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used."""


@dataclass
class Train:
    objective: Literal["sft", "pretrain", "dpo", "grpo"] = "sft"
    """What a step means."""
    epochs: float = 1
    """Passes over the data; may be a fraction."""
    max_steps: int = 0
    """Optimiser steps; 0: by epochs."""
    batch_size: int = 8
    """Samples in a micro-batch."""
    max_tokens: int = 0
    """Fill micro-batches up to this many tokens instead; 0: by batch_size."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimiser step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" takes the matrices of the layers, AdamW the rest."""
    learning_rate: float = 2e-4
    """Peak rate."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up: to 0 in a line, in half a cosine, or not at all."""
    warmup_steps: int = 0
    """Steps over which the rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled decay of the matrices."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this; 0: never."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the matrix products; "auto": bf16 where the device does it well."""
    force_fp16: bool = False
    """Train in fp16 although Gemma 3's activations (about 8e5) overflow it (65,504)."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", ..."""
    share_prefix: bool = True
    """Compute the tokens that samples of a micro-batch begin with, an instruction say, once; the gradients are those of each sample alone."""
    gradient_checkpointing: bool = False
    """Keep each layer's input alone and work the rest out again in the backward pass: less memory, slower steps."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile the layers and the loss: half a minute at the start, then on a CPU steps 3 to 10% shorter; "auto": for a run of half an hour there."""
    shuffle: bool = True
    """A new order in each epoch."""
    log_every: int = 10
    """Steps between lines on a terminal that is none; metrics.jsonl has every step."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the end only."""
    eval_samples: int = 100
    """Rows of each validation set that are measured; 0: all."""
    save_every: int = 0
    """Steps between checkpoints; 0: none but when stopped."""
    save_total_limit: int = 2
    """How many are kept."""
    early_stopping_patience: int = 0
    """Evaluations without a better loss after which the run stops; 0: never."""


@dataclass
class Generate:
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Sample among the k likeliest; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest that make up this share."""
    prompts: list[str] = field(default_factory=list)
    """Prompts answered before and after training, for the terminal and the report."""


@dataclass
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    generate: Generate = field(default_factory=Generate)

    def to_toml(self) -> str:
        """The config as TOML text that load_config reads back to an equal one."""
        return "\n".join(
            f"[{name}]\n" + "".join(f"{k} = {_toml(v)}\n" for k, v in section.items())
            for name, section in asdict(self).items()
        )


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Reads a TOML file and applies `section.key=value` overrides; raises ValueError that lists every problem at once."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; start from small.toml or one of configs/") from None
    except OSError as e:
        raise ValueError(
            f"{path}: cannot be read ({e.strerror}); name a TOML file such as small.toml"
        ) from None
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{path}: not valid TOML: byte {e.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path}: not valid TOML: {e}") from None
    cfg, problems, wrong = Config(), [], []
    for section, values in raw.items():
        if isinstance(values, dict):
            for key, value in values.items():
                _assign(cfg, section, key, value, str(path), problems, wrong)
        elif section in _names(cfg):
            problems.append(
                f"{path}: {section} must be a section of keys; write [{section}] once, in single brackets, and the keys under it"
            )
        else:
            problems.append(
                f"{path}: {section} stands outside a section; put it under one of {_list(_names(cfg))}"
            )
    for text in overrides:
        _override(cfg, text, problems, wrong)
    problems += [
        p for p in _check(cfg, str(path)) if not any(name in p for name in wrong)
    ]  # a wrong key has its default, which is nobody's mistake
    if problems:
        raise ValueError("\n".join(problems))
    cfg.run.name = cfg.run.name or path.stem
    cfg.run.dir = cfg.run.dir or f"runs/{cfg.run.name}"
    return cfg


def _override(cfg: Config, text: str, problems: list[str], wrong: list[str]) -> None:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot):
        problems.append(f"--set {text}: write it as section.key=value, e.g. --set train.learning_rate=1e-4")
        return
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()  # a bare word is a string: --set model.name=tiny
    if (
        section in _names(cfg)
        and get_type_hints(type(getattr(cfg, section))).get(key) is str
        and not isinstance(parsed, str)
    ):
        parsed = value.strip()  # and so is what TOML takes for a number or a date: --set run.name=2026-11-21
    _assign(cfg, section, key, parsed, "--set", problems, wrong)


def _assign(
    cfg: Config, section: str, key: str, value, where: str, problems: list[str], wrong: list[str]
) -> None:
    """Sets one key, or adds to `problems` what is wrong with it; a known key that keeps its default so is added to `wrong`."""
    part = getattr(cfg, section, None) if section in _names(cfg) else None
    if part is None:
        problems.append(f"{where}: no section [{section}]{closest(section, _names(cfg))}")
    elif key not in _names(part):
        problems.append(f"{where}: no key {section}.{key}{closest(key, _names(part))}")
    else:
        kind = get_type_hints(type(part))[key]
        try:
            setattr(part, key, _convert(value, kind))
        except ValueError as e:
            problems.append(f"{where}: {section}.{key} = {value!r} {e}")
            wrong.append(f"{section}.{key}")


def _convert(value, kind):
    """`value` as the type `kind`; raises ValueError that says what was expected."""
    if get_origin(kind) is Literal:
        if not any(
            value == choice and type(value) is type(choice) for choice in get_args(kind)
        ):  # 1 is not true
            raise ValueError(f"is not one of {_list(get_args(kind))}")
        return value
    if isinstance(kind, types.GenericAlias):  # list[str]; one string stands for a list of it
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError("must be a string or a list of strings")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(
            f"must be {({int: 'a whole number', float: 'a number', bool: 'true or false', str: 'a string'})[kind]}"
        )
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError("must be a whole number of 64 bits")
    return value


AT_LEAST = {
    "adapter.r": 1,
    "adapter.lora_alpha": 0,
    "adapter.lora_dropout": 0,
    "data.validation_fraction": 0,
    "data.max_length": 2,
    "train.epochs": 0,
    "train.max_steps": 0,
    "train.batch_size": 1,
    "train.max_tokens": 0,
    "train.gradient_accumulation_steps": 1,
    "train.learning_rate": 0,
    "train.warmup_steps": 0,
    "train.weight_decay": 0,
    "train.max_grad_norm": 0,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.eval_samples": 0,
    "train.save_every": 0,
    "train.save_total_limit": 1,
    "train.early_stopping_patience": 0,
    "generate.max_new_tokens": 1,
    "generate.temperature": 0,
    "generate.top_k": 0,
}
BELOW_ONE = ("adapter.lora_dropout", "data.validation_fraction")


def _check(cfg: Config, where: str) -> list[str]:
    """What no type can say: ranges, and keys that need each other."""
    found = []
    for name, low in AT_LEAST.items():
        section, key = name.split(".")
        value = getattr(getattr(cfg, section), key)
        if not value >= low:
            found.append(f"{where}: {name} = {value} must be at least {low}")
        if value == math.inf:
            found.append(f"{where}: {name} = {value} must be a finite number")
        if name in BELOW_ONE and value >= 1:
            found.append(f"{where}: {name} = {value} must be below 1")
    if not 0 < cfg.generate.top_p <= 1:
        found.append(
            f"{where}: generate.top_p = {cfg.generate.top_p} must be above 0 and at most 1; 1 keeps every token"
        )
    if cfg.train.early_stopping_patience and not (
        cfg.train.eval_every and (cfg.data.validation or cfg.data.validation_fraction)
    ):
        found.append(
            f"{where}: train.early_stopping_patience = {cfg.train.early_stopping_patience} needs evaluations on the way; set train.eval_every, and "
            "data.validation or data.validation_fraction"
        )
    if cfg.adapter.type == "full" and cfg.adapter.init_from:
        found.append(
            f"{where}: adapter.init_from = {cfg.adapter.init_from!r} goes with adapter.type 'lora' or 'dora'; a full run starts from model.name"
        )
    if not cfg.data.train:
        found.append(f"{where}: data.train is missing; name a JSON or JSONL file of training rows")
    if not cfg.train.max_steps and not cfg.train.epochs:
        found.append(f"{where}: train.epochs and train.max_steps are both 0; nothing would be trained")
    if cfg.train.objective in ("dpo", "grpo"):
        found.append(
            f"{where}: train.objective = {cfg.train.objective!r} is not built yet; use 'sft' or 'pretrain'"
        )
    if cfg.train.precision == "fp16" and not cfg.train.force_fp16:
        found.append(
            f"{where}: train.precision = 'fp16': Gemma 3's activations reach about 8e5 and fp16 ends at 65,504; use 'bf16', "
            "or set train.force_fp16 = true to try all the same"
        )
    return found


def _names(part) -> list[str]:
    return [f.name for f in fields(part)]


def _list(words) -> str:
    return ", ".join(_toml(w) if isinstance(w, bool) else repr(w) for w in words)


def _toml(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        import json

        return json.dumps(value, ensure_ascii=False).replace(
            "\x7f", "\\u007f"
        )  # a TOML basic string has JSON's escapes, and refuses a raw DEL
    if isinstance(value, list):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)

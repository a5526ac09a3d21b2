"""The config of a training run: every key with its type, its default and its meaning.

load_config reads a TOML file, applies the options `--set section.key=value`, and reports all mistakes in one
error. A Config is frozen. To change a value, make a new Config with dataclasses.replace.
"""

import json
import math
import os
import re
import tomllib
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from common.errors import closest
from common.files import moved
from common.progress import warn
from data.row_reader import parse_columns
from tasks.classification import wrong_labels


@dataclass(frozen=True)
class Run:
    name: str = ""
    """Name of the run; the config file's name if empty."""
    dir: str = ""
    """Folder that the run writes; runs/<name> if empty."""
    seed: int = 3407
    """Seed of the initial weights, dropout, the validation split, the order of the data, and sampling."""


@dataclass(frozen=True)
class Model:
    name: str = "tiny"
    """"tiny" (the embedded base), "gemma-3-270m" (a package), a folder, a .gguf file, or a hub id."""
    revision: str = "main"
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base in memory. "auto": bfloat16 if train.precision is bf16, else float32.
    With adapter.type "full" it is the dtype of the written weights instead, and "auto" is bfloat16.
    """
    quantize: Literal["none", "keep", "q8_0", "q6_k", "q5_0", "q4_k", "nf4"] = "keep"
    """Block type of the frozen matrices in memory; "keep": those of a GGUF base stay as they are; "nf4":
    QLoRA's, of the linear layers only."""
    init: Literal["pretrained", "random"] = "pretrained"
    """"random": pretraining; takes the shapes from the model's config.json and draws new weights."""


@dataclass(frozen=True)
class Adapter:
    type: Literal["lora", "dora", "full"] = "lora"
    """"lora", "dora", or "full": all parameters are trainable and there is no adapter."""
    r: int = 16
    """Rank."""
    lora_alpha: float = 16
    """The adapter's output is multiplied with lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that is dropped in training."""
    use_rslora: bool = False
    """Multiply the adapter's output with lora_alpha / sqrt(r) instead (rsLoRA, Kalajdzievski 2023)."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Names of the linear layers to adapt, or "all-linear"."""
    init_from: str = ""
    """Folder of a PEFT adapter to start from; its settings replace all other keys of this section."""


@dataclass(frozen=True)
class Data:
    train: list[str] = field(default_factory=list)
    """Training file or files: JSON, JSONL, CSV, plain text or parquet; all but parquet may be gzipped."""
    validation: list[str] = field(default_factory=list)
    """Validation files, measured before and after training; the first also selects the best weights."""
    validation_fraction: float = 0.05
    """Share of the training rows used as validation rows if data.validation is empty; 0: none."""
    retention: list[str] = field(default_factory=list)
    """Files of general text or chats; how their loss rises in training shows what the model forgot."""
    format: Literal["auto", "json", "jsonl", "csv", "txt"] = "auto"
    """File format; "auto" looks at the content and, for CSV and text, at the name. A paragraph of a text is a
    sample."""
    columns: list[str] = field(default_factory=list)
    """Your own names of keys, such as ["prompt=question", "response=answer"]."""
    task: Literal["auto", "redaction", "classification", "translation", "text"] = "auto"
    """Kind of task, which decides how responses are measured; "auto" looks at the rows."""
    labels: list[str] = field(default_factory=list)
    """The labels of a classification, as responses; with none, the different responses are the labels."""
    loss_on: Literal["response", "last", "all"] = "response"
    """Which tokens are supervised: those of every response, of the last response, or all; raw text is always
    supervised whole, and a response of weight 0 never is."""
    special_tokens: Literal["text", "parse"] = "text"
    """Whether a special token that training rows spell, such as "<eos>", becomes that token ("parse") or
    stays text. Prompts that are answered stay text."""
    max_length: int = 2048
    """Longest sample, in tokens."""
    on_long: Literal["error", "drop", "truncate"] = "error"
    """What happens to a sample longer than max_length."""
    on_bad: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be used."""


@dataclass(frozen=True)
class Train:
    objective: Literal["sft", "dpo", "grpo"] = "sft"
    """What training optimizes: "sft" (supervised fine-tuning on responses), "dpo" (preferences: a chosen and
    a rejected answer), or "grpo" (rewards: the model answers, and a score says how good that was)."""
    epochs: float = 1
    """Passes over the data; may be a fraction."""
    max_steps: int = 0
    """Number of optimizer steps; 0: train.epochs decides."""
    batch_size: int = 8
    """Samples in a micro-batch."""
    max_tokens: int = 0
    """If not 0, a micro-batch is filled up to this many tokens and batch_size is not used."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in an optimizer step."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" updates the matrices of the layers, AdamW all other parameters."""
    learning_rate: float = 2e-4
    """Highest learning rate."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate after the warm-up: falls linearly to 0, falls along a cosine to 0, or stays."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay (as in AdamW) of parameters with two or more dimensions."""
    adam_beta2: float = 0.999
    """AdamW's beta2: the mean of the squared gradients reaches back about 1 / (1 - beta2) steps. In a run of
    about 100 steps, 0.98 lets the large gradients of the first steps decay. Muon has none.
    """
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this norm; 0: never."""
    divergence_factor: float = 10.0
    """The run stops, and the best weights stay, where the median loss of 5 steps exceeds that of the 50 steps
    before this many times; 0: never. The losses of "grpo" are not watched."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Dtype of the matrix products; "auto": bf16 on devices that are fast at it."""
    force_fp16: bool = False
    """Train in fp16 although Gemma 3's activations (about 8e5) overflow it (65,504)."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", ..."""
    share_prefix: bool = True
    """Compute tokens at the beginning that samples of a micro-batch have in common once; same gradients."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of storing them: less memory, slower steps."""
    compile: Literal["auto", True, False] = "auto"
    """torch.compile the layers and the loss. On a CPU it takes 30 s at the start and makes steps 3 to 10%
    shorter. "auto": compile on a CPU if the run takes about half an hour or more. A quantized base is not
    compiled.
    """
    shuffle: bool = True
    """Shuffle the samples anew in each epoch."""
    log_every: int = 10
    """Steps between printed lines if stderr is no terminal and has no bar; metrics.jsonl has every step."""
    eval_every: int = 0
    """Steps between evaluations; 0: only at the end."""
    eval_samples: int = 100
    """Rows of each validation set that are measured; 0: all."""
    save_every: int = 0
    """Steps between checkpoints; 0: one every ten minutes, at the end, and when the run is stopped."""
    save_total_limit: int = 2
    """Checkpoints that are kept."""
    early_stopping_patience: int = 0
    """Training ends after this many evaluations in a row without improvement; 0: never."""


@dataclass(frozen=True)
class SFT:
    metric_for_best_model: Literal["loss", "token_accuracy"] = "loss"
    """The validation metric that selects the best weights: the lowest loss or the highest token accuracy."""


@dataclass(frozen=True)
class DPO:
    beta: float = 0.1
    """How strongly the model is held to its start: the reward of an answer is beta times what its
    log-probability has gained."""
    metric_for_best_model: Literal["loss", "rewards/accuracies", "rewards/margins"] = "loss"
    """The validation metric that selects the best weights."""


@dataclass(frozen=True)
class GRPO:
    rewards: list[str] = field(default_factory=list)
    """Reward functions: names of shipped ones (tasks/rewards.py), or "module:function" of your own file;
    empty: those of the task."""
    reward_weights: list[float] = field(default_factory=list)
    """Weights of the rewards in their sum; empty: 1 each, or the task's."""
    rewards_folder: str = ""
    """Folder of your own reward files; that of the config file if empty."""
    reward_timeout: float = 60.0
    """Seconds that a reward function may take for a micro-batch."""
    format: str = ""
    """Regular expression of the reward "format", which a whole completion must match."""
    num_generations: int = 8
    """Completions of each prompt: the group G."""
    temperature: float = 1.0
    """Sampling temperature, in training too."""
    max_completion_length: int = 256
    """Longest completion, in tokens."""
    mask_truncated_completions: bool = False
    """Leave completions that reached max_completion_length out of the loss."""
    loss_type: Literal["dapo", "dr_grpo", "grpo"] = "dapo"
    """How token losses become one: "dapo": mean over all tokens of a step; "dr_grpo": sum / (completions
    * max_completion_length); "grpo": mean of each completion's mean."""
    scale_rewards: bool = True
    """Divide advantages by the standard deviation of their group; false: Dr. GRPO's."""
    epsilon: float = 0.2
    """The probability ratio is clipped to 1 - epsilon and 1 + epsilon."""
    beta: float = 0.0
    """Weight of the KL divergence from the model at the start of the run."""
    num_iterations: int = 1
    """Optimizer steps on the same completions."""
    metric_for_best_model: Literal["reward", "loss"] = "reward"
    """The validation metric that selects the best weights: the mean reward of greedy answers, or the loss of
    the gold responses."""


@dataclass(frozen=True)
class Generate:
    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    max_new_ratio: float = 0.0
    """Longest completion as a multiple of its prompt's tokens; 0: max_new_tokens alone limits it."""
    temperature: float = 0.0
    """Sampling temperature; 0: greedy decoding."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the fewest most likely tokens whose probabilities add up to at least this."""
    prompts: list[str] = field(default_factory=list)
    """Prompts that are answered before and after training, for the terminal and the report."""


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    adapter: Adapter = field(default_factory=Adapter)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    sft: SFT = field(default_factory=SFT)
    dpo: DPO = field(default_factory=DPO)
    grpo: GRPO = field(default_factory=GRPO)
    generate: Generate = field(default_factory=Generate)

    def to_toml(self) -> str:
        """Returns the config as the text of a TOML file; load_config reads it back to an equal Config."""
        lines = []
        for name, section in asdict(self).items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in section.items()), ""]
        return "\n".join(lines)


# These keys may change between a run and its resume, because no computation depends on them.
FREE = {"run.name", "run.dir", "train.log_every", "train.save_every", "train.save_total_limit"}
FREE |= {"train.divergence_factor", "grpo.rewards_folder", "grpo.reward_timeout"}
# Old names work for one release, with a warning.
RENAMED = {
    "train.recompute": "train.gradient_checkpointing",
    "train.keep_checkpoints": "train.save_total_limit",
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns a TOML file's Config with overrides applied; one ValueError lists all wrong keys and values."""
    path = Path(path)
    reader = _Reader()
    for section, values in _read_toml(path).items():
        if isinstance(values, dict):
            for key, value in values.items():
                reader.assign(section, key, value, str(path))
        elif section in SECTIONS:
            reader.problems.append(
                f"{path}: {section} must be a section of keys; write [{section}] once, in single brackets"
            )
        else:
            names = ", ".join(map(repr, SECTIONS))
            reader.problems.append(f"{path}: {section} stands outside a section; put it under one of {names}")
    for text in overrides:
        reader.override(text)
    if reader.pretrain:
        warn(f"{reader.pretrain}: train.objective = 'pretrain' is now 'sft' with data.loss_on = 'all'")
        reader.values["data"]["loss_on"] = "all"
    run = {"name": path.stem} | {k: v for k, v in reader.values["run"].items() if v != ""}
    reader.values["run"] = {"dir": f"runs/{run['name']}"} | run
    reader.values["grpo"] = {"rewards_folder": str(path.parent)} | reader.values["grpo"]
    cfg = Config(**{name: kind(**reader.values[name]) for name, kind in SECTIONS.items()})
    # A key that was rejected has its default here, and nothing is said about that.
    rejected = [re.compile(rf"\b{name}\b") for name in reader.rejected]
    problems = [p for p in _check(cfg, str(path)) if not any(name.search(p) for name in rejected)]
    options = [f": {name.removeprefix('--set ')} = " for name in reader.written if name.startswith("--set ")]
    problems = [p.replace(str(path), "--set", 1) if any(o in p for o in options) else p for p in problems]
    if problems := reader.problems + problems:
        raise ValueError("\n".join(problems))
    return cfg


def _read_toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        problem = "no such file; start from small.toml or one of configs/"
    except OSError as e:
        problem = f"cannot be read ({e.strerror}); name a TOML file such as small.toml"
    except UnicodeDecodeError as e:
        problem = f"not valid TOML: byte {e.start + 1} is not UTF-8; save the file as UTF-8"
    except (ValueError, RecursionError) as e:  # a mistake, an endless number, or nesting without an end
        problem = f"not valid TOML: {e}"
    raise ValueError(f"{path}: {problem}")


SECTIONS: dict[str, type] = get_type_hints(Config)
PATHS = {"run.dir", "model.name", "adapter.init_from", "grpo.rewards_folder"}
PATHS |= {"data.train", "data.validation", "data.retention"}


class _Reader:
    """Collects the values that were set, as {section: {key: value}}, and messages about wrong ones."""

    def __init__(self) -> None:
        self.values: dict[str, dict] = {name: {} for name in SECTIONS}
        self.problems: list[str] = []
        self.rejected: list[str] = []  # known keys whose value is wrong
        self.pretrain = ""  # where the last train.objective is the old "pretrain", or ""
        self.written: dict[str, str] = {}  # key -> the name under which it was given

    def override(self, text: str) -> None:
        """Sets the key of one `--set` option, whose text is "section.key=value"."""
        name, equals, value = text.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot):
            example = "--set train.learning_rate=1e-4"
            self.problems.append(f"--set {text}: write it as section.key=value, for example {example}")
            return
        try:
            parsed = tomllib.loads(f"v = {value}")["v"]
        except (ValueError, RecursionError):
            parsed = value.strip()  # a bare word is a string: --set model.name=tiny
        if section in SECTIONS and get_type_hints(SECTIONS[section]).get(key) is str:
            # So is what TOML takes for a number or a date: --set run.name=2026-11-21
            parsed = parsed if isinstance(parsed, str) else value.strip()
        self.assign(section, key, parsed, "--set")

    def assign(self, section: str, key: str, value: object, where: str) -> None:
        """Sets one key, or adds a message to `problems`; `where` is the file's path or "--set"."""
        given = f"{section}.{key}"
        section, key, value = self._translate(section, key, value, where)
        name = f"{section}.{key}"
        if section not in SECTIONS:
            self.problems.append(f"{where}: no section [{section}]{closest(section, SECTIONS)}")
            return
        hints = get_type_hints(SECTIONS[section])
        if key not in hints:
            self.problems.append(f"{where}: no key {name}{closest(key, hints)}")
            return
        if (earlier := self.written.setdefault(f"{where} {name}", given)) != given:
            old = given if given in RENAMED else earlier
            self.problems.append(f"{where}: {old} is the old name of {name}, which is given too; remove it")
        try:
            self.values[section][key] = _convert(value, hints[key])
        except ValueError as e:
            self.problems.append(f"{where}: {name} = {_shown(value)} {e}")
            self.rejected.append(name)

    def _translate(self, section: str, key: str, value: object, where: str) -> tuple[str, str, object]:
        """Returns (section, key, value) with names of earlier releases replaced; warns about each of them."""
        name = f"{section}.{key}"
        if name in RENAMED:
            warn(f"{where}: {name} is now called {RENAMED[name]}; the old name will be removed")
            section, key = RENAMED[name].split(".")
        if name == "train.objective":
            self.pretrain = where if value == "pretrain" else ""
            value = "sft" if self.pretrain else value
        if name in PATHS:
            value = [_home(v) for v in value] if isinstance(value, list) else _home(value)
        if section in ("data", "model", "adapter"):
            place = f"{where}: {name}: "
            value = [moved(v, place) for v in value] if isinstance(value, list) else moved(value, place)
        return section, key, value


def _home(value: object) -> object:
    """Returns a path with the user's home folder in the place of "~", which no shell expands in a config."""
    return os.path.expanduser(value) if isinstance(value, str) else value


def _convert(value: object, kind: Any) -> object:
    """Returns `value` as `kind`: a class, list[str] or a Literal. Raises ValueError with what is expected."""
    if get_origin(kind) is Literal:
        # 1 is not true.
        if not any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            choices = (_toml(c) if isinstance(c, bool) else repr(c) for c in get_args(kind))
            raise ValueError(f"is not one of {', '.join(choices)}")
        return value
    if isinstance(kind, types.GenericAlias):  # list[str] or list[float]; one element stands for a list of it
        (element,) = get_args(kind)
        name = "string" if element is str else "number"
        try:
            return [_convert(v, element) for v in (value if isinstance(value, list) else [value])]
        except ValueError:
            raise ValueError(f"must be a {name} or a list of {name}s") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError("must be a finite number") from None
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        raise ValueError(f"must be {names[kind]}")
    if kind is int and not -(2**63) <= value < 2**63:
        raise ValueError("must be a whole number of 64 bits")
    if kind is str and "\0" in value:
        raise ValueError("has a NUL character, which no path can have; remove it")
    return value


def _shown(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # Python writes no number of over 4,300 digits, and TOML has hexadecimal ones.
        return "an endless number"


AT_LEAST = {
    0: "adapter.lora_alpha adapter.lora_dropout data.validation_fraction train.epochs train.max_steps "
    "train.max_tokens train.learning_rate train.warmup_steps train.weight_decay train.adam_beta2 "
    "train.max_grad_norm train.divergence_factor train.eval_every train.eval_samples train.save_every "
    "train.early_stopping_patience generate.temperature generate.top_k generate.max_new_ratio dpo.beta "
    "grpo.beta grpo.temperature grpo.epsilon grpo.reward_timeout",
    1: "adapter.r train.batch_size train.gradient_accumulation_steps train.log_every "
    "train.save_total_limit generate.max_new_tokens grpo.max_completion_length grpo.num_iterations",
    2: "data.max_length grpo.num_generations",
}
# What is above these cannot be right: no step would be finite, or none would end.
AT_MOST: dict[float, str] = {
    1: "train.learning_rate",
    10: "train.weight_decay",
    1000: "generate.temperature grpo.temperature dpo.beta grpo.beta",
    65536: "adapter.r adapter.lora_alpha grpo.num_generations",
    10**6: "train.epochs train.batch_size train.gradient_accumulation_steps grpo.num_iterations",
    10**9: "train.max_steps train.max_tokens train.warmup_steps data.max_length generate.max_new_tokens "
    "generate.max_new_ratio grpo.max_completion_length",
}
BELOW_ONE = ("adapter.lora_dropout", "data.validation_fraction", "train.adam_beta2", "grpo.epsilon")
ABOVE_ZERO = ("dpo.beta", "grpo.temperature", "grpo.reward_timeout")


def _check(cfg: Config, where: str) -> list[str]:
    """Returns messages about values outside their range, and about keys that do not fit together."""
    found = []
    limits = {name: low for low, names in AT_LEAST.items() for name in names.split()}
    highest = {name: high for high, names in AT_MOST.items() for name in names.split()}
    for name, low in limits.items():
        section, key = name.split(".")
        value = getattr(getattr(cfg, section), key)
        above = name in ABOVE_ZERO
        if not (value > low if above else value >= low):
            found.append(f"{name} = {value} must be {'above' if above else 'at least'} {low}")
        if value == math.inf or value > highest.get(name, math.inf):
            limit = f"at most {highest[name]:,}" if name in highest else "a finite number"
            found.append(f"{name} = {value} must be {limit}")
        if name in BELOW_ONE and value >= 1:
            found.append(f"{name} = {value} must be below 1")
    t, held_out = cfg.train, cfg.data.validation or cfg.data.validation_fraction
    if not 0 < cfg.generate.top_p <= 1:
        found.append(f"generate.top_p = {cfg.generate.top_p} must be above 0 and at most 1 (every token)")
    if t.early_stopping_patience and not (t.eval_every and held_out):
        found.append(
            f"train.early_stopping_patience = {t.early_stopping_patience} needs evaluations during training; "
            "set train.eval_every, and data.validation or data.validation_fraction"
        )
    if cfg.adapter.type == "full" and cfg.adapter.init_from:
        found.append(
            f"adapter.init_from = {cfg.adapter.init_from!r} needs adapter.type 'lora' or 'dora'; "
            "a full run starts from model.name"
        )
    if not cfg.data.train:
        found.append("data.train is missing; name a JSON or JSONL file of training rows")
    if not t.max_steps and not t.epochs:
        found.append("train.epochs and train.max_steps are both 0; nothing would be trained")
    try:
        parse_columns(cfg.data.columns)
    except ValueError as e:
        found.append(str(e))
    if cfg.data.labels and cfg.data.task not in ("auto", "classification"):
        found.append(
            f"data.labels = {cfg.data.labels!r} are of a classification, and data.task = {cfg.data.task!r} "
            "is none; remove data.labels, or set data.task to 'classification'"
        )
    if wrong := wrong_labels(cfg.data.labels):
        found.append(f"data.labels = {cfg.data.labels!r} {wrong}")
    if t.objective != "sft":
        found += _check_preferences(cfg)
    if t.precision == "fp16" and not t.force_fp16:
        found.append(
            "train.precision = 'fp16': Gemma 3's activations reach about 8e5 and fp16 ends at 65,504; "
            "use 'bf16', or set train.force_fp16 = true to try all the same"
        )
    return [f"{where}: {problem}" for problem in found]


def _check_preferences(cfg: Config) -> list[str]:
    """Returns messages about keys that do not fit to train.objective = "dpo" or "grpo"."""
    name, found = f"train.objective = {cfg.train.objective!r}", []
    if cfg.adapter.lora_dropout:
        found.append(
            f"{name} compares log-probabilities, which dropout would change: set adapter.lora_dropout = 0 "
            f"(now {cfg.adapter.lora_dropout})"
        )
    if cfg.data.loss_on == "all":
        found.append(f"{name} trains on answers only; remove data.loss_on = 'all'")
    if cfg.data.special_tokens == "parse" and cfg.train.objective == "grpo":
        found.append(f"{name} asks with prompts that stay text; remove data.special_tokens = 'parse'")
    if cfg.model.init == "random":
        found.append(f"{name} needs a model that answers already; remove model.init = 'random'")
    g = cfg.grpo if cfg.train.objective == "grpo" else GRPO()
    if g.reward_weights and not g.rewards:
        found.append(f"grpo.reward_weights = {g.reward_weights} needs grpo.rewards; name a reward for each")
    if g.format and "format" not in g.rewards:
        found.append(f"grpo.format = {g.format!r} needs the reward 'format'; add it to grpo.rewards")
    if g.beta and cfg.adapter.type == "full":
        found.append(
            f"grpo.beta = {g.beta} needs the model of the start beside the trained one, which "
            "adapter.type = 'full' would have to hold twice; set grpo.beta = 0, or train an adapter"
        )
    return found


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # a TOML basic string has JSON's escapes, and refuses a raw DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)

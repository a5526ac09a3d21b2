"""From the config to the parts of a run: model with its adapters, loader, the loop's numbers."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common.device import Precision, missing_to_compile
from data.loader import Loader
from data.render import IGNORE_INDEX, Document
from lora.inject import inject
from lora.peft_io import load_adapter
from model.gemma3 import Gemma3ForCausalLM
from model.hub import resolve
from model.tokenizer import Tokenizer
from model.weights import Checkpoint, hash_model
from training.beside import beside
from training.config import Config
from training.dataset import Reader, TrainingData, read
from training.flops import step_flops
from training.loop import Plan
from training.objectives import pretrain, sft

OBJECTIVES = {"sft": sft, "pretrain": pretrain}
COMPILED = 3e14  # FLOPs a thread, about half an hour's work: half a minute of compiling is then less than the 3 to 10% of the steps that it saves


@dataclass
class Base:
    """The base model and where it came from."""

    model: Gemma3ForCausalLM
    tokenizer: Tokenizer
    folder: Path
    hash: str


def build_base(cfg: Config, precision: Precision) -> tuple[Base, TrainingData]:
    """The base in the dtype that the run wants, on its device, with nothing trainable yet, and the data, which is read while the weights are."""
    folder = resolve(cfg.model.name, cfg.model.revision, weights=cfg.model.init == "pretrained")
    dtype = precision.base_dtype(cfg.model.dtype, trains_all=cfg.adapter.type == "full")
    if cfg.model.init == "random":
        reader, data = read(cfg, folder)
        model = (
            without_weights(reader).model.to(dtype).to_empty(device="cpu")
        )  # a Linear that is made here would draw numbers in float32
        model.reset_parameters(cfg.run.seed)
        return Base(
            model.to(precision.device), reader.tokenizer, folder, f"random weights of seed {cfg.run.seed}"
        ), data
    model, digest = beside(Checkpoint(folder).load, dtype, precision.device), beside(hash_model, folder)
    reader, data = read(cfg, folder)
    return Base(model.result(), reader.tokenizer, folder, digest.result()), data


def without_weights(reader: Reader) -> Base:
    """The base as far as it is known without its weights: its shapes are on the meta device."""
    with torch.device("meta"):
        return Base(Gemma3ForCausalLM(reader.config), reader.tokenizer, reader.folder, hash="")


def add_adapters(model: Gemma3ForCausalLM, cfg: Config) -> int:
    """Makes the config's adapters, or all of the model, trainable, and has it gradient_checkpointing layers if it shall; returns how many numbers train."""
    model.model.gradient_checkpointing = cfg.train.gradient_checkpointing
    a = cfg.adapter
    if a.type == "full":
        model.requires_grad_(True)
    elif a.init_from:
        loaded = load_adapter(model, a.init_from)
        a.type, a.r, a.lora_alpha = (
            "dora" if loaded.get("use_dora") else "lora",
            loaded["r"],
            loaded["lora_alpha"],
        )
        a.use_rslora, a.lora_dropout = loaded.get("use_rslora", False), loaded.get("lora_dropout", 0.0)
    else:
        inject(
            model,
            type=a.type,
            r=a.r,
            lora_alpha=a.lora_alpha,
            lora_dropout=a.lora_dropout,
            use_rslora=a.use_rslora,
            target_modules=a.target_modules,
            seed=cfg.run.seed,
        )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def refuse_without_compiler(cfg: Config, device: torch.device) -> None:
    """Raises ValueError, before the first step would, where the run shall be compiled and cannot be."""
    if cfg.train.compile is True and (missing := missing_to_compile(device)):
        raise ValueError(f"train.compile = true: {missing}; or set it to false")


def compile_where_it_pays(
    model: Gemma3ForCausalLM, cfg: Config, documents: list[Document], device: torch.device
) -> bool:
    """Compiles the layers, which have their adapters by now, where train.compile is true or, by "auto", where a run on a CPU is long enough.

    How long is told by its FLOPs and not by a clock, so that a machine computes a run alike whenever it is started; the answer takes the place of "auto".
    """
    if cfg.train.compile == "auto":
        loader = build_loader(cfg, documents)
        epochs = build_plan(cfg, loader).total_steps / math.ceil(
            len(loader) / cfg.train.gradient_accumulation_steps
        )
        tokens, supervised = (
            sum(len(d.labels) for d in documents),
            sum(len(d.labels) - d.labels.count(IGNORE_INDEX) for d in documents),
        )
        flops = epochs * step_flops(model, tokens, supervised)
        cfg.train.compile = (
            device.type == "cpu"
            and flops > COMPILED * torch.get_num_threads()
            and not missing_to_compile(device)
        )
        if cfg.train.compile:
            forgive_compiler()
    if cfg.train.compile:
        model.compile_layers()
    return cfg.train.compile


def forgive_compiler() -> None:
    """Where a compiler fails, what it was to compile runs as it is: nobody asked for it, so it must not end the run."""
    from torch import _dynamo

    _dynamo.config.suppress_errors = True


def build_loader(cfg: Config, documents: list[Document]) -> Loader:
    t = cfg.train
    return Loader(documents, t.batch_size, cfg.run.seed, t.shuffle, t.max_tokens or None, t.share_prefix)


def build_plan(cfg: Config, loader: Loader) -> Plan:
    t = cfg.train
    per_epoch = math.ceil(len(loader) / t.gradient_accumulation_steps)
    steps = math.ceil(round(t.epochs * per_epoch, 6))  # 1.1 * 50 is 55.00000000000001
    return Plan(
        t.max_steps or steps,
        len(loader),
        t.gradient_accumulation_steps,
        t.learning_rate,
        t.lr_scheduler,
        t.warmup_steps,
        t.max_grad_norm,
        t.eval_every,
        t.save_every,
        t.early_stopping_patience,
    )


def trained_weights(model) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}

"""Makes what training needs, from the config: base model, adapters, objective, loader and schedule."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import torch

from common.device import Precision, missing_to_compile, pick_device
from common.progress import warn
from data.loader import Loader
from data.render import IGNORE_INDEX, Document
from generation.load import LoadedModel
from lora.inject import adapters, inject
from lora.peft_io import load_adapter, read_config, read_tensors
from model.gemma3 import Gemma3ForCausalLM
from model.hub import resolve
from model.quantized import QuantizedWeight, all_weights, set_quantized
from model.weights import Checkpoint, gguf_tensors, hash_model, quantized_types
from training.config import Config
from training.dataset import TrainingData, read, refuse_missing_files
from training.flops import step_flops
from training.loop import Schedule
from training.objectives.dpo import DirectPreferenceOptimization
from training.objectives.grpo import GroupRelativePolicyOptimization
from training.objectives.objective import Objective
from training.objectives.rewards import Rewards, missing_rewards
from training.objectives.sft import SupervisedFineTuning

# FLOPs of one CPU thread in about half an hour; in longer runs compiling saves more time than it takes.
WORTH_COMPILING = 3e14


@dataclass
class BaseModel(LoadedModel):
    """A loaded base model and the hash of its weights; for random weights, a text with their seed."""

    hash: str


def prepare(cfg: Config) -> tuple[Config, Precision]:
    """Returns the config, with the settings of adapter.init_from, and the device with its precision.

    Raises ValueError that lists the `problems`, or if the device, or a compiler that train.compile needs, is
    missing.
    """
    if found := problems(cfg):
        raise ValueError("\n".join(found))
    cfg, device = resolve_adapter(cfg), pick_device(cfg.train.device)
    if cfg.train.compile is True and (missing := missing_to_compile(device)):
        raise ValueError(f"train.compile = true: {missing}; or set it to false")
    return cfg, Precision(cfg.train.precision, device)


def problems(cfg: Config) -> list[str]:
    """Returns a message for each thing that the config names and that is missing: data files, the adapter to
    start from, and rewards. Loads none of them.
    """
    found = (
        missing_rewards(cfg.grpo.rewards, Path(cfg.grpo.rewards_folder))
        if cfg.train.objective == "grpo"
        else []
    )
    for check in (refuse_missing_files, partial(_start_config, tensors=True)):
        try:
            check(cfg)
        except ValueError as e:
            found.append(str(e))
    return found


def _start_config(cfg: Config, tensors: bool = False) -> dict:
    """Returns the adapter_config.json in adapter.init_from, {} if that is ""; `tensors`: checks these too.

    Raises ValueError if a file is missing or damaged.
    """
    folder = Path(cfg.adapter.init_from)
    if not cfg.adapter.init_from:
        return {}
    try:
        if not folder.is_dir():
            remedy = "train that adapter first (the head of the config may say how), or name another"
            raise ValueError(f"no such folder; {remedy}")
        if tensors:
            read_tensors(folder)
        return read_config(folder)
    except ValueError as e:
        raise ValueError(f"adapter.init_from = {cfg.adapter.init_from!r}: {e}") from None


def resolve_adapter(cfg: Config) -> Config:
    """Returns the config with the type, rank, scale and dropout of the adapter in adapter.init_from.

    The dropout becomes 0 if the objective compares log-probabilities.
    """
    peft = _start_config(cfg)
    if not peft:
        return cfg
    dropout = peft.get("lora_dropout", 0.0)
    if dropout and cfg.train.objective != "sft":
        warn(f"{cfg.adapter.init_from}: its lora_dropout {dropout} is not used by {cfg.train.objective!r}")
        dropout = 0.0
    adapter = replace(
        cfg.adapter,
        type="dora" if peft.get("use_dora") else "lora",
        r=peft["r"],
        lora_alpha=peft["lora_alpha"],
        use_rslora=peft.get("use_rslora", False),
        lora_dropout=dropout,
    )
    return replace(cfg, adapter=adapter)


def make_objective(cfg: Config) -> Objective:
    """Returns the training method that train.objective names."""
    if cfg.train.objective == "dpo":
        return DirectPreferenceOptimization(cfg.dpo.beta, cfg.dpo.metric_for_best_model)
    if cfg.train.objective == "grpo":
        g, rewards = cfg.grpo, None
        if g.rewards:
            weights = g.reward_weights or [1.0] * len(g.rewards)
            rewards = Rewards(g.rewards, weights, Path(g.rewards_folder), g.format, g.reward_timeout)
        task = "classification" if cfg.data.labels else cfg.data.task
        return GroupRelativePolicyOptimization(g, rewards, task, cfg.run.seed)
    return SupervisedFineTuning(cfg.sft.metric_for_best_model, cfg.data.loss_on)


def used_documents(
    cfg: Config, loader: Loader, schedule: Schedule, objective: Objective
) -> Iterator[Document]:
    """Yields the documents of the micro-batches that the run gets to, in the order of the data."""
    steps = math.ceil(schedule.total_steps / objective.steps_per_batch)
    epochs = (loader.plan(epoch) for epoch in count())
    groups = islice(chain.from_iterable(epochs), steps * cfg.train.gradient_accumulation_steps)
    yield from (loader.documents[i] for i in sorted({i for group in groups for i in group}))


def load_base(cfg: Config, precision: Precision) -> tuple[BaseModel, TrainingData]:
    """Loads the base model on the device, and meanwhile, in this thread, reads tokenizer and data files."""
    folder = resolve(cfg.model.name, cfg.model.revision, weights=cfg.model.init == "pretrained")
    dtype = precision.base_dtype(cfg.model.dtype, trains_all=cfg.adapter.type == "full")
    quantize = "none" if cfg.adapter.type == "full" else cfg.model.quantize
    if cfg.model.init == "random":
        files, data = read(cfg, make_objective(cfg), folder)
        # On the meta device no values are drawn and no memory is taken.
        with torch.device("meta"):
            model = Gemma3ForCausalLM(files.config).to(dtype)
        for name, type in quantized_types(files.config, gguf_tensors(folder, files.config), quantize).items():
            rows, columns = model.get_parameter(name).shape
            set_quantized(model, name, QuantizedWeight.zeros(rows, columns, type, dtype))
        for name, p in list(model.named_parameters()):  # only those that have no blocks
            module, _, leaf = name.rpartition(".")
            empty = torch.nn.Parameter(torch.empty_like(p, device="cpu"))
            setattr(model.get_submodule(module), leaf, empty)
        model.reset_parameters(cfg.run.seed)
        origin = f"random weights of seed {cfg.run.seed}"
        return BaseModel(model.to(precision.device), files.tokenizer, folder, precision, origin), data
    with ThreadPoolExecutor(2) as threads:  # reading and hashing a gigabyte hold no Python lock
        loading = threads.submit(Checkpoint(folder).load, dtype, precision.device, quantize)
        hashing = threads.submit(hash_model, folder)
        files, data = read(cfg, make_objective(cfg), folder)
        return BaseModel(loading.result(), files.tokenizer, folder, precision, hashing.result()), data


def add_adapters(model: Gemma3ForCausalLM, cfg: Config) -> int:
    """Adds or loads adapters, or for type "full" makes all parameters trainable; returns their number."""
    model.model.gradient_checkpointing = cfg.train.gradient_checkpointing
    a = cfg.adapter
    if a.type == "full":
        model.requires_grad_(True)
    elif a.init_from:
        load_adapter(model, a.init_from)
        for layer in adapters(model).values():
            layer.lora_dropout = a.lora_dropout  # 0 if the objective has no use for it
    else:
        settings = {name: value for name, value in vars(a).items() if name != "init_from"}
        inject(model, seed=cfg.run.seed, **settings)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trainable_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the trainable parameters as {name: parameter}."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def resolve_compile(
    model: Gemma3ForCausalLM, cfg: Config, documents: list[Document], device: torch.device
) -> Config:
    """Returns the config with train.compile = "auto" replaced by true for a long run on a CPU, else false.

    A run is long by its FLOPs, not by measured time, so that the result is the same in each start. A
    quantized base is not compiled: compiled code keeps its dense weights for the backward pass.

    Raises ValueError if train.compile is true and the base is quantized.
    """
    if any(isinstance(w, QuantizedWeight) for w in all_weights(model).values()):
        if cfg.train.compile is True:
            raise ValueError(
                f"train.compile = true: a quantized base (model.quantize = {cfg.model.quantize!r}) is not "
                "compiled; set it to false, or model.quantize to 'none'"
            )
        return replace(cfg, train=replace(cfg.train, compile=False))
    if cfg.train.compile != "auto":
        return cfg
    loader = build_loader(cfg, documents)
    steps_per_epoch = math.ceil(len(loader) / cfg.train.gradient_accumulation_steps)
    epochs = build_schedule(cfg, loader).total_steps / steps_per_epoch
    tokens = sum(len(d.labels) for d in documents)
    supervised = tokens - sum(d.labels.count(IGNORE_INDEX) for d in documents)
    flops = epochs * step_flops(model, tokens, supervised)
    worth_it = device.type == "cpu" and flops > WORTH_COMPILING * torch.get_num_threads()
    worth_it = worth_it and not missing_to_compile(device)
    if worth_it:
        tolerate_compiler_errors()
    return replace(cfg, train=replace(cfg.train, compile=worth_it))


def tolerate_compiler_errors() -> None:
    """Makes torch.compile fall back to uncompiled code on errors; for train.compile = "auto"."""
    from torch import _dynamo

    _dynamo.config.suppress_errors = True


def build_loader(cfg: Config, documents: list[Document]) -> Loader:
    """Returns the loader that packs the documents into micro-batches."""
    t, per_sample = cfg.train, 2 if cfg.train.objective == "dpo" else 1
    share = t.share_prefix and t.objective != "grpo"  # GRPO's are prompts only, and it packs them anew
    return Loader(documents, t.batch_size, cfg.run.seed, t.shuffle, t.max_tokens or None, share, per_sample)


def build_schedule(cfg: Config, loader: Loader) -> Schedule:
    """Returns the schedule: train.max_steps optimizer steps, or if that is 0, train.epochs passes."""
    t = cfg.train
    steps_per_epoch = math.ceil(len(loader) / t.gradient_accumulation_steps)
    steps = math.ceil(round(t.epochs * steps_per_epoch, 6))  # 1.1 * 50 is 55.00000000000001
    if t.objective == "grpo":
        steps *= cfg.grpo.num_iterations
    return Schedule(t.max_steps or steps, len(loader), t)

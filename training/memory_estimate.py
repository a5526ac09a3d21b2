"""The memory estimate: for a GPU that is not here, and for a base too large to run some of its steps here.

A step runs on the meta device, where a tensor has a shape and no values, and the bytes of the tensors that
are alive are counted. It differs from a real step in three ways:

1. It computes in the dtype of train.precision throughout, without autocast; with adapter.type "full", in
   float32.
2. Attention is FlashAttention's, which keeps no scores. A GPU older than Ampere keeps them.
3. What a kernel takes inside is not counted; OTHERS stands for it and for the program itself.
"""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.device import Precision
from common.machine import free
from data.packing import Batch, pack
from model.config import SLIDING, Gemma3Config
from model.gemma3 import Gemma3ForCausalLM
from model.quantized import QuantizedWeight, all_weights, set_quantized
from model.weights import gguf_tensors, quantized_types
from training import build
from training.config import Config
from training.dataset import BaseFiles, TrainingData
from training.flops import step_flops
from training.memory_probe import Probe, longest_prompts, sizes
from training.objectives.objective import Objective

# Bytes of Python and PyTorch on a CPU; of CUDA's context and the kernels' memory on a GPU.
OTHERS = 600 * 2**20
FEW_LAYERS = (2, 3)  # A step runs on so many layers; each further one takes as much as the third.
MOST_FLOPS = 5e12  # of a thread, for a step of one row: about a minute


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that are made on a device while it is entered, and are alive."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.live, self.peak, self.known = device, 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for storage in self._storages((args, kwargs)):  # a view of a weight is no new tensor
            self._watch(storage, 0)
        out = func(*args, **kwargs or {})
        for storage in self._storages(out):
            self._watch(storage, storage.nbytes())
        return out

    def _storages(self, tree: Any) -> Iterator[torch.UntypedStorage]:
        tensors = (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor))
        return (t.untyped_storage() for t in tensors if t.device.type == self.device)

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def estimate(cfg: Config, base: BaseFiles, data: TrainingData, precision: Precision) -> Probe:
    """Returns what memory_probe.probe would measure, from tensors without values.

    The phase "completions" has the weights and the KV cache of the longest prompts.
    """
    found, layers = Probe(), base.config.num_hidden_layers
    model = meta_model(cfg, base, precision, layers)
    found.parts["base weights"] = 0 if cfg.adapter.type == "full" else weight_bytes(model)
    trainable = 4 * build.add_adapters(model, cfg)
    moments = 2 if cfg.train.optimizer == "adamw" else 1
    found.parts |= {"trainable parameters": trainable, "gradients": trainable}
    found.parts["optimizer state"] = moments * trainable
    fixed = sum(found.parts.values()) - trainable + OTHERS  # step_peak counts the gradients
    for size, train in dict([*sizes(cfg.train, data)[:1], *sizes(cfg.train, data)[-1:]]).items():
        loader = build.build_loader(replace(cfg, train=train), data.documents)
        batches = [[data.documents[i] for i in group] for group in loader.plan(0)]
        heaviest = max(batches, key=lambda one: sum(len(d.input_ids) for d in one))
        batch = pack(heaviest, cfg.train.share_prefix)
        # All layers have the same shapes.
        few, more = (step_peak(cfg, base, precision, min(n, layers), batch) for n in FEW_LAYERS)
        found.sizes.append((size, fixed + more + max(0, layers - FEW_LAYERS[1]) * (more - few)))
    found.phases["training"] = found.sizes[-1][1]
    prompts = longest_prompts(cfg, base.tokenizer, data)
    caches = [cache_bytes(cfg, base.config, some, precision.dtype) for some in prompts]
    found.phases["completions"] = found.parts["base weights"] + trainable + OTHERS + max(caches, default=0)
    return found


def too_large_to_probe(cfg: Config, base: BaseFiles, data: TrainingData, precision: Precision) -> bool:
    """Returns whether a step of the longest row would take a CPU minutes, or the weights all its memory."""
    if precision.device.type != "cpu":
        return False
    model = meta_model(cfg, base, precision, base.config.num_hidden_layers)
    longest = max(data.documents, key=lambda d: len(d.input_ids))
    flops = step_flops(model, len(longest.input_ids), len(longest.input_ids))
    return flops > MOST_FLOPS * torch.get_num_threads() or weight_bytes(model) > free(precision.device)


def weight_bytes(model: Gemma3ForCausalLM) -> int:
    """Returns the bytes of the base's weights."""
    return sum(w.nbytes for w in all_weights(model).values())


def meta_model(cfg: Config, base: BaseFiles, precision: Precision, layers: int) -> Gemma3ForCausalLM:
    """Returns the first layers of the base on the meta device, in the dtype and block types of a run."""
    trains_all, config = cfg.adapter.type == "full", base.config
    types = quantized_types(
        config, gguf_tensors(base.folder, config), "none" if trains_all else cfg.model.quantize
    )
    dtype = precision.base_dtype(cfg.model.dtype, trains_all)
    with torch.device("meta"):
        few = replace(config, num_hidden_layers=layers, layer_types=config.layer_types[:layers])
        model = Gemma3ForCausalLM(few).to(dtype)
        for name in types.keys() & dict(model.named_parameters()).keys():
            rows, columns = model.get_parameter(name).shape
            set_quantized(model, name, QuantizedWeight.zeros(rows, columns, types[name], dtype))
    return model


def step_peak(cfg: Config, base: BaseFiles, precision: Precision, layers: int, batch: Batch) -> int:
    """Returns the most bytes of tensors in forward and backward pass of some layers, without the weights."""
    model = meta_model(cfg, base, precision, layers)
    build.add_adapters(model, cfg)
    model = model if cfg.adapter.type == "full" else model.to(precision.dtype)
    objective = build.make_objective(cfg)
    return tensors_peak(model.train(), objective, objective.largest_batch(batch).to("meta"))


def tensors_peak(model: Gemma3ForCausalLM, objective: Objective, batch: Batch, device: str = "meta") -> int:
    """Returns the most bytes of tensors in forward and backward pass, with gradients, without the weights."""
    with MemoryTracker(device) as tracker:
        loss, _, _ = objective.loss(model, batch)
        loss.backward()
    return tracker.peak


def cache_bytes(cfg: Config, config: Gemma3Config, prompts: list[list[int]], dtype: torch.dtype) -> int:
    """Returns the bytes of the KV cache in which these prompts are answered together."""
    room = max(map(len, prompts)) + cfg.generate.max_new_tokens
    positions = sum(min(room, config.sliding_window if k == SLIDING else room) for k in config.layer_types)
    of_a_position = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return len(prompts) * positions * of_a_position

"""Reads a base model with its adapter merged in, one tensor at a time, so that little memory is needed."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from lora.inject import adapters
from lora.layer import LoRALinear
from lora.merge import change, refuse_empty
from lora.peft_io import adapter_tensors, load_adapter
from model.weights import Checkpoint, quantized_types

SLICE = 2**22  # Weights of a matrix without adapter that are in memory at a time: 16 MiB in float32.


class MergedCheckpoint:
    """A base model and its adapter; `adapter` is the content of adapter_config.json, {} without one."""

    def __init__(self, folder: str | Path, adapter: str | Path | None = None):
        """Reads the config, the tensors' names and shapes, and the adapter, but no values of the base.

        Raises ValueError if the weights do not fit config.json, or the adapter does not fit the weights.
        """
        self.checkpoint, self.folder, self.adapter_folder = Checkpoint(folder), Path(folder), adapter
        self.config, self.names, model = self.checkpoint.config, self.checkpoint.names, self.checkpoint.model
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.parameters = sum(p.numel() for p in model.parameters())
        # The model is on the meta device, so load_adapter checks names and shapes and stores no values.
        self.adapter = {} if adapter is None else load_adapter(model, adapter)
        self.layers = adapters(model)
        self.tensors = {} if adapter is None else adapter_tensors(model, adapter)

    @property
    def has_quantized_base(self) -> bool:
        """Whether the base is a GGUF file with quantized matrices."""
        return bool(quantized_types(self.config, self.checkpoint.gguf, "keep"))

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor in float32; the weight of a layer with an adapter is returned merged."""
        path = name.removesuffix(".weight")
        return self.layer(path).merged_weight() if path in self.layers else self.checkpoint.read(name).float()

    def read_rows(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """Yields a matrix in float32, `rows` rows at a time; if it has an adapter, it is merged whole."""
        if name.removesuffix(".weight") in self.layers:
            yield from self.read(name).split(rows)
            return
        for start in range(0, self.shapes[name][0], rows):
            yield self.checkpoint.read_rows(name, start, start + rows).float()

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yields a tensor in float32: a vector whole, a matrix in pieces of rows of up to SLICE values."""
        shape = self.shapes[name]
        return iter([self.read(name)]) if len(shape) == 1 else self.read_rows(name, max(1, SLICE // shape[1]))

    def norms(self) -> dict[str, float]:
        """Returns {layer's path: Frobenius norm of (merged weight - base weight)}.

        Raises ValueError if a merged weight is not finite, or if no weight changes.
        """
        norms = {}
        for path in self.layers:
            layer = self.layer(path)
            norms[path] = change(layer.base_layer.weight, layer.merged_weight())
        refuse_empty(norms)
        return norms

    @torch.no_grad()
    def layer(self, path: str) -> LoRALinear:
        """Returns the LoRA or DoRA layer at `path` with its trained values and its base weight in float32."""
        shell = self.layers[path]
        base = nn.Linear(shell.base_layer.in_features, shell.base_layer.out_features, False, device="meta")
        base.weight = nn.Parameter(self.checkpoint.read(path + ".weight").float(), requires_grad=False)
        layer = type(shell)(base, shell.r, shell.lora_alpha, use_rslora=shell.use_rslora)
        for key, p in layer.named_parameters(recurse=False):
            p.copy_(self.tensors[f"{path}.{key}"])
        return layer

"""A base and its adapter as one model whose tensors come one at a time, so that an export needs the memory of
the largest tensor and not of the model.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from lora.inject import adapters
from lora.merge import change, refuse_empty
from lora.peft_io import adapter_tensors, load_adapter
from model.weights import Checkpoint

SLICE = 2**22  # weights that are in memory at a time of a matrix that no adapter changes: 16 MiB in float32


class MergedCheckpoint:
    """Base and adapter of a run: `config`, `names` and `shapes` of the tensors, `adapter`
    (adapter_config.json, or None), and read(name), merged.
    """

    def __init__(self, folder: str | Path, adapter: str | Path | None = None):
        """Raises ValueError where the weights do not fit config.json or the adapter does not fit the weights;
        no tensor of the base is read yet.
        """
        self.checkpoint = Checkpoint(folder)
        self.config, self.names, self.folder = self.checkpoint.config, self.checkpoint.names, Path(folder)
        self.shapes = {name: tuple(p.shape) for name, p in self.checkpoint.model.named_parameters()}
        self.adapter, self.layers, self.tensors, self.adapter_folder = None, {}, {}, adapter
        if adapter is not None:
            # On the meta device: the names, ranks and shapes are checked against the model's, the numbers
            # wait for their layer's turn.
            self.adapter = load_adapter(self.checkpoint.model, adapter)
            self.layers = adapters(self.checkpoint.model)
            self.tensors = adapter_tensors(self.checkpoint.model, adapter)

    @torch.no_grad()
    def read(self, name: str) -> torch.Tensor:
        """A tensor in float32, with the adapter's share where its layer has one."""
        path = name.removesuffix(".weight")
        return self.layer(path).merged_weight() if path in self.layers else self.checkpoint.read(name).float()

    def read_rows(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """A matrix in float32, so many rows at a time: an embedding of 262,144 words is never in memory
        whole.
        """
        if name.removesuffix(".weight") in self.layers:
            yield from self.read(name).split(rows)
            return
        for start in range(0, self.shapes[name][0], rows):
            yield self.checkpoint.read_rows(name, start, start + rows).float()

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor in float32 in pieces of SLICE weights, its rows in order."""
        shape = self.shapes[name]
        return iter([self.read(name)]) if len(shape) == 1 else self.read_rows(name, max(1, SLICE // shape[1]))

    def norms(self) -> dict[str, float]:
        """{path: Frobenius norm of the adapter's change to its layer's weight}, in float32, a layer at a
        time.

        Raises ValueError, as lora.merge.merge does, if a weight would not be finite, or if none would change:
        an untrained or lost adapter.
        """
        norms = {
            path: change(layer.base_layer.weight, layer.merged_weight())
            for path, layer in ((path, self.layer(path)) for path in self.layers)
        }
        refuse_empty(norms)
        return norms

    @torch.no_grad()
    def layer(self, path: str) -> nn.Module:
        """The LoRA or DoRA layer at `path` with its numbers in it, the base's in float32."""
        shell = self.layers[path]
        base = nn.Linear(
            shell.base_layer.in_features, shell.base_layer.out_features, bias=False, device="meta"
        )
        base.weight = nn.Parameter(self.checkpoint.read(path + ".weight").float(), requires_grad=False)
        layer = type(shell)(base, shell.r, shell.lora_alpha, use_rslora=shell.use_rslora)
        for key, p in layer.named_parameters(recurse=False):
            p.copy_(self.tensors[f"{path}.{key}"])
        return layer

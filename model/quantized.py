"""Weights that stay quantized in memory: a frozen linear layer, and an embedding that is also the head.

    QuantizedWeight      blocks (rows, bytes of a row) uint8, their type, and for NF4 its scales
    QuantizedLinear      y = x W^T, W dequantized for the product
    QuantizedEmbedding   the rows of the tokens, dequantized

A product makes a dense W in the dtype of its input, in the forward pass and again in the backward pass, and
keeps none. So a base takes the bytes of its file, and one matrix more while it computes. The weights are
frozen: the idea is QLoRA's (Dettmers et al. 2023, arXiv 2305.14314), with the block types of a GGUF file or
QLoRA's NF4.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common.device import autocast_dtype, without_autocast
from ggml.blocks import dequantize, row_bytes, type_named
from model.nf4 import BLOCK, BLOCK_BYTES, GROUP, dequantize_nf4


class QuantizedWeight:
    """A quantized matrix (rows, columns) that is read like a tensor: len(w), w[ids], w[a:b], w.to(dtype)."""

    requires_grad = False

    def __init__(
        self, blocks: torch.Tensor, type: str, dtype: torch.dtype, scales: torch.Tensor | None = None
    ):
        """Takes blocks of a type of ggml/blocks.py, or NF4's blocks and scales; w[...] is in `dtype`."""
        self.blocks, self.type, self.dtype, self.scales = blocks, type, dtype, scales
        self.device = blocks.device
        if scales is None:
            quant = type_named(type)
            columns = blocks.shape[1] // quant.block_bytes * quant.block_size
        else:
            columns = blocks.shape[1] // BLOCK_BYTES * BLOCK
        self.shape = (len(blocks), columns)

    @classmethod
    def zeros(cls, rows: int, columns: int, type: str, dtype: torch.dtype) -> "QuantizedWeight":
        """Returns a weight whose bytes are all zero, for measuring memory."""

        # torch.zeros would take its pages from the system only when they are written.
        def written(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.uint8).zero_()

        if type != "nf4":
            return cls(written(rows, row_bytes(type, columns)), type, dtype)
        n = columns // BLOCK
        return cls(written(rows, n * BLOCK_BYTES), type, dtype, written(-(-rows * n // GROUP) + 1, 4))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Returns some rows, dequantized."""
        return self._dense(rows, self.dtype)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns the whole matrix, dequantized."""
        return self._dense(slice(None), dtype)

    def _dense(self, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        if self.scales is None:
            return dequantize(self.blocks[rows], self.type, dtype)
        return dequantize_nf4(self.blocks, self.scales, rows, dtype)

    def detach(self) -> "QuantizedWeight":
        return self

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + (0 if self.scales is None else self.scales.nbytes)


class _QuantizedLayer(nn.Module):
    """Holds a QuantizedWeight; its tensors are buffers, so that they move to a device with the model."""

    blocks: torch.Tensor
    scales: torch.Tensor | None
    dense: torch.Tensor | None = None  # the dequantized matrix, only inside `dequantized`

    def hold(self, weight: QuantizedWeight) -> None:
        self.block_type, self.dtype = weight.type, weight.dtype
        self.register_buffer("blocks", weight.blocks)
        self.register_buffer("scales", weight.scales)

    @property
    def quantized(self) -> QuantizedWeight:
        return QuantizedWeight(self.blocks, self.block_type, self.dtype, self.scales)


class QuantizedLinear(_QuantizedLayer, nn.Linear):
    """y = x W^T + b with a QuantizedWeight W. `weight` makes a dense W, in float32 at least."""

    def __init__(self, weight: QuantizedWeight, bias: nn.Parameter | None = None):
        nn.Module.__init__(self)
        self.hold(weight)
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = weight.shape

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return self.quantized.to(torch.promote_types(self.quantized.dtype, torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps x (..., in) to (..., out)."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x W^T (..., out), in the dtype of x or autocast's."""
        if self.dense is not None:
            return F.linear(x, self.dense.to(x.dtype))
        return _Product.apply(x, self.quantized)


class QuantizedEmbedding(_QuantizedLayer):
    """Maps token ids to rows of a QuantizedWeight, which is also the head's matrix if the two are tied."""

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.hold(weight)

    @property
    def weight(self) -> torch.Tensor | QuantizedWeight:
        return self.quantized if self.dense is None else self.dense

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Maps tokens (T,) to (T, D)."""
        return self.weight[tokens]


class _Product(torch.autograd.Function):
    """y = x W^T and dL/dx = dL/dy W; W is dequantized for each of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
        ctx.weight = weight
        x = x.to(autocast_dtype(x.device.type) or x.dtype)
        with without_autocast(x.device.type):
            return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad @ ctx.weight.to(grad.dtype), None


@contextmanager
def dequantized(model: nn.Module, room: int, unused: Collection[nn.Module] = ()) -> Iterator[None]:
    """Makes all quantized weights but the unused ones dense inside the block, if they fit into `room` bytes.

    A step of decoding has few tokens, so that dequantizing for each product would take most of its time.
    """
    skipped = set(unused)
    layers = [m for m in model.modules() if isinstance(m, _QuantizedLayer) and m not in skipped]
    fits = sum(layer.quantized.numel() * layer.dtype.itemsize for layer in layers) <= room
    try:
        for layer in layers if fits else ():
            layer.dense = layer.quantized.to(layer.dtype)
        yield
    finally:
        for layer in layers:
            layer.dense = None


def all_weights(model: nn.Module) -> dict[str, torch.Tensor | QuantizedWeight]:
    """Returns the parameters and the quantized weights of a model by name."""
    weights: dict[str, torch.Tensor | QuantizedWeight] = dict(model.named_parameters())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _QuantizedLayer)}
    return weights | {f"{name}.weight": layer.quantized for name, layer in layers.items()}


def set_quantized(model: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Puts a weight in the place of the parameter `name`, of a linear layer, the embedding or the head."""
    path, _, child = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    layer = getattr(parent, child)
    is_layer = isinstance(layer, nn.Linear) and child != "lm_head"
    setattr(parent, child, QuantizedLinear(weight, layer.bias) if is_layer else QuantizedEmbedding(weight))

"""Bytes without numbers: code is walked through with tensors that have a shape and no content, and those that are alive are counted.

Whole numbers (token ids, bounds, positions, masks) stay real, since they decide what is computed; every floating-point tensor is an Outline.  PyTorch's
own FakeTensor does the same in five times the time, and MemTracker (torch.distributed._tools.mem_tracker) counts by modules, which we do not ask for.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
BLOCK = 512  # bytes: what CUDA's allocator rounds up to
LOGITS, WORKING = "logits chunk", "activations"


class Outline(torch.Tensor):
    """A tensor on a device that holds no numbers there: `meta` has its shape, and shares a storage (of a size and no content) with its views."""

    @staticmethod
    def __new__(cls, meta: torch.Tensor, device: torch.device):
        return torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=device
        )

    def __init__(self, meta: torch.Tensor, device: torch.device):
        self.meta = meta

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} of an Outline outside its Ledger")

    def tolist(self):
        return [row.tolist() for row in self] if self.ndim else self.item()  # torch's own reads the memory


class Ledger(TorchDispatchMode):
    """Counts the bytes of living storages on `device`, by the part of a run that they belong to: `now`, and at their `peak` since start().

    A number that is read from an Outline (a loss, a norm, a token) is `answer`.
    """

    def __init__(self, device: torch.device, vocab_size: int):
        super().__init__()
        self.device, self.vocab_size, self.answer = device, vocab_size, 0
        self.logits: set[tuple] = set()  # the shapes that chunks of logits have, beside (rows, vocab_size)
        self.living: dict[int, tuple[int, str]] = {}  # a storage's address -> bytes, part
        self.now: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """Forgets the peak there was."""
        self.total = sum(self.now.values())
        self.highest, self.peak = self.total, dict(self.now)

    def assign(self, tensors, part: str) -> None:
        """Says what these tensors are for; until then they are activations, or logits by their shape."""
        for t in tensors:
            storage = (t.meta if isinstance(t, Outline) else t).untyped_storage()
            if storage._cdata in self.living:
                size, before = self.living[storage._cdata]
                self.living[storage._cdata] = size, part
                self.now[before] -= size
                self.now[part] = self.now.get(part, 0) + size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given: list[torch.Tensor] = []
        _map(lambda x: given.append(x) or x, (args, list(kwargs.values())))
        if any(isinstance(x, Outline) for x in given):
            if func is aten._local_scalar_dense.default:
                return float(self.answer) if given[0].is_floating_point() else self.answer
            out = _on_meta(func, args, kwargs)
        else:
            out = func(*args, **kwargs) if given else _make(func, args, kwargs)
        return _map(self._enter, out)

    def _enter(self, t: torch.Tensor) -> torch.Tensor:
        """Notes a tensor's storage if it is a new one; a meta tensor goes on as an Outline."""
        inner = t.meta if isinstance(t, Outline) else t
        storage = inner.untyped_storage()
        if storage._cdata not in self.living and (inner.is_meta or inner.device.type == self.device.type):
            size = storage.nbytes()
            size = -(-size // BLOCK) * BLOCK if self.device.type == "cuda" else size
            part = (
                LOGITS
                if inner.ndim > 1
                and (inner.shape[-1] == self.vocab_size or tuple(inner.shape) in self.logits)
                else WORKING
            )
            self.living[storage._cdata] = size, part
            self.now[part] = self.now.get(part, 0) + size
            self.total += size
            weakref.finalize(storage, self._leave, storage._cdata).atexit = False
            if self.total > self.highest:
                self.highest, self.peak = self.total, dict(self.now)
        return Outline(inner, self.device) if inner.is_meta and inner is t else t

    def _leave(self, address: int) -> None:
        size, part = self.living.pop(address)
        self.now[part] -= size
        self.total -= size


def _make(func, args, kwargs):
    """A new tensor out of no other: floating-point ones without numbers."""
    if any(argument.name == "device" for argument in func._schema.arguments):
        out = func(
            *args, **{key: value for key, value in kwargs.items() if key != "pin_memory"} | {"device": "meta"}
        )
        if out.is_floating_point():
            return out
    return func(*args, **kwargs)


def _on_meta(func, args, kwargs):
    """The operator on shapes alone; what it returns of its own arguments (in place, or `out`) is returned as it was given."""
    known = {}

    def bare(x):
        meta = (
            x.meta
            if isinstance(x, Outline)
            else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        )
        known[id(meta)] = x
        return meta

    args, kwargs = _map(bare, args), {key: _map(bare, value) for key, value in kwargs.items()}
    out = func(*args, **kwargs | ({"device": "meta"} if "device" in kwargs else {}))
    return _map(lambda x: known.get(id(x), x), out)


def _map(function, value):
    """function(tensor) for each tensor in nested lists and tuples, anything else as it is (torch.utils._pytree takes half of the walk's time)."""
    if isinstance(value, torch.Tensor):
        return function(value)
    return type(value)(_map(function, v) for v in value) if type(value) in (list, tuple) else value

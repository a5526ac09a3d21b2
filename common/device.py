"""Chooses the device, the dtypes, autocast and loss scaling. No other file decides on these."""

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from common.cores import watch_cores

# oneDNN keeps this many kernels. In bfloat16 each serves one shape and takes about 300 KB; a step uses about
# a hundred, and few shapes come back.
ONEDNN_KERNELS = 256
# The C library maps a tensor of this many bytes or more outside of its heap.
MMAP_THRESHOLD = 32 * 2**20
# PyTorch starts at 2^16, which suits losses that are means. Ours are sums over some hundreds of tokens, and
# each halving of the scale costs a step.
FP16_INIT_SCALE = 2.0**8
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LossScaler = torch.amp.GradScaler


def pick_device(name: str) -> torch.device:
    """Returns the named device, ready for use. "auto" is CUDA if there is a CUDA GPU, else the CPU.

    Raises ValueError if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"Loupe does not run on {device.type!r}")
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"device {name!r} (train.device, --device) cannot be used ({str(e).splitlines()[0]}); "
            "set it to 'auto' or 'cpu'"
        ) from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    if device.type == "cpu":
        _keep_freed_memory()
        watch_cores()
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_KERNELS))
    return device


def device_name(device: torch.device) -> str:
    """Returns the name of a CUDA GPU; for other devices the number of CPU threads ("8 CPU threads")."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def missing_to_compile(device: torch.device) -> str | None:
    """Returns what torch.compile needs on a CPU but cannot find, with a remedy; None if nothing is missing.

    It needs a C++ compiler and Python's headers (torch/_inductor/cpp_builder.py).
    """
    if device.type != "cpu":
        return None
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        return f"the C++ compiler {compiler} is missing; install it, or name another in CXX"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return f"{header} is missing; install Python's headers (python3-dev on Debian)"
    return None


def _keep_freed_memory() -> None:
    """Makes glibc keep the memory of freed tensors for new tensors; does nothing with other C libraries."""
    # Every step frees and allocates the same gigabytes. A page that Linux got back costs a page fault.
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD, see mallopt(3): the heap never shrinks.
        # M_MMAP_THRESHOLD: a larger block is mapped outside of the heap and returned when it is freed. In the
        # heap, small blocks would settle where a freed embedding gradient was, and the next needs a new one.
        libc.mallopt(-3, MMAP_THRESHOLD)  # glibc refuses a larger value.


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Returns whether bfloat16 beats float32: on GPUs since Ampere, on CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def autocast_dtype(device: str) -> torch.dtype | None:
    """Returns autocast's dtype on "cpu", "cuda", ...; None where it is off, and on "meta"."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(device: str) -> AbstractContextManager:
    """Returns a context in which autocast is off on "cpu", "cuda", ..."""
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


class Precision:
    """Holds autocast and the gradient scaler for a precision. The scaler has an effect in fp16 only.

    `name` is "fp32", "bf16", "fp16" or "auto": bf16 where the hardware multiplies it faster, else fp32.
    """

    def __init__(self, name: str, device: torch.device):
        if name == "auto":
            name = "bf16" if _multiplies_bfloat16(device) else "fp32"
        self.name, self.device, self.dtype = name, device, TYPES[name]
        self.scaler = LossScaler(device.type, init_scale=FP16_INIT_SCALE, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Returns the context that a forward pass runs in."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def base_dtype(self, wanted: str, trains_all: bool) -> torch.dtype:
        """Returns the dtype of the base weights: `wanted`, or for "auto" bfloat16 under bf16, else float32.

        Weights that are trained (trains_all) are always float32, because bfloat16 loses small updates.
        """
        if trains_all or wanted == "float32":
            return torch.float32
        return torch.bfloat16 if wanted == "bfloat16" or self.name == "bf16" else torch.float32

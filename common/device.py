"""Which device, which numbers: the only place that decides on dtypes, autocast and loss scaling."""

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

KERNELS = 256  # that oneDNN keeps, each some 300 KB and for one shape of bfloat16; a step takes about a hundred, and few shapes come again
MAPPED = 32 * 2**20  # bytes: a tensor of so many has room of its own, outside of the C library's heap
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one; raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"nothing is computed on {device.type!r}")
    except (RuntimeError, AssertionError) as e:
        raise ValueError(
            f"device {name!r} (train.device, --device) cannot be used ({str(e).splitlines()[0]}); set it to 'auto' or 'cpu'"
        ) from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    if device.type == "cpu":
        keep_freed_memory()
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    return device


def device_name(device: torch.device) -> str:
    """Returns the name of a GPU, or the number of CPU threads, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def missing_to_compile(device: torch.device) -> str | None:
    """What torch.compile, for a CPU, would not find (torch/_inductor/cpp_builder.py): a C++ compiler, Python's headers; None where it has both."""
    compiler, header = (
        os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"),
        Path(sysconfig.get_path("include"), "Python.h"),
    )
    if device.type != "cpu":
        return None
    if not shutil.which(compiler):
        return f"the C++ compiler {compiler} is not here; install it, or name another in CXX"
    return (
        None
        if header.is_file()
        else f"{header} is not here; install Python's headers (python3-dev on Debian)"
    )


def keep_freed_memory() -> None:
    """Has glibc keep what tensors leave behind: every step frees and asks again for the same gigabytes, and a page that went back to Linux in between
    costs a fault and a zeroing.  M_TRIM_THRESHOLD and M_MMAP_THRESHOLD as in mallopt(3); other C libraries are left alone."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, -1)  # the heap's end is never given back
        # A larger block is mapped beside the heap, and goes back at once: in the heap, a gradient of the embedding seldom finds the place of the last one
        # free of small things, and takes another every step.  More than this is refused.
        libc.mallopt(-3, MAPPED)


def pick_precision(name: str, device: torch.device) -> str:
    """ "auto" is bf16 where the device multiplies it faster than float32: CUDA since Ampere, CPUs with AVX512-BF16 or AMX."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        return (
            "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"
        )
    return "fp32"


class Precision:
    """Autocast and loss scaling of one run: `with precision.autocast(): ...`, and a scaler that does nothing outside fp16."""

    def __init__(self, name: str, device: torch.device):
        self.name, self.device, self.dtype = name, device, TYPES[name]
        # PyTorch begins at 2^16, for means; our losses are sums over some hundreds of tokens, and each halving costs a step
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8, enabled=name == "fp16")

    def autocast(self):
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def base_dtype(self, wanted: str, trains_all: bool) -> torch.dtype:
        """The dtype that the base's weights are kept in: float32 where they train (their updates are smaller than bfloat16's step)."""
        if trains_all or wanted == "float32":
            return torch.float32
        return torch.bfloat16 if wanted == "bfloat16" or self.name == "bf16" else torch.float32

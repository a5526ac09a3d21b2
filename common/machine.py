"""Memory of this process and this machine, in bytes."""

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import torch


def mebibytes(n: int) -> str:
    return f"{n / 2**20:,.0f} MiB"


def resident() -> int:
    """Bytes of this process that are in memory, once the C library has given back what it keeps for later."""
    if sys.platform != "linux":
        return peak_memory(torch.device("cpu"))
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's alone
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def free(device: torch.device) -> int:
    """Bytes that a run may take: what CUDA's driver has left, or the machine (or this container's share of it) with this process gone."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    left = [int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024]
    for folder, limit, used in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):  # cgroups v2, v1
        group = Path("/sys/fs/cgroup", folder)
        try:
            files = sum(
                int(n)
                for n in re.findall(
                    r"^(?:in)?active_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE
                )
            )  # can be dropped
            left.append(int((group / limit).read_text()) - int((group / used).read_text()) + files)
        except (OSError, ValueError):  # no such group, or no limit: "max"
            continue
    return min(left) + resident()


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator on CUDA, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # not ru_maxrss, which a process inherits from the one that started it
        if found := re.search(
            r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()
        ):  # some sandboxes leave it out
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

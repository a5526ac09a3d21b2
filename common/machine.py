"""The memory of this process and of this machine, in bytes."""

import os
import re
import resource
import sys
from pathlib import Path

import torch


def mebibytes(n: int) -> str:
    """Returns a number of bytes as text: "1,250 MiB"."""
    return f"{n / 2**20:,.0f} MiB"


def free(device: torch.device) -> int:
    """Returns the available memory in bytes: of the GPU on CUDA, else of this machine or its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    left = [int(available[1]) * 1024] if available else []
    cgroups = (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    )
    for folder, limit, used in cgroups:  # versions 2 and 1
        group = Path("/sys/fs/cgroup", folder)
        try:
            stat = (group / "memory.stat").read_text()
            droppable = sum(int(n) for n in re.findall(r"^(?:in)?active_file (\d+)", stat, re.MULTILINE))
            left.append(int((group / limit).read_text()) - int((group / used).read_text()) + droppable)
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
    return min(left)


def peak_memory(device: torch.device) -> int:
    """Returns the most memory used so far, in bytes: by tensors on a CUDA GPU, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # not ru_maxrss, which a process inherits from the one that started it
        if found := re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

"""Arguments, a clock and one line of JSON for each program that frameworks.py runs.

Importing this file does not load torch.
"""

import argparse
import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One program of benchmarks/frameworks.py, which starts it.")
    parser.add_argument("name")
    parser.add_argument("folder", type=Path, help="the folder that lab_like.py wrote")
    number = "index of the batch of the timed steps; the first step uses batch 0"
    parser.add_argument("--round", type=int, required=True, help=number)
    parser.add_argument("--steps", type=int, required=True, help="number of timed steps")
    parser.add_argument("--batch", type=int, required=True, help="rows per step")
    parser.add_argument("--device", required=True)
    parser.add_argument("--started", type=float, required=True, help="time.time() at the process's start")
    parser.add_argument("--set", action="append", default=[])
    return parser.parse_args()


class Clock:
    """Measures the seconds of each step; lap() is called after each one, and first after the warm-up step."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.losses, self.seconds, self.others, self.first = args, [], [], [], None
        self._begin()

    def _begin(self) -> None:
        self.since, self.others_since = time.perf_counter(), cpu_of_others()

    def lap(self, loss: float | None = None) -> None:
        if self.args.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.since)
        self.others.append((cpu_of_others() - self.others_since) / self.seconds[-1])
        self.losses.append(loss)
        self.first = self.first or time.time() - self.args.started
        self._begin()

    def result(self) -> dict:
        """Returns the measurements of this process.

        seconds: of each timed step. others: the number of cores that other processes kept busy, before the
        end of the first step and in each timed step. first_step: seconds from the process's start to the end
        of the first step. peak: bytes, of the allocator on CUDA, else of resident memory.
        """
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self.args.device == "cuda":
            import torch

            peak = torch.cuda.max_memory_allocated()
        times = {"seconds": self.seconds[1:], "others": self.others, "first_step": self.first}
        return times | {"peak": peak, "losses": self.losses, "versions": versions(self.args.device)}


def cpu_of_others() -> float:
    """Returns the CPU seconds of all other processes since the boot, or 0 where there is no /proc/stat."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def versions(device: str) -> list[str]:
    """Returns the device's name and the loaded packages with their versions."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    loaded = [package for package in ("torch", "transformers", "peft", "trl") if package in sys.modules]
    return [name, *(f"{package} {metadata.version(package)}" for package in loaded)]


def finish(result: dict) -> None:
    print(json.dumps(result), flush=True)

"""Arguments, a clock and one line of JSON for each program that frameworks.py runs. This file does not load
torch."""

import argparse
import json
import os
import resource
import sys
import time
from importlib import metadata
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="One contestant of benchmarks/frameworks.py, which starts it."
    )
    parser.add_argument("name")
    parser.add_argument("folder", type=Path, help="what lab_like.py wrote")
    parser.add_argument(
        "--round",
        type=int,
        required=True,
        help="number of the batch that the timed steps run on; the first step runs on batch 0",
    )
    parser.add_argument("--steps", type=int, required=True, help="timed steps")
    parser.add_argument("--batch", type=int, required=True, help="rows of a step")
    parser.add_argument("--device", required=True)
    parser.add_argument(
        "--started", type=float, required=True, help="time.time() when the process was started"
    )
    parser.add_argument("--set", action="append", default=[])
    return parser.parse_args()


class Clock:
    """Call lap() after each step: the first call gives the start-up time, later ones the step seconds."""

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
        """Returns what the process measured.

        The seconds of the timed steps; the cores that other processes kept busy up to the first step and in
        each timed one; the seconds from the start to the end of the first step; and the peak memory in bytes
        (on CUDA that of the allocator).
        """
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self.args.device == "cuda":
            import torch

            peak = torch.cuda.max_memory_allocated()
        return {
            "seconds": self.seconds[1:],
            "others": self.others,
            "first_step": self.first,
            "peak": peak,
            "losses": self.losses,
            "versions": versions(self.args.device),
        }


def cpu_of_others() -> float:
    """Seconds that the machine's cores have worked for other processes; 0 where there is no /proc/stat."""
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - time.process_time()


def versions(device: str) -> list[str]:
    """The device, and the packages that did the work."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return [
        name,
        *(
            f"{package} {metadata.version(package)}"
            for package in ("torch", "transformers", "peft", "trl")
            if package in sys.modules
        ),
    ]


def finish(result: dict) -> None:
    print(json.dumps(result), flush=True)

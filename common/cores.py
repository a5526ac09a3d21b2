"""Stops threads from waiting in a busy loop while other processes need the cores.

PyTorch divides an operation among its OpenMP threads. A thread that has finished spins for some milliseconds
until the others have, which is the fastest way to wait if every thread has a core. If another process takes a
core, one thread is always late, the others spin in vain on the cores that it could have, and a step takes
five times as long and more. The environment variables for this are read once, when PyTorch loads.

But libgomp spins hardly at all while its threads outnumber the cores. A watch therefore measures how long
this process's threads wait for a core. While they do, it keeps idle threads of libgomp; otherwise none.

Source: libgomp of GCC, env.c (gomp_throttled_spin_count_var) and config/linux/wait.h (do_spin); the file
schedstat of a thread: Linux, Documentation/scheduler/sched-stats.rst.
"""

import os
import threading
import time
from pathlib import Path

import torch

PERIOD = 0.5  # seconds between two measurements
# Threads that wait for a core, on average. On two cores: at most 0.1 alone, 0.4 to 0.8 beside a busy process.
BUSY, CALM = 0.25, 0.1
AFTER = 4  # So many measurements in a row begin or end the throttling: a busy second at the start does not.
TASKS = Path("/proc/self/task")
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # A user who sets one decides.
GRAIN = 2**15  # at::internal::GRAIN_SIZE: elements of a tensor for each thread

_started = threading.Lock()


def watch_cores() -> None:
    """Starts the watch in a thread of its own: once, on Linux, and only with several OpenMP threads."""
    if not (TASKS / str(os.getpid()) / "schedstat").is_file() or any(name in os.environ for name in SETTINGS):
        return
    if torch.get_num_threads() > 1 and _started.acquire(blocking=False):
        threading.Thread(target=_watch, name="cores", daemon=True).start()


def waited() -> dict[str, int]:
    """Returns how long each thread of this process has waited for a core, in nanoseconds, by its id."""
    found = {}
    for task in TASKS.iterdir():
        try:
            found[task.name] = int((task / "schedstat").read_text().split()[1])
        except OSError:  # The thread has ended.
            continue
    return found


def _watch() -> None:
    throttle, before, start = Throttle(), waited(), time.monotonic()
    while True:
        time.sleep(PERIOD)
        now, end = waited(), time.monotonic()
        grown = sum(now[task] - before.get(task, now[task]) for task in now)
        throttle.measured(grown / 1e9 / (end - start))
        before, start = now, end


class Throttle:
    """Keeps idle threads of libgomp, more than there are cores, while this process waits for cores."""

    def __init__(self) -> None:
        self.on, self.contrary = False, 0  # measurements in a row that speak for a change
        self.release = threading.Event()
        self.holders: list[threading.Thread] = []

    def measured(self, waiting: float) -> None:
        """Takes a measurement, the number of threads that waited for a core, and starts or stops."""
        self.contrary = self.contrary + 1 if (waiting < CALM if self.on else waiting > BUSY) else 0
        if self.contrary == AFTER:
            self.stop() if self.on else self.start()

    def start(self) -> None:
        """Starts the idle threads: each Python thread that computes has OpenMP threads of its own."""
        threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
        # Each holder adds threads - 1, and with those of this process they must outnumber the cores.
        count = max(0, cores - threads) // (threads - 1) + 1
        self.on, self.contrary, self.release = True, 0, threading.Event()
        self.holders = [
            threading.Thread(target=self._hold, args=(threads,), daemon=True) for _ in range(count)
        ]
        for holder in self.holders:
            holder.start()

    def _hold(self, threads: int) -> None:
        torch.zeros(threads * GRAIN).add_(1)
        self.release.wait()

    def stop(self) -> None:
        """Ends the idle threads."""
        self.release.set()
        for holder in self.holders:
            holder.join()
        self.on, self.contrary, self.holders = False, 0, []

"""common/cores.py: threads that wait for each other do not spin beside a busy process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import cores
from common.cores import Throttle, waited
from tests.folders import ROOT


class Counted(Throttle):
    """A throttle that only notes what it would do."""

    def start(self) -> None:
        self.on, self.contrary = True, 0

    def stop(self) -> None:
        self.on, self.contrary = False, 0


def test_four_busy_measurements_in_a_row_begin_the_throttling_and_four_calm_ones_end_it():
    throttle, seen = Counted(), []
    for waiting in (0.5, 0.5, 0.5, 0.2, *(0.5,) * 4, 0.2, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.2):
        throttle.measured(waiting)
        seen.append(throttle.on)
    assert seen == [False] * 7 + [True] * 9 + [False] * 2


@pytest.mark.parametrize(("threads", "count", "holders"), [(2, 2, 1), (8, 16, 2), (8, 14, 1), (16, 4, 1)])
def test_the_openmp_threads_outnumber_the_cores(monkeypatch, threads, count, holders):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda _: set(range(count)))
    throttle = Throttle()
    throttle.start()
    assert len(throttle.holders) == holders and threads + holders * (threads - 1) > count
    throttle.stop()
    assert throttle.holders == []


def test_a_thread_that_waits_for_a_core_is_measured():
    """Two processes on one core: each waits about as long as it computes."""
    code = """
import os, time, subprocess, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
from common.cores import waited
time.sleep(0.2)
before, start = sum(waited().values()), time.process_time()
while time.process_time() - start < 0.3: pass
print((sum(waited().values()) - before) / 1e9)
other.kill()
"""
    assert float(run(code)) > 0.1


def test_throttling_adds_openmp_threads_and_ends_them():
    code = """
import json, os, torch
from common.cores import Throttle
torch.zeros(2**18).add_(1)
def count(): return len(os.listdir("/proc/self/task"))
found, throttle = [count()], Throttle()
throttle.start()
while count() < found[0] + 2: pass
found.append(count())
throttle.stop()
while count() > found[0]: pass
found.append(count())
print(json.dumps(found))
"""
    alone, throttled, after = json.loads(run(code, OMP_NUM_THREADS="2"))
    assert throttled == alone + 2 and after == alone  # the holder and one thread of its own


@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "100"}])
def test_a_command_on_the_cpu_keeps_watch_once_unless_the_user_has_decided(chosen):
    code = """
import threading
from common.device import pick_device
pick_device("cpu"), pick_device("cpu")
print(sum(thread.name == "cores" for thread in threading.enumerate()))
"""
    assert int(run(code, OMP_NUM_THREADS="2", **chosen)) == (not chosen)


def test_one_thread_needs_no_watch():
    code = """
import threading
from common.device import pick_device
pick_device("cpu")
print(threading.active_count())
"""
    assert int(run(code, OMP_NUM_THREADS="1")) == 1


def test_a_thread_that_ends_while_it_is_read_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "schedstat").write_text("5 70 1\n")
    (tmp_path / "2").mkdir()
    monkeypatch.setattr(cores, "TASKS", tmp_path)
    assert waited() == {"1": 70}


def run(code: str, **variables: str) -> str:
    """Returns what a new process prints; it runs with a timeout, for its loops wait for what must happen."""
    known = {key: value for key, value in os.environ.items() if key not in cores.SETTINGS}
    words = [sys.executable, "-c", code]
    done = subprocess.run(
        words, cwd=Path(ROOT), env=known | variables, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

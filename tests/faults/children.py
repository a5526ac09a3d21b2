"""Processes that start in milliseconds, are killed, and meet failing disks.

A server process loads torch once and forks a child for each request, so that a hundred kills cost
little more than the work itself. It runs with disk.c preloaded, which sees the writes of libraries in other
languages too.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.folders import ROOT

LAST = 2**62  # of the calls on a disk: all from the first one on
COUNT_ONLY = (LAST, LAST, 0)


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code (-9: SIGKILL), output, calls on its disk, and clock times in seconds."""

    code: int
    said: str
    calls: int
    began: float
    ended: float


def build_library(folder: Path) -> Path:
    """Compiles disk.c."""
    library = folder / "disk.so"
    source = Path(__file__).with_name("disk.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


class Server:
    """Runs Python code in forked children: `with Server(folder) as server: server.run("train.main(...)")`."""

    def __init__(self, folder: Path):
        self.folder, self.library = folder, build_library(folder)
        env = os.environ | {"LD_PRELOAD": str(self.library), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", "from tests.faults import children; children.serve()"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=env | {"HF_HUB_OFFLINE": "1"}, text=True
        )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, code: str, cwd: Path, disk: tuple | None = None, stdout: str = "") -> Ended:
        """Runs `code`, which sets `result`, the exit code, in a child whose current folder is `cwd`.

        `disk` is (folder, first, last, errno): these calls on that folder fail, with errno 0 by SIGKILL.
        """
        assert self.process.stdin and self.process.stdout
        output = self.folder / "output"
        about = {"code": code, "cwd": str(cwd), "disk": disk, "output": stdout or str(output)}
        about |= {"calls": str(self.folder / "calls"), "library": str(self.library)}
        print(json.dumps(about), file=self.process.stdin, flush=True)
        code_, began, ended = json.loads(self.process.stdout.readline())
        calls = self.folder / "calls"
        counted = int(calls.read_text()) if calls.exists() else 0
        calls.unlink(missing_ok=True)
        return Ended(code_, "" if stdout else output.read_text(errors="replace"), counted, began, ended)


def serve() -> None:
    """Is the server: reads requests from stdin, and writes (exit code, start, end) of each to stdout."""
    import torch

    import export  # noqa: F401
    import train  # noqa: F401
    from training import explain, memory, trainer  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        began, child = time.time(), os.fork()
        if not child:
            _work(**json.loads(line))
        status = os.waitpid(child, 0)[1]
        print(json.dumps([os.waitstatus_to_exitcode(status), began, time.time()]), flush=True)


def _work(code: str, cwd: str, disk: list | None, output: str, calls: str, library: str) -> None:
    os.chdir(cwd)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1), os.dup2(out, 2), os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    lib = ctypes.CDLL(library)
    counted = [0]

    def arm(folder: str = "", first: int = LAST, last: int = 0, number: int = 0) -> None:
        counted.append(lib.disk_calls())
        lib.disk_arm(folder.encode(), ctypes.c_long(first), ctypes.c_long(last), number)

    arm(*disk or ())
    names: dict = {"result": 0, "arm": lambda: arm(*disk or ()), "disarm": arm}
    try:
        exec(code, names)
    except BaseException:
        import traceback

        traceback.print_exc()
        names["result"] = 99
    arm()
    Path(calls).write_text(str(max(counted)))
    sys.stdout.flush()
    os._exit(names["result"])

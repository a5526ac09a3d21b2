"""A quick share of `python -m tests.faults.kills 100`, and the disk under a save."""

import errno
import random
import shutil

import pytest

from tests.faults.children import Server
from tests.faults.kills import Kills

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="disk.c needs a C compiler")

# A save beside a whole checkpoint, on a disk whose calls fail from one on, or only one of them.
SAVE = """
import os, torch
from pathlib import Path
from training import checkpoint
folder = Path("checkpoints")
def save(step):
    checkpoint.save(folder, step, {"weights/a": torch.full((300,), float(step))}, {"n": step}, 1)
disarm(), save(1), arm()
try:
    save(2)
except OSError:
    pass
disarm()
checkpoint.clean(folder)
path, tensors, state = checkpoint.load_newest(folder, lambda text: None)
assert tensors["weights/a"][0] == state["step"] and state["step"] in (1, 2)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.mark.fault("kill in a run")
def test_chains_of_kills_end_in_the_bytes_of_the_uninterrupted_run(server, tmp_path):
    kills = Kills(server, tmp_path, random.Random(7)).prepare()
    kills.all(10)
    assert kills.done.total() >= 10 and kills.done["export"], kills.summary()


@pytest.mark.fault("full disk")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("once", [True, False])
def test_whatever_call_of_a_save_fails_a_whole_checkpoint_loads(server, tmp_path, number, once):
    for first in range(1, 200):
        place = tmp_path / str(first)
        place.mkdir()
        disk = (str(place / "checkpoints"), first, first if once else 2**62, number)
        ended = server.run(SAVE, place, disk)
        assert ended.code == 0, (first, ended.said)
        if ended.calls < first:
            break
    assert first > 10

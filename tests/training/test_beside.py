"""training/beside.py: what a thread returns or raises reaches who asks for it, and the program's exit waits for it."""

import subprocess
import sys

import pytest

from tests.folders import ROOT
from training.beside import beside


def test_what_the_function_returns_or_raises_is_the_futures():
    assert beside(divmod, 7, 3).result() == (2, 1)
    with pytest.raises(ZeroDivisionError):
        beside(divmod, 7, 0).result()


def test_a_program_that_fails_meanwhile_waits_for_the_thread_and_keeps_its_exit_code():
    program = "import sys, time; from training.beside import beside; beside(lambda: (time.sleep(0.5), print('done'))); sys.exit(2)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (2, "done\n", "")

"""A quick share of `python -m tests.faults.fuzz`, in the process that it is for a user."""

import subprocess
import sys

from tests.folders import ROOT


def test_damaged_files_of_eight_formats_give_a_result_or_one_error_that_names_them():
    command = [sys.executable, "-m", "tests.faults.fuzz", "--count", "150"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    table = [line.split() for line in done.stdout.splitlines() if line.count("|") == 7][1:]
    assert len(table) == 8
    for name, _, inputs, _, results, _, refused, *_ in table:
        assert int(inputs) == 150 and int(results) > 5 and int(refused) > 30, (name, done.stdout)

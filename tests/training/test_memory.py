"""training/memory.py and memory_probe.py: train.py --plan against the memory that the run then takes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from common import machine
from tests.folders import ROOT
from training import memory, memory_probe
from training.config import Train, load_config
from training.memory_probe import Probe, extended, sizes

TINY = (
    "--config small.toml --set train.max_steps=6 --set train.eval_samples=2 --set generate.max_new_tokens=4"
)


def sets(*settings: str) -> list[str]:
    return [word for s in settings for word in ("--set", s)]


def plan(capsys, *settings: str) -> str:
    assert train.main(["--config", "tiny.toml", "--plan", *sets(*settings)]) == 0
    return capsys.readouterr().out


def mebibytes(text: str, line: str) -> int:
    return int(text[text.index(line) + len(line) :].split("MiB")[0].replace(",", ""))


def found(sizes: dict[int, int], evaluation: int = 0) -> Probe:
    """A probe of a machine on which micro-batches of these sizes reach these peaks."""
    phases = {"loading": 1, "training": max(sizes.values()), "evaluation": evaluation}
    return Probe({"base weights": 1}, list(sizes.items()), phases)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.precision=fp32", "adapter.type=dora", "adapter.r=8", "train.batch_size=8"),
        ("train.precision=fp32", "adapter.type=full", "train.batch_size=2"),
    ],
)
def test_a_plan_is_within_a_tenth_of_what_the_run_takes(tmp_path, settings):
    """Both run on the embedded model in processes of their own, as a user starts them."""
    words = [*TINY.split(), *sets(f"run.dir={tmp_path / 'run'}", *settings)]
    command = [sys.executable, "train.py", *words]
    said = subprocess.run([*command, "--plan"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not (tmp_path / "run").exists()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    measured = mebibytes(manifest["run"]["peak memory"], "")
    assert mebibytes(said, "in all") == pytest.approx(measured, rel=0.1)


def test_a_plan_needs_no_weights_writes_nothing_and_its_parts_add_up(place, capsys):
    (place / "base" / "model.safetensors").unlink()
    before = sorted(place.rglob("*"))
    out = plan(capsys)
    parts = ("base weights", "trainable parameters", "optimizer state", "gradients", "everything else")
    assert sum(mebibytes(out, part) for part in parts) == pytest.approx(mebibytes(out, "in all"), abs=4)
    assert "it fits" in out and sorted(place.rglob("*")) == before


def test_for_a_run_that_does_not_fit_the_plan_gives_the_largest_batch_that_does(place, capsys, monkeypatch):
    # The peaks are 100, 200, 300 for 2, 4, 8 rows: the line between 4 and 8 reaches 250 at 6 rows.
    monkeypatch.setattr(memory, "probe", lambda cfg, room: found({2: 100, 4: 200, 8: 300}))
    monkeypatch.setattr(memory, "free", lambda device: 275.1)  # 250 times the margin of 1.1
    out = plan(capsys, "train.batch_size=8", "train.gradient_accumulation_steps=3")
    assert "train.batch_size = 6 (now 8)" in out and "gradient_accumulation_steps = 4 (now 3)" in out
    monkeypatch.setattr(memory, "free", lambda device: 1)
    assert "not even one row at a time" in plan(capsys, "train.batch_size=8")


def test_the_plan_tells_an_evaluation_that_does_not_fit_from_training(place, capsys, monkeypatch):
    monkeypatch.setattr(memory, "probe", lambda cfg, room: found({1: 100, 2: 150}, evaluation=400))
    monkeypatch.setattr(memory, "free", lambda device: 300)
    out = plan(capsys, "train.batch_size=2")
    assert "most is taken in evaluation" in out and "lower train.eval_samples" in out


def test_a_probe_that_ran_out_of_memory_does_not_fit(place, capsys, monkeypatch):
    probe = Probe({"base weights": 1}, [], {"loading": 100, "training": 0}, failed="training")
    monkeypatch.setattr(memory, "probe", lambda cfg, room: probe)
    assert "it does not fit" in plan(capsys)


CASES = [(99, 0), (100, 1), (149, 1), (150, 2), (175, 3), (200, 4), (999, 4)]


@pytest.mark.parametrize("room, largest", CASES)
def test_the_largest_size_is_interpolated_between_the_measured_ones(room, largest):
    assert found({1: 100, 2: 150, 4: 200}).largest(room) == largest


def test_growth_is_extrapolated_by_the_last_doubling_for_at_most_eight_times_the_steps():
    peaks = [100, 100, 110, 115, 120]  # from the second step to the fourth the peak grows by 10
    assert extended(peaks, 4) == 120 and extended(peaks, 8) == 130 and extended(peaks, 10**6) == 150


def test_sizes_double_up_to_the_runs_own():
    data = SimpleNamespace(documents=[SimpleNamespace(input_ids=[0] * n) for n in (3, 5)])
    assert [size for size, _ in sizes(Train(batch_size=6), data)] == [1, 2, 4, 6]
    assert [t.max_tokens for _, t in sizes(Train(max_tokens=12), data)] == [5, 10, 12]


# the process


def test_a_size_that_would_exceed_the_room_is_not_tried(place):
    """Without any room the first two sizes are measured, and the third is predicted from them."""
    cfg = load_config("tiny.toml", ["train.batch_size=8"])
    probe = memory_probe.probe(cfg, room=0)
    assert [size for size, _ in probe.sizes] == [1, 2, 4] and probe.failed == "training"


def test_after_enough_seconds_the_largest_micro_batch_is_extrapolated(place, monkeypatch):
    monkeypatch.setattr(memory_probe, "MOST_SECONDS", -1)
    *_, found = memory_probe._phases(load_config("tiny.toml", ["train.batch_size=8"]), room=2**40)
    (_, one), (_, two), (size, predicted) = found.sizes
    assert size == 8 and predicted == two + 6 * (two - one) and not found.failed


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def exhausted(*_):
    torch.empty(2**60)


def refused(*_):
    raise ValueError("this is no good")


def in_a_child(monkeypatch, phases) -> Probe:
    """Runs the probe with other phases in its child, which is forked so that it has the replacement."""
    context = memory_probe.multiprocessing.get_context("fork")
    monkeypatch.setattr(memory_probe.multiprocessing, "get_context", lambda kind: context)
    monkeypatch.setattr(memory_probe, "_phases", phases)
    return memory_probe.probe(load_config("tiny.toml"), room=2**40)


@pytest.mark.parametrize("phases", [killed, exhausted])
def test_a_process_that_runs_out_of_memory_is_a_failed_probe(place, monkeypatch, phases):
    assert in_a_child(monkeypatch, phases).failed == "loading"


def test_another_failure_of_the_process_is_raised_with_its_place(place, monkeypatch):
    with pytest.raises(ValueError, match="this is no good") as caught:
        in_a_child(monkeypatch, refused)
    assert "in refused" in caught.value.__notes__[0]


# bad input


def refusal(capsys, *settings: str) -> str:
    assert train.main(["--config", "tiny.toml", "--plan", *sets(*settings)]) == 2
    return capsys.readouterr().err


def test_a_compiled_run_without_a_compiler_is_refused(place, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in refusal(capsys, "train.compile=true", "train.device=cpu")


def test_a_plan_of_a_bad_config_is_refused(place, capsys):
    assert "train.batch_size = 0 must be at least 1" in refusal(capsys, "train.batch_size=0")
    shutil.rmtree(place / "base")
    refusal(capsys)


def test_the_free_memory_is_the_machines_or_the_containers():
    cpu = torch.device("cpu")
    assert 2**20 < machine.peak_memory(cpu) < machine.free(cpu) + machine.peak_memory(cpu) < 2**45
    assert machine.mebibytes(3 * 2**20) == "3 MiB"

"""training/memory.py: train.py --plan, against what the run then takes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from tests.folders import ROOT
from tests.makers import write_run
from training import memory

TINY = [
    "--config",
    "small.toml",
    "--set",
    "train.max_steps=6",
    "--set",
    "train.eval_samples=2",
    "--set",
    "generate.max_new_tokens=4",
]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(write_run(tmp_path / "place"))
    return tmp_path / "place"


def plan(capsys, *settings: str) -> str:
    words = [word for s in settings for word in ("--set", s)]
    assert train.main(["--config", "tiny.toml", "--plan", *words]) == 0
    return capsys.readouterr().out


def mebibytes(text: str, line: str) -> int:
    return int(text[text.index(line) + len(line) :].split("MiB")[0].replace(",", ""))


@pytest.mark.parametrize(
    "settings",
    [
        ("train.precision=bf16", "adapter.r=32", "train.batch_size=2", "train.gradient_accumulation_steps=3"),
        ("train.precision=fp32", "adapter.type=dora", "adapter.r=8", "train.batch_size=8"),
        ("train.precision=fp32", "adapter.type=full", "train.batch_size=2"),
    ],
)
def test_a_plan_is_within_a_tenth_of_what_the_run_takes(tmp_path, settings):
    """The embedded model, in two processes as a user starts them; of a run as short as this the trial does every micro-batch."""
    words = [*TINY, *(word for s in (f"run.dir={tmp_path / 'run'}", *settings) for word in ("--set", s))]
    said = subprocess.run(
        [sys.executable, "train.py", *words, "--plan"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not (tmp_path / "run").exists()
    subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, check=True)
    measured = mebibytes(
        json.loads((tmp_path / "run" / "manifest.json").read_text())["run"]["peak memory"], ""
    )
    assert mebibytes(said, "in all") == pytest.approx(measured, rel=0.1)


def test_a_plan_needs_no_weights_and_writes_nothing(place, capsys):
    (place / "base" / "model.safetensors").unlink()
    before = sorted(place.rglob("*"))
    out = plan(capsys)
    parts = (
        "base weights",
        "trained weights",
        "optimiser state",
        "gradients",
        "activations",
        "logits chunk",
        "process",
        "around them",
    )
    assert sum(mebibytes(out, part) for part in parts) == pytest.approx(mebibytes(out, "in all"), abs=4)
    assert "it fits" in out and sorted(place.rglob("*")) == before


def test_what_does_not_fit_is_told_with_the_batch_that_does(place, capsys, monkeypatch):
    """The machine is made so small that half of the batch fits; then so small that nothing does."""
    monkeypatch.setattr(memory.trial, "in_its_own_process", lambda *_: 1)
    monkeypatch.setattr(memory, "resident", lambda: 0)
    room = int(3.6 * 2**20)
    monkeypatch.setattr(memory, "free", lambda device: room)
    out = plan(
        capsys,
        "train.batch_size=12",
        "train.gradient_accumulation_steps=1",
        "train.max_steps=9",
        "train.eval_samples=1",
    )
    size = int(out.split("the largest batch that does is train.batch_size = ")[1].split(" ")[0])
    assert 1 <= size < 12 and f"train.gradient_accumulation_steps = {-(-12 // size)} (now 1)" in out
    assert "it fits" in plan(capsys, f"train.batch_size={size}", "train.max_steps=9", "train.eval_samples=1")
    assert "it fits" not in plan(
        capsys, f"train.batch_size={size + 1}", "train.max_steps=9", "train.eval_samples=1"
    )
    room = 1000
    monkeypatch.delattr(memory.trial, "in_its_own_process")  # what cannot fit is not tried
    assert "not even one row at a time" in plan(capsys)


def test_what_the_trial_finds_too_large_does_not_fit_either(place, capsys, monkeypatch):
    """The trial takes as much again as there is; what it took beside the tensors stays, so that the batch that is named fits with it."""
    steps = ("train.gradient_accumulation_steps=1", "train.max_steps=9", "train.eval_samples=1")
    room, around = 16 * 2**20, 10 * 2**20
    monkeypatch.setattr(memory, "resident", lambda: 0)
    monkeypatch.setattr(memory, "free", lambda device: room)
    monkeypatch.setattr(memory.trial, "in_its_own_process", lambda *_: taken)
    taken = 2 * room
    out = plan(capsys, "train.batch_size=12", *steps)
    assert mebibytes(out, "in all") == 32 and "not even one row at a time" in out
    counted = 32 - mebibytes(out, "around them")
    taken = counted * 2**20 + around
    out = plan(capsys, "train.batch_size=12", *steps)
    size = int(out.split("the largest batch that does is train.batch_size = ")[1].split(" ")[0])
    assert mebibytes(out, "around them") in (9, 10, 11) and 1 <= size < 12
    taken = 1
    counted = mebibytes(plan(capsys, f"train.batch_size={size}", *steps), "in all")
    taken = (counted - 1) * 2**20 + around  # what is printed is rounded
    assert "it fits" in plan(capsys, f"train.batch_size={size}", *steps)


def test_a_trial_that_ran_out_of_memory_is_told_so(place, capsys, monkeypatch):
    monkeypatch.setattr(memory.trial, "in_its_own_process", lambda *_: None)
    out = plan(capsys, "train.batch_size=12", "train.max_steps=9", "train.eval_samples=1")
    assert (
        "ended for want of memory" in out
        and "it does not fit; the largest batch that does" in out
        and mebibytes(out, "around them") == 0
    )


def test_a_compiled_run_without_a_compiler_is_refused(place, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert (
        train.main(
            ["--config", "tiny.toml", "--plan", "--set", "train.compile=true", "--set", "train.device=cpu"]
        )
        == 2
    )
    assert "no-such-compiler" in capsys.readouterr().err


def test_a_plan_of_a_bad_config_is_refused(place, capsys):
    assert train.main(["--config", "tiny.toml", "--plan", "--set", "train.batch_size=0"]) == 2
    assert "train.batch_size = 0 must be at least 1" in capsys.readouterr().err
    shutil.rmtree(place / "base")
    assert train.main(["--config", "tiny.toml", "--plan"]) == 2


def test_the_free_memory_is_the_machines_or_the_containers():
    assert 2**20 < memory.resident() < memory.free(torch.device("cpu")) < 2**45
    assert memory.mebibytes(3 * 2**20) == "3 MiB"

"""training/trial.py: steps of a run in a process of their own, and what that took."""

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.machine import peak_memory
from tests.makers import write_run
from training import loop, trial
from training.config import Config, load_config
from training.rehearsal import steps_of


@pytest.fixture
def cfg(tmp_path, monkeypatch) -> Config:
    monkeypatch.chdir(write_run(tmp_path / "place"))
    return load_config(
        "tiny.toml", ["train.max_steps=3", "train.eval_samples=2", "train.gradient_accumulation_steps=1"]
    )


def torch_alone(cfg: Config) -> int:
    return peak_memory(torch.device("cpu"))


def be_killed(cfg: Config) -> int:
    os.kill(os.getpid(), signal.SIGKILL)


def run_out(cfg: Config) -> int:
    return torch.empty(2**60).numel()


def give_up(cfg: Config) -> int:
    os._exit(3)


def refuse(cfg: Config) -> int:
    raise ValueError(f"{cfg.run.name} is no good")


def test_a_process_that_runs_out_of_memory_gives_none_and_other_failures_are_raised(cfg):
    assert trial.in_its_own_process(be_killed, cfg) is None and trial.in_its_own_process(run_out, cfg) is None
    with pytest.raises(ValueError, match=f"{cfg.run.name} is no good") as caught:
        trial.in_its_own_process(refuse, cfg)
    assert "in refuse" in caught.value.__notes__[0], "where it was raised is told"
    with pytest.raises(RuntimeError, match="code 3"):
        trial.in_its_own_process(give_up, cfg)
    assert not multiprocessing.active_children()


def test_a_trial_takes_more_than_torch_alone_needs_no_weights_and_writes_nothing(cfg):
    Path("base", "model.safetensors").unlink()
    before = sorted(Path.cwd().rglob("*"))
    alone, found = (trial.in_its_own_process(work, cfg) for work in (torch_alone, trial.peak))
    assert alone + 10 * 2**20 < found < alone + 2**31 and sorted(Path.cwd().rglob("*")) == before


@pytest.fixture
def steps(monkeypatch) -> list:
    """What train_step was called with."""
    calls, real = [], loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *arguments: calls.append(arguments) or real(*arguments))
    return calls


def test_a_trial_does_the_steps_of_a_short_run_in_their_order(cfg, steps):
    """Six steps of one micro-batch, with the run's own precision, and a learning rate of 0."""
    cfg = replace(cfg, train=replace(cfg.train, precision="bf16", max_steps=6))
    trial.peak(cfg)
    documents = trial.setup.read(cfg, Path(cfg.model.name))[1].documents
    order = [
        batch.ids for epoch in range(6) for batch in trial.setup.build_loader(cfg, documents).batches(epoch)
    ]
    assert [window[0].ids for _, _, window, *_ in steps] == order[:6]
    assert {(precision.name, rate) for *_, precision, rate, _ in steps} == {("bf16", 0.0)}


@pytest.mark.parametrize(("limits", "tried"), [({"STEPS": 5}, 5), ({"SECONDS": -1, "FEWEST": 3}, 3)])
def test_a_long_run_is_tried_for_a_count_of_steps_or_where_they_are_slow_a_time_and_then_its_heaviest_come(
    cfg, steps, monkeypatch, limits, tried
):
    """Those of the heaviest three that were not among the first are done behind them, each once."""
    cfg = replace(cfg, train=replace(cfg.train, batch_size=1, max_steps=50))
    for name, value in limits.items():
        monkeypatch.setattr(trial, name, value)
    trial.peak(cfg)
    loader = trial.setup.build_loader(cfg, trial.setup.read(cfg, Path(cfg.model.name))[1].documents)
    planned, heaviest = steps_of(loader, trial.setup.build_plan(cfg, loader))
    names = [[loader.batch(group).ids for group in step] for step in planned]
    late = [
        name
        for name, step in zip(names, planned, strict=True)
        if step in heaviest.difference(planned[:tried])
    ]
    done = [[batch.ids for batch in window] for _, _, window, *_ in steps]
    assert late and done[:tried] == names[:tried] and sorted(done[tried:]) == sorted(late)

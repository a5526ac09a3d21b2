"""training/sweep.py: the runs of a sweep, what it refuses before the first, how it stops and continues."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from tests.folders import ROOT
from tests.report.pages import Page
from tests.report.runs import GOLDS
from tests.report.runs import write_run as write_finished
from training import sweep
from training.sweep import name_of, parse, plan, split

BOTH = ["--sweep", "train.learning_rate=1e-4,3e-4", "--sweep", "adapter.r=2,4"]
NAMES = [f"learning_rate={lr}_r={r}" for lr in ("1e-4", "3e-4") for r in (2, 4)]


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Replaces the training of a run by a folder of its files; returns the names of the runs that trained."""
    names: list[str] = []

    def pretend(config, member):
        names.append(member.name)
        path = write_finished(member.path, [gold for _, gold in GOLDS])
        (path / "config.toml").write_text(member.cfg.to_toml())
        return 0

    monkeypatch.setattr(sweep, "_train", pretend)
    return names


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4", ["1e-4", "3e-4"]),
        ('["a","b"],["c"]', ['["a","b"]', '["c"]']),
        ('"a,b",c', ['"a,b"', "c"]),
        ("'a,[',b", ["'a,['", "b"]),
        (r'"a\",b",c', [r'"a\",b"', "c"]),
        ("8", ["8"]),
    ],
)
def test_values_are_split_at_commas_outside_of_brackets_and_quotes(text, values):
    assert split(text) == values and parse(f"a.b={text}") == ("a.b", values)


def test_names_show_the_values_and_are_safe_and_different():
    assert name_of([("train.learning_rate", "1e-4"), ("adapter.r", "8")]) == NAMES[0].replace("r=2", "r=8")
    one, two = (name_of([("data.train", value)]) for value in ('["a/b.jsonl"]', '["a:b.jsonl"]'))
    assert one != two and one.startswith("train=a-b.jsonl") and "/" not in one
    assert name_of([("model.name", "../.."), ("run.name", "x")]).startswith("model.name=value-")
    assert len(name_of([("model.name", "x" * 999)])) < 80


def test_a_sweep_trains_the_product_of_the_values_and_compares_the_runs(place, capsys, trained):
    assert train.main(["--config", "tiny.toml", *BOTH]) == 0
    assert trained == NAMES
    out = capsys.readouterr().out
    assert [f"run {n} of 4: {name}" in out for n, name in enumerate(NAMES, 1)] == [True] * 4
    assert "train.learning_rate" in out and "adapter.r" in out and "no clear difference" in out
    Page(Path("runs/tiny/compare.html").read_text())


def test_the_same_command_again_skips_finished_runs_and_continues_others(place, capsys, trained, monkeypatch):
    first, second, *_ = plan("tiny.toml", [], [BOTH[1], BOTH[3]])
    sweep._train("tiny.toml", first)
    second.path.mkdir()
    (second.path / "config.toml").write_text(second.cfg.to_toml())
    calls = []
    monkeypatch.setattr(sweep, "_train", lambda _, member: calls.append((member.name, member.begun)) or 0)
    assert train.main(["--config", "tiny.toml", *BOTH]) == 0
    assert calls == [(NAMES[1], True), (NAMES[2], False), (NAMES[3], False)]
    assert f"{NAMES[0]} is finished" in capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert train.main(["--config", "tiny.toml", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Traceback" not in error
    return error


def test_every_wrong_config_is_named_before_the_first_run(place, capsys, trained):
    error = refused(capsys, "--sweep", "adapter.r=2,0,x", "--sweep", "train.batch_size=1,-1")
    assert "adapter.r = 0 must be at least 1" in error and "train.batch_size = -1" in error
    assert "--sweep: adapter.r = 'x' must be a whole number" in error and "tiny.toml: " not in error
    assert trained == [] and not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sweep", "adapter.r"], "write it as section.key=value,value"),
        (["--sweep", "adapter.r=2,,4"], "write it as section.key=value,value"),
        (["--sweep", "run.dir=a,b"], "--sweep run.dir=a,b: run.dir cannot be swept"),
        (["--sweep", "run.name=a,b"], "run.name cannot be swept"),
        (["--sweep", "adapter.rr=2,4"], "did you mean 'r'?"),
        (["--sweep", "adapter.r=2,4", "--sweep", "adapter.r=8"], "adapter.r is given twice"),
        (["--sweep", "train.learning_rate=1e-4,0.0001"], "write each value once"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(place, capsys, trained, words, message):
    assert message in refused(capsys, *words)
    assert trained == []


def test_every_wrong_option_is_named_before_the_first_run(place, capsys, trained):
    wrong = ["adapter.r", "run.name=a,b", "train.batch_size=0", "train.batch_size=0"]
    error = refused(capsys, *(word for option in wrong for word in ("--sweep", option)))
    assert "--sweep adapter.r: write it" in error and "--sweep run.name=a,b: run.name cannot" in error
    assert "--sweep: train.batch_size = 0" in error and "batch_size is given twice" in error
    assert trained == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.train=train.jsonl,nothing.jsonl"], "nothing.jsonl"),
        (["adapter.init_from=no-adapter"], "no-adapter"),
        (["train.objective=grpo", "adapter.lora_dropout=0", 'grpo.rewards=["leek"]'], "leek"),
    ],
)
def test_files_adapters_and_rewards_that_are_not_there_are_named_before_the_first_run(
    place, capsys, trained, words, message
):
    assert message in refused(capsys, *(word for option in words for word in ("--sweep", option)))
    assert trained == []


def test_runs_of_another_config_and_a_run_in_the_sweeps_folder_are_not_touched(place, capsys, trained):
    assert train.main(["--config", "tiny.toml", "--sweep", "adapter.r=2,4"]) == 0
    error = refused(capsys, "--sweep", "adapter.r=2,4", "--set", "train.epochs=7")
    assert "train.epochs: " in error and "-> 7" in error and "set another run.dir" in error
    Path("runs/tiny/config.toml").write_text("")
    assert "--set run.dir=runs/tiny-sweep" in refused(capsys, "--sweep", "adapter.r=2,4")
    assert len(trained) == 2


@pytest.mark.parametrize("mode", ["--plan", "--explain-batch"])
def test_a_sweep_only_trains(mode):
    with pytest.raises(SystemExit) as end:
        train.main(["--config", "tiny.toml", "--sweep", "adapter.r=2,4", mode])
    assert end.value.code == 2


def test_a_run_that_fails_does_not_end_the_others(place, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "_train", lambda config, member: 1 if member.name == "r=2" else 0)
    assert train.main(["--config", "tiny.toml", "--sweep", "adapter.r=2,4"]) == 1
    out, error = capsys.readouterr()
    assert "run 2 of 2" in out and "r=2: exit code 1" in error and "--sweep adapter.r=2,4" in error


def test_sigint_stops_the_sweep_and_the_printed_command_continues_it(place):
    """Two runs of many steps as processes: the first is stopped in its steps and continued from there."""
    steps = ["--set", "train.max_steps=40", "--set", "train.log_every=1"]
    words = ["--config", "tiny.toml", *steps, "--sweep", "adapter.r=2,4"]
    command = [sys.executable, str(ROOT / "train.py"), *words]
    first, log = Path("runs/tiny/r=2"), Path("runs/tiny/r=2/metrics.jsonl")
    done = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while done.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.02)
    os.kill(done.pid, signal.SIGINT)
    out, error = done.communicate()
    assert done.returncode == 130, error
    assert "the sweep stopped in run 1 of 2" in out and f"python train.py {' '.join(words)}" in out
    assert list((first / "checkpoints").iterdir()) and not (first / "manifest.json").exists()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "run 1 of 2: r=2, continued" in again.stdout and "resumed    from the checkpoint" in again.stdout
    assert Path("runs/tiny/compare.html").is_file() and "run 2 of 2: r=4" in again.stdout

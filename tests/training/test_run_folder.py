"""training/run_folder.py: who holds the folder of a run, older runs in it, and what a resume checks."""

import builtins
import errno
import io
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.files import sha256
from tests.folders import ROOT
from training.config import Adapter, Config, Data, Run, load_config
from training.run_folder import RunFolder, fingerprint, refuse_if_changed


def config(folder: Path, **changes) -> Config:
    return Config(run=Run(name="a", dir=str(folder), **changes), data=Data(train=["rows.jsonl"]))


@pytest.fixture
def cfg(tmp_path) -> Config:
    return config(tmp_path / "a")


def begun(cfg: Config) -> RunFolder:
    """A new run that has read its base and data."""
    folder = RunFolder(cfg, resume=False)
    folder.begin(cfg)
    return folder


def finished(cfg: Config, text: str = '{"step": 1}\n') -> None:
    """A run that did a step and has ended."""
    opened = begun(cfg)
    Path(cfg.run.dir, "metrics.jsonl").write_text(text)
    opened.lock.close()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- the lock


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(tmp_path, cfg):
    first = begun(cfg)
    first.metrics.write({"step": 1})
    for resume in (False, True):
        with pytest.raises(ValueError, match="another process is training here.*choose another run.name"):
            RunFolder(config(tmp_path / "a", seed=1), resume)
    assert names(tmp_path) == ["a"] and "seed = 3407" in (tmp_path / "a" / "config.toml").read_text()


HOLD = """
import sys
from training.config import Config, Run
from training.run_folder import RunFolder
cfg = Config(run=Run(dir=sys.argv[1]))
folder = RunFolder(cfg, False)
folder.begin(cfg)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.fault("two runs")
def test_the_lock_holds_between_processes_and_ends_with_its_process(cfg):
    command = [sys.executable, "-c", HOLD, cfg.run.dir]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    holder = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process"):
            RunFolder(cfg, resume=True)
    finally:
        holder.kill()
        holder.wait()
    RunFolder(cfg, resume=True)


# --- an older run


def test_an_old_run_is_moved_aside_and_never_overwritten(tmp_path, cfg, capsys):
    logs = [f'{{"step": {n}}}\n' for n in (1, 2)]
    for text in logs:
        finished(cfg, text)
    begun(cfg)
    kept = {p.name: (p / "metrics.jsonl").read_text() for p in tmp_path.iterdir()}
    assert kept == {"a": "", "a~1": logs[0], "a~2": logs[1]}
    assert f"{tmp_path / 'a'} held an earlier run; it is now {tmp_path / 'a~2'}" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["adapter", "model", "checkpoints"])
def test_what_a_run_made_is_moved_aside_even_without_its_log(tmp_path, cfg, kept):
    begun(cfg).lock.close()
    (tmp_path / "a" / kept).mkdir()
    begun(cfg)
    assert (tmp_path / "a~1" / kept).is_dir() and not (tmp_path / "a" / kept).exists()


def test_the_moved_run_is_no_longer_locked_and_the_new_one_is(tmp_path, cfg):
    finished(cfg)
    held = begun(cfg)
    RunFolder(config(tmp_path / "a~1"), resume=True)
    with pytest.raises(ValueError, match="another process"):
        RunFolder(cfg, resume=True)
    held.lock.close()


def test_a_start_that_failed_on_its_input_leaves_the_old_run_where_it_is(tmp_path, cfg):
    def files():
        return {p.name: p.read_text() for p in (tmp_path / "a").iterdir()}

    finished(cfg)
    before = files()
    RunFolder(config(tmp_path / "a", seed=1), resume=False).lock.close()
    assert names(tmp_path) == ["a"] and files() == before


def test_a_start_that_failed_before_its_first_step_leaves_no_litter(tmp_path, cfg):
    for _ in range(3):
        begun(cfg).lock.close()
    assert names(tmp_path) == ["a"]


# --- the folder itself


@pytest.mark.parametrize("held", ["model", "notes.txt"])
def test_a_folder_that_no_run_made_is_neither_moved_nor_written_into(tmp_path, held):
    (tmp_path / "mine" / held).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"mine: holds {held}, but no run.*set run.dir to a new folder"):
        RunFolder(config(tmp_path / "mine"), resume=False)
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == [held]


@pytest.mark.parametrize("folder", [".", ".."])
def test_the_current_folder_and_those_above_it_are_no_run_folders(tmp_path, monkeypatch, folder):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(ValueError, match="set run.dir to a new folder"):
        RunFolder(config(Path(folder)), resume=False)


def test_an_old_run_that_the_new_one_reads_from_is_not_moved(tmp_path, cfg):
    """The new run trains on from runs/a/adapter under the same name."""
    finished(cfg)
    cfg = replace(cfg, adapter=Adapter(init_from=str(tmp_path / "a" / "adapter")))
    message = r"a: holds an earlier run.*adapter.init_from = '.*a/adapter' lies in it.*another run.name"
    with pytest.raises(ValueError, match=message):
        RunFolder(cfg, resume=False)
    assert names(tmp_path) == ["a"]
    RunFolder(replace(cfg, run=Run(dir=str(tmp_path / "b"))), resume=False)


def test_a_resume_without_a_run_says_to_start_one(tmp_path, cfg):
    with pytest.raises(ValueError, match="no run to resume here.*without --resume"):
        RunFolder(cfg, resume=True)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_the_users_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/a: cannot be written \(Not a directory\); set run.dir"):
        RunFolder(config(tmp_path / "file" / "a"), resume=False)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", ".lock"])
def test_a_file_that_cannot_be_opened_is_reported_like_a_folder(monkeypatch, cfg, name):
    """The error is that of a read-only file system: it stops root too, who is allowed everything else."""

    def refusing(work):
        def opened(path, mode="r", *args, **kwargs):
            if name in Path(str(path)).name and mode != "r":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return work(path, mode, *args, **kwargs)

        return opened

    monkeypatch.setattr(io, "open", refusing(io.open))
    monkeypatch.setattr(builtins, "open", refusing(builtins.open))
    with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\)"):
        begun(cfg)


@pytest.mark.fault("kill in a save")
def test_leftovers_of_a_killed_save_are_gone_once_the_folder_is_open(tmp_path, cfg):
    finished(cfg)
    (tmp_path / "a" / "checkpoints" / ".step-00000003.part").mkdir(parents=True)
    RunFolder(cfg, resume=True)
    assert names(tmp_path / "a" / "checkpoints") == []


def test_the_resolved_config_in_the_folder_is_the_config(tmp_path, cfg):
    begun(cfg)
    assert load_config(tmp_path / "a" / "config.toml") == cfg


def test_json_files_appear_whole_or_not_at_all(monkeypatch, cfg):
    folder = RunFolder(cfg, resume=False)
    folder.write_json("before.json", {"n": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.write_json("before.json", {"n": 2})
    assert folder.read_json("before.json") == {"n": 1} and folder.read_json("manifest.json") is None


# --- a resume


def test_every_difference_is_listed_at_once(tmp_path, cfg):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    before = fingerprint(cfg, {str(rows): sha256(rows)}, "base 1")
    refuse_if_changed(before, fingerprint(cfg, {str(rows): sha256(rows)}, "base 1"))
    rows.write_text("{ }\n")
    other = replace(cfg, adapter=replace(cfg.adapter, r=8), train=replace(cfg.train, learning_rate=1e-3))
    now = fingerprint(other, {str(rows): sha256(rows)}, "base 2")
    with pytest.raises(ValueError) as caught:
        refuse_if_changed(before, now)
    *lines, remedy = str(caught.value).splitlines()[1:]
    assert lines == [
        "  adapter.r: 16 -> 8",
        "  base model: base 1 -> base 2",
        f"  file {rows}: {before[f'file {rows}']} -> {now[f'file {rows}']}",
        "  train.learning_rate: 0.0002 -> 0.001",
    ]
    assert "start a new run without --resume" in remedy


def test_keys_that_no_computation_depends_on_may_change(cfg):
    run = replace(cfg.run, name="b", dir="elsewhere")
    other = replace(cfg, run=run, train=replace(cfg.train, log_every=3, save_every=9, save_total_limit=5))
    refuse_if_changed(fingerprint(cfg, {}, ""), fingerprint(other, {}, ""))


def test_a_run_resumes_with_the_config_in_its_own_folder(cfg):
    """Defaults such as train.epochs = 1 are read back as 1.0."""
    folder = begun(cfg)
    again = load_config(folder.path / "config.toml")
    refuse_if_changed(fingerprint(cfg, {}, ""), fingerprint(again, {}, ""))
    refuse_if_changed(fingerprint(again, {}, ""), fingerprint(cfg, {}, ""))


def test_how_many_rows_are_evaluated_decides_which_adapter_is_best_and_may_not_change(cfg):
    other = replace(cfg, train=replace(cfg.train, eval_samples=5))
    with pytest.raises(ValueError, match="train.eval_samples: 100 -> 5"):
        refuse_if_changed(fingerprint(cfg, {}, ""), fingerprint(other, {}, ""))


def test_a_checkpoint_older_than_a_key_of_the_config_resumes_with_the_keys_default_only(cfg):
    older = fingerprint(cfg, {}, "")
    del older["train.adam_beta2"]
    refuse_if_changed(older, fingerprint(cfg, {}, ""))
    other = replace(cfg, train=replace(cfg.train, adam_beta2=0.9))
    with pytest.raises(ValueError, match="train.adam_beta2: 0.999 -> 0.9"):
        refuse_if_changed(older, fingerprint(other, {}, ""))

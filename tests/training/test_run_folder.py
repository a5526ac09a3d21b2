"""training/run_folder.py: who may write a run's folder, what becomes of an older run, and what a resume must
find unchanged.
"""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.folders import ROOT
from training.config import Adapter, Config, Data, Run, load_config
from training.run_folder import RunFolder, fingerprint, refuse_if_changed


def config(folder: Path, **changes) -> Config:
    return Config(run=Run(name="a", dir=str(folder), **changes), data=Data(train=["rows.jsonl"]))


def begun(cfg: Config) -> RunFolder:
    """A new run whose base and data are good."""
    folder = RunFolder(cfg, resume=False)
    folder.begin(cfg)
    return folder


def finished(folder: Path, text: str = '{"step": 1}\n') -> None:
    """A run that did a step."""
    opened = begun(config(folder))
    (folder / "metrics.jsonl").write_text(text)
    opened.lock.close()


# --- the lock


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(tmp_path):
    first = begun(config(tmp_path / "a"))
    first.metrics.write({"step": 1})
    for resume in (False, True):
        with pytest.raises(
            ValueError, match="another process is training here; wait for it, or choose another run.name"
        ):
            RunFolder(config(tmp_path / "a", seed=1), resume)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and "seed = 3407" in (
        tmp_path / "a" / "config.toml"
    ).read_text()


def test_the_lock_holds_between_processes_and_falls_with_its_process(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from training.config import *; from "
        f"training.run_folder import RunFolder\n"
        f"c = Config(run=Run(dir={str(tmp_path / 'a')!r})); f = RunFolder(c, False); f.begin(c); "
        f"print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process"):
            RunFolder(config(tmp_path / "a"), resume=True)
    finally:
        holder.kill()
        holder.wait()
    RunFolder(config(tmp_path / "a"), resume=True)


# --- an older run


def test_an_old_run_is_moved_aside_and_never_overwritten(tmp_path, capsys):
    for text in ("1", "2"):
        finished(tmp_path / "a", f'{{"step": {text}}}\n')
    begun(config(tmp_path / "a"))
    assert {p.name: (p / "metrics.jsonl").read_text() for p in tmp_path.iterdir()} == {
        "a": "",
        "a~1": '{"step": 1}\n',
        "a~2": '{"step": 2}\n',
    }
    assert f"{tmp_path / 'a'} held an earlier run; it is now {tmp_path / 'a~2'}" in capsys.readouterr().out


@pytest.mark.parametrize("kept", ["adapter", "model", "checkpoints"])
def test_what_a_run_made_is_moved_aside_even_without_its_log(tmp_path, kept):
    begun(config(tmp_path / "a")).lock.close()
    (tmp_path / "a" / kept).mkdir()
    begun(config(tmp_path / "a"))
    assert (tmp_path / "a~1" / kept).is_dir() and not (tmp_path / "a" / kept).exists()


def test_the_moved_run_is_no_longer_locked_and_the_new_one_is(tmp_path):
    finished(tmp_path / "a")
    held = begun(config(tmp_path / "a"))
    RunFolder(config(tmp_path / "a~1"), resume=True)
    with pytest.raises(ValueError, match="another process"):
        RunFolder(config(tmp_path / "a"), resume=True)
    held.lock.close()


def test_a_start_that_failed_on_its_input_leaves_the_old_run_where_it_is(tmp_path):
    finished(tmp_path / "a")
    before = {p.name: p.read_text() for p in (tmp_path / "a").iterdir()}
    RunFolder(config(tmp_path / "a", seed=1), resume=False).lock.close()
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and {
        p.name: p.read_text() for p in (tmp_path / "a").iterdir()
    } == before


def test_a_start_that_failed_before_its_first_step_leaves_no_litter(tmp_path):
    for _ in range(3):
        begun(config(tmp_path / "a")).lock.close()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# --- the folder itself


@pytest.mark.parametrize("held", ["model", "notes.txt"])
def test_a_folder_that_no_run_made_is_neither_moved_nor_written_into(tmp_path, held):
    (tmp_path / "mine" / held).mkdir(parents=True)
    with pytest.raises(
        ValueError, match=f"mine: holds {held}, but no run of Loupe's; set run.dir to a new folder"
    ):
        RunFolder(config(tmp_path / "mine"), resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"] and [
        p.name for p in (tmp_path / "mine").iterdir()
    ] == [held]


@pytest.mark.parametrize("folder", [".", ".."])
def test_the_current_folder_is_no_runs(tmp_path, monkeypatch, folder):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(ValueError, match="set run.dir to a new folder"):
        RunFolder(config(Path(folder)), resume=False)


def test_an_old_run_that_the_new_one_reads_from_is_not_moved_from_under_it(tmp_path):
    """Training on from runs/a/adapter under the same name."""
    finished(tmp_path / "a")
    cfg = config(tmp_path / "a")
    cfg = replace(cfg, adapter=Adapter(init_from=str(tmp_path / "a" / "adapter")))
    with pytest.raises(
        ValueError,
        match=r"a: holds an earlier run.* adapter.init_from = '.*a/adapter' lies in it; choose another run.name",
    ):
        RunFolder(cfg, resume=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    RunFolder(replace(cfg, run=Run(dir=str(tmp_path / "b"))), resume=False)


def test_a_resume_without_a_run_says_to_start_one(tmp_path):
    with pytest.raises(ValueError, match="no run to resume here; start it without --resume"):
        RunFolder(config(tmp_path / "a"), resume=True)
    assert not (tmp_path / "a").exists()


def test_a_folder_that_cannot_be_made_is_the_users_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"file/a: cannot be written \(Not a directory\); set run.dir to a folder that can"
    ):
        RunFolder(config(tmp_path / "file" / "a"), resume=False)


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", ".lock"])
def test_a_file_that_cannot_be_opened_is_told_like_a_folder(monkeypatch, tmp_path, name):
    """What a read-only file system answers; root, who runs many a container, is refused nothing else."""
    import builtins
    import io

    def refusing(work):
        def opened(path, mode="r", *args, **kwargs):
            if Path(str(path)).name == name and mode != "r":
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return work(path, mode, *args, **kwargs)

        return opened

    monkeypatch.setattr(io, "open", refusing(io.open))
    monkeypatch.setattr(builtins, "open", refusing(builtins.open))
    with pytest.raises(ValueError, match=r"cannot be written \(Read-only file system\)"):
        begun(config(tmp_path / "a"))


def test_leftovers_of_a_killed_save_are_gone_once_the_folder_is_open(tmp_path):
    finished(tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / ".step-00000003.part").mkdir(parents=True)
    RunFolder(config(tmp_path / "a"), resume=True)
    assert list((tmp_path / "a" / "checkpoints").iterdir()) == []


def test_the_resolved_config_in_the_folder_is_the_config(tmp_path):
    cfg = config(tmp_path / "a")
    begun(cfg)
    assert load_config(tmp_path / "a" / "config.toml") == cfg


def test_json_files_appear_whole_or_not_at_all(monkeypatch, tmp_path):
    folder = RunFolder(config(tmp_path), resume=False)
    folder.write_json("before.json", {"n": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.write_json("before.json", {"n": 2})
    assert folder.read_json("before.json") == {"n": 1} and folder.read_json("manifest.json") is None


# --- a resume


def test_every_difference_is_listed_at_once(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    cfg = config(tmp_path)
    before = fingerprint(cfg, [str(rows)], "base 1")
    refuse_if_changed(before, fingerprint(cfg, [str(rows)], "base 1"))
    rows.write_text("{ }\n")
    now = fingerprint(
        replace(cfg, adapter=replace(cfg.adapter, r=8), train=replace(cfg.train, learning_rate=1e-3)),
        [str(rows)],
        "base 2",
    )
    with pytest.raises(ValueError) as caught:
        refuse_if_changed(before, now)
    lines = str(caught.value).splitlines()
    assert lines[1:5] == [
        "  adapter.r: 16 -> 8",
        "  base model: base 1 -> base 2",
        f"  file {rows}: {before[f'file {rows}']} -> {now[f'file {rows}']}",
        "  train.learning_rate: 0.0002 -> 0.001",
    ]
    assert "start a new run without --resume" in lines[5] and len(lines) == 6


def test_keys_that_change_no_number_may_change(tmp_path):
    cfg = config(tmp_path)
    other = replace(
        cfg,
        run=replace(cfg.run, name="b", dir="elsewhere"),
        train=replace(cfg.train, log_every=3, save_every=9, save_total_limit=5),
    )
    refuse_if_changed(fingerprint(cfg, [], ""), fingerprint(other, [], ""))


def test_how_many_rows_are_evaluated_decides_which_adapter_is_best_and_may_not_change(tmp_path):
    cfg = config(tmp_path)
    with pytest.raises(ValueError, match="train.eval_samples: 100 -> 5"):
        refuse_if_changed(
            fingerprint(cfg, [], ""),
            fingerprint(replace(cfg, train=replace(cfg.train, eval_samples=5)), [], ""),
        )

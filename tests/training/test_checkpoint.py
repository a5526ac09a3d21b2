"""training/checkpoint.py: a checkpoint is complete or absent after a kill, a full disk or damage."""

import contextlib
import errno
import os
import random
import resource
import shutil
from pathlib import Path

import pytest
import torch

from common.device import Precision
from common.files import clean, sha256
from data.loader import Loader
from tests.makers import documents, tiny_model
from training import checkpoint
from training.loop import train_step
from training.objectives.sft import SupervisedFineTuning
from training.optim import make_optimizers

FILES = ["SHA256SUMS", "state.json", "tensors.safetensors"]


def save(folder: Path, step: int, keep: int = 2) -> Path:
    tensors = {"weights/a": torch.full((300,), float(step)), "rng/cpu": torch.get_rng_state()}
    return checkpoint.save(folder, step, tensors, {"loop": {"step": step}}, keep)


def newest(folder: Path) -> tuple[int, list[str]]:
    """Returns the step of the checkpoint that a resume takes, read from both files, and the warnings."""
    said = []
    _, tensors, state = checkpoint.load_newest(folder, said.append)
    assert tensors["weights/a"][0] == state["step"] == state["loop"]["step"]
    return state["step"], said


# --- what is captured is restored


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_restored_run_takes_the_next_step_to_the_same_bits(tmp_path, name):
    """Dropout makes the random state count. The embedding trains too: with "muon" it is AdamW's."""
    micro_batches = list(Loader(documents(4), 2, seed=1).batches(0))
    precision = Precision("fp32", torch.device("cpu"))

    def fresh(seed):
        torch.manual_seed(seed)
        random.seed(seed)
        model = tiny_model(lora_dropout=0.2)
        model.model.embed_tokens.weight.requires_grad_(True)
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return model, weights, make_optimizers(model, name, 1e-2, 0.1)

    def step(model, optimizers) -> tuple:
        record = train_step(model, SupervisedFineTuning(), micro_batches, optimizers, precision, 1e-2, 1.0)
        model.zero_grad()
        return record, random.random()

    model, expected, optimizers = fresh(seed=1)
    step(model, optimizers)
    checkpoint.save(tmp_path, 1, *checkpoint.capture(expected, optimizers, precision.scaler), keep=1)
    after = step(model, optimizers)

    model, weights, optimizers = fresh(seed=2)
    _, *loaded = checkpoint.load_newest(tmp_path, pytest.fail)
    checkpoint.restore(*loaded, weights, optimizers, precision.scaler)
    assert step(model, optimizers) == after
    assert all(torch.equal(p, expected[n]) for n, p in weights.items())


def test_the_scaler_of_fp16_comes_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0, enabled=True)
    tensors, state = checkpoint.capture({}, [], scaler)
    checkpoint.save(tmp_path, 1, tensors, state, keep=1)
    other = torch.amp.GradScaler("cpu", enabled=True)
    checkpoint.restore(*checkpoint.load_newest(tmp_path, pytest.fail)[1:], {}, [], other)
    assert other.state_dict() == scaler.state_dict() and other.get_scale() == 128.0


# --- a kill at any moment of a save


class Killed(BaseException):
    """Stands for SIGKILL: no code catches it."""


def kill_at(monkeypatch, moment: int, half_done: bool) -> list[str]:
    """Makes every disk call of checkpoint.py raise Killed from the `moment`-th call on.

    If half_done, the call that is killed first writes half of its file. Returns the list that the names of
    the calls are appended to.
    """
    calls = []

    def patch(owner, name):
        work = getattr(owner, name)

        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == moment and half_done and name in ("save_file", "write_text"):
                work(*args, **kwargs)
                path = Path(args[1] if name == "save_file" else args[0])
                os.truncate(path, path.stat().st_size // 2)
            if len(calls) >= moment:
                raise Killed
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    files = [(checkpoint, "save_file"), (Path, "write_text"), (Path, "mkdir")]
    for owner, name in [*files, (os, "fsync"), (os, "replace"), (shutil, "rmtree")]:
        patch(owner, name)
    return calls


def kill_everywhere(monkeypatch, tmp_path, step: int, keep: int, check) -> list[str]:
    """Saves `step` beside checkpoints 1 and 2, killed at each disk call in turn, and calls check(folder).

    Returns the disk calls of a complete save.
    """
    for half_done in (False, True):
        for moment in range(1, 100):
            folder = tmp_path / f"{half_done}-{moment}"
            save(folder, 1), save(folder, 2)
            with monkeypatch.context() as patch:
                calls = kill_at(patch, moment, half_done)
                with contextlib.suppress(Killed):
                    save(folder, step, keep)
                if len(calls) < moment:
                    return calls
            check(folder)
    raise AssertionError("a save makes more disk calls than that")


@pytest.mark.fault("kill in a save")
@pytest.mark.parametrize("keep", [1, 2])
def test_after_a_kill_in_any_phase_of_a_save_a_whole_checkpoint_loads_and_nothing_else_is_left(
    monkeypatch, tmp_path, keep
):
    def check(folder):
        assert newest(folder)[1] == []  # Leftovers do not count as checkpoints.
        clean(folder)  # A resume does this first.
        step, said = newest(folder)
        assert step in (2, 3) and said == []
        assert all(p.name.startswith("step-") for p in folder.iterdir())
        save(folder, 3)
        assert newest(folder) == (3, [])

    calls = kill_everywhere(monkeypatch, tmp_path, 3, keep, check)
    assert calls.count("replace") == 1 and calls.count("fsync") == 5 and "rmtree" in calls


@pytest.mark.fault("kill in a save")
def test_a_kill_while_a_step_is_saved_a_second_time_keeps_the_first_or_has_the_second(monkeypatch, tmp_path):
    """With keep=1 no other checkpoint exists while the save replaces this one."""

    def check(folder):
        clean(folder)
        assert newest(folder) == (2, [])

    assert kill_everywhere(monkeypatch, tmp_path, 2, 1, check).count("replace") == 2


# --- damage on the disk


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, name, damage):
    save(tmp_path, 1), save(tmp_path, 2)
    file = tmp_path / "step-00000002" / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    elif damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 1
        file.write_bytes(content)
    step, (said,) = newest(tmp_path)
    assert step == 1 and "step-00000002" in said and "before it" in said
    assert name in said or name == "SHA256SUMS"


def test_every_single_bit_of_the_state_counts(tmp_path):
    """A flipped bit can turn one digit into another and leave valid JSON."""
    file = save(tmp_path, 7) / "state.json"
    content = file.read_bytes()
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load_newest(tmp_path, lambda text: None)


@pytest.mark.fault("damaged checkpoint")
def test_where_all_checkpoints_are_damaged_the_run_stops_and_does_not_start_anew(tmp_path):
    for path in (save(tmp_path, 1), save(tmp_path, 2)):
        (path / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="all 2 checkpoints are damaged.*remove the folder"):
        checkpoint.load_newest(tmp_path, lambda text: None)


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint.load_newest(tmp_path / "checkpoints", pytest.fail) is None


def test_after_a_damaged_checkpoint_new_ones_are_kept_and_the_damaged_one_goes(tmp_path):
    """Pruning by name alone would keep the damaged one and delete what the run saves after it went back."""
    for step in (2, 4, 9):
        save(tmp_path, step)
    (tmp_path / "step-00000009" / "state.json").write_bytes(b"{}")
    assert newest(tmp_path)[0] == 4
    save(tmp_path, 5)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000004", "step-00000005"]


def test_only_the_newest_are_kept(tmp_path):
    for step in (9, 10, 11, 100):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000011", "step-00000100"]


def test_the_sums_are_those_of_sha256sum(tmp_path):
    path = save(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == FILES
    lines = (path / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{sha256(path / name)}  {name}" for name in ("tensors.safetensors", "state.json")]


# --- a full disk


@pytest.mark.fault("full disk")
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_debris(monkeypatch, tmp_path, call):
    save(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest(tmp_path) == (1, [])


def test_a_write_that_the_system_refuses_is_an_oserror_from_safetensors_too(tmp_path):
    """safetensors raises an exception class of its own; a limit on file sizes stands in for the full disk."""
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        with pytest.raises(OSError):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and newest(tmp_path) == (1, [])

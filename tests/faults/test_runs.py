"""Runs whose files are damaged, whose terminal is closed, or whose machine answers otherwise on a resume."""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest

import train
from common import device
from common.files import sha256
from generation.answer_file import AnswerFile
from report.metrics_log import read_metrics
from training import loop, trainer
from training.config import load_config

RUN = Path("runs/tiny")
SHORT = ["--set", "train.epochs=1", "--set", "train.save_every=1", "--set", "train.eval_every=2"]  # 4 steps


def run(*more: str) -> int:
    return train.main(["--config", "tiny.toml", *SHORT, *more])


@pytest.fixture
def handlers():
    """Restores the signal handlers."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.fault("damaged adapter")
def test_a_changed_byte_of_the_best_weights_is_restored_from_the_checkpoint(place, capsys):
    assert run() == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        file = RUN / "adapter" / name
        digest, content = sha256(file), bytearray(file.read_bytes())
        content[-9] ^= 1
        for damaged in (bytes(content), b""):
            file.write_bytes(damaged)
            assert run("--resume") == 0
            assert sha256(file) == digest and f"restored   {name}" in capsys.readouterr().out


@pytest.mark.fault("damaged checkpoint")
@pytest.mark.parametrize(
    "file", ["tensors.safetensors", "state.json", "SHA256SUMS", "best/adapter_model.safetensors"]
)
def test_a_changed_byte_or_a_cut_of_any_file_of_a_checkpoint_is_named(place, capsys, file):
    """The run goes on from the checkpoint before it, to the same end."""
    assert run() == 0
    adapter = sha256(RUN / "adapter" / "adapter_model.safetensors")
    path = RUN / "checkpoints" / "step-00000004" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)
    assert run("--resume") == 0
    said = capsys.readouterr()
    assert "step-00000004" in said.err and "resumed    from the checkpoint of step 3" in said.out
    assert sha256(RUN / "adapter" / "adapter_model.safetensors") == adapter


@pytest.mark.fault("stop")
def test_a_closed_stdout_stops_the_run_with_a_checkpoint_and_says_how_to_continue(
    place, monkeypatch, capsys, handlers
):
    class Closed:
        def write(self, text):
            if "step " in text:
                raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Closed())
        assert run("--set", "train.save_every=0") == 130
    said = capsys.readouterr().err
    assert "nobody reads what this run prints" in said and "--resume" in said
    assert [p.name for p in (RUN / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.fault("stop")
def test_a_run_without_save_every_saves_after_some_minutes(place, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    saved, save = [], trainer.checkpoint.save
    monkeypatch.setattr(trainer.checkpoint, "save", lambda *args: saved.append(args[1]) or save(*args))
    assert run("--set", "train.save_every=0") == 0
    assert saved[:4] == [1, 2, 3, 4]


@pytest.mark.fault("precision")
def test_a_resume_computes_in_the_precision_that_auto_meant_at_the_start(place, monkeypatch):
    auto = ["--set", "train.precision=auto"]
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda _: False)
    assert run(*auto) == 0
    monkeypatch.setattr(device, "_multiplies_bfloat16", lambda _: True)
    assert trainer.open_run(load_config("tiny.toml", auto[1:]), resume=True).precision.name == "fp32"
    assert load_config(RUN / "config.toml").train.precision == "fp32"


@pytest.mark.fault("edited data")
def test_a_data_file_that_is_deleted_while_the_run_trains_is_in_the_manifest_as_it_was_read(
    place, monkeypatch
):
    digest, fit = sha256("train.jsonl"), trainer.fit
    monkeypatch.setattr(trainer, "fit", lambda *args: (Path("train.jsonl").unlink(), fit(*args))[1])
    assert run() == 0
    assert json.loads((RUN / "manifest.json").read_text())["data_sha256"]["train.jsonl"] == digest


@pytest.mark.fault("no file")
def test_a_pipe_is_no_data_file(place, capsys):
    os.mkfifo("pipe")
    assert run("--set", "data.train=pipe") == 2
    assert "pipe: is a pipe or a device, and a resumed run could not read it again" in capsys.readouterr().err


@pytest.mark.fault("changed run")
def test_a_resume_for_more_steps_says_how_to_continue_from_the_adapter(place, capsys):
    assert run() == 0
    assert run("--set", "train.epochs=2", "--resume") == 2
    error = capsys.readouterr().err
    assert "train.epochs: 1.0 -> 2.0" in error and "adapter.init_from = 'runs/tiny/adapter'" in error


def test_a_byte_of_the_log_that_is_no_utf8_is_a_bad_line_with_its_number(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "note": "\xff"}\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl:1: not a JSON object"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.fault("kill in a save")
def test_what_a_killed_adapter_save_left_is_gone_at_the_next_start(place):
    assert run() == 0
    left = RUN / "adapter" / ".adapter_model.safetensors.part"
    left.write_bytes(b"half")
    assert run("--resume") == 0 and not left.exists()


@pytest.mark.fault("full disk")
def test_a_report_that_the_disk_refuses_names_the_folder_and_what_is_safe(place, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "write_report", full)
    assert run() == 1
    error = capsys.readouterr().err
    assert "cannot be written (No space left on device)" in error and "runs/tiny/adapter is whole" in error
    assert "--resume" in error and str(RUN.absolute()) in error


@pytest.mark.fault("bad argument")
def test_a_home_folder_is_expanded_and_a_nul_refused(place, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert load_config("tiny.toml", ['run.dir="~/x"']).run.dir == "/somewhere/x"
    with pytest.raises(ValueError, match="run.dir = .* has a NUL character"):
        load_config("tiny.toml", ['run.dir="a\\u0000b"'])


@pytest.mark.fault("many mistakes")
def test_a_mistake_hides_no_mistake_in_a_key_with_a_longer_name(place):
    with pytest.raises(ValueError) as caught:
        load_config("tiny.toml", ["data.validation=3", "data.validation_fraction=2"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and all(line.startswith("--set: data.validation") for line in lines)


@pytest.mark.fault("escape sequences")
def test_control_characters_of_a_row_are_text_in_an_error(place, capsys):
    Path("train.jsonl").write_text('{"\\u001b[31mkey": 1}\n')
    assert run() == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error and "\\x1b[31mkey" in error


@pytest.mark.fault("lost answer")
def test_answers_whose_disk_is_full_are_counted_and_kept(tmp_path):
    """/dev/full refuses each write; the file before it has what was answered."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(RuntimeError, match="the 1 answers in it are kept. Make room in"):
        with AnswerFile(out, ["a", "b"], "m") as file:
            file.add(0, "A", "stop")
            file.output.file = open("/dev/full", "ab")
            file.add(1, "B", "stop")
    assert out.read_bytes().count(b"\n") == 1

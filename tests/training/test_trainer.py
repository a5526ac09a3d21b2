"""Whole runs of train.py on a model of six layers: stopped, killed, resumed and refused."""

import errno
import gc
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

import train
from model.gemma3 import Gemma3ForCausalLM
from model.tokenizer import Tokenizer
from report.metrics_log import read_metrics
from tests.folders import ROOT, make_model
from tests.makers import documents, rows, write_jsonl, write_model, write_run
from training import build, checkpoint, loop, trainer
from training.config import Config, Train, load_config
from training.objectives.sft import SupervisedFineTuning
from training.run_folder import RunFolder

EVALUATED = ["--set", "train.eval_every=3"]
RUN = Path("runs/tiny")

# train.py that sends itself a signal in the middle of a given micro-batch, or kills itself in a save after
# the files are written and before they are renamed.
DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from training import checkpoint
from training.objectives.sft import SupervisedFineTuning

what, at = sys.argv[1].split("@")
loss, write, calls = SupervisedFineTuning.loss, checkpoint._write, 0

def count():
    global calls
    calls += 1
    if calls == int(at):
        os.kill(os.getpid(), getattr(signal, "SIGKILL" if what == "SAVE" else what))

def counted_loss(self, model, batch):
    if model.training and what != "SAVE":
        count()
    return loss(self, model, batch)

def counted_write(*args):
    write(*args)
    if what == "SAVE":
        count()

SupervisedFineTuning.loss, checkpoint._write = counted_loss, counted_write
sys.exit(train.main(sys.argv[2:]))
"""


def run_script(folder: Path, *args: str, stop: str | None = None) -> subprocess.CompletedProcess:
    """Runs train.py in `folder`, in a process; `stop` is "SIGNAL@micro-batch" or "SAVE@number"."""
    start = ["-c", DRIVER, stop] if stop else [str(ROOT / "train.py")]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *start, *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def stream(folder: Path = RUN) -> list[dict]:
    """Returns metrics.jsonl without the figures of time and memory, which differ from run to run."""
    steps, evals = read_metrics(folder / "metrics.jsonl")
    varying = ("seconds", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in r.items() if k not in varying} for r in [*steps, *evals]]


def adapter_bytes(folder: Path = RUN) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def result(folder: Path = RUN) -> tuple[bytes, list[dict]]:
    """Returns what must not depend on how often a run was stopped."""
    return adapter_bytes(folder), stream(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """runs/tiny of an uninterrupted run: 16 steps in 4 epochs, with dropout, shuffling and accumulation."""
    folder = write_run(tmp_path_factory.mktemp("whole"))
    done = run_script(folder, "--config", "tiny.toml", *EVALUATED)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "tiny"


@pytest.mark.parametrize(
    "epochs, accumulate, steps", [(1, 1, 50), (1.1, 1, 55), (0.01, 1, 1), (2, 4, 26), (2.5, 4, 33)]
)
def test_a_fraction_of_an_epoch_is_rounded_up_to_a_step_and_rounding_errors_are_not(
    epochs, accumulate, steps
):
    cfg = Config(train=Train(epochs=epochs, gradient_accumulation_steps=accumulate, batch_size=1))
    assert build.build_schedule(cfg, build.build_loader(cfg, documents(50))).total_steps == steps


# Gemma 3 27B's depth, heads and RoPE, and a width that Q4_K's blocks of 256 weights fill.
DOLL_27B = {"num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 8}
DOLL_27B |= {"hidden_size": 256, "intermediate_size": 256, "query_pre_attn_scalar": 168 / 16}


def test_a_doll_of_the_27b_trains_on_q4_k(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", rope_linear_factor=8.0, **DOLL_27B)
    write_jsonl(tmp_path / "train.jsonl", rows(2))
    settings = ["model.name=base", "model.quantize=q4_k", "data.train=train.jsonl", "train.max_steps=3"]
    settings += ["train.learning_rate=1e-3", "train.precision=fp32", "data.validation_fraction=0"]
    Path("doll.toml").write_text("")
    assert train.main(["--config", "doll.toml", *(w for s in settings for w in ("--set", s))]) == 0
    first, _, last = (record["loss"] for record in read_metrics(Path("runs/doll/metrics.jsonl"))[0])
    assert 0 < last < first - 0.5


# --- stopped and killed: in processes of their own, by real signals


@pytest.mark.fault("kill in a run")
def test_a_run_killed_and_stopped_at_random_ends_with_the_bytes_of_one_that_was_not(whole):
    """The stops are SIGKILL in a micro-batch, SIGTERM, Ctrl-C and SIGKILL in a save; after each the run is
    resumed with the command that it printed.
    """
    rng = random.Random(16)
    ranges = {"SIGKILL": (4, 9), "SIGTERM": (1, 5), "SIGINT": (1, 5), "SAVE": (1, 1)}
    folder, said = whole.parents[1], []
    args = ["--config", "tiny.toml", *EVALUATED, "--set", "run.dir=runs/stopped"]
    for what, at in ranges.items():
        done = run_script(folder, *args, stop=f"{what}@{rng.randint(*at)}")
        said.append((what, done.returncode, done.stdout[-500:], done.stderr))
        if what in ("SIGTERM", "SIGINT"):
            assert done.returncode == 130, said
            command = re.search(r"stopped after step \d+ of 16;.*\n    python train.py (.*)\n", done.stdout)
            assert shlex.split(command[1]) == [*args[:6], "--resume"], said
        else:
            assert done.returncode == -9, said
        args = [*args[:6], "--resume"]
    run = folder / "runs" / "stopped"
    assert list((run / "checkpoints").glob(".step-*.part")), said
    done = run_script(folder, *args)
    assert done.returncode == 0 and "resumed    from the checkpoint of step" in done.stdout, said
    assert result(run) == result(whole), said
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000014", "step-00000016"]


KEYS = """step epoch loss token_accuracy learning_rate grad_norm tokens stream_tokens supervised_tokens
tokens_per_second seconds peak_memory"""
FILES = {"config.toml", "metrics.jsonl", "manifest.json", "adapter", "checkpoints", "report.html"}


def test_the_uninterrupted_run_leaves_what_it_promises(whole):
    assert {p.name for p in whole.iterdir()} >= FILES
    steps, evals = read_metrics(whole / "metrics.jsonl")
    assert [r["step"] for r in steps] == list(range(1, 17))
    assert [r["step"] for r in evals] == [3, 6, 9, 12, 15, 16]
    assert set(steps[0]) == set(KEYS.split())
    assert all(r["supervised_tokens"] < r["stream_tokens"] <= r["tokens"] for r in steps)
    peaks = [r["peak_memory"] for r in steps]  # bytes; the kernel's count may be wrong by some pages
    assert peaks[0] > 2**26 and peaks[-1] > peaks[0] - 2**20
    manifest = json.loads((whole / "manifest.json").read_text())
    assert int(manifest["run"]["peak memory"].removesuffix(" MiB").replace(",", "")) > 0
    assert manifest["after"]["val"]["loss"] < manifest["before"]["val"]["loss"]


# --- the rest in this process, where things can be made to fail


class Killed(BaseException):
    """Stands for SIGKILL: no code catches it."""


def run(*args: str) -> int:
    """Runs train.main in the current folder, and frees the lock of the run's folder."""
    try:
        return train.main(["--config", "tiny.toml", *args])
    finally:
        gc.collect()


def sets(**changes) -> list[str]:
    return [word for key, value in changes.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


SHORT = sets(train__epochs=1, train__save_every=1)  # four steps


def kill_in_micro_batch(monkeypatch, number: int, error: BaseException):
    """Makes the number-th training loss raise `error`."""
    calls, loss = [], SupervisedFineTuning.loss

    def counted(self, model, batch):
        if model.training:
            calls.append(batch)
            if len(calls) == number:
                raise error
        return loss(self, model, batch)

    monkeypatch.setattr(SupervisedFineTuning, "loss", counted)


def run_killed(monkeypatch, number: int, *args: str) -> None:
    """Runs train.main and kills it in its number-th micro-batch."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_micro_batch(patch, number, Killed())
        train.main(["--config", "tiny.toml", *args])
    gc.collect()


def poison(monkeypatch, *bad: str) -> None:
    """Makes the training loss of batches with one of these rows NaN."""
    loss = SupervisedFineTuning.loss

    def poisoned(self, model, batch):
        total, *rest = loss(self, model, batch)
        return total * (float("nan") if model.training and {*bad} & {*batch.ids} else 1), *rest

    monkeypatch.setattr(SupervisedFineTuning, "loss", poisoned)


def interrupt(monkeypatch, name: str) -> None:
    """Makes the function of training/trainer.py raise KeyboardInterrupt."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, name, interrupted)


def test_a_resumed_run_is_compiled_as_it_was_whatever_auto_would_say_now(place, monkeypatch):
    compiled = []
    monkeypatch.setattr(Gemma3ForCausalLM, "compile_layers", lambda model: compiled.append(model))
    monkeypatch.setattr(build, "missing_to_compile", lambda device: None)
    for first, then in ((0, 1e30), (1e30, 0)):
        monkeypatch.setattr(build, "WORTH_COMPILING", first)
        assert run(*SHORT, "--set", f"run.name=first{first}") == 0
        before = len(compiled)
        monkeypatch.setattr(build, "WORTH_COMPILING", then)
        assert run(*SHORT, "--set", f"run.name=first{first}", "--resume") == 0
        assert (len(compiled) > before) == (first == 0)
    assert compiled


def test_a_run_that_auto_compiled_goes_on_without_a_compiler(place, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Gemma3ForCausalLM, "compile_layers", lambda model: None)
        patched.setattr(build, "missing_to_compile", lambda device: None)
        patched.setattr(build, "WORTH_COMPILING", 0)
        assert run(*SHORT) == 0
    shutil.rmtree(RUN / "checkpoints" / "step-00000004")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert run(*SHORT, "--resume") == 0
    assert (RUN / "checkpoints" / "step-00000004").is_dir()


def test_the_model_of_a_full_run_has_the_trained_turns_and_stops_at_their_end(place):
    """The base has nothing but tokenizer.json."""
    assert run(*SHORT, "--set", "adapter.type=full") == 0
    theirs, ours = AutoTokenizer.from_pretrained(RUN / "model"), Tokenizer("base")
    turns = [{"role": "user", "content": "Hello"}]
    ids = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert ids == ours.render_prompt([("user", "Hello")])
    stops = json.loads((RUN / "model" / "generation_config.json").read_text())["eos_token_id"]
    assert set(stops) == {ours.eos_id, ours.end_of_turn_id}


def test_the_share_of_a_known_peak_is_in_the_step_log(place, monkeypatch):
    monkeypatch.setattr(trainer, "peak_flops", lambda device, dtype: 1e4)
    monkeypatch.setattr(trainer, "step_flops", lambda model, tokens, targets: 1000 * tokens + 3000 * targets)
    assert run(*SHORT) == 0
    for r in read_metrics(RUN / "metrics.jsonl")[0]:
        flops = 1000 * r["stream_tokens"] + 3000 * r["supervised_tokens"]
        assert r["mfu"] == pytest.approx(flops / r["seconds"] / 1e4, rel=0.01)


VARIANTS = {
    "dora, by tokens": sets(adapter__type="dora", train__max_tokens=160, data__max_length=160),
    "muon": sets(train__optimizer="muon", train__lr_scheduler="cosine"),
    "all weights, muon": sets(adapter__type="full", train__optimizer="muon", train__learning_rate=1e-3),
    "fp16": sets(train__precision="fp16", train__force_fp16="true"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_run_resumes_to_the_same_bytes(place, monkeypatch, variant):
    args = [*VARIANTS[variant], *sets(train__epochs=2, train__save_every=2, generate__temperature=0.7)]
    assert run(*args) == 0
    whole = RUN.rename("whole")
    run_killed(monkeypatch, 10, *args)
    torch.manual_seed(99)
    assert run(*args, "--resume") == 0
    assert stream() == stream(whole)
    file = "model/model.safetensors" if "all weights" in variant else "adapter/adapter_model.safetensors"
    assert (whole / file).read_bytes() == (RUN / file).read_bytes()


def test_a_run_killed_before_its_first_checkpoint_starts_anew_on_a_resume(place, monkeypatch):
    args = [*SHORT, *sets(train__save_every=0)]
    assert run(*args) == 0
    whole = RUN.rename("whole")
    run_killed(monkeypatch, 6, *args)
    assert [r["step"] for r in stream()] == [1, 2]
    assert run(*args, "--resume") == 0
    assert result() == result(whole)


def test_the_time_left_is_estimated_from_the_steps_after_the_first_which_may_have_compiled(
    place, monkeypatch, capsys
):
    """The first of four steps takes ten seconds, and the others two, four and six."""
    ticks = iter([0, 10, 10, 12, 12, 16, 16, 22])
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert run(*SHORT) == 0
    assert re.findall(r"about (\d+) s left", capsys.readouterr().out) == ["30", "4", "3", "0"]


def test_a_finished_run_that_is_resumed_trains_no_more(place, capsys):
    assert run(*SHORT) == 0
    before = result()
    assert run(*SHORT, "--resume") == 0
    assert result() == before
    assert "resumed    from the checkpoint of step 4" in capsys.readouterr().out


@pytest.mark.fault("stop")
def test_ctrl_c_outside_of_the_training_loop_prints_the_resume_command_too(place, monkeypatch, capsys):
    interrupt(monkeypatch, "measure_after")
    assert run(*SHORT) == 130
    command = f"python train.py --config tiny.toml {shlex.join(SHORT)} --resume"
    assert command in "".join(capsys.readouterr())


def test_ctrl_c_before_the_run_has_begun_prints_the_command_that_starts_it(place, monkeypatch, capsys):
    interrupt(monkeypatch, "load")
    assert run(*SHORT) == 130
    assert capsys.readouterr().err.endswith(f"\n    python train.py --config tiny.toml {shlex.join(SHORT)}\n")


def test_a_mistake_in_the_data_leaves_the_earlier_run_in_its_place(place, capsys):
    assert run(*SHORT) == 0
    before = adapter_bytes()
    (place / "train.jsonl").write_text('{"prompt": "a"}\n')
    assert run(*SHORT) == 2
    assert [p.name for p in Path("runs").iterdir()] == ["tiny"] and adapter_bytes() == before


@pytest.mark.fault("changed run")
def test_a_changed_config_base_or_data_is_refused_with_every_difference(place, capsys):
    assert run(*SHORT) == 0
    before = [(RUN / file).read_text() for file in ("config.toml", "metrics.jsonl")]
    write_jsonl(place / "train.jsonl", rows(12))
    write_model(place / "base", seed=1)
    tokenizer = json.loads((place / "base" / "tokenizer.json").read_text())
    (place / "base" / "tokenizer.json").write_text(json.dumps(tokenizer))
    capsys.readouterr()
    assert run(*SHORT, *sets(adapter__r=2, train__learning_rate=0.5), "--resume") == 2
    error = capsys.readouterr().err
    values = ["adapter.r: 4 -> 2", "train.learning_rate: 0.01 -> 0.5"]
    for line in (*values, "file train.jsonl: ", "base model: ", "base tokenizer.json: "):
        assert f"\n  {line}" in error
    assert "val.jsonl" not in error and "start a new run without --resume" in error
    assert [(RUN / file).read_text() for file in ("config.toml", "metrics.jsonl")] == before


@pytest.mark.fault("damaged checkpoint")
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_leads_to_the_same_end(place, capsys):
    assert run(*SHORT) == 0
    before = result()
    file = RUN / "checkpoints" / "step-00000004" / "tensors.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    assert run(*SHORT, "--resume") == 0
    said = capsys.readouterr()
    assert "step-00000004/tensors.safetensors is damaged" in said.err
    assert "resumed    from the checkpoint of step 3" in said.out and result() == before


@pytest.mark.fault("two runs")
def test_a_second_run_of_the_same_name_is_refused_while_the_first_one_lives(place, capsys):
    cfg = load_config("tiny.toml")
    held = RunFolder(cfg, resume=False)
    held.begin(cfg)
    assert run() == 2 and run("--resume") == 2
    assert capsys.readouterr().err.count("error: runs/tiny: another process is training here") == 2
    held.lock.close()


# --- the disk


@pytest.fixture(
    params=[
        (OSError, errno.ENOSPC, "No space left on device"),
        (SafetensorError, "I/O error: No space left on device (os error 28)"),
    ],
    ids=["OSError", "SafetensorError"],
)
def fill_disk(request):
    """Makes the function `name` of a module raise the error of a full disk from its call `first` on."""

    def fill(patch, module, name: str, first: int) -> None:
        (kind, *args), work, calls = request.param, getattr(module, name), []

        def full(*given, **settings):
            calls.append(None)
            if len(calls) >= first:
                raise kind(*args)
            work(*given, **settings)

        patch.setattr(module, name, full)

    return fill


@pytest.mark.fault("full disk")
def test_a_run_goes_on_without_a_checkpoint_that_does_not_fit_on_the_disk(
    place, monkeypatch, capsys, fill_disk
):
    fill_disk(monkeypatch, checkpoint, "save_file", first=3)
    assert run(*SHORT) == 0
    said = capsys.readouterr().err
    assert "the checkpoint of step 3 could not be written" in said and "No space left" in said
    kept = sorted(p.name for p in (RUN / "checkpoints").iterdir())
    assert kept == ["step-00000001", "step-00000002"]


@pytest.mark.fault("full disk")
def test_an_adapter_that_does_not_fit_on_the_disk_stops_the_run_which_can_be_resumed(
    place, monkeypatch, capsys, fill_disk
):
    args = [*SHORT, *sets(train__eval_every=2)]
    assert run(*args) == 0
    whole = RUN.rename("whole")
    with monkeypatch.context() as patch:
        fill_disk(patch, trainer, "save_adapter", first=2)
        assert run(*args) == 1
    said = capsys.readouterr().err
    assert "No space left" in said and "earlier checkpoints are kept" in said
    assert shlex.join(args) + " --resume" in said
    assert run(*args, "--resume") == 0
    assert result() == result(whole)


@pytest.mark.fault("full disk")
def test_a_run_without_enough_free_space_for_its_checkpoints_is_refused_before_training(
    place, monkeypatch, capsys
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert run() == 2
    assert "0 MiB free" in capsys.readouterr().err and (RUN / "metrics.jsonl").read_text() == ""


@pytest.mark.fault("full disk")
def test_a_run_folder_that_cannot_be_written_is_wrong_input(place, capsys):
    assert run("--set", "run.dir=train.jsonl/a") == 2
    said = capsys.readouterr().err
    assert "train.jsonl/a: cannot be written (Not a directory)" in said and "set run.dir to a" in said


# --- steps that go wrong


@pytest.mark.fault("NaN")
def test_three_steps_that_are_not_finite_end_the_run_with_exit_code_1(place, monkeypatch, capsys):
    poison(monkeypatch, "train.jsonl:3", "train.jsonl:4")
    monkeypatch.setattr(loop, "MAX_BAD_STEPS", 1)
    assert run(*SHORT, *sets(train__shuffle="false")) == 1
    said, samples = capsys.readouterr().err, [f"train.jsonl:{n}" for n in (1, 2, 3, 4)]
    assert "step 1 was not applied: not finite; first bad place: the loss; samples: train.jsonl:1" in said
    assert f"Samples of the last step: {', '.join(samples)}." in said
    steps, _ = read_metrics(RUN / "metrics.jsonl")
    assert steps == [{"step": 1, "skipped": True, "layer": steps[0]["layer"], "samples": samples}]


def test_a_step_that_was_skipped_is_in_the_metrics_and_the_report_still_draws(place, monkeypatch, capsys):
    poison(monkeypatch, "train.jsonl:5")
    assert run(*SHORT, *sets(train__shuffle="false")) == 0
    records = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in records if r["step"] == 2 and "loss" in r] == ["nan"]
    assert [r["samples"] for r in records if r.get("skipped")] == [[f"train.jsonl:{n}" for n in (5, 6, 7, 8)]]
    assert json.loads((RUN / "manifest.json").read_text())["run"]["steps"] == "4"
    assert (RUN / "report.html").is_file()


DOUBLE = "double train.gradient_accumulation_steps (now 2)"


@pytest.mark.fault("out of memory")
@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, f"halve train.batch_size (now 2) and {DOUBLE}"),
        ({"train__batch_size": 1}, "lower data.max_length (now 2048)"),
        (
            {"train__max_tokens": 400, "data__max_length": 180},
            f"halve train.max_tokens (now 400) and {DOUBLE}",
        ),
        ({"train__max_tokens": 300, "data__max_length": 180}, "lower data.max_length (now 180)"),
    ],
)
def test_out_of_memory_ends_with_one_concrete_remedy(place, monkeypatch, capsys, changes, remedy):
    message = "CUDA out of memory. Tried to allocate 20.00 GiB"
    kill_in_micro_batch(monkeypatch, 1, torch.OutOfMemoryError(f"{message}\nmore"))
    assert run(*SHORT, *sets(**changes)) == 1
    error = capsys.readouterr().err
    assert f"error: out of memory ({message}); {remedy}" in error and "more" not in error

"""Whole runs of train.py with the objectives dpo and grpo: killed, resumed, and with a faulty reward."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import export
import train
from lora.peft_io import save_adapter
from report.metrics_log import read_metrics
from tests.folders import ROOT
from tests.makers import rows, tiny_model, write_jsonl, write_run
from training import trainer
from training.objectives.rewards import RewardError

GRPO = """
[adapter]
r = 4
lora_alpha = 8
[train]
objective = "grpo"
max_steps = 5
batch_size = 2
gradient_accumulation_steps = 2
learning_rate = 1e-2
precision = "fp32"
device = "cpu"
eval_every = 2
save_every = 1
[model]
name = "base"
[data]
train = "train.jsonl"
validation = "val.jsonl"
[grpo]
rewards = ["mine:length", "exact_match"]
num_generations = 3
max_completion_length = 5
num_iterations = 1
beta = 0.05
[generate]
max_new_tokens = 3
"""
LENGTH = "def length(completion):\n    return len(completion) / 5\n"

# train.py that kills itself at the given call of a function.
DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import export
import train
from generation.generate import BatchScheduler
from training.objectives.rewards import Rewards
from training.optim import AdamW

places = {{"generation": (BatchScheduler, "step"), "scoring": (Rewards, "__call__")}}
places["update"] = AdamW, "step"
(kind, name), at = places[sys.argv[1]], int(sys.argv[2])
original, calls = getattr(kind, name), 0

def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(kind, name, counted)
sys.exit(train.main(sys.argv[3:]))
"""


def run(folder: Path, *words: str) -> int:
    return train.main(["--config", "run.toml", *(w for word in words for w in ("--set", word))])


def killed(folder: Path, place: str, at: int, *words: str) -> None:
    sets = [w for word in words for w in ("--set", word)]
    command = [sys.executable, "-c", DRIVER, place, str(at), "--config", "run.toml", *sets]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == -9, done.stderr


def result(folder: Path) -> tuple[bytes, list[dict]]:
    """Returns what must not depend on how often a run was stopped."""
    steps, evals = read_metrics(folder / "metrics.jsonl")
    varying = ("seconds", "tokens_per_second", "peak_memory")
    records = [{k: v for k, v in r.items() if k not in varying} for r in [*steps, *evals]]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), records


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    write_run(tmp_path)
    (tmp_path / "run.toml").write_text(GRPO)
    (tmp_path / "mine.py").write_text(LENGTH)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.fault("kill in a run")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_grpo_killed_in_generation_scoring_or_update_resumes_to_the_same_bits(place, seed, capsys):
    words = [f"run.seed={seed}"]
    assert run(place, *words, "run.dir=runs/whole") == 0
    wanted = result(place / "runs" / "whole")
    # A step has two micro-batches, and an evaluation may score in between.
    for phase, at in (("generation", 17 + seed), ("scoring", 5 + seed), ("update", 2 + seed)):
        folder = place / "runs" / phase
        killed(place, phase, at, *words, f"run.dir={folder}")
        capsys.readouterr()
        sets = [w for word in [*words, f"run.dir={folder}"] for w in ("--set", word)]
        assert train.main(["--config", "run.toml", *sets, "--resume"]) == 0
        assert "resumed    from the checkpoint of step" in capsys.readouterr().out
        assert result(folder) == wanted, phase


def test_grpo_with_several_steps_on_the_same_completions_saves_between_generations_only(place):
    words = ["grpo.num_iterations=3", "train.max_steps=8", "train.save_total_limit=9"]
    assert run(place, *words) == 0
    found = sorted(p.name for p in (place / "runs" / "run" / "checkpoints").iterdir())
    assert found == [f"step-{n:08d}" for n in (3, 6, 8)]
    wanted = result(place / "runs" / "run")
    killed(place, "update", 5, *words, "run.dir=runs/killed")
    sets = [w for word in [*words, "run.dir=runs/killed"] for w in ("--set", word)]
    assert train.main(["--config", "run.toml", *sets, "--resume"]) == 0
    assert result(place / "runs" / "killed") == wanted


def pairs(count: int, seed: int) -> list[dict]:
    made = zip(rows(count, seed), rows(count, seed + 1), strict=True)
    return [
        {"prompt": a["prompt"], "chosen": a["response"], "rejected": b["response"] + "."} for a, b in made
    ]


@pytest.mark.fault("kill in a run")
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_dpo_killed_in_an_update_resumes_to_the_same_bits(place, seed, capsys):
    write_jsonl(place / "train.jsonl", pairs(13, seed))
    write_jsonl(place / "val.jsonl", pairs(3, 9))
    words = [f"run.seed={seed}", "train.objective=dpo"]
    assert run(place, *words, "run.dir=runs/whole") == 0
    steps, _ = read_metrics(place / "runs" / "whole" / "metrics.jsonl")
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    killed(place, "update", 2 + seed, *words, "run.dir=runs/killed")
    shutil.rmtree(place / "reference", ignore_errors=True)  # it is computed again, by the model of the start
    sets = [w for word in [*words, "run.dir=runs/killed"] for w in ("--set", word)]
    assert train.main(["--config", "run.toml", *sets, "--resume"]) == 0
    assert result(place / "runs" / "killed") == result(place / "runs" / "whole")


def test_dpo_and_grpo_from_an_adapter_measure_it_as_their_start_and_reference(place, capsys):
    """The reference is the trained adapter: the first loss of DPO is log 2, and the first KL is 0."""
    sft = ["train.objective=sft", "run.dir=runs/sft", "train.max_steps=8"]
    assert run(place, *sft) == 0
    start = ["adapter.init_from=runs/sft/adapter"]
    assert run(place, *start) == 0
    steps, _ = read_metrics(place / "runs" / "run" / "metrics.jsonl")
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["kl"] > 1e-6
    write_jsonl(place / "train.jsonl", pairs(13, 1))
    write_jsonl(place / "val.jsonl", pairs(3, 9))
    assert run(place, *start, "train.objective=dpo") == 0
    steps, _ = read_metrics(place / "runs" / "run" / "metrics.jsonl")
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_faulty_reward_stops_the_run_whole_and_its_repair_lets_it_go_on(place, capsys):
    assert run(place, "run.dir=runs/whole") == 0
    capsys.readouterr()
    faulty = "calls = []\n" + LENGTH.replace(
        "    return", "    calls.append(1)\n    if len(calls) > 40: raise KeyError('gold')\n    return"
    )
    (place / "mine.py").write_text(faulty)
    assert run(place) == 1
    fault, remedy, command = capsys.readouterr().err.strip().splitlines()[-3:]
    assert "mine:length" in fault and "KeyError" in fault and "the run is saved after step 3" in fault
    assert remedy == "stopped; continue with:" and command.endswith("--config run.toml --resume")
    (place / "mine.py").write_text(LENGTH)
    assert train.main(["--config", "run.toml", "--resume"]) == 0
    assert "changed since the checkpoint: reward mine.py" in capsys.readouterr().err
    assert result(place / "runs" / "run") == result(place / "runs" / "whole")


@pytest.mark.parametrize("place_of_fault", ["measure_before", "measure_after"])
def test_a_reward_that_fails_outside_of_the_training_loop_says_how_to_go_on(
    place, monkeypatch, capsys, place_of_fault
):
    def measured(*_):
        raise RewardError("reward 'mine:length' returned nan")

    monkeypatch.setattr(trainer, place_of_fault, measured)
    assert run(place) == 1
    fault, remedy, command = capsys.readouterr().err.strip().splitlines()[-3:]
    assert fault == "error: reward 'mine:length' returned nan"
    assert remedy == "stopped; continue with:" and command.endswith("--config run.toml --resume")


@pytest.mark.parametrize("iterations", [1, 3])
def test_a_resume_does_the_evaluation_in_which_a_reward_failed(place, capsys, iterations):
    words = ["grpo.rewards=mine:size", f"grpo.num_iterations={iterations}", "train.max_steps=6"]
    words += ["train.gradient_accumulation_steps=1"]
    sets = [w for word in words for w in ("--set", word)]
    size = (
        "calls = []\ndef size(completions):\n    calls.append(1)\n    CHECK\n    return map(len, completions)"
    )
    (place / "mine.py").write_text(size.replace("CHECK", "pass"))
    assert run(place, *words, "run.dir=runs/whole") == 0
    # The first evaluation is after step 2 or, with three steps on the same completions, after step 3.
    failing = 3 if iterations == 1 else 2
    (place / "mine.py").write_text(size.replace("CHECK", f"assert len(calls) != {failing}"))
    assert run(place, *words) == 1
    assert f"saved after step {2 if iterations == 1 else 3}" in capsys.readouterr().err
    (place / "mine.py").write_text(size.replace("CHECK", "pass"))
    assert train.main(["--config", "run.toml", *sets, "--resume"]) == 0
    assert result(place / "runs" / "run") == result(place / "runs" / "whole")


def test_prompts_without_a_response_are_enough_for_grpo_and_not_for_sft(place, capsys):
    write_jsonl(place / "train.jsonl", [{"prompt": row["prompt"]} for row in rows(13)])
    assert run(place, "grpo.rewards=mine:length") == 0
    assert run(place, "train.objective=sft", "run.dir=runs/sft") == 2
    error = capsys.readouterr().err
    assert 'missing key "response"' in error and "gold" not in error


@pytest.mark.parametrize("file", ["train.jsonl", "val.jsonl"])
@pytest.mark.parametrize(
    "rewards, named", [("['ended', 'leak', 'mine:length']", "(leak)"), ("[]", "(the task's own)")]
)
def test_a_row_without_the_response_that_a_reward_reads_is_refused(place, capsys, file, rewards, named):
    write_jsonl(place / file, [*rows(3), {"prompt": "Hello"}])
    assert run(place, f"grpo.rewards={rewards}") == 2
    error = capsys.readouterr().err
    assert f'{file}:4: missing key "response"' in error and f"grpo.rewards {named} need the response" in error
    assert "a prompt alone is enough for rewards that do not take `gold`" in error


@pytest.mark.parametrize(
    "words, told",
    [
        (["train.objective=dpo"], 'needs rows with "prompt", "chosen" and "rejected"'),
        (["adapter.lora_dropout=0.1"], "set adapter.lora_dropout = 0 (now 0.1)"),
        (["data.loss_on=all"], "remove data.loss_on = 'all'"),
        (["model.init=random"], "remove model.init = 'random'"),
        (["adapter.type=full"], "set grpo.beta = 0, or train an adapter"),
        (["grpo.rewards=[]"], "the task 'text' has no rewards of its own"),
        (["grpo.rewards=exact_mach"], "exact_match"),
        (
            ["grpo.rewards=[]", "grpo.reward_weights=[1, 2]"],
            "grpo.reward_weights = [1.0, 2.0] needs grpo.rewards",
        ),
        (["grpo.format=a+"], "grpo.format = 'a+' needs the reward 'format'"),
        (["grpo.reward_weights=[0, 0]"], "every weight is 0"),
        (["grpo.num_generations=1"], "grpo.num_generations = 1 must be at least 2"),
        (["grpo.temperature=0"], "grpo.temperature = 0.0 must be above 0"),
        (["train.objective=dpo", "dpo.beta=0"], "dpo.beta = 0.0 must be above 0"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_remedy(place, capsys, words, told):
    assert run(place, *words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_everything_that_is_missing_is_named_at_once_and_before_the_base(place, capsys):
    words = ["model.name=no/such-base", "data.train=a.jsonl", "adapter.init_from=runs/none/adapter"]
    assert run(place, *words, "grpo.rewards=['mine:f', 'your:f', 'leek']") == 2
    error = capsys.readouterr().err
    for part in ("data.train: a.jsonl", "'leek': unknown; did you mean 'leak'?", "'your:f': no file"):
        assert part in error
    start = "adapter.init_from = 'runs/none/adapter': no such folder; train that adapter first"
    assert start in error and "no/such-base" not in error and not (place / "runs").exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_part_of_the_adapter_to_start_from_that_is_missing_is_named_with_the_key(place, capsys, name):
    save_adapter(tiny_model(), place / "start", base_model_name="base")
    (place / "start" / name).unlink()
    assert run(place, "adapter.init_from=start", "model.name=no/such-base") == 2
    error = capsys.readouterr().err
    assert "adapter.init_from = 'start'" in error and f"start/{name}" in error


def test_raw_text_is_refused_by_grpo(place, capsys):
    write_jsonl(place / "train.jsonl", [{"text": "Once upon a time"}])
    assert run(place) == 2
    assert "train.jsonl:1" in capsys.readouterr().err


def test_the_plan_of_a_grpo_run_counts_its_completions(place, capsys):
    def peak(length: int) -> float:
        words = ["--set", f"grpo.max_completion_length={length}", "--plan", "8"]
        assert train.main(["--config", "run.toml", *words]) == 0
        line = next(ln for ln in capsys.readouterr().out.splitlines() if "activations" in ln)
        return float(line.split()[2].replace(",", ""))

    assert peak(400) > peak(5)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "base.gguf"
    words = ["--model", "tiny", "--to", "gguf", "--quant", "q8_0", "--no-verify", "--out", str(file)]
    assert export.main(words) == 0
    return file


@pytest.mark.parametrize("method", ["dpo", "grpo"])
@pytest.mark.parametrize("base", ["q8_0", "nf4", "gguf"])
def test_dpo_and_grpo_train_adapters_on_quantized_and_gguf_bases(place, gguf, base, method):
    write_jsonl(place / "train.jsonl", pairs(13, 1) if method == "dpo" else rows(13))
    write_jsonl(place / "val.jsonl", pairs(3, 9) if method == "dpo" else rows(3, 9))
    model = [f"model.name={gguf}"] if base == "gguf" else ["model.name=tiny", f"model.quantize={base}"]
    assert run(place, *model, f"train.objective={method}", "train.max_steps=2", "train.eval_every=0") == 0
    steps, _ = read_metrics(place / "runs" / "run" / "metrics.jsonl")
    assert len(steps) == 2 and all(math.isfinite(step["loss"]) for step in steps)
    if method == "dpo":
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    trained = load_file(place / "runs" / "run" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in trained.items() if "lora_B" in name)  # they start at 0

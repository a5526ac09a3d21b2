"""train.py's command line: help, exit codes, and the messages about wrong settings, rows and folders."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from model.hub import TINY
from report.metrics_log import read_metrics
from tasks.choose import TASKS
from tests.folders import ROOT
from tests.makers import rows, write_jsonl


def script(*args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def run(capsys, *settings: str, config: str = "tiny.toml") -> tuple[int, str, str]:
    """Returns exit code, stdout and stderr of train.py for one epoch, with --set for each of the settings."""
    words = [word for s in ("train.epochs=1", *settings) for word in ("--set", s)]
    code = train.main(["--config", config, *words])
    return code, *capsys.readouterr()


def refused(capsys, *settings: str, config: str = "tiny.toml") -> str:
    """Returns the message of a run that must end with exit code 2, without a traceback and without a step."""
    code, _, error = run(capsys, *settings, config=config)
    assert code == 2, error
    assert error.startswith("error: ") and "Traceback" not in error
    assert not list(Path().glob("runs/*/adapter"))
    assert not any(log.stat().st_size for log in Path().glob("runs/*/metrics.jsonl"))
    return error


# --- help, and the exit codes of a real process


def test_help_comes_in_under_a_second_and_without_torch():
    """The best of three counts, because the machine may be busy."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = script("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert all(option in done.stdout for option in ("--config", "--set", "--resume"))
    assert min(seconds) < 1
    code = "import sys, train, training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_process_with_a_bad_config_ends_with_2_and_every_mistake_on_stderr(place):
    (place / "bad.toml").write_text(
        '[data]\ntrain = "train.jsonl"\n[train]\nlearning_rat = 1e-4\nbatch_size = "8"\n[trian]\nepochs = 2\n'
    )
    done = script("--config", "bad.toml", "--set", "train.epochs", "--set", "adapter.type=lore", cwd=place)
    assert done.returncode == 2 and done.stdout == ""
    expected = [
        "error: bad.toml: no key train.learning_rat; did you mean 'learning_rate'?",
        "bad.toml: train.batch_size = '8' must be a whole number",
        "bad.toml: no section [trian]; did you mean 'train'?",
        "--set train.epochs: write it as section.key=value",
        "--set: adapter.type = 'lore' is not one of 'lora', 'dora', 'full'",
    ]
    for line, start in zip(done.stderr.splitlines(), expected, strict=True):
        assert line.startswith(start)
    assert not (place / "runs").exists()


def test_a_process_without_a_config_prints_its_usage():
    done = script()
    assert done.returncode == 2 and "--config" in done.stderr and "Traceback" not in done.stderr


# --- the config


def test_a_config_that_is_not_there_has_a_remedy(place, capsys):
    error = refused(capsys, config="no-such.toml")
    assert "no-such.toml: no such file" in error and "start from small.toml" in error


def test_toml_that_cannot_be_read_names_its_line(place, capsys):
    Path("bad.toml").write_text("[train]\nepochs = 1\nbatch_size = = 2\n")
    error = refused(capsys, config="bad.toml")
    assert "bad.toml: not valid TOML" in error and "line 3" in error


@pytest.mark.parametrize(
    "setting, parts",
    [
        ("train.precision=fp16", ["train.precision = 'fp16'", "fp16 ends at 65,504", "use 'bf16'"]),
        ("train.objective=ppo", ["train.objective = 'ppo' is not one of 'sft', 'dpo', 'grpo'"]),
        ("train.batch_size=0", ["train.batch_size = 0 must be at least 1"]),
        ("adapter.lora_dropout=1", ["adapter.lora_dropout = 1.0 must be below 1"]),
        ("train.device=gpu", ["device 'gpu' (train.device, --device) cannot be used"]),
        ("model.name=nowhere", ["'nowhere' is neither a folder"]),
        (
            "adapter.target_modules=['q_proj', 'q_prj']",
            ["'q_prj' selects no linear layer", "down_proj, gate_proj, k_proj"],
        ),
        ("data.train=nowhere.jsonl", ["nowhere.jsonl: cannot be read: No such file or directory"]),
        ("data.validation=nowhere.jsonl", ["nowhere.jsonl: cannot be read: No such file or directory"]),
        ("data.max_length=20", ["samples are longer than data.max_length = 20 tokens"]),
    ],
)
def test_an_impossible_setting_is_refused_with_the_remedy(place, capsys, setting, parts):
    error = refused(capsys, setting)
    assert all(part in error for part in parts), error


def test_a_config_without_rows_says_so(place, capsys):
    Path("bad.toml").write_text("[train]\nepochs = 1\n")
    assert "data.train is missing; name a JSON or JSONL file" in refused(capsys, config="bad.toml")


# --- the rows


BAD_ROWS = [
    ('{"prompt": "a", "response": "b"', "train.jsonl:2: not JSON: "),
    ('{"prompt": "a"}', 'train.jsonl:3: missing key "response"'),
    ('{"prompt": "a", "response": "  "}', 'train.jsonl:4: empty response ("response")'),
    ('{"prompt": "a", "response": 7}', 'train.jsonl:5: "response" must be a string, not a number (7)'),
    ('{"question": "a"}', 'train.jsonl:6: unknown row, its keys are: "question"'),
]


def test_every_bad_row_is_named_in_one_error_with_its_line(place, capsys):
    good = json.dumps(rows(1)[0])
    Path("train.jsonl").write_text("\n".join([good, *(line for line, _ in BAD_ROWS)]) + "\n")
    error = refused(capsys)
    assert "5 problems in the data" in error and 'data.on_bad = "skip"' in error
    assert all(f"\n  {message}" in error for _, message in BAD_ROWS), error


def test_bad_rows_are_left_out_and_counted_where_the_config_says_so(place, capsys):
    lines = [json.dumps(r) for r in rows(4)] + [line for line, _ in BAD_ROWS]
    Path("train.jsonl").write_text("\n".join(lines) + "\n")
    code, out, error = run(capsys, "data.on_bad=skip")
    assert code == 0 and "data: 4 samples" in out
    assert "5 bad rows skipped (data.on_bad = 'skip'); the first: train.jsonl:5: not JSON" in error


def test_a_run_reports_what_it_forgot_of_general_text_and_the_perplexity_of_chats(place, capsys):
    write_jsonl(place / "general.jsonl", [{"text": f"The sea was calm at {n}."} for n in range(4)])
    sets = ("data.retention=general.jsonl", "train.max_steps=3", "train.eval_samples=0")
    assert train.main(["--config", "tiny.toml", *(word for s in sets for word in ("--set", s))]) == 0
    manifest = json.loads(Path("runs/tiny/manifest.json").read_text())
    found = manifest["retention"]["general"]
    assert found["rows"] == 4 and "general.jsonl" in manifest["data_sha256"]
    assert found["change"] == pytest.approx(found["loss_after"] - found["loss_before"]) != 0
    assert "retention  general, 4 rows: loss" in capsys.readouterr().out
    assert "Retention" in Path("runs/tiny/report.html").read_text()
    for when in ("before", "after"):
        measured = manifest[when]["val"]
        assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
        assert measured["bits_per_byte"] > 0


def test_a_run_of_a_classification_reports_its_labels_and_their_confusion(place, capsys):
    answers = [{"prompt": f"Is {i} odd? Yes or no?", "response": ("no", "yes")[i % 2]} for i in range(24)]
    for name in ("train", "val"):
        write_jsonl(place / f"{name}.jsonl", answers)
    sets = ("train.max_steps=2", "train.eval_samples=8")
    assert train.main(["--config", "tiny.toml", *(word for s in sets for word in ("--set", s))]) == 0
    measured = json.loads(Path("runs/tiny/manifest.json").read_text())["after"]["val"]
    assert measured["label_accuracy"] in [n / 8 for n in range(9)]
    assert {gold: sum(row.values()) for gold, row in measured["confusion"].items()} == {"no": 4, "yes": 4}
    assert "label accuracy" in capsys.readouterr().out
    assert "answered label (across)" in Path("runs/tiny/report.html").read_text()


@pytest.mark.fault("few rows")
def test_fewer_rows_than_a_batch_are_one_step_an_epoch(place, capsys):
    write_jsonl(Path("train.jsonl"), rows(3))
    assert run(capsys, "train.batch_size=8", "train.gradient_accumulation_steps=4", "train.epochs=2")[0] == 0
    steps, _ = read_metrics("runs/tiny/metrics.jsonl")
    assert [r["step"] for r in steps] == [1, 2] and steps[0]["tokens"] == steps[1]["tokens"]


@pytest.mark.parametrize("count", [1, 5])
def test_one_row_and_copies_of_one_row_cannot_be_split_but_can_be_trained_on(place, capsys, count):
    write_jsonl(Path("train.jsonl"), rows(1) * count)
    error = refused(capsys, "data.validation=[]")
    assert f"{count} sample(s) with 1 distinct prompt(s)" in error
    assert "name a file in data.validation, or set the fraction to 0" in error
    code, out, _ = run(capsys, "data.validation=[]", "data.validation_fraction=0")
    assert code == 0 and Path("runs/tiny/adapter/adapter_model.safetensors").is_file()
    assert Path("runs/tiny/report.html").is_file()
    assert ("exact copies of an earlier sample" in out) == (count > 1)


def test_rows_that_are_too_few_for_a_tenth_still_leave_one_for_validation(place, capsys):
    write_jsonl(Path("train.jsonl"), rows(2))
    code, out, _ = run(capsys, "data.validation=[]", "data.validation_fraction=0.1")
    assert code == 0 and "data: 1 samples, 1 held out" in out


# --- the model folder


def damage_weights(base: Path) -> str:
    with open(base / "model.safetensors", "r+b") as f:
        f.truncate(5000)
    return "base/model.safetensors: not a whole safetensors file"


def pickle_only(base: Path) -> str:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch run-by-the-pickle'\ntR.")
    return "base: has pytorch_model.bin and no model.safetensors. A pickle can run any code"


def change_config(base: Path, **changes) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def other_architecture(base: Path) -> str:
    change_config(base, model_type="llama", architectures=["LlamaForCausalLM"])
    return "base/config.json: model_type is 'llama'; Loupe knows Gemma 3 only"


def other_sizes(base: Path) -> str:
    change_config(base, intermediate_size=64)
    return "misshapen: model.layers.0.mlp.gate_proj.weight is (48, 32), but config.json makes it (64, 32)"


def larger_tokenizer(base: Path) -> str:
    shutil.copyfile(TINY / "tokenizer.json", base / "tokenizer.json")
    return "is outside the model's vocabulary of 357; tokenizer.json does not belong to this model"


def tokenizer_without_turns(base: Path) -> str:
    text = (base / "tokenizer.json").read_text().replace("start_of_turn", "im_start")
    (base / "tokenizer.json").write_text(text)
    return "base/tokenizer.json: has no <start_of_turn>; Loupe needs the tokenizer of a Gemma 3 model"


def no_tokenizer(base: Path) -> str:
    (base / "tokenizer.json").unlink()
    return "base/tokenizer.json: no such file"


FAULTS = [damage_weights, pickle_only, other_architecture, other_sizes]
FAULTS += [larger_tokenizer, tokenizer_without_turns, no_tokenizer]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_model_folder_that_does_not_fit_is_refused_and_named(place, capsys, fault):
    message = fault(place / "base")
    assert message in refused(capsys)
    assert not Path("run-by-the-pickle").exists()


def test_an_error_of_the_program_has_its_traceback_on_request(place, monkeypatch):
    monkeypatch.setenv("LOUPE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="batch_size"):
        train.main(["--config", "tiny.toml", "--set", "train.batch_size=0"])


# --- a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_on_cuda_learns_and_reports_its_peak_memory(place, capsys, precision):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    settings = ["train.device=cuda", f"train.precision={precision}", "train.force_fp16=true"]
    code, _, error = run(capsys, *settings, "train.epochs=4")
    assert code == 0, error
    manifest = json.loads(Path("runs/tiny/manifest.json").read_text())
    assert manifest["run"]["device"] == torch.cuda.get_device_name()
    assert float(manifest["run"]["peak memory"].split()[0].replace(",", "")) > 0
    assert manifest["after"]["val"]["loss"] < manifest["before"]["val"]["loss"]


def test_a_run_keeps_its_answers_row_by_row_and_they_give_its_measures(place, capsys):
    assert run(capsys, "train.eval_samples=0")[0] == 0
    found = [json.loads(line) for line in Path("runs/tiny/answers.jsonl").read_text().splitlines()]
    manifest = json.loads(Path("runs/tiny/manifest.json").read_text())
    golds = [json.loads(line) for line in Path("val.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["gold"]) for row in found] == [(r["prompt"], r["response"]) for r in golds]
    assert [row["id"] for row in found] == [f"val.jsonl:{n + 1}" for n in range(len(golds))]
    task = TASKS[manifest["tasks"]["val"]]
    for when in ("before", "after"):
        score = task.score([(row["prompt"], row["gold"], row[when]) for row in found])
        assert manifest[when]["val"] | score == manifest[when]["val"]

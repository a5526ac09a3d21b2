"""export.py as a user runs it: transformers and PEFT load its folders, and a failed export leaves nothing."""

import json
import logging
import shutil
import warnings
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
from exporting import hf_folder
from exporting.merged import MergedCheckpoint
from lora.inject import inject
from lora.peft_io import load_adapter, save_adapter
from model.weights import hash_model, load_model
from tests.folders import (
    BROKEN,
    TARGETS,
    help_seconds,
    logits,
    make_adapter,
    make_broken_adapter,
    make_model,
    run_script,
)
from training.config import Adapter, Config, Data, Model

TOKENS = torch.randint(200, 6000, (48,), generator=torch.Generator().manual_seed(5))


def adapted_logits(base: str, adapter: str | None) -> torch.Tensor:
    model = load_model(base, torch.float32)
    if adapter:
        load_adapter(model, adapter)
    return logits(model, TOKENS)


def their_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS[None]).logits[0]


def assert_same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def make_run(folder: Path, base: str, type: str) -> str:
    """A finished run's folder: its config, manifest, and adapter/ or model/."""
    cfg = Config(model=Model(name=base), adapter=Adapter(type=type), data=Data(train=["rows.jsonl"]))
    folder.mkdir()
    (folder / "config.toml").write_text(cfg.to_toml())
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "base_sha256": hash_model(base),
                "before": {"val": {"loss": 2.5}},
                "after": {"val": {"loss": 0.25}},
            }
        )
    )
    if type == "full":
        make_model(folder / "model", seed=1)
    else:
        make_adapter(folder / "adapter", base, type=type)
    return str(folder)


def files(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def refused(capsys, out: Path, *words: str) -> str:
    """Runs an export that must be refused, asserts that it changes no file, and returns the message."""
    before = {p: p.lstat().st_mtime_ns for p in out.parent.rglob("*")} if out.parent.exists() else None
    assert export.main([*words, "--out", str(out)]) == 2
    printed, err = capsys.readouterr()
    assert printed == "" and err.startswith("error: ") and "Traceback" not in err
    after = {p: p.lstat().st_mtime_ns for p in out.parent.rglob("*")} if out.parent.exists() else None
    assert before == after
    return err


# what others load


@pytest.mark.parametrize("type", ["lora", "dora"])
def test_transformers_loads_the_merged_model_without_a_warning_and_gives_the_adapter_models_logits(
    tmp_path, base, capsys, type
):
    adapter = make_adapter(tmp_path / "adapter", base, type=type)
    assert (
        export.main(
            ["--model", base, "--adapter", adapter, "--to", "safetensors", "--out", str(tmp_path / "out")]
        )
        == 0
    )
    assert files(tmp_path / "out") == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    said, handler = [], logging.Handler(logging.WARNING)
    handler.emit = said.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, tokenizer = (
                AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
                AutoTokenizer.from_pretrained(tmp_path / "out"),
            )
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in said] == [] and model.dtype == torch.float32
    assert (
        model.generation_config.eos_token_id == [1, 106]
        and tokenizer.convert_tokens_to_ids("<end_of_turn>") == 106
    )
    merged, expected = their_logits(model), adapted_logits(base, adapter)
    assert_same(merged, expected)
    assert (expected - adapted_logits(base, None)).abs().max() > 0.01


def test_the_norm_of_what_was_merged_is_reported(tmp_path, base, adapter, capsys):
    assert (
        export.main(
            ["--model", base, "--adapter", adapter, "--to", "safetensors", "--out", str(tmp_path / "out")]
        )
        == 0
    )
    was, now = load_file(Path(base) / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    norms = {name: (now[name] - was[name]).norm() for name in was if not torch.equal(was[name], now[name])}
    total, largest = torch.stack(list(norms.values())).norm(), max(norms, key=norms.get)
    said, layer = capsys.readouterr().out, largest.removesuffix(".weight")
    assert f"merged {len(norms)} layers" in said and f"{total:.4g}" in said and len(norms) == 49
    assert f"{layer} by {norms[largest]:.4g}" in said


def test_peft_loads_the_adapter_folder_and_gives_the_same_logits(tmp_path, base, adapter):
    out = tmp_path / "my-adapter"
    assert export.main(["--model", base, "--adapter", adapter, "--to", "peft", "--out", str(out)]) == 0
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    } <= files(out)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    assert_same(
        their_logits(AutoPeftModelForCausalLM.from_pretrained(out)), adapted_logits(base, adapter)
    )  # finds the base by that name
    assert (
        AutoTokenizer.from_pretrained(out)
        .apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
        .startswith("<bos><start_of_turn>")
    )
    card = (out / "README.md").read_text()
    assert (
        "# my-adapter" in card and "r = 4, lora_alpha = 8" in card and 'from_pretrained("my-adapter")' in card
    )
    assert str(Path(base).parent) not in card  # nobody's home folder is published


def test_a_model_without_an_adapter_keeps_its_weights(tmp_path, base, capsys):
    assert export.main(["--model", base, "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    assert "nothing to merge" in capsys.readouterr().out
    assert_same(
        their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), adapted_logits(base, None)
    )


@pytest.mark.parametrize("quant", ["f32", "bf16", "f16"])
def test_the_merged_weights_are_rounded_once_to_the_dtype_asked_for(tmp_path, base, adapter, capsys, quant):
    words = ["--model", base, "--adapter", adapter, "--to", "safetensors", "--quant", quant]
    assert export.main([*words, "--out", str(tmp_path / "out")]) == 0
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[quant]
    assert f"parameters in {str(dtype).removeprefix('torch.')}, merged" in capsys.readouterr().out
    theirs, merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), MergedCheckpoint(base, adapter)
    assert theirs.dtype == dtype
    for name in merged.names:
        assert torch.equal(theirs.get_parameter(name), merged.read(name).to(dtype))


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path, base, capsys):
    broken = shutil.copytree(base, tmp_path / "broken")
    tensors, name = load_file(broken / "model.safetensors"), "model.layers.2.mlp.up_proj.weight"
    tensors[name] = tensors[name].clone()
    tensors[name][3, 3] = 70_000
    save_file(tensors, broken / "model.safetensors")
    words = ["--model", str(broken), "--to", "safetensors"]
    message = refused(capsys, tmp_path / "out", *words, "--quant", "f16")
    assert f"{name} has a value that f16 cannot hold; use --quant f32" in message
    assert export.main([*words, "--quant", "bf16", "--out", str(tmp_path / "out")]) == 0


def test_generation_settings_are_written_where_the_base_has_none(tmp_path, base):
    shutil.copytree(base, tmp_path / "bare")
    (tmp_path / "bare" / "generation_config.json").unlink()
    assert (
        export.main(
            ["--model", str(tmp_path / "bare"), "--to", "safetensors", "--out", str(tmp_path / "out")]
        )
        == 0
    )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 106]


# runs


@pytest.mark.parametrize("type", ["lora", "dora"])
def test_a_runs_adapter_is_exported_both_ways(tmp_path, base, type):
    run = make_run(tmp_path / "run", base, type)
    expected = adapted_logits(base, f"{run}/adapter")
    assert export.main(["--run", run, "--to", "peft", "--out", str(tmp_path / "peft")]) == 0
    assert_same(their_logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")), expected)
    assert "  loss                   2.500    0.2500" in (tmp_path / "peft" / "README.md").read_text()
    assert export.main(["--run", run, "--to", "safetensors", "--out", str(tmp_path / "merged")]) == 0
    assert_same(their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)


def test_a_full_runs_model_is_exported_and_its_base_is_not(tmp_path, base):
    run = make_run(tmp_path / "run", base, "full")
    assert export.main(["--run", run, "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    found = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert_same(found, adapted_logits(f"{run}/model", None))
    assert (found - adapted_logits(base, None)).abs().max() > 0.1


def test_a_full_runs_card_names_the_base_it_was_trained_from_and_not_its_folder(tmp_path, base):
    run = make_run(tmp_path / "run", base, "full")
    assert export.main(["--run", run, "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (
        f"A model, from the base `{Path(base).name}`" in card
        and f"- base: `{Path(base).name}`" in card
        and str(tmp_path) not in card
    )
    assert "license:" not in card and "base_model:" not in card  # nobody knows them of a folder


def test_the_embedded_models_card_has_its_licence(tmp_path):
    assert export.main(["--model", "tiny", "--to", "safetensors", "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\nlicense: apache-2.0\n---\n" in card and "`tiny`" in card and "base_model:" not in card


def test_a_full_run_has_no_adapter_for_peft(tmp_path, base, capsys):
    run = make_run(tmp_path / "run", base, "full")
    assert "--to safetensors" in refused(capsys, tmp_path / "out", "--run", run, "--to", "peft")


def test_the_adapter_of_a_run_is_not_merged_into_other_weights_unless_asked(tmp_path, base, capsys):
    shutil.copytree(base, tmp_path / "base")
    run = make_run(tmp_path / "run", str(tmp_path / "base"), "lora")
    make_model(tmp_path / "base", seed=3)
    err = refused(capsys, tmp_path / "out", "--run", run, "--to", "safetensors")
    assert f"--model {tmp_path / 'base'} --revision main --adapter {run}/adapter" in err
    assert (
        export.main(
            [
                "--model",
                str(tmp_path / "base"),
                "--adapter",
                f"{run}/adapter",
                "--to",
                "safetensors",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )


def test_a_runs_own_adapter_and_revision_are_not_overruled(tmp_path, capsys):
    for flag in ("--adapter", "--revision"):
        with pytest.raises(SystemExit) as stop:
            export.main(["--run", "r", flag, "x", "--to", "peft", "--out", str(tmp_path / "out")])
        assert stop.value.code == 2 and f"{flag} goes with --model" in capsys.readouterr().err


def test_a_folder_that_is_no_run_and_a_run_that_has_saved_nothing_are_told_apart(tmp_path, base, capsys):
    assert "no run is here" in refused(capsys, tmp_path / "out", "--run", base, "--to", "peft")
    run = make_run(tmp_path / "run", base, "lora")
    shutil.rmtree(f"{run}/adapter")
    assert "has no adapter/ yet" in refused(capsys, tmp_path / "out", "--run", run, "--to", "peft")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"base', "not valid JSON"),
        ("{}", "has no base_sha256, before, after"),
        ("[1]", "not a JSON object"),
        (
            '{"base_sha256": "SHA", "before": [], "after": {}}',
            "before, after or data_sha256 is not as train.py writes",
        ),
        ('{"base_sha256": "SHA", "before": {"a": 1}, "after": {}}', "before, after or data_sha256 is not as"),
        (
            '{"base_sha256": "SHA", "before": {}, "after": {}, "data_sha256": 3}',
            "before, after or data_sha256",
        ),
    ],
)
def test_a_broken_manifest_is_named_with_the_remedy(tmp_path, base, capsys, text, message):
    run = Path(make_run(tmp_path / "run", base, "lora"))
    (run / "manifest.json").write_text(text.replace("SHA", hash_model(base)))
    err = refused(capsys, tmp_path / "out", "--run", str(run), "--to", "safetensors")
    assert (
        f"{run / 'manifest.json'}: {message}" in err
        and "to export without the run's measures" in err
        and err.count("\n") == 1
    )


def test_a_base_given_by_a_relative_path_is_found_and_named_from_everywhere(
    tmp_path, base, adapter, monkeypatch
):
    monkeypatch.chdir(base)
    assert (
        export.main(["--model", ".", "--adapter", adapter, "--to", "peft", "--out", str(tmp_path / "out")])
        == 0
    )
    monkeypatch.chdir(tmp_path)
    assert f"- base: `{Path(base).name}`" in (tmp_path / "out" / "README.md").read_text()
    assert_same(
        their_logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")),
        adapted_logits(base, adapter),
    )


# what is refused


@pytest.mark.parametrize("to", ["peft", "safetensors"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_adapter_is_one_message_and_leaves_nothing(tmp_path, base, capsys, what, to):
    folder, message = make_broken_adapter(tmp_path / "broken", base, what)
    err = refused(capsys, tmp_path / "new" / "out", "--model", base, "--adapter", folder, "--to", to)
    assert folder in err and message in err and not (tmp_path / "new").exists()


@pytest.mark.fault("bad argument")
def test_an_empty_word_is_no_missing_one(tmp_path, base, capsys, monkeypatch):
    """What a shell makes of --adapter "$UNSET"."""
    monkeypatch.chdir(tmp_path)
    assert "adapter_config.json: no such file" in refused(
        capsys, tmp_path / "out", "--model", base, "--adapter", "", "--to", "safetensors"
    )
    assert "no run is here" in refused(capsys, tmp_path / "out", "--run", "", "--to", "safetensors")


@pytest.mark.parametrize("to", ["safetensors", "gguf", "gguf-lora"])
def test_an_untrained_adapter_is_not_merged(tmp_path, base, capsys, to):
    model = load_model(base, torch.float32)
    inject(model, r=4, lora_alpha=8, target_modules=TARGETS, seed=1)
    save_adapter(model, tmp_path / "adapter", base_model_name=base)
    assert "untrained" in refused(
        capsys, tmp_path / "out", "--model", base, "--adapter", str(tmp_path / "adapter"), "--to", to
    )


@pytest.mark.parametrize("to", ["safetensors", "gguf", "ollama", "oci", "gguf-lora", "peft"])
def test_a_disk_without_room_is_refused_before_a_byte_is_written(
    tmp_path, base, adapter, capsys, to, monkeypatch
):
    monkeypatch.setattr("shutil.disk_usage", lambda _: namedtuple("usage", "free")(10**6))
    assert "has 1 MiB free; make room there" in refused(
        capsys, tmp_path / "out", "--model", base, "--adapter", adapter, "--to", to
    )


def test_peft_without_an_adapter_is_refused_with_the_remedy(tmp_path, base, capsys):
    assert "give --adapter" in refused(capsys, tmp_path / "out", "--model", base, "--to", "peft")


@pytest.mark.parametrize("to", ["peft", "safetensors"])
def test_an_earlier_export_is_replaced_by_force_only(tmp_path, base, adapter, capsys, to):
    words, out = ["--model", base, "--adapter", adapter, "--to", to], tmp_path / "out"
    assert export.main([*words, "--out", str(out)]) == 0
    (out / "notes.json").write_text("{}")
    capsys.readouterr()
    assert "--force" in refused(capsys, out, *words)
    assert "holds notes.json, which no export wrote" in refused(capsys, out, *words, "--force")
    (out / "notes.json").unlink()
    stale = out / "model-00001-of-00002.safetensors"  # of an earlier export in shards
    stale.write_bytes(b"")
    assert export.main([*words, "--out", str(out), "--force"]) == 0
    assert stale.name not in files(out) and files(tmp_path) == {"out"}


def test_force_replaces_no_folder_of_another_kind_and_no_source(tmp_path, base, adapter, capsys):
    words = ["--model", base, "--adapter", adapter, "--to", "safetensors", "--force"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    (tmp_path / "file").write_text("")
    deep = tmp_path / "project"
    (deep / "sources").mkdir(parents=True)
    (deep / "config.json").write_text("{}")
    for out in (tmp_path / "photos", tmp_path / "file", deep):
        assert "is no earlier export" in refused(capsys, out, *words)
    for out in (base, adapter):  # which no export wrote
        assert "is no earlier export" in refused(capsys, Path(out), *words)
    exported = tmp_path / "exported"
    assert export.main([*words, "--out", str(exported)]) == 0
    capsys.readouterr()
    again = ["--model", str(exported), "--to", "safetensors", "--force"]
    assert "is the source of the export" in refused(capsys, exported, *again)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("broken")]
)
def test_what_fails_halfway_leaves_the_earlier_export_and_nothing_else(
    tmp_path, base, adapter, capsys, monkeypatch, error
):
    def fail(*_):
        raise error

    out = tmp_path / "new" / "out"
    words = ["--model", base, "--adapter", adapter, "--to", "safetensors", "--out", str(out)]
    code = {OSError: 2, KeyboardInterrupt: 130, RuntimeError: 1}[type(error)]
    with monkeypatch.context() as patch:
        patch.setattr(hf_folder, "save_tokenizer", fail)
        assert export.main(words) == code
        assert not (tmp_path / "new").exists()
    assert export.main(words) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(hf_folder, "save_tokenizer", fail)
    assert export.main([*words, "--force"]) == code
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before and files(out.parent) == {"out"}


@pytest.mark.parametrize(
    "words",
    [
        ["--run", "a", "--model", "b"],
        ["--run", "a", "--adapter", "b"],
        [],
        ["--model", "a", "--to", "nothing"],
    ],
)
def test_an_impossible_command_line_is_exit_code_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        export.main(["--to", "peft", "--out", "out", *words])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_the_process_has_the_exit_code(tmp_path, base):
    done = run_script("export.py", "--model", base, "--to", "peft", "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr


def test_help_costs_less_than_a_second():
    assert help_seconds("export.py") < 1

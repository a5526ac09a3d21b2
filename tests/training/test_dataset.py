"""training/dataset.py: which rows are measured, under which name, and what is refused before training."""

import os
from pathlib import Path

import pytest

from data import token_cache
from tests.makers import rows, write_jsonl
from training import build, trainer
from training import dataset as documents
from training.config import load_config
from training.dataset import read
from training.objectives.sft import SupervisedFineTuning

LONG = {"prompt": "Count to 1 from 1." + " 1" * 60, "response": "1"}


def data_of(*overrides):
    cfg = load_config("tiny.toml", list(overrides))
    return read(cfg, build.make_objective(cfg), Path(cfg.model.name))[1]


def test_loss_and_answers_are_measured_on_the_rows_that_on_long_leaves(place, capsys):
    write_jsonl(place / "val.jsonl", [LONG, *rows(3)])
    (found,) = data_of("data.max_length=100", "data.on_long=drop", "train.eval_samples=0").validation
    kept = ["val.jsonl:2", "val.jsonl:3", "val.jsonl:4"]
    assert [s.id for s in found.samples] == [d.id for d in found.documents] == kept
    assert "val: 1 of 4 rows exceed data.max_length and are not measured" in capsys.readouterr().err


def test_general_text_is_cut_at_max_length_and_its_file_is_one_of_the_run(place):
    write_jsonl(place / "general.jsonl", [{"text": "1 " * 300}, *rows(3)])
    data = data_of("data.retention=general.jsonl", "data.max_length=100", "train.eval_samples=2")
    (found,) = data.retention
    assert found.name == "general" and len(found.documents) == 2 and "general.jsonl" in data.hashes
    assert len(found.documents[0].input_ids) == 100 and len(data.validation) == 1


def test_labels_are_found_in_training_and_validation_rows_or_named(place):
    answers = [{"prompt": f"{i}?", "response": ("yes", "no", "never")[i % 3]} for i in range(60)]
    write_jsonl(place / "train.jsonl", answers)
    write_jsonl(place / "val.jsonl", [row for row in answers if row["response"] != "never"])
    assert data_of().validation[0].labels == ["never", "no", "yes"]
    assert data_of('data.labels=["no", "yes", "so"]').validation[0].labels == ["no", "yes", "so"]
    with pytest.raises(ValueError, match="val.jsonl:1: 'yes'"):
        data_of('data.labels=["no"]')


def test_every_data_file_that_is_not_there_is_named_before_the_model_is_looked_for(place):
    overrides = ["model.name=no/such-model", 'data.train=["train.jsonl", "a.jsonl", "base"]']
    with pytest.raises(ValueError, match="cannot be read") as caught:
        overrides += ["data.validation=", "data.retention=b.jsonl"]
        trainer.open_run(load_config("tiny.toml", overrides), False)
    *named, remedy = str(caught.value).splitlines()[1:]
    assert named == [
        "  data.train: a.jsonl: cannot be read: No such file or directory",
        "  data.train: base: cannot be read: Is a directory",
        "  data.validation: '': cannot be read: Is a directory",
        "  data.retention: b.jsonl: cannot be read: No such file or directory",
    ]
    assert "JSON or JSONL" in remedy and str(place) in remedy
    assert not Path("runs").exists()


def test_validation_files_of_one_name_keep_their_folders_in_it(place):
    for folder in ("de", "it"):
        Path(folder).mkdir()
        write_jsonl(place / folder / "val.jsonl", rows(2))
    sets = data_of('data.validation=["de/val.jsonl", "it/val.jsonl", "val.jsonl"]').validation
    assert [v.name for v in sets] == ["de/val.jsonl", "it/val.jsonl", "val.jsonl"]


def test_a_training_prompt_among_the_validation_rows_that_are_not_measured_is_reported_too(place):
    write_jsonl(place / "val.jsonl", [*rows(3, seed=9), rows(13)[0]])
    assert data_of("train.eval_samples=1").checks["overlap"] == ["val.jsonl:4"]


@pytest.mark.fault("long rows")
def test_rows_and_prompts_longer_than_the_models_positions_are_refused_before_training(place):
    write_jsonl(place / "train.jsonl", [*rows(5), {"prompt": "1 " * 3000, "response": "1"}])
    with pytest.raises(ValueError, match="positions:") as caught:
        data_of("data.max_length=9000", f'generate.prompts=["1", "{"1 " * 3000}"]')
    for part in ("the longest row has", "set data.max_length to", "prompt 2 of generate.prompts has"):
        assert part in str(caught.value)


def test_documents_come_from_the_cache_for_the_same_rows_tokenizer_and_settings_alone(place, monkeypatch):
    calls, made_of = [], SupervisedFineTuning.documents
    monkeypatch.setattr(documents, "TOKEN_CACHE", place / ".tokens")
    # There are 13 rows for training, and one row of validation is measured.
    monkeypatch.setattr(token_cache, "MIN_SAMPLES", 10)

    def counted(self, samples, *args, **limits):
        calls.append(len(samples))
        return made_of(self, samples, *args, **limits)

    monkeypatch.setattr(SupervisedFineTuning, "documents", counted)

    def rendered(*overrides: str) -> list[int]:
        calls.clear()
        first = data_of(*overrides).documents
        made, again = list(calls), data_of(*overrides).documents
        assert calls == [*made, 1] and again == first, "only the set below MIN_SAMPLES is rendered again"
        return made

    assert rendered() == [13, 1] and rendered("adapter.r=2", "run.dir=elsewhere") == [1]
    for changes in (
        ["data.loss_on=all"],
        ["data.special_tokens=parse"],
        ["data.max_length=60", "data.on_long=truncate"],
        ["data.max_length=60", "data.on_long=drop"],
        ["data.max_length=59", "data.on_long=drop"],
    ):
        assert rendered(*changes) == [13, 1], changes
    tokenizer = place / "base" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    assert rendered() == [13, 1]
    write_jsonl(place / "train.jsonl", rows(13, seed=5))
    assert rendered() == [13, 1]


def test_special_tokens_that_rows_spell_are_counted_and_stay_text_unless_they_are_parsed(place, capsys):
    spelled = [{"prompt": "Say <eos>.", "response": f"It is <eos>, {i}."} for i in range(20)]
    write_jsonl(place / "train.jsonl", [*rows(5), *spelled, {"text": "<bos>A<eos>B"}])
    write_jsonl(place / "val.jsonl", rows(3))
    as_text = data_of().documents
    assert "21 rows spell special tokens, which stay text" in (err := capsys.readouterr().err)
    assert "<eos>; the first is train.jsonl:6" in err
    parsed = data_of("data.special_tokens=parse").documents
    assert "21 rows spell special tokens, which become tokens" in capsys.readouterr().err
    eos, bos = 1, 2
    assert [d.input_ids.count(eos) for d in as_text] == [0] * 25 + [1]
    assert [d.input_ids.count(eos) for d in parsed] == [0] * 5 + [2] * 20 + [2]
    assert all(d.input_ids.count(bos) == 1 for d in [*as_text, *parsed]) and as_text[:5] == parsed[:5]


def test_a_run_reads_its_own_columns_in_every_file(place):
    own = [{"question": row["prompt"], "answer": row["response"]} for row in rows(20)]
    for name in ("train", "val", "general"):
        write_jsonl(place / f"{name}.jsonl", own)
    data = data_of('data.columns=["prompt=question", "response=answer"]', "data.retention=general.jsonl")
    assert len(data.documents) == 20 and data.validation[0].documents and data.retention[0].documents


def test_a_pipe_is_named_before_the_model_is_looked_for(place):
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match=r"data\.train: pipe: is a pipe or a device"):
        trainer.open_run(load_config("tiny.toml", ["model.name=no/such", "data.train=pipe"]), False)

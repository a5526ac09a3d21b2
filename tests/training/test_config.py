"""training/config.py: what a config file may hold, and the messages about a mistake in it."""

import re
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.files import MOVED
from lora import inject
from tests.folders import ROOT
from training.config import AT_MOST, SECTIONS, Adapter, Config, Data, Generate, Model, Run, Train, load_config


def config_file(folder: Path, text: str, start: str = '[data]\ntrain = "rows.jsonl"\n') -> Path:
    path = folder / "some.toml"
    path.write_text(start + text, encoding="utf-8")
    return path


def message_of(path: Path, overrides=()) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def value_of(cfg: Config, section: str, key: str):
    return getattr(getattr(cfg, section), key)


# --- what a user gets wrong


def test_a_misspelt_key_is_an_error_that_names_the_right_one(tmp_path):
    said = message_of(config_file(tmp_path, "[train]\nlearning_rat = 1e-4\n"))
    assert "no key train.learning_rat; did you mean 'learning_rate'?" in said


def test_an_unknown_section_is_an_error_that_names_the_right_one(tmp_path):
    said = message_of(config_file(tmp_path, "[trian]\nepochs = 1\n"))
    assert "no section [trian]; did you mean 'train'?" in said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[train]\nbatch_size = 2.5", "train.batch_size = 2.5 must be a whole number"),
        ("[train]\nbatch_size = true", "train.batch_size = True must be a whole number"),
        ("[train]\nlearning_rate = '1e-4'", "train.learning_rate = '1e-4' must be a number"),
        ("[train]\nshuffle = 1", "train.shuffle = 1 must be true or false"),
        ("[run]\nname = 5", "run.name = 5 must be a string"),
        ("[adapter]\ntarget_modules = [1]", "target_modules = [1] must be a string or a list of strings"),
        ("[train]\nobjective = 'stf'", "train.objective = 'stf' is not one of 'sft', 'dpo'"),
        ("[train]\ncompile = 1", "train.compile = 1 is not one of 'auto', true, false"),
    ],
)
def test_a_wrong_type_is_an_error_with_the_value_and_the_remedy(tmp_path, line, expected):
    assert expected in message_of(config_file(tmp_path, line))


@pytest.mark.fault("divergence")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("[adapter]\nr = 0", "adapter.r = 0 must be at least 1"),
        ("[adapter]\nlora_dropout = 1.0", "adapter.lora_dropout = 1.0 must be below 1"),
        ("[train]\nadam_beta2 = 1.0", "train.adam_beta2 = 1.0 must be below 1"),
        ("[train]\nlearning_rate = nan", "train.learning_rate = nan must be at least 0"),
        ("[train]\nepochs = 0", "train.epochs and train.max_steps are both 0"),
        ("[train]\nprecision = 'fp16'", "train.force_fp16"),
        ("[train]\nlearning_rate = inf", "train.learning_rate = inf must be at most 1"),
        ("[train]\nlearning_rate = 1e300", "train.learning_rate = 1e+300 must be at most 1"),
        ("[train]\nweight_decay = 1e38", "train.weight_decay = 1e+38 must be at most 10"),
        ("[train]\nmax_steps = 9223372036854775807", "807 must be at most 1,000,000,000"),
        ("[adapter]\nr = 1000000000", "adapter.r = 1000000000 must be at most 65,536"),
        ("[adapter]\nlora_alpha = 1e300", "adapter.lora_alpha = 1e+300 must be at most 65,536"),
        ("[run]\nseed = 9223372036854775808", "seed = 9223372036854775808 must be a whole number of 64 bits"),
        ("[train]\nepochs = inf", "train.epochs = inf must be at most 1,000,000"),
        ("[generate]\ntop_p = 0.0", "generate.top_p = 0.0 must be above 0 and at most 1"),
        ("[generate]\ntop_p = 1.5", "generate.top_p = 1.5 must be above 0 and at most 1"),
        ("[train]\nearly_stopping_patience = 2", "train.early_stopping_patience = 2 needs evaluations"),
        ("[dpo]\nbeta = -0.1", "dpo.beta = -0.1 must be above 0"),
        pytest.param(f"[train]\nlearning_rate = {10**400}", "must be a finite number", id="10^400"),
        pytest.param(f"[train]\nlearning_rate = 0x{'f' * 5000}", "must be a finite number", id="16^5000"),
        pytest.param(f"[adapter]\nr = 0x{'f' * 5000}", "must be a whole number of 64 bits", id="r 16^5000"),
        ("[grpo]\ntemperature = 0", "grpo.temperature = 0.0 must be above 0"),
        ("[grpo]\nreward_timeout = nan", "grpo.reward_timeout = nan must be above 0"),
        ("[adapter]\ntype = 'full'\ninit_from = 'a'", "init_from = 'a' needs adapter.type 'lora' or 'dora'"),
    ],
)
def test_a_value_out_of_range_is_an_error_with_the_limit(tmp_path, line, expected):
    assert expected in message_of(config_file(tmp_path, line))


@pytest.mark.fault("many mistakes")
def test_a_value_out_of_range_is_blamed_on_the_option_that_set_it(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[data]\ntrain = "a"\n[adapter]\nr = 8\n[train]\nbatch_size = 0\n')
    with pytest.raises(ValueError) as error:
        load_config(path, ["adapter.r=0"])
    assert str(error.value).splitlines() == [
        "--set: adapter.r = 0 must be at least 1",
        f"{path}: train.batch_size = 0 must be at least 1",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.task=text", 'data.labels=["a"]'], "data.labels = ['a'] are of a classification"),
        (['data.labels=["a", " "]'], "data.labels = ['a', ' '] has an empty label"),
        (['data.labels=["a", "b", "A "]'], "has equal labels, 'a', 'A '"),
    ],
)
def test_labels_that_are_empty_equal_or_of_another_task_are_errors(tmp_path, overrides, expected):
    assert expected in message_of(config_file(tmp_path, ""), overrides)


@pytest.mark.fault("many mistakes")
@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (
            "[train]\nepoch = 1\nbatch_size = 'x'\n[nowhere]\na = 1\n",
            ["adapter.rank=8", "nonsense"],
            ["train.epoch;", "train.batch_size", "[nowhere]", "adapter.rank", "--set nonsense"],
        ),
        (
            "[train]\nbatch_size = 'x'\nwarmup_steps = -1\nlearning_rate = inf\n[run]\nsed = 1\n",
            ["adapter.r=0"],
            [
                "train.batch_size = 'x'",
                "warmup_steps = -1",
                "learning_rate = inf",
                "run.sed",
                "adapter.r = 0",
            ],
        ),
    ],
    ids=["names", "types, spelling and ranges"],
)
def test_all_problems_stand_in_one_message(tmp_path, text, overrides, parts):
    said = message_of(config_file(tmp_path, text), overrides)
    assert len(said.splitlines()) == 5 and all(part in said for part in parts), said


def test_a_key_of_the_wrong_type_is_not_called_missing_too(tmp_path):
    text = "[data]\ntrain = 3\n[train]\neval_every = 'x'\nearly_stopping_patience = 1\n"
    lines = message_of(config_file(tmp_path, text, start="")).splitlines()
    assert [line.split(" = ")[0].split(": ")[1] for line in lines] == ["data.train", "train.eval_every"]


def test_the_error_for_a_section_in_double_brackets_says_how_to_write_it(tmp_path):
    said = message_of(config_file(tmp_path, "[[train]]\nepochs = 1\n", start=""))
    assert "train must be a section of keys" in said and "[train] once, in single brackets" in said


def test_a_key_outside_a_section_is_an_error(tmp_path):
    assert "epochs stands outside a section" in message_of(config_file(tmp_path, "epochs = 1\n", start=""))


def test_training_data_must_be_named(tmp_path):
    assert "data.train is missing" in message_of(config_file(tmp_path, "[train]\nepochs = 1\n", start=""))


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path):
    assert "nowhere.toml: no such file" in message_of(tmp_path / "nowhere.toml")
    assert "some.toml: not valid TOML" in message_of(config_file(tmp_path, "[train\n"))
    (tmp_path / "wide.toml").write_text("[train]\n", encoding="utf-16")
    said = message_of(tmp_path / "wide.toml")
    assert "wide.toml: not valid TOML" in said and "byte 1" in said and "save the file as UTF-8" in said
    assert f"{tmp_path}: cannot be read (Is a directory)" in message_of(tmp_path)


@pytest.mark.parametrize("value", ["[" * 100_000, "{a=" * 100_000, "1" * 5000], ids=lambda v: v[:3])
def test_toml_without_an_end_is_refused_by_its_file_or_option(tmp_path, value):
    assert "some.toml: not valid TOML" in message_of(config_file(tmp_path, f"[train]\nepochs = {value}"))
    option = f"train.epochs={value}"
    assert "--set: train.epochs" in message_of(config_file(tmp_path, ""), [option])


# --- overrides


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.learning_rate=1e-3", "train", "learning_rate", 1e-3),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("model.name=some/folder", "model", "name", "some/folder"),
        ('model.name="tiny"', "model", "name", "tiny"),
        ("data.train=a.jsonl", "data", "train", ["a.jsonl"]),
        ('data.train=["a.jsonl", "b.jsonl"]', "data", "train", ["a.jsonl", "b.jsonl"]),
        ("train.shuffle=false", "train", "shuffle", False),
        ("run.name=a=b", "run", "name", "a=b"),
        ("run.name=2026-11-21", "run", "name", "2026-11-21"),
        ("run.name=007", "run", "name", "007"),
        ("model.revision=12345", "model", "revision", "12345"),
    ],
)
def test_set_overrides_the_file(tmp_path, override, section, key, value):
    cfg = load_config(config_file(tmp_path, "[train]\nlearning_rate = 5e-5\n"), [override])
    found = value_of(cfg, section, key)
    assert found == value and type(found) is type(value)


def test_the_last_override_wins(tmp_path):
    assert load_config(config_file(tmp_path, ""), ["train.epochs=2", "train.epochs=3"]).train.epochs == 3


def test_name_and_folder_of_a_run_come_from_the_file_name(tmp_path):
    cfg = load_config(config_file(tmp_path, ""))
    assert (cfg.run.name, cfg.run.dir) == ("some", "runs/some")


def test_every_key_has_a_docstring():
    text = (ROOT / "training" / "config.py").read_text(encoding="utf-8")
    for part in SECTIONS.values():
        body = text.split(f"class {part.__name__}:")[1]
        for f in fields(part):
            documented = re.search(rf'^    {f.name}: .*\n    """', body, re.M)
            assert documented, f"{part.__name__}.{f.name} has no docstring"


# --- names of earlier releases


@pytest.mark.parametrize(
    ("line", "section", "key", "value"),
    [
        ("[train]\nrecompute = true", "train", "gradient_checkpointing", True),
        ("[train]\nkeep_checkpoints = 5", "train", "save_total_limit", 5),
        ("[train]\nobjective = 'pretrain'", "data", "loss_on", "all"),
        ("[train]\nobjective = 'pretrain'", "train", "objective", "sft"),
        ("[model]\nname = 'model/tiny'", "model", "name", "assets/tiny"),
    ],
)
def test_an_old_name_works_with_a_warning_that_gives_the_new_one(tmp_path, capsys, line, section, key, value):
    cfg = load_config(config_file(tmp_path, line))
    assert value_of(cfg, section, key) == value
    said = capsys.readouterr().err
    assert "some.toml" in said and (key in said or str(value) in said)


def test_the_old_folder_of_the_samples_is_found_in_the_new_one(tmp_path, capsys):
    cfg = load_config(config_file(tmp_path, ""), ["data.train=data/samples/train.jsonl"])
    assert cfg.data.train == ["assets/samples/train.jsonl"]
    assert "assets/samples/train.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    "override, loss_on", [("data.loss_on=response", "all"), ("train.objective=sft", "response")]
)
def test_the_last_objective_decides_whether_the_old_pretrain_supervises_all(tmp_path, override, loss_on):
    """The order of the sections in the file does not matter, and --set train.objective=sft undoes it."""
    for text in (
        "[train]\nobjective = 'pretrain'\n",
        "[model]\nname = 'tiny'\n[train]\nobjective = 'pretrain'\n",
    ):
        assert load_config(config_file(tmp_path, text), [override]).data.loss_on == loss_on


def test_an_old_name_beside_the_new_one_is_an_error(tmp_path):
    said = message_of(config_file(tmp_path, "[train]\nrecompute = true\ngradient_checkpointing = false"))
    assert "train.recompute is the old name of train.gradient_checkpointing" in said


# --- the resolved config that a run writes

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
# Hypothesis also draws the constants of the code under test; a path that has moved is not written as it is.
texts = texts.filter(lambda text: not text.startswith(tuple(MOVED)))
words = texts.filter(bool)
lists = st.lists(texts, max_size=3)
flags = st.booleans()
rates = st.floats(min_value=0, max_value=1, allow_nan=False)
counts = st.integers(min_value=1, max_value=2**16)
configs = st.builds(
    Config,
    run=st.builds(Run, name=words, dir=words, seed=st.integers(-(2**40), 2**40)),
    model=st.builds(Model, name=texts, dtype=st.sampled_from(["auto", "float32", "bfloat16"])),
    adapter=st.builds(Adapter, r=counts, lora_alpha=rates, use_rslora=flags, target_modules=lists),
    data=st.builds(Data, train=lists.filter(bool), validation=lists, max_length=st.integers(2, 10**9)),
    train=st.builds(
        Train, max_steps=counts, learning_rate=rates, weight_decay=rates, shuffle=flags, device=texts
    ),
    generate=st.builds(Generate, temperature=rates, prompts=lists),
)


@given(cfg=configs)
def test_a_config_survives_the_way_through_toml(cfg, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round-trip.toml"
    path.write_text(cfg.to_toml(), encoding="utf-8", newline="")
    assert load_config(path) == cfg


def test_a_config_is_written_as_one_would_write_it():
    text = replace(Config(), run=Run(name='a "b" \\ c\n', seed=1)).to_toml()
    assert text.startswith('[run]\nname = "a \\"b\\" \\\\ c\\n"\ndir = ""\nseed = 1\n')
    assert tomllib.loads(text) == asdict(Config()) | {"run": {"name": 'a "b" \\ c\n', "dir": "", "seed": 1}}


def test_the_limits_of_an_adapter_are_those_of_lora_inject():
    highest = {name: limit for limit, names in AT_MOST.items() for name in names.split()}
    assert highest["adapter.r"] == highest["adapter.lora_alpha"] == inject.MOST

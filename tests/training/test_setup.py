"""training/setup.py: from the config to the parts of a run."""

from pathlib import Path

import pytest

from lora.inject import adapters
from lora.peft_io import save_adapter
from tests.makers import tiny_model, write_jsonl, write_run
from training import setup
from training.config import load_config
from training.documents import read
from training.precision import Precision, pick_device


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    return tmp_path


def test_an_adapter_to_start_from_brings_its_own_settings(place):
    save_adapter(tiny_model(type="dora", r=3, lora_alpha=6), place / "start", base_model_name="base")
    cfg = load_config("tiny.toml", ["adapter.init_from=start"])
    base, _ = setup.build_base(cfg, Precision("fp32", pick_device("cpu")))
    model = base.model
    setup.add_adapters(model, cfg)
    assert (cfg.adapter.type, cfg.adapter.r, cfg.adapter.lora_alpha, cfg.adapter.lora_dropout) == ("dora", 3, 6, 0.0)
    assert {layer.r for layer in adapters(model).values()} == {3}


def test_an_opening_is_shared_unless_the_key_says_otherwise(place):
    start = "the same twenty tokens "
    write_jsonl(place / "train.jsonl", [{"prompt": start + word, "response": word} for word in ("one", "two", "three")])
    shared = {}
    for overrides in ((), ("train.share_prefix=false",)):
        cfg = load_config("tiny.toml", ["train.batch_size=3", *overrides])
        _, data = read(cfg, Path(cfg.model.name))
        (batch,) = setup.build_loader(cfg, data.documents).batches(0)
        shared[overrides] = batch.num_tokens - len(batch.tokens)
    assert shared[()] >= 2 * len(start) and not shared[("train.share_prefix=false",)]

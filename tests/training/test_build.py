"""training/build.py: the parts of a run are made from its config."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.device import Precision, pick_device
from data.render import IGNORE_INDEX
from lora.inject import adapters
from lora.peft_io import save_adapter
from model.gemma3 import Gemma3ForCausalLM
from model.quantized import all_weights
from tests.folders import ROOT, ROWS
from tests.makers import needs_compiler, tiny_model, write_jsonl
from training import build
from training.config import load_config
from training.dataset import read
from training.flops import step_flops
from training.memory_estimate import MemoryTracker


def model_and_documents(cfg) -> tuple:
    files, data = read(cfg, build.make_objective(cfg), Path("base"))
    with torch.device("meta"):
        model = Gemma3ForCausalLM(files.config)
    build.add_adapters(model, cfg)
    return model, data.documents


def compiled(monkeypatch, flops: float, *overrides: str, device: str = "cpu") -> bool:
    """Returns how train.compile is resolved where a run of `flops` FLOPs or more is worth compiling."""
    monkeypatch.setattr(build, "WORTH_COMPILING", flops / torch.get_num_threads())
    cfg = load_config("tiny.toml", list(overrides))
    model, documents = model_and_documents(cfg)
    return build.resolve_compile(model, cfg, documents, torch.device(device)).train.compile


def test_an_adapter_to_start_from_brings_its_own_settings(place):
    save_adapter(tiny_model(type="dora", r=3, lora_alpha=6), place / "start", base_model_name="base")
    cfg = build.resolve_adapter(load_config("tiny.toml", ["adapter.init_from=start"]))
    model = build.load_base(cfg, Precision("fp32", pick_device("cpu")))[0].model
    build.add_adapters(model, cfg)
    found = cfg.adapter.type, cfg.adapter.r, cfg.adapter.lora_alpha, cfg.adapter.lora_dropout
    assert found == ("dora", 3, 6, 0.0)
    assert {layer.r for layer in adapters(model).values()} == {3}


def test_a_prefix_is_shared_unless_the_key_says_otherwise(place):
    start = "the same twenty tokens "
    rows = [{"prompt": start + word, "response": word} for word in ("one", "two", "three")]
    write_jsonl(place / "train.jsonl", rows)
    saved = []
    for overrides in ([], ["train.share_prefix=false"]):
        cfg = load_config("tiny.toml", ["train.batch_size=3", *overrides])
        _, data = read(cfg, build.make_objective(cfg), Path(cfg.model.name))
        (batch,) = build.build_loader(cfg, data.documents).batches(0)
        saved.append(batch.num_tokens - len(batch.tokens))
    assert saved[0] >= 2 * len(start) and saved[1] == 0


@needs_compiler
def test_auto_compiles_a_run_on_a_cpu_that_is_long_enough(place, monkeypatch):
    model, documents = model_and_documents(load_config("tiny.toml"))
    labels = [label for d in documents for label in d.labels]
    epoch = step_flops(model, len(labels), sum(label != IGNORE_INDEX for label in labels))
    assert compiled(monkeypatch, 3.99 * epoch) and not compiled(monkeypatch, 4.01 * epoch)
    assert compiled(monkeypatch, 0.24 * epoch, "train.max_steps=1")
    assert not compiled(monkeypatch, 0.26 * epoch, "train.max_steps=1")
    assert not compiled(monkeypatch, 0, device="cuda")
    assert compiled(monkeypatch, 9 * epoch, "train.compile=true")
    assert not compiled(monkeypatch, 0, "train.compile=false")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not compiled(monkeypatch, 0)


def test_a_quantized_base_is_not_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "WORTH_COMPILING", 0)
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    for quantize in ("q8_0", "nf4"):
        overrides = [f"data.train={rows}", f"model.quantize={quantize}", "data.validation=[]"]
        cfg = load_config(ROOT / "small.toml", overrides)
        base, data = build.load_base(cfg, Precision("fp32", pick_device("cpu")))
        resolved = build.resolve_compile(base.model, cfg, data.documents, torch.device("cpu"))
        assert resolved.train.compile is False
        wanted = replace(cfg, train=replace(cfg.train, compile=True))
        with pytest.raises(ValueError, match=f"compile = true.*quantize = '{quantize}'.*false, or.*'none'"):
            build.resolve_compile(base.model, wanted, data.documents, torch.device("cpu"))


def test_random_weights_for_a_plan_are_never_dense_where_the_base_is_quantized(tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    overrides = [f"data.train={rows}", "model.quantize=q8_0", "model.init=random", "data.validation=[]"]
    cfg = load_config(ROOT / "small.toml", overrides)
    with MemoryTracker("cpu") as tracker:
        base, _ = build.load_base(cfg, Precision("fp32", pick_device("cpu")))
    weights = sum(w.nbytes for w in all_weights(base.model).values())
    assert weights <= tracker.peak < 1.1 * weights


def test_a_run_that_would_compile_without_a_compiler_is_refused(place, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="train.compile = true.*no-such-compiler.*install it.*false"):
        build.prepare(load_config("tiny.toml", ["train.compile=true"]))
    build.prepare(load_config("tiny.toml"))

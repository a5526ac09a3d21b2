"""model/gguf_folder.py: the folder that stands for a GGUF file, split files, and the commands with one."""

import json
import os
from pathlib import Path

import pytest
import torch

import evaluate
import export
import train
from ggml.container import GGUFFile
from model import gguf_folder as folders
from model.config import read_config
from model.hub import TINY, resolve
from model.tokenizer import Tokenizer
from model.weights import hash_model, load_model
from tests.folders import ROOT
from tests.model.gguf_files import VAL, make_gguf, rewritten

TEXTS = [
    "Hello  world!\n\n\tx",
    "<bos> and <end_of_turn> as text",
    "日本語 é\u0301 😀 \u00a0",
    "   " * 9,
    "1234567 Straße",
    "<0x41>",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The embedded base as a GGUF file of each type."""
    folder = tmp_path_factory.mktemp("files")
    return {quant: make_gguf(folder / f"{quant}.gguf", quant) for quant in ("f32", "q8_0")}


def test_the_folder_has_config_tokenizer_and_stop_tokens_of_the_model(files):
    folder, base = resolve(str(files["f32"])), Tokenizer(TINY)
    ours, theirs = vars(read_config(folder)), vars(read_config(TINY))
    single = {key for key, value in theirs.items() if isinstance(value, float)}
    assert {k: v for k, v in ours.items() if k not in single} == {
        k: v for k, v in theirs.items() if k not in single
    }
    assert all(ours[key] == pytest.approx(theirs[key], rel=1e-7) for key in single)
    found = Tokenizer(folder)
    assert [found.encode(text) for text in TEXTS] == [base.encode(text) for text in TEXTS]
    assert [found.decode(found.encode(text)) for text in TEXTS] == [
        base.decode(base.encode(t)) for t in TEXTS
    ]
    assert (found.stop_ids, found.bos_id, found.vocab_size) == (base.stop_ids, base.bos_id, base.vocab_size)


def test_a_float32_file_loads_as_the_model_that_it_was_made_from(files):
    ours, theirs = load_model(resolve(str(files["f32"])), torch.float32), load_model(TINY, torch.float32)
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        # The file stores 1 + weight for a norm, and the sum is rounded.
        torch.testing.assert_close(q, p, rtol=0, atol=1e-6 if name.endswith("norm.weight") else 0.0)


def test_a_second_look_makes_nothing_anew_and_another_or_a_moved_file_has_its_own_folder(
    files, tmp_path, monkeypatch
):
    first = resolve(str(files["q8_0"]))
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(files["q8_0"].read_bytes())
    assert len({first, resolve(str(files["f32"])), resolve(str(moved))}) == 3
    assert hash_model(first) == hash_model(resolve(str(moved)))
    replaced = resolve(str(rewritten(files["q8_0"], moved, {"general.name": ("str", "other")})))
    assert replaced != resolve(str(files["q8_0"])) and hash_model(replaced) != hash_model(first)
    monkeypatch.setattr(folders, "GGUFFile", None)
    assert resolve(str(files["q8_0"])) == first


def test_all_parts_of_a_split_file_are_one_model_and_a_missing_part_is_named(files, tmp_path):
    file = GGUFFile(files["q8_0"])
    infos = list(file.tensors.values())
    for i, part in enumerate((infos[:5], infos[5:9], infos[9:])):
        split = {
            "split.no": ("u16", i),
            "split.count": ("u16", 3),
            "split.tensors.count": ("i32", len(infos)),
        }
        drop = () if i == 0 else tuple(file.metadata)  # The later parts have the keys of the split only.
        rewritten(files["q8_0"], tmp_path / f"m-{i + 1:05d}-of-00003.gguf", split, drop, part)
    whole = load_model(resolve(str(files["q8_0"])), torch.float32)
    for name in ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf"):
        split_model = load_model(resolve(str(tmp_path / name)), torch.float32)
        assert all(p.equal(q) for p, q in zip(whole.parameters(), split_model.parameters(), strict=True))
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(ValueError, match=r"m-00003-of-00003\.gguf is missing"):
        resolve(str(tmp_path / "m-00001-of-00003.gguf"))


def loss_of(model: str, capsys, *options: str) -> float:
    assert (
        evaluate.main(["--model", model, "--data", VAL, "--limit", "4", "--loss-only", "--json", *options])
        == 0
    )
    return json.loads(capsys.readouterr().out)["loss"]


def test_a_run_trains_on_the_blocks_of_a_file_and_its_adapter_works_on_that_file(
    files, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    base, run = str(files["q8_0"]), tmp_path / "run"
    assert loss_of(str(files["f32"]), capsys) == pytest.approx(loss_of("tiny", capsys), abs=1e-5)
    settings = {"model.name": base, "run.dir": run, "train.max_steps": 3, "train.eval_samples": 1}
    settings |= {
        "data.train": VAL,
        "data.validation": "[]",
        "generate.prompts": "[]",
        "generate.max_new_tokens": 4,
    }
    words = [w for key, value in settings.items() for w in ("--set", f"{key}={value}")]
    assert train.main(["--config", str(ROOT / "small.toml"), *words]) == 0
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in steps if "loss" in record]
    capsys.readouterr()
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert loss_of(base, capsys, "--adapter", str(run / "adapter")) < loss_of(base, capsys)
    out = tmp_path / "lora.gguf"
    assert export.main(["--run", str(run), "--to", "gguf-lora", "--out", str(out)]) == 0
    assert GGUFFile(out).metadata["general.type"] == "adapter"


def test_the_cache_is_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folders.cache() == tmp_path / "loupe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folders.cache() == Path(os.path.expanduser("~")) / ".cache" / "loupe"

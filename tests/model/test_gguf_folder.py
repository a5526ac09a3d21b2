"""model/gguf_folder.py: the folder that stands for a GGUF file, split files, and the commands with one."""

import json
import os
import subprocess
import sys
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
from tests.folders import ROOT, make_model
from tests.model.gguf_files import VAL, loaded, make_gguf, refused, rewritten

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


def split(source: Path, folder: Path, shares: list[slice]) -> list[Path]:
    """Writes a file in parts as llama-gguf-split does, with the tensors of a share in each.

    The first part has all keys and the others those of the split only. With --no-tensor-first-split the first
    part has no tensor. Source: llama.cpp, tools/gguf-split/gguf-split.cpp.
    """
    file, paths = GGUFFile(source), []
    infos = list(file.tensors.values())
    for i, share in enumerate(shares):
        keys = {"split.no": ("u16", i), "split.count": ("u16", len(shares))}
        keys |= {"split.tensors.count": ("i32", len(infos))}
        paths.append(folder / f"m-{i + 1:05d}-of-{len(shares):05d}.gguf")
        rewritten(source, paths[-1], keys, tuple(file.metadata) if i else (), infos[share])
    return paths


THREE = [slice(0, 5), slice(5, 9), slice(9, None)]
NONE_IN_THE_FIRST = [slice(0, 0), slice(0, 9), slice(9, None)]


@pytest.mark.parametrize("shares", [THREE, NONE_IN_THE_FIRST, [slice(None)]])
def test_all_parts_of_a_split_file_are_one_model_whichever_is_named(files, tmp_path, shares):
    whole = load_model(resolve(str(files["q8_0"])), torch.float32)
    for part in split(files["q8_0"], tmp_path, shares):
        model = load_model(resolve(str(part)), torch.float32)
        assert all(p.equal(q) for p, q in zip(whole.parameters(), model.parameters(), strict=True))


def test_a_missing_part_is_named(files, tmp_path, capsys):
    paths = split(files["q8_0"], tmp_path, THREE)
    paths[2].unlink()
    for path in paths[:2]:
        said = refused(capsys, loaded(path))
        assert f"{path}: m-00003-of-00003.gguf is missing beside it; download all 3 parts" in said
    paths[1].unlink()
    assert f"{paths[0]}: m-00002-of-00003.gguf and 1 more is missing" in refused(capsys, loaded(paths[0]))


def test_a_part_of_another_file_is_refused(files, tmp_path, capsys):
    paths = split(files["q8_0"], tmp_path, THREE)
    paths[2].write_bytes(paths[1].read_bytes())
    assert "m-00001-of-00003.gguf: split.tensors.count is" in refused(capsys, loaded(paths[0]))
    split(files["q8_0"], tmp_path, [THREE[0], THREE[2], THREE[1]])
    (tmp_path / "m-00002-of-00003.gguf").rename(tmp_path / "x")
    (tmp_path / "m-00003-of-00003.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "x").rename(tmp_path / "m-00003-of-00003.gguf")
    assert "m-00002-of-00003.gguf: split.no is 2 and must be 1" in refused(capsys, loaded(paths[0]))


def test_a_part_under_another_name_is_refused(files, tmp_path, capsys):
    path = split(files["q8_0"], tmp_path, THREE)[0].rename(tmp_path / "whole.gguf")
    assert f"{path}: split.count is 3 and must be 1" in refused(capsys, loaded(path))


def test_the_head_of_a_split_file_may_be_in_a_later_part(tmp_path):
    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    whole = make_gguf(tmp_path / "x.gguf", "f32", base)
    last = list(GGUFFile(whole).tensors).index("output.weight")
    path = split(whole, tmp_path, [slice(0, last), slice(last, None)])[0]
    model = load_model(resolve(str(path)), torch.float32)
    assert model.lm_head.weight.equal(load_model(base, torch.float32).lm_head.weight)


@pytest.mark.parametrize("cache", ["file", "file/below"])
def test_a_cache_that_cannot_be_written_is_one_error_with_the_remedy(
    files, tmp_path, capsys, monkeypatch, cache
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    said = refused(capsys, loaded(files["q8_0"]))
    assert f"{tmp_path / cache}" in said and "cannot be written" in said and "set XDG_CACHE_HOME to" in said


def test_a_full_disk_is_the_same_error_and_leaves_nothing(files, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert "No space left on device" in refused(capsys, loaded(files["q8_0"]))
    assert list((tmp_path / "loupe" / "gguf").iterdir()) == []
    assert loaded(files["q8_0"]) == 0


KILLED = """
import json, os, sys
from pathlib import Path
from model import gguf_folder
gguf_folder.json.dumps = lambda *_, **__: os.kill(os.getpid(), 9)
gguf_folder.gguf_folder(Path(sys.argv[1]))
"""


def test_a_killed_build_leaves_no_half_folder(files, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert subprocess.run([sys.executable, "-c", KILLED, files["q8_0"]], cwd=ROOT).returncode == -9
    assert not list((tmp_path / "loupe" / "gguf").glob("[!.]*"))
    folder = resolve(str(files["q8_0"]))
    names = "config.json generation_config.json model.gguf tokenizer.json tokenizer_config.json".split()
    assert sorted(path.name for path in folder.iterdir()) == names


def test_two_processes_that_open_a_file_at_the_same_time_get_one_folder(files, tmp_path, monkeypatch):
    """As torchrun's do: while one makes the folder, the other begins and finishes."""
    write, first = json.dumps, []

    def after_another(*args, **settings):
        monkeypatch.setattr(json, "dumps", write)
        first.append(resolve(str(files["q8_0"])))
        return write(*args, **settings)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(json, "dumps", after_another)
    assert [resolve(str(files["q8_0"]))] == first
    assert list((tmp_path / "loupe" / "gguf").iterdir()) == first


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

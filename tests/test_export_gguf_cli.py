"""export.py as a user runs it for llama.cpp, Ollama and Docker Model Runner."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import export
import exporting.gguf_model
import exporting.lora_gguf
from exporting.registry import is_reference
from exporting.verify import POSITIONS
from ggml.container import GGUFFile
from ggml.quantize import FILE_TYPES
from model.tokenizer import Tokenizer
from tests.exporting.registry_server import PASSWORD, USER, registry
from tests.folders import ROWS, make_adapter, make_model, write_rows
from training.config import Config, Data, Model, Run


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return make_model(tmp_path_factory.mktemp("base"), max_position_embeddings=512)


def make_run(folder, base) -> str:
    """A finished run with validation rows, in the shape that train.py leaves it."""
    from model.weights import hash_model

    folder.mkdir()
    data = Data(train=["rows.jsonl"], validation=[write_rows(folder / "val.jsonl", ROWS)])
    cfg = Config(model=Model(name=base), run=Run(name="my-run"), data=data)
    (folder / "config.toml").write_text(cfg.to_toml())
    manifest = {
        "base_sha256": hash_model(base),
        "data_sha256": {"data/rows.jsonl": "ab12"},
        "before": {"val": {"loss": 2.5}},
        "after": {"val": {"loss": 0.25}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    make_adapter(folder / "adapter", base)
    return str(folder)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_lora_file_with_numbers_that_are_none_is_refused(tmp_path, base, adapter, capsys, number):
    broken = shutil.copytree(adapter, tmp_path / "broken") / "adapter_model.safetensors"
    tensors = load_file(broken)
    name = next(name for name in tensors if "layers.3.mlp.up_proj.lora_B" in name)
    save_file(tensors | {name: tensors[name] * number}, broken)
    out = tmp_path / "x.gguf"
    assert (
        export.main(
            ["--model", base, "--adapter", str(broken.parent), "--to", "gguf-lora", "--out", str(out)]
        )
        == 2
    )
    assert "up_proj.lora_B.weight: has an infinity or NaN" in capsys.readouterr().err and not out.exists()


def test_a_lora_file_is_read_back_before_it_gets_its_name(tmp_path, base, adapter, capsys, monkeypatch):
    def write(part, *args):
        digests, raw = write_gguf(part, *args), bytearray(part.read_bytes())
        raw[-100] ^= 1
        part.write_bytes(raw)
        return digests

    write_gguf = exporting.lora_gguf.write_gguf
    monkeypatch.setattr(exporting.lora_gguf, "write_gguf", write)
    assert (
        export.main(
            ["--model", base, "--adapter", adapter, "--to", "gguf-lora", "--out", str(tmp_path / "x.gguf")]
        )
        == 1
    )
    assert "bytes on the disk differ" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_types_offered_are_the_types_there_are():
    assert set(export.QUANTS) == set(FILE_TYPES)


def test_a_runs_file_carries_its_origin_and_is_compared_on_its_own_validation_data(
    tmp_path, base, capsys, monkeypatch
):
    seen = []
    verify = exporting.gguf_model.verify
    monkeypatch.setattr("exporting.gguf_model.verify", lambda *args: seen.append(args[3]) or verify(*args))
    assert (
        export.main(
            [
                "--run",
                make_run(tmp_path / "run", base),
                "--to",
                "gguf",
                "--quant",
                "q8_0",
                "--out",
                str(tmp_path / "x.gguf"),
            ]
        )
        == 0
    )
    keys = GGUFFile(tmp_path / "x.gguf").metadata
    assert (
        keys["loupe.run"] == "my-run"
        and keys["loupe.data_sha256"] == "rows.jsonl=ab12"
        and "loss" in keys["loupe.measures"]
    )
    assert {
        "loupe.version",
        "loupe.base_sha256",
        "loupe.adapter_sha256",
        "loupe.config",
    } <= keys.keys() and keys["loupe.verified"] == "yes"
    assert ROWS[0]["response"] in seen[0].texts and 20 < len(seen[0].positions) <= POSITIONS
    assert "file against adapter" in capsys.readouterr().out


def test_validation_data_that_has_gone_is_told_and_does_not_stop_the_export(tmp_path, base, capsys):
    run = make_run(tmp_path / "run", base)
    (tmp_path / "run" / "val.jsonl").unlink()
    assert export.main(["--run", run, "--to", "gguf", "--out", str(tmp_path / "x.gguf")]) == 0
    err = capsys.readouterr().err
    assert (
        "compared on a built-in sentence" in err
        and "val.jsonl: cannot be read: No such file" in err
        and len(err.splitlines()) == 1
    )


def test_an_earlier_file_is_replaced_by_force_only(tmp_path, base, capsys):
    words = ["--model", base, "--to", "gguf", "--quant", "f16", "--out", str(tmp_path / "x.gguf")]
    assert export.main(words) == 0
    before = (tmp_path / "x.gguf").stat().st_ino
    assert (
        export.main(words) == 2
        and "--force" in capsys.readouterr().err
        and (tmp_path / "x.gguf").stat().st_ino == before
    )
    assert export.main([*words, "--force"]) == 0 and (tmp_path / "x.gguf").stat().st_ino != before
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_ollama_gets_a_folder_with_both_files(tmp_path, base, adapter, capsys):
    assert (
        export.main(
            [
                "--model",
                base,
                "--adapter",
                adapter,
                "--to",
                "ollama",
                "--quant",
                "Q8_0",
                "--out",
                str(tmp_path / "my pii.v2"),
            ]
        )
        == 0
    )
    folder = tmp_path / "my pii.v2"
    assert {p.name for p in folder.iterdir()} == {"model.gguf", "Modelfile"} and "FROM ./model.gguf" in (
        folder / "Modelfile"
    ).read_text()
    assert (
        f"ollama create 'my pii.v2' -f '{folder}/Modelfile'" in capsys.readouterr().out
    )  # as a shell wants it
    assert GGUFFile(folder / "model.gguf").metadata["general.name"] == "my pii.v2"


def test_an_image_layout_holds_the_gguf_under_its_digest(tmp_path, base, adapter, capsys):
    words = [
        "--model",
        base,
        "--adapter",
        adapter,
        "--to",
        "oci",
        "--quant",
        "q8_0",
        "--out",
        str(tmp_path / "layout"),
    ]
    assert export.main(words) == 0
    digest = json.loads((tmp_path / "layout" / "index.json").read_text())["manifests"][0]["digest"]
    assert digest in capsys.readouterr().out
    blobs = tmp_path / "layout" / "blobs" / "sha256"
    manifest = json.loads((blobs / digest[7:]).read_text())
    config = json.loads((blobs / manifest["config"]["digest"][7:]).read_text())
    assert (
        config["config"]["quantization"] == "MOSTLY_Q8_0"
        and config["config"]["gguf"]["loupe.verified"] == "yes"
    )
    file = GGUFFile(blobs / manifest["layers"][0]["digest"][7:])
    assert len(file.tensors) == 7 * 13 + 2 and {p.name for p in (tmp_path / "layout").iterdir()} == {
        "oci-layout",
        "index.json",
        "blobs",
    }
    assert export.main([*words, "--force"]) == 0  # an earlier layout is replaced


@pytest.mark.parametrize(("words", "size"), [([], 512), (["--context-size", "100"], 100)])
def test_docker_model_runner_is_told_the_context_size(tmp_path, base, words, size):
    options = ["--model", base, "--to", "oci", "--no-verify", "--out", str(tmp_path / "layout"), *words]
    assert export.main(options) == 0
    blobs = (tmp_path / "layout" / "blobs" / "sha256").iterdir()
    (config,) = (raw for raw in map(Path.read_bytes, blobs) if raw.startswith(b'{"config"'))
    assert json.loads(config)["config"]["context_size"] == size


def test_a_context_size_beyond_the_models_positions_is_refused(tmp_path, base, capsys):
    words = ["--model", base, "--to", "oci", "--context-size", "513", "--out", str(tmp_path / "layout")]
    assert export.main(words) == 2 and list(tmp_path.iterdir()) == []
    assert "--context-size 513: the model has 512 positions" in capsys.readouterr().err


def test_a_stop_token_that_a_gguf_cannot_name_is_told(tmp_path, base, capsys):
    folder = shutil.copytree(base, tmp_path / "base")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 50]}')
    words = ["--to", "gguf", "--no-verify", "--out", str(tmp_path / "x.gguf")]
    assert export.main(["--model", str(folder), *words]) == 0
    piece = Tokenizer(folder).piece(50)
    assert f"cannot say that {piece!r} ends an answer" in capsys.readouterr().err


def test_a_tag_in_a_registry_is_pushed_to_and_nothing_is_left_here(tmp_path, base, capsys, monkeypatch):
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("LOUPE_REGISTRY_USER", USER)
    with registry(auth="basic") as state:
        words = [
            "--model",
            base,
            "--to",
            "oci",
            "--quant",
            "q8_0",
            "--out",
            f"127.0.0.1:{state.port}/me/model:v1",
        ]
        monkeypatch.setenv("LOUPE_REGISTRY_PASSWORD", "wrong")
        assert (
            export.main(words) == 2
            and len(capsys.readouterr().err.strip().splitlines()) == 1
            and not state.manifests
        )
        monkeypatch.setenv("LOUPE_REGISTRY_PASSWORD", PASSWORD)
        assert export.main(words) == 0 and "digest sha256:" in capsys.readouterr().out
        assert "v1" in state.manifests and any(raw[:4] == b"GGUF" for raw in state.blobs.values())
        assert any(
            raw.startswith(b'{"config"') and json.loads(raw)["config"]["gguf"]["general.name"] == "model"
            for raw in state.blobs.values()
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "remote"),
    [
        ("out/layout", False),
        ("./a:b/c", False),
        ("/tmp/x", False),
        ("..", False),
        ("localhost:5000/x", True),
        ("ghcr.io/me/pii", True),
        ("me/pii:v1", True),
        ("localhost/me/x:1", True),
        ("tests", False),
        ("/tmp/a:b", False),
        ("./a:b", False),
        ("../pii.v2/x:1", False),
    ],
)
def test_a_registry_is_told_from_a_folder_as_docker_does(out, remote):
    assert is_reference(out) == remote


@pytest.mark.parametrize(
    "words",
    [
        ["--to", "peft", "--quant", "q8_0"],
        ["--to", "safetensors", "--quant", "q8_0"],
        ["--to", "gguf", "--context-size", "64"],
        ["--to", "oci", "--context-size", "0"],
        ["--to", "gguf-lora", "--no-verify"],
        ["--to", "gguf", "--quant", "q3"],
        ["--to", "gguf", "--no-verify", "--verify", "llama.cpp"],
    ],
)
def test_an_option_that_does_not_belong_is_exit_code_2(capsys, words):
    with pytest.raises(SystemExit) as end:
        export.main(["--model", "tiny", "--out", "x", *words])
    assert end.value.code == 2 and "usage:" in capsys.readouterr().err


def test_a_model_that_llama_cpp_cannot_hold_is_refused_with_the_remedy(tmp_path, capsys):
    base = make_model(tmp_path / "base", query_pre_attn_scalar=64)
    assert export.main(["--model", base, "--to", "gguf", "--out", str(tmp_path / "x.gguf")]) == 2
    assert "--to safetensors" in capsys.readouterr().err and not (tmp_path / "x.gguf").exists()

"""The embedded base as a GGUF file, with other keys or tensors, and what a command says of such a file."""

from pathlib import Path

import numpy as np

import evaluate
import export
from ggml.container import GGUFFile, TensorInfo, write_gguf
from tests.folders import ROOT

VAL = str(ROOT / "assets" / "samples" / "val.jsonl")


def make_gguf(path: Path, quant: str, model: str = "tiny") -> Path:
    """Exports a model to a GGUF file."""
    words = ["--model", model, "--to", "gguf", "--quant", quant, "--no-verify", "--out", str(path)]
    assert export.main(words) == 0
    return path


def rewritten(source: Path, path: Path, changes: dict | None = None, drop: tuple = (), tensors=None) -> Path:
    """Writes a GGUF file again with other metadata ({key: (type, value)}), or with some of its tensors."""
    file = GGUFFile(source)
    metadata = {k: (file.kinds[k], v) for k, v in file.metadata.items() if k not in drop} | (changes or {})
    infos = list(file.tensors.values()) if tensors is None else tensors
    write_gguf(path, metadata, infos, lambda name: [np.asarray(file.data(name))])
    return path


def reshaped(source: Path, path: Path, name: str, new: TensorInfo) -> Path:
    """Writes a file again in which another entry stands for the tensor `name`, with the same bytes."""
    file = GGUFFile(source)
    infos = [new if t.name == name else t for t in file.tensors.values()]
    metadata = {k: (file.kinds[k], v) for k, v in file.metadata.items()}
    write_gguf(path, metadata, infos, lambda n: [np.asarray(file.data(name if n == new.name else n))])
    return path


def refused(capsys, code: int) -> str:
    """Returns the message of a command that must end with 2: one line, and no traceback."""
    said = capsys.readouterr().err
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def loaded(path: Path) -> int:
    """Returns the exit code of a command that reads header and weights."""
    return evaluate.main(["--model", str(path), "--data", VAL, "--limit", "1", "--loss-only"])

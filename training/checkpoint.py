"""Checkpoints that are whole or not there, and continue to the same bits.

    checkpoints/step-00000120/
        tensors.safetensors    trained weights, optimiser and RNG states
        state.json             counters, optimiser settings, scaler, fingerprint of config, data and base
        SHA256SUMS             of these two, for us and for `sha256sum -c`

A checkpoint is written under a temporary name, flushed to the disk, and renamed: after a crash at any moment
the last whole one is there.
"""

import json
import random
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.files import recover, replacing, sha256

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"


def capture(weights: dict[str, torch.Tensor], optimizers, scaler) -> tuple[dict[str, torch.Tensor], dict]:
    """Everything that the next step depends on but the data, as named tensors and JSON: weights, optimisers,
    scaler, every RNG.
    """
    tensors = {f"weights/{n}": p.detach() for n, p in weights.items()}
    settings = []
    for i, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        settings.append(state["param_groups"])
        for index, entries in state["state"].items():
            tensors |= {f"optimizer/{i}/{index}/{k}": torch.as_tensor(v) for k, v in entries.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    return tensors, {
        "optimizers": settings,
        "scaler": scaler.state_dict(),
        "python_rng": [version, list(numbers), gauss],
    }


def restore(
    tensors: dict[str, torch.Tensor], state: dict, weights: dict[str, torch.Tensor], optimizers, scaler
) -> None:
    """The reverse of capture, in place."""
    with torch.no_grad():
        for n, p in weights.items():
            p.copy_(tensors[f"weights/{n}"])
    for i, optimizer in enumerate(optimizers):
        entries: dict[int, dict] = {}
        for name, tensor in tensors.items():
            kind, *rest = name.split("/")
            if kind == "optimizer" and rest[0] == str(i):
                entries.setdefault(int(rest[1]), {})[rest[2]] = tensor
        optimizer.load_state_dict({"state": entries, "param_groups": state["optimizers"][i]})
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(tensors["rng/cpu"])
    if torch.cuda.is_available() and "rng/cuda0" in tensors:
        torch.cuda.set_rng_state_all(
            [tensors[f"rng/cuda{i}"] for i in range(torch.cuda.device_count()) if f"rng/cuda{i}" in tensors]
        )
    version, numbers, gauss = state["python_rng"]
    random.setstate((version, tuple(numbers), gauss))


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Writes folder/step-N whole or not at all, then removes all but the `keep` newest; an OSError (a full
    disk) leaves the old ones as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    final = folder / f"step-{step:08d}"
    try:
        with replacing(final) as part:
            part.mkdir()
            _write(part, tensors, {**state, "step": step})
    except SafetensorError as e:  # safetensors raises its own exception on a full disk
        raise OSError(str(e)) from e
    kept = [p for p in checkpoints(folder) if p <= final][
        -keep:
    ]  # later ones were damaged: the run went back behind them
    for old in set(checkpoints(folder)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(folder: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    (folder / SUMS).write_text(
        "".join(f"{sha256(folder / name)}  {name}\n" for name in (TENSORS, STATE)), encoding="utf-8"
    )


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first; leftovers of killed saves are no checkpoints."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def clean(folder: Path) -> None:
    """Removes what killed saves left, and restores a checkpoint that one of them was about to replace."""
    for left in folder.glob(".step-*"):
        recover(folder / left.stem.removeprefix("."))


def load_newest(folder: Path, warn) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest checkpoint that is whole; a damaged one is named through `warn` and the one before it is
    tried. None if there is none.

    Raises ValueError where checkpoints exist and all are damaged: starting anew without a word would hide the
    loss.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        problem = _damage(path)
        if problem is None:
            return load_file(path / TENSORS), json.loads((path / STATE).read_text(encoding="utf-8"))
        warn(f"{problem}; trying the checkpoint before it")
    if found:
        raise ValueError(
            f"{folder}: all {len(found)} checkpoints are damaged; remove the folder to start anew"
        )
    return None


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, the first of them named; None where each has the SHA-256 that
    was noted.
    """
    file = path / SUMS
    try:
        wanted = {
            name: digest
            for digest, _, name in (
                line.partition("  ") for line in file.read_text(encoding="utf-8").splitlines()
            )
        }
        for name in (TENSORS, STATE):
            file = path / name
            if sha256(file) != wanted.get(name):
                return f"{file} is damaged: its SHA-256 is not the one noted in {SUMS}"
    except (OSError, UnicodeDecodeError) as e:
        return f"{file} cannot be read ({e})"
    return None

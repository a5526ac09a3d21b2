"""Checkpoints that are whole or not there, and continue to the same bits.

    checkpoints/step-00000120/
        tensors.safetensors    trained weights, optimiser and RNG states
        state.json             counters, optimiser settings, scaler, fingerprint of config, data and base; SHA-256 of tensors.safetensors

A checkpoint is written under a temporary name, flushed to the disk, and renamed: after a crash at any moment the last whole one is there.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import torch

TEMPORARY = ".partial-"


def capture(weights: dict[str, torch.Tensor], optimizers, scaler) -> tuple[dict[str, torch.Tensor], dict]:
    """Everything that the next step depends on but the data, as named tensors and JSON: weights, optimisers, scaler, every RNG."""
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
    return tensors, {"optimizers": settings, "scaler": scaler.state_dict(), "python_rng": [version, list(numbers), gauss]}


def restore(tensors: dict[str, torch.Tensor], state: dict, weights: dict[str, torch.Tensor], optimizers, scaler) -> None:
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
        torch.cuda.set_rng_state_all([tensors[f"rng/cuda{i}"] for i in range(torch.cuda.device_count()) if f"rng/cuda{i}" in tensors])
    version, numbers, gauss = state["python_rng"]
    random.setstate((version, tuple(numbers), gauss))


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Writes folder/step-N whole or not at all, then removes all but the `keep` newest; an OSError (a full disk) leaves the old ones as they are."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"step-{step:08d}", folder / f"{TEMPORARY}step-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial / "tensors.safetensors")
        _sync(partial / "tensors.safetensors")
        state = {**state, "step": step, "sha256": file_hash(partial / "tensors.safetensors")}
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        _sync(partial / "state.json")
        _sync(partial)
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in `folder`, oldest first; leftovers of killed saves are no checkpoints."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def clean(folder: Path) -> None:
    """Removes what killed saves left."""
    for p in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(p, ignore_errors=True)


def load_newest(folder: Path, warn) -> tuple[dict[str, torch.Tensor], dict] | None:
    """The newest checkpoint that is whole; a damaged one is named through `warn` and the one before it is tried.  None if there is none.

    Raises ValueError where checkpoints exist and all are damaged: starting anew without a word would hide the loss.
    """
    from safetensors.torch import load_file

    found = checkpoints(folder)
    for path in reversed(found):
        problem = _damage(path)
        if problem is None:
            return load_file(path / "tensors.safetensors"), json.loads((path / "state.json").read_text(encoding="utf-8"))
        warn(f"{problem}; trying the checkpoint before it")
    if found:
        raise ValueError(f"{folder}: all {len(found)} checkpoints are damaged; remove the folder to start anew")
    return None


def _damage(path: Path) -> str | None:
    try:
        wanted = json.loads((path / "state.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"{path / 'state.json'} is damaged ({e})"
    try:
        found = file_hash(path / "tensors.safetensors")
    except OSError as e:
        return f"{path / 'tensors.safetensors'} cannot be read ({e})"
    return None if found == wanted else f"{path / 'tensors.safetensors'} is damaged (its SHA-256 is not the one noted)"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Waits until a file or a folder's entries are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

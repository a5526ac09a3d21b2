"""Checkpoints from which a run continues to the same bits.

    checkpoints/step-00000120/
        tensors.safetensors    trainable parameters, optimizer and RNG states
        state.json             counters, optimizer settings, scaler, fingerprint of config, data and base
        SHA256SUMS             of these two files, also for `sha256sum -c`

A checkpoint is written under a temporary name, flushed to the disk, and renamed. So the newest complete one
survives a crash at any moment.
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
    """Returns all that the next step depends on besides the data, as named tensors and as JSON values."""
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
    """Sets weights, optimizers, scaler and RNGs to what `capture` returned."""
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
    for i in range(torch.cuda.device_count()):
        if f"rng/cuda{i}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng/cuda{i}"], i)
    version, numbers, gauss = state["python_rng"]
    random.setstate((version, tuple(numbers), gauss))


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int) -> Path:
    """Writes folder/step-N and then removes all but the `keep` newest checkpoints.

    Raises OSError, on a full disk for example, and leaves the earlier checkpoints as they are.
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
    # Later ones were damaged; the run went back to an earlier one.
    kept = [p for p in checkpoints(folder) if p <= final][-keep:]
    for old in set(checkpoints(folder)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(folder: Path, tensors: dict[str, torch.Tensor], state: dict) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    sums = "".join(f"{sha256(folder / name)}  {name}\n" for name in (TENSORS, STATE))
    (folder / SUMS).write_text(sums, encoding="utf-8")


def checkpoints(folder: Path) -> list[Path]:
    """Returns the finished checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def clean(folder: Path) -> None:
    """Removes what a killed save left, and restores the checkpoint that it was about to replace."""
    for left in folder.glob(".step-*"):
        recover(folder / left.stem.removeprefix("."))


def load_newest(folder: Path, warn) -> tuple[dict[str, torch.Tensor], dict] | None:
    """Returns tensors and state of the newest undamaged checkpoint, or None if there is no checkpoint.

    `warn` is called for each damaged one. Raises ValueError if all are damaged, because a new start would
    hide the loss.
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
    """Returns what is wrong with the first file whose SHA-256 is not the noted one, or None."""
    file = path / SUMS
    try:
        lines = [line.partition("  ") for line in file.read_text(encoding="utf-8").splitlines()]
        wanted = {name: digest for digest, _, name in lines}
        for name in (TENSORS, STATE):
            file = path / name
            if sha256(file) != wanted.get(name):
                return f"{file} is damaged: its SHA-256 is not the one noted in {SUMS}"
    except (OSError, UnicodeDecodeError) as e:
        return f"{file} cannot be read ({e})"
    return None

"""Checkpoints. A run that continues from one computes the same bits as a run that was not interrupted.

    checkpoints/step-00000120/
        tensors.safetensors    trainable parameters, optimizer and RNG states
        state.json             counters, optimizer settings, fp16 loss scaler, config keys, hashes of inputs
        best/                  a copy of adapter/ or model/, the best weights so far, if there are any
        SHA256SUMS             SHA-256 of all these files, in the format of `sha256sum -c`

A checkpoint is written under a temporary name, flushed to the disk, and then renamed. If the program or the
machine crashes, earlier checkpoints are whole.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.device import LossScaler
from common.files import clean, replacing, sha256
from training.optim import Optimizers

Tensors = dict[str, torch.Tensor]
TENSORS, STATE, SUMS, BEST = "tensors.safetensors", "state.json", "SHA256SUMS", "best"


def capture(weights: Tensors, optimizers: Optimizers, scaler: LossScaler) -> tuple[Tensors, dict]:
    """Returns weights and states of optimizers, scaler and random generators: tensors, and JSON values."""
    tensors = {f"weights/{n}": p.detach() for n, p in weights.items()}
    settings = []
    for i, optimizer in enumerate(optimizers):
        saved = optimizer.state_dict()
        settings.append(saved["param_groups"])
        for index, entries in saved["state"].items():
            tensors |= {f"optimizer/{i}/{index}/{k}": torch.as_tensor(v) for k, v in entries.items()}
    tensors["rng/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors |= {f"rng/cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, gauss = random.getstate()
    state = {"optimizers": settings, "scaler": scaler.state_dict()}
    return tensors, state | {"python_rng": [version, list(numbers), gauss]}


def restore(
    tensors: Tensors, state: dict, weights: Tensors, optimizers: Optimizers, scaler: LossScaler
) -> None:
    """Copies `tensors` and `state` of `capture` into weights, optimizers, scaler and random generators."""
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


def save(folder: Path, step: int, tensors: Tensors, state: dict, keep: int, best: Path | None = None) -> Path:
    """Writes the checkpoint folder/step-<step>, removes all but the `keep` newest, and returns its path.

    `best` is the folder of the best weights, which is copied into the checkpoint.
    Raises OSError if it cannot be written, for example on a full disk; earlier checkpoints stay unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    final = folder / f"step-{step:08d}"
    try:
        with replacing(final) as part:
            part.mkdir()
            _write(part, tensors, {**state, "step": step}, best)
    except SafetensorError as e:  # safetensors raises its own exception on a full disk
        raise OSError(str(e)) from e
    # Checkpoints of later steps are damaged: the run went back to an earlier one.
    kept = [p for p in checkpoints(folder) if p <= final][-keep:]
    for old in set(checkpoints(folder)) - set(kept):
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(folder: Path, tensors: Tensors, state: dict, best: Path | None) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / TENSORS)
    (folder / STATE).write_text(json.dumps(state), encoding="utf-8")
    names = [TENSORS, STATE]
    if best:
        shutil.copytree(best, folder / BEST, ignore=shutil.ignore_patterns(".*"))
        names += sorted(f"{BEST}/{p.name}" for p in (folder / BEST).iterdir())
    sums = "".join(f"{sha256(folder / name)}  {name}\n" for name in names)
    (folder / SUMS).write_text(sums, encoding="utf-8")


def checkpoints(folder: Path) -> list[Path]:
    """Returns the paths of the complete checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def load_newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, Tensors, dict] | None:
    """Returns path, tensors and state of the newest undamaged checkpoint, or None if there is no checkpoint.

    Calls `warn` with a message for each damaged checkpoint. Raises ValueError if all are damaged.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        problem = _damage(path)
        if problem is None:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            return path, load_file(path / TENSORS), state
        warn(f"{problem}; trying the checkpoint before it")
    if found:
        raise ValueError(
            f"{folder}: all {len(found)} checkpoints are damaged; remove the folder to start anew"
        )
    return None


def restore_best(path: Path, folder: Path) -> list[str]:
    """Makes `folder` (adapter/ or model/) what it was at the checkpoint in `path`, if that has best weights.

    Returns the names of the files that are written anew, because their SHA-256 is not the checkpoint's.
    """
    wanted = {name.removeprefix(f"{BEST}/"): d for name, d in _sums(path).items() if name.startswith(BEST)}
    changed = [n for n, d in wanted.items() if not (folder / n).is_file() or sha256(folder / n) != d]
    folder.mkdir(exist_ok=True)
    for name in changed:
        with replacing(folder / name) as part:
            shutil.copyfile(path / BEST / name, part)
    return changed


def _sums(path: Path) -> dict[str, str]:
    """Returns {file name: SHA-256} of a checkpoint."""
    lines = (path / SUMS).read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _damage(path: Path) -> str | None:
    """Returns a message about the first file that does not match its SHA-256 in SHA256SUMS, or None."""
    file = path / SUMS
    try:
        wanted = _sums(path)
        for name in {TENSORS: "", STATE: ""} | wanted:
            file = path / name
            if sha256(file) != wanted.get(name):
                return f"{file} is damaged: its SHA-256 is not the one noted in {SUMS}"
    except (OSError, UnicodeDecodeError) as e:
        return f"{file} cannot be read ({e})"
    return None

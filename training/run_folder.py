"""Creates and locks the folder of a run, and compares config and input files when a run is resumed."""

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path

from common.errors import listed
from common.files import clean, lock, read_json, replacing
from common.progress import say
from report.metrics_log import MetricsLog, plain
from training.config import FREE, Config

VERSION = "0.1.0"
LENGTH = ("train.epochs: ", "train.max_steps: ")


class RunFolder:
    """The folder runs/<name> of a training run. One process holds its lock until it ends."""

    def __init__(self, cfg: Config, resume: bool):
        """Creates or opens the folder and locks it. An older run in it stays there until `begin` is called.

        Raises ValueError if another process holds the lock, if there is no run to resume, or if the folder
        cannot be written, holds files that no run wrote, or holds input files of this run.
        """
        self.path = Path(cfg.run.dir)
        self.checkpoints = self.path / "checkpoints"
        if resume and not (self.path / "config.toml").is_file():
            raise ValueError(f"{self.path}: no run to resume here; start it without --resume")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not resume:
                self._refuse_foreign()
            self._lock()
            self._replaces = not resume and self._holds_a_run()
            if self._replaces:
                self._refuse_own_input(cfg)
            for folder in (self.path, self.checkpoints, self.path / "adapter", self.path / "model"):
                clean(folder)  # what a killed process left
            self.metrics = MetricsLog(self.path / "metrics.jsonl")
        except OSError as e:
            raise self._unwritable(e) from None

    def begin(self, cfg: Config) -> None:
        """Renames the folder of an older run, if there is one, and writes config.toml into the new folder."""
        try:
            if self._replaces:
                self.metrics.close()
                self._move_aside()
                self.metrics = MetricsLog(self.path / "metrics.jsonl")
                self._replaces = False
            self.write_config(cfg)
        except OSError as e:
            raise self._unwritable(e) from None

    def write_config(self, cfg: Config) -> None:
        """Writes config.toml, whole or not at all: a resume reads it."""
        with replacing(self.path / "config.toml") as part:
            part.write_text(cfg.to_toml(), encoding="utf-8")

    def write_json(self, name: str, value: dict) -> None:
        """Writes `value` to the JSON file `name`, whole or not at all."""
        text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
        with replacing(self.path / name) as part:
            part.write_text(text + "\n", encoding="utf-8")

    def write_jsonl(self, name: str, rows: Iterable[dict]) -> None:
        """Writes the JSONL file `name`, one row a line, whole or not at all."""
        lines = [json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
        with replacing(self.path / name) as part:
            part.write_text("".join(lines), encoding="utf-8", errors="replace")

    def read_json(self, name: str) -> dict | None:
        path = self.path / name
        return read_json(path, "remove it, to have it made anew") if path.is_file() else None

    def _unwritable(self, e: OSError) -> ValueError:
        return ValueError(f"{self.path}: cannot be written ({e.strerror}); set run.dir to a folder that can")

    def _holds_a_run(self) -> bool:
        """Returns whether the folder has a log of steps, weights or checkpoints of an older run."""
        log = self.path / "metrics.jsonl"
        logged = log.is_file() and log.stat().st_size > 0
        return logged or any((self.path / n).exists() for n in ("adapter", "model", "checkpoints"))

    def _refuse_foreign(self) -> None:
        """Raises ValueError if the folder is the cwd or above it, or has files but no .lock of a run."""
        names = sorted(p.name for p in self.path.iterdir())
        problem = ""
        if names and not (self.path / ".lock").exists():
            problem = f"holds {names[0]}, but no run of Loupe's"
        if self.path.resolve() in (Path.cwd(), *Path.cwd().parents):
            problem = "is the current folder or above it"
        if problem:
            raise ValueError(f"{self.path}: {problem}; set run.dir to a new folder")

    def _refuse_own_input(self, cfg: Config) -> None:
        """Raises ValueError if an input of this run lies in the folder, whose older run is to be renamed."""
        folder = self.path.resolve()
        inputs = [("adapter.init_from", cfg.adapter.init_from), ("model.name", cfg.model.name)]
        inputs += [("data.train", file) for file in cfg.data.train]
        inputs += [("data.validation", file) for file in cfg.data.validation]
        inputs += [("data.retention", file) for file in cfg.data.retention]
        inside = [f"{key} = {n!r}" for key, n in inputs if n and Path(n).resolve().is_relative_to(folder)]
        if inside:
            raise ValueError(
                f"{self.path}: holds an earlier run, which would be moved aside, but {', '.join(inside)} "
                "lies in it; choose another run.name"
            )

    def _lock(self) -> None:
        self.lock = open(self.path / ".lock", "w")
        if not lock(self.lock):
            raise ValueError(
                f"{self.path}: another process is training here; wait for it, or choose another run.name"
            )

    def _move_aside(self) -> None:
        names = (self.path.with_name(f"{self.path.name}~{n}") for n in count(1))
        old = next(name for name in names if not name.exists())
        self.path.rename(old)
        say(f"{self.path} held an earlier run; it is now {old}")
        self.path.mkdir()
        self.lock.close()
        self._lock()


def fingerprint(cfg: Config, data: dict[str, str], base_hash: str) -> dict[str, str]:
    """Returns the values that a resume may not change: config keys, and hashes of data files and base.

    `data` is {file: SHA-256 of what was read}.
    """
    return _fixed_keys(cfg) | {f"file {f}": digest for f, digest in data.items()} | {"base model": base_hash}


def _fixed_keys(cfg: Config) -> dict[str, str]:
    """Returns {section.key: value} of the keys that may not change."""
    keys = {f"{s}.{k}": str(v) for s, section in asdict(cfg).items() for k, v in section.items()}
    return {name: value for name, value in keys.items() if name not in FREE}


def refuse_if_changed(
    before: dict[str, str], now: dict[str, str], further: str = "adapter.init_from"
) -> None:
    """Raises ValueError if two fingerprints differ, with the old and new value of each key that differs.

    `further` is the setting with which a new run continues from the result of this one.

    A key that the checkpoint lacks counts as its default: the default of a new key keeps the old behaviour.
    """
    defaults = _fixed_keys(Config())
    before = defaults | before
    if before["train.precision"] == "auto":  # a run of an earlier release did not note what that meant
        before = before | {"train.precision": now["train.precision"]}
    changed = [
        f"{k}: {before.get(k, '(absent)')} -> {now.get(k, '(absent)')}"
        for k in sorted(before.keys() | now.keys())
        if before.get(k) != now.get(k) and not (k in defaults and _same_number(before[k], now[k]))
    ]
    if changed:
        head = "the checkpoint was made by another run; what differs:"
        remedy = "Put it back, or start a new run without --resume"
        if any(line.startswith(LENGTH) for line in changed):
            remedy += f". To train its result for longer, start a new run with {further}"
        raise ValueError(listed(head, changed, remedy))


def _same_number(before: str, now: str) -> bool:
    """Returns whether two values are equal numbers: a default of 1 is 1.0 when config.toml is read back."""
    try:
        return float(before) == float(now)
    except ValueError:
        return False


def environment() -> dict[str, str]:
    """Returns the versions of Loupe, Python and torch, the machine type and the operating system."""
    import torch

    return {
        "loupe": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
    }

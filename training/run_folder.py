"""The run's folder: who holds it, what it was made from, and what a resume must find unchanged."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

from common.errors import listed
from common.files import lock, replacing, sha256
from common.progress import say
from report.metrics_log import MetricsLog, plain
from training import checkpoint
from training.config import Config

VERSION = "0.1.0"
# Keys that may change between a run and its resume: they do not touch what is computed
FREE = {"run.name", "run.dir", "train.log_every", "train.save_every", "train.save_total_limit"}


class RunFolder:
    """runs/<name>, held by a lock as long as the process lives."""

    def __init__(self, cfg: Config, resume: bool):
        """Makes the folder, or opens it to resume; an old run of the same name stays in it until `begin`.

        Raises ValueError where another process holds it, where --resume finds no run, where it cannot be
        written, where it holds files that no run wrote, or where this run reads from the old one.
        """
        self.path = Path(cfg.run.dir)
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
            checkpoint.clean(self.checkpoints)
            self.metrics = MetricsLog(self.path / "metrics.jsonl")
        except OSError as e:
            raise self._unwritable(e) from None

    def begin(self, cfg: Config) -> None:
        """Once base and data are found good: an old run is moved aside, never overwritten, and the config
        written. A mistake in the input moves nothing.
        """
        try:
            if self._replaces:
                self.metrics.close()
                self._move_aside()
                self.metrics = MetricsLog(self.path / "metrics.jsonl")
                self._replaces = False
            self.write_config(cfg)
        except OSError as e:
            raise self._unwritable(e) from None

    def _unwritable(self, e: OSError) -> ValueError:
        return ValueError(f"{self.path}: cannot be written ({e.strerror}); set run.dir to a folder that can")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_config(self, cfg: Config) -> None:
        (self.path / "config.toml").write_text(cfg.to_toml(), encoding="utf-8")

    def _holds_a_run(self) -> bool:
        """Whether a step was done here; a start that failed on its input leaves nothing worth keeping."""
        log = self.path / "metrics.jsonl"
        return (log.is_file() and log.stat().st_size > 0) or any(
            (self.path / n).exists() for n in ("adapter", "model", "checkpoints")
        )

    def _refuse_foreign(self) -> None:
        """A run leaves its lock behind: a folder of files without one is the user's, and must be neither
        moved aside nor written into.
        """
        names = sorted(p.name for p in self.path.iterdir())
        if names and not (self.path / ".lock").exists():
            raise ValueError(
                f"{self.path}: holds {names[0]}, but no run of Loupe's; set run.dir to a new folder"
            )
        if self.path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise ValueError(
                f"{self.path}: is the folder that you are in, or above it; set run.dir to a new folder"
            )

    def _refuse_own_input(self, cfg: Config) -> None:
        """What this run would read from the old one is no longer there once that is moved aside."""
        inputs = {
            "adapter.init_from": [cfg.adapter.init_from],
            "model.name": [cfg.model.name],
            "data.train": cfg.data.train,
            "data.validation": cfg.data.validation,
        }
        inside = [
            f"{key} = {name!r}"
            for key, names in inputs.items()
            for name in names
            if name and Path(name).resolve().is_relative_to(self.path.resolve())
        ]
        if inside:
            raise ValueError(
                f"{self.path}: holds an earlier run, which makes room for this one, and {', '.join(inside)} "
                f"lies in it; choose another run.name"
            )

    def _lock(self) -> None:
        self.lock = open(self.path / ".lock", "w")
        if not lock(self.lock):
            raise ValueError(
                f"{self.path}: another process is training here; wait for it, or choose another run.name"
            )

    def _move_aside(self) -> None:
        number = next(
            n for n in range(1, 10_000) if not self.path.with_name(f"{self.path.name}~{n}").exists()
        )
        old = self.path.with_name(f"{self.path.name}~{number}")
        self.path.rename(old)
        say(f"{self.path} held an earlier run; it is now {old}")
        self.path.mkdir()
        self.lock.close()
        self._lock()

    def write_json(self, name: str, value: dict) -> None:
        """Writes a small JSON file whole or not at all."""
        text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
        with replacing(self.path / name) as part:
            part.write_text(text + "\n", encoding="utf-8")

    def read_json(self, name: str) -> dict | None:
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def fingerprint(cfg: Config, data_files: list[str], base_hash: str) -> dict[str, str]:
    """What a resume must find as it was: every config key that matters, and hashes of data and base."""
    keys = {
        f"{s}.{k}": str(v)
        for s, section in asdict(cfg).items()
        for k, v in section.items()
        if f"{s}.{k}" not in FREE
    }
    return keys | {f"file {f}": sha256(f) for f in data_files} | {"base model": base_hash}


def refuse_if_changed(before: dict[str, str], now: dict[str, str]) -> None:
    """Raises ValueError that lists every difference between the checkpoint's run and this one."""
    changed = [
        f"{k}: {before.get(k, '(absent)')} -> {now.get(k, '(absent)')}"
        for k in sorted(before.keys() | now.keys())
        if before.get(k) != now.get(k)
    ]
    if changed:
        raise ValueError(
            listed(
                "the checkpoint was made by another run; what differs:",
                changed,
                "Put it back, or start a new run without --resume",
            )
        )


def environment() -> dict[str, str]:
    """Versions that a result may depend on."""
    import torch

    return {
        "loupe": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
    }

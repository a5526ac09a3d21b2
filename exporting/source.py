"""Describes what is exported: the model of --model with the adapter of --adapter, or the result of a run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.files import read_json, sha256
from common.progress import warn
from data.loader import split_validation
from data.rows import Sample, read_samples
from lora.peft_io import weights_file
from model.hub import HUB_GGUF, resolve
from model.weights import gguf_files, hash_model
from report.metrics_log import before_after_table

RESTORE = "restore it from a copy, or remove it to export without the run's measures"


class HeldOutRows(NamedTuple):
    """A run's held-out rows: those of validation files or, without these, a part of the training files."""

    validation: list[str]
    train: list[str]
    format: str
    columns: list[str]
    fraction: float
    seed: int

    def read(self) -> list[Sample]:
        """Returns the held-out samples. If the files cannot be read, warns and returns an empty list."""
        try:
            if self.validation:
                return read_samples(self.validation, self.format, "skip", columns=self.columns)[0]
            samples, _ = read_samples(self.train, self.format, "skip", columns=self.columns)
            return split_validation(samples, self.fraction, self.seed)[1]
        except ValueError as e:
            reason = " ".join(str(e).split())
            warn(f"the export is compared on a built-in sentence: no validation data can be read ({reason})")
            return []


@dataclass
class Source:
    """A base model with its adapter, if any; `origin` is {key: text}, such as the base's name and hashes."""

    name: str  # for PEFT: a hub id, the base's folder, or the name of the base's GGUF file
    revision: str
    folder: Path
    adapter: Path | None
    origin: dict[str, str]
    held_out: HeldOutRows | None = None

    @property
    def gguf(self) -> list[Path]:
        """The base's GGUF file, or all parts of a split one; none if the base has safetensors."""
        files = gguf_files(self.folder)
        return [file.parent / file.readlink() if file.is_symlink() else file for file in files]

    def refuse_overwriting(self, out: Path) -> None:
        """Raises ValueError if `out` is the base, the adapter, or a folder that holds one of them."""
        sources = [path.resolve() for path in (self.folder, self.adapter, *self.gguf) if path]
        if any(out in (source, *source.parents) for source in sources):
            raise ValueError(f"{out} is the source of the export, or holds it; give another --out")


def from_model(name: str, adapter: str | Path | None, revision: str = "main") -> Source:
    """Returns the Source for --model, --adapter and --revision; raises ValueError for an unknown model."""
    folder = resolve(name, revision).absolute()  # "." has no name
    origin = {"base": public_name(name), "base_sha256": hash_model(folder)}
    path = None if adapter is None else Path(adapter)
    if path and weights_file(path).is_file():
        origin["adapter_sha256"] = sha256(weights_file(path))
    source = Source(name, revision, folder, path, origin)
    if source.gguf:
        hub = None if _absolute(name).is_file() else HUB_GGUF.fullmatch(name)
        source.name = hub[1] if hub else source.gguf[0].name
    elif name == "tiny" or folder == _absolute(name):
        source.name = str(folder)
    return source


def public_name(model: str) -> str:
    """Returns "tiny", a hub id, or only the last part of a local path, to hide the home folder."""
    return _absolute(model).name if model != "tiny" and _absolute(model).exists() else model


def _absolute(model: str) -> Path:
    return Path(os.path.expanduser(model)).absolute()


def run_config(folder: Path) -> Path:
    """Returns the path of a run's config.toml; raises ValueError if the folder has none."""
    if not (folder / "config.toml").is_file():
        remedy = "give a folder that train.py wrote, such as runs/small"
        raise ValueError(f"{folder}: no run is here, config.toml is missing; {remedy}")
    return folder / "config.toml"


def from_run(folder: Path, name: str, base: str, revision: str, full: bool, rows: HeldOutRows) -> Source:
    """Returns a run's base and trained adapter or, if `full`, the model of which the run trained all weights.

    Raises ValueError if the run has not saved its result yet, or the base of an adapter has changed since.
    """
    trained = folder / ("model" if full else "adapter")
    if not trained.is_dir():
        remedy = "train to the first evaluation or to the end (train.py --resume)"
        raise ValueError(f"{folder}: the run has no {trained.name}/ yet; {remedy}")
    manifest = _read_manifest(folder / "manifest.json")
    if full:
        source = from_model(str(trained), None)
        origin = source.origin
        origin |= {"weights_sha256": origin["base_sha256"], "base": public_name(base)}
        origin["base_sha256"] = manifest.get("base_sha256", "unknown")
    else:
        source = from_model(base, trained, revision)
        if manifest and manifest["base_sha256"] != source.origin["base_sha256"]:
            remedy = f"export anyway with --model {base} --revision {revision} --adapter {trained}"
            raise ValueError(
                f"{folder}: the adapter was trained on other weights than "
                f"{(source.gguf or [source.folder])[0]} holds now; "
                f"restore them, or {remedy}"
            )
    source.held_out = rows
    config = run_config(folder).read_text(encoding="utf-8")
    source.origin |= {"run": name, "config": config.replace(f"{Path.home()}/", "~/")}
    if manifest:
        source.origin |= _run_facts(folder / "manifest.json", manifest)
    return source


def _run_facts(file: Path, manifest: dict) -> dict[str, str]:
    """Returns the hashes of the data and the table of measures; raises ValueError if they were edited."""
    try:
        files = manifest.get("data_sha256", {}).items()
        hashes = " ".join(f"{Path(file).name}={digest}" for file, digest in files)
        return {"data_sha256": hashes, "measures": before_after_table(manifest["before"], manifest["after"])}
    except (AttributeError, TypeError, ValueError) as e:
        raise ValueError(
            f"{file}: before, after or data_sha256 is not as train.py writes it ({e}); {RESTORE}"
        ) from None


def _read_manifest(file: Path) -> dict:
    """Returns manifest.json, which train.py writes at the end of a run, or {} if the file is missing."""
    if not file.is_file():
        return {}
    manifest = read_json(file, RESTORE)
    missing = [key for key in ("base_sha256", "before", "after") if key not in manifest]
    if missing:
        raise ValueError(f"{file}: has no {', '.join(missing)}, which train.py writes; {RESTORE}")
    return manifest

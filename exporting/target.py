"""Checks what an export may replace, and writes it under a temporary name that is renamed at the end."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import lock, recover, replacing
from common.files import need_space as need_disk_space
from ggml.container import GGUFFile

# The paths in a folder that an export writes.
WRITTEN = re.compile(
    r"README\.md|((generation_|tokenizer_|adapter_)?config|tokenizer|index)\.json|Modelfile|(model|lora)\.gguf|"
    r"(adapter_)?model[-\w]*\.safetensors(\.index\.json)?|oci-layout|blobs(/sha256(/[0-9a-f]{64})?)?"
)
SIGNATURE = "written by Loupe"  # in the model card, exporting/hf_folder.py
SMALL_FILES = 2**24  # Bytes for what an export holds besides its tensors.


def refuse_existing(out: Path, force: bool, folder: bool) -> None:
    """Raises ValueError if `out` exists; with `force`, only if an earlier export did not write all of it.

    If an export was killed while it replaced `out`, the earlier one is restored first.
    """
    try:
        if out.with_name(f".{out.name}.old").exists():
            with _held(out):
                recover(out)
        if not out.exists():
            return
    except OSError as e:  # the name is too long
        raise ValueError(f"{out} cannot be written ({e.strerror}); give another --out") from None
    if not force:
        raise ValueError(f"{out} exists already; give another --out, or add --force to replace it")
    if folder and is_our_folder(out) and (others := other_files(out)):
        names = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        raise ValueError(f"{out} holds {names}, which no export wrote; move it away, or give another --out")
    if not (is_our_folder(out) if folder else is_our_file(out)):
        raise ValueError(f"{out} is no earlier export, so --force does not replace it; give another --out")


def is_our_folder(path: Path) -> bool:
    """Returns whether a folder is empty, or has our model card, a Modelfile or an OCI image layout."""
    names = {p.name for p in path.iterdir()} if path.is_dir() else {""}
    card = path / "README.md"
    signed = card.is_file() and SIGNATURE in card.read_text(encoding="utf-8", errors="replace")
    return not names or signed or bool({"Modelfile", "oci-layout"} & names)


def other_files(path: Path) -> list[str]:
    """Returns the paths in a folder, relative to it, that no export writes."""
    inside = sorted(p.relative_to(path).as_posix() for p in path.rglob("*"))
    return [name for name in inside if not WRITTEN.fullmatch(name)]


def is_our_file(path: Path) -> bool:
    """Returns whether a file is empty, or a GGUF file whose header names Loupe's version."""
    if not path.is_file():
        return False
    try:
        return path.stat().st_size == 0 or "loupe.version" in GGUFFile(path).metadata
    except ValueError:
        return False


def need_space(part: Path, tensor_bytes: int) -> None:
    """Raises ValueError if the disk of `part` has less than tensor_bytes plus SMALL_FILES bytes free."""
    remedy = "give another --out (set another TMPDIR for an upload)"
    need_disk_space(part, tensor_bytes + SMALL_FILES, "the export", remedy)


def link_or_copy(file: Path, to: Path) -> None:
    """Makes `to` a hard link to a file or, on another disk, a copy; neither names a path of this machine."""
    try:
        os.link(file.resolve(), to)
    except OSError:  # another disk, another owner, or a file system without links
        need_space(to, file.stat().st_size)
        shutil.copyfile(file, to)


@contextmanager
def new_path(out: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, and renames it to `out` when the block ends.

    If the disk refuses or another export is writing `out`, raises ValueError and leaves `out` as it was.
    """
    made = [p for p in out.parents if not p.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _held(out), replacing(out) as part:
            yield part
    except BaseException as e:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        if isinstance(e, OSError):
            raise ValueError(
                f"{out} cannot be written ({e.strerror or e}); make room there, or give another --out"
            ) from e
        raise


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Locks `out`, because a second export would rename the file that the first one is still writing."""
    path = out.with_name(f".{out.name}.lock")
    with open(path, "w") as file:
        if not lock(file):
            raise ValueError(f"{out}: another export is writing it now; wait for it, or give another --out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yields a temporary folder and removes it afterwards; raises ValueError if its disk refuses a write."""
    with tempfile.TemporaryDirectory(prefix="loupe-") as folder:
        try:
            yield Path(folder)
        except OSError as e:
            raise ValueError(
                f"{folder} cannot be written ({e.strerror}); make room there, or set TMPDIR to a larger disk"
            ) from e

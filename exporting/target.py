"""Checks what an export may replace, and writes it under a temporary name that is renamed at the end."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.files import lock, replacing
from common.files import need_space as need_disk_space

# A folder that Loupe exported holds one of these files.
EXPORTED = {"config.json", "adapter_config.json", "Modelfile", "oci-layout"}
SMALL_FILES = 2**24  # Bytes for what an export holds besides its tensors.


def refuse_existing(out: Path, force: bool, folder: bool) -> None:
    """Raises ValueError if `out` exists; with `force`, only if it does not look like an earlier export."""
    try:
        if not out.exists():
            return
    except OSError as e:  # the name is too long
        raise ValueError(f"{out} cannot be written ({e.strerror}); give another --out") from None
    if not force:
        raise ValueError(f"{out} exists already; give another --out, or add --force to replace it")
    if not (is_our_folder(out) if folder else is_our_file(out)):
        raise ValueError(f"{out} is no earlier export, so --force does not replace it; give another --out")


def is_our_folder(path: Path) -> bool:
    """Returns whether a folder is empty, or has a file named in EXPORTED and no subfolder except blobs/."""
    entries = {p.name: p.is_dir() for p in path.iterdir()} if path.is_dir() else {"": True}
    folders = {name for name, is_dir in entries.items() if is_dir}
    return not entries or bool(EXPORTED & entries.keys() and folders <= {"blobs"})


def is_our_file(path: Path) -> bool:
    """Returns whether a file is empty or starts with GGUF, the first four bytes of every GGUF file."""
    return path.is_file() and path.open("rb").read(4) in (b"", b"GGUF")


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

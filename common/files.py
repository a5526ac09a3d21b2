"""Files and folders that are replaced as a whole, JSON files, locks, SHA-256 and free disk space."""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import IO, Any

from common.progress import warn

# Files of Loupe's own that lay elsewhere in earlier releases.
MOVED = {"data/samples/": "assets/samples/", "model/tiny": "assets/tiny"}


def sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read_json(path: Path, remedy: str) -> dict:
    """Returns the object in a JSON file; raises ValueError (path, reason, remedy) if that is impossible."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; {remedy}") from None
    except OSError as e:
        raise ValueError(f"{path}: cannot be read ({e.strerror}); {remedy}") from None
    except (ValueError, RecursionError) as e:  # the second if it is nested thousands of times
        raise ValueError(f"{path}: not valid JSON ({e}); {remedy}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; {remedy}")
    return value


@contextmanager
def replacing(path: Path, part: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path. What the block writes there, a file or a folder, replaces `path` at its end.

    The bytes are on the disk before the rename. If the block raises, `path` stays as it was. Where several
    processes may replace one path at a time, each passes a `part` of its own in the same folder.

    Raises IsADirectoryError if a file would replace a folder, NotADirectoryError if a folder would a file.
    """
    part = part or path.with_name(f".{path.name}.part")
    recover(path)
    try:
        yield part
        for written in (*part.rglob("*"), part):
            _sync(written)
        if path.is_dir():
            if not part.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            os.replace(path, _aside(path))  # a folder that holds files cannot be replaced in one rename
        os.replace(part, path)
        _sync(path.parent)
    finally:
        remove(part)
        recover(path)


@contextmanager
def making(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder, which becomes `path` at the end of the block.

    Several processes may make one path at a time: the first to finish wins, and the others take its folder.
    The bytes are on the disk before the rename, so a process that is killed leaves no half folder there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield part
        for written in (*part.rglob("*"), part):
            _sync(written)
        try:
            os.replace(part, path)
        except OSError:
            if not path.is_dir():
                raise
        _sync(path.parent)
    finally:
        remove(part)


def recover(path: Path) -> None:
    """Cleans up after a killed replacing(path). If `path` is missing, restores the old folder."""
    if _aside(path).exists() and not path.exists():
        os.replace(_aside(path), path)
    remove(_aside(path))
    remove(path.with_name(f".{path.name}.part"))


def clean(folder: Path) -> None:
    """Does recover() for each file and folder in `folder` that a killed replacing() left half done."""
    for kind in (".part", ".old"):
        for left in folder.glob(f".?*{kind}"):
            recover(folder / left.name[1:].removesuffix(kind))


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def write_together(folder: Path, files: dict[str, Iterable[bytes]]) -> None:
    """Writes {name: pieces of bytes}; the disk has all of the bytes before the first file is replaced."""
    with ExitStack() as stack:
        for name, pieces in files.items():
            part = stack.enter_context(replacing(folder / name))
            with open(part, "wb") as f:
                f.writelines(pieces)
            _sync(part)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(file: IO) -> None:
    """Waits until what was written to an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Waits until the bytes of a file, or the list of names in a folder, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock(file: IO) -> bool:
    """Tries to lock an open file for this process; returns whether it did. Closing the file unlocks it.

    A file that was removed or renamed after it was opened is not locked: other processes would not see it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def need_space(path: Path, size: int, what: str, remedy: str) -> None:
    """Raises ValueError if the disk on which `path` lies has fewer than `size` bytes free."""
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if shutil.disk_usage(folder).free < size:
        raise ValueError(f"{folder}: {what} {_space(folder, size)}; make room there, or {remedy}")


def full_disk(folder: Path, size: int, error: Exception) -> str:
    """Returns a text about a failed write of `size` bytes: the folder, the reason, and the space needed."""
    reason = getattr(error, "strerror", None) or error
    return f"{folder.absolute()}: cannot be written ({reason}); this {_space(folder, size)}"


def _space(folder: Path, size: int) -> str:
    free = shutil.disk_usage(folder).free
    return f"needs {math.ceil(size / 2**20):,} MiB, but the disk has {free / 2**20:,.0f} MiB free"


def moved(value: Any, where: str = "") -> Any:
    """Returns the new path of a file that an earlier release kept elsewhere, or any other value unchanged."""
    for old, new in MOVED.items():
        if isinstance(value, str) and value.startswith((old, f"./{old}")) and not Path(value).exists():
            there = new + value.removeprefix("./").removeprefix(old)
            if Path(there).exists():
                warn(f"{where}{value} is now {there}; the old path will be removed")
                return there
    return value

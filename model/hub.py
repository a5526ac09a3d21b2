"""From a model's name to its folder; what comes from the hub is downloaded once and cached.

tiny                             the embedded base
gemma-3-270m                     the package of the extra "gemma"
path/to/folder                   config.json, tokenizer.json and *.safetensors
path/to/file.gguf                a GGUF file, or the first part of a split one
google/gemma-3-270m-it           a hub model with safetensors
user/repository:Q4_K_M           the hub's GGUF file of this type, as llama.cpp writes it
user/repository/file.gguf        a GGUF file on the hub
"""

import os
import re
from pathlib import Path

from model.package import PACKAGES, packaged_file

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # an organisation or user, and a name
HUB_GGUF = re.compile(rf"({HUB_ID.pattern})(?::([\w.-]+)|/(.+\.gguf))")
EXAMPLE = "a hub id such as google/gemma-3-270m-it"
FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.*".split()
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def resolve(name: str, revision: str = "main", weights: bool = True) -> Path:
    """Returns the folder of a model, or the folder that stands for a GGUF file (model/gguf_folder.py).

    Args:
        name: "tiny" (the small model in assets/tiny), a folder, or a hub id such as google/gemma-3-270m-it.
        revision: the branch, tag or commit of a model on the hub.
        weights: whether to download the weights too, and not only the config and the tokenizer.

    Raises:
        ValueError: no such folder or model, access refused, or hub not reachable, with a remedy in one line.
    """
    if name == "tiny":
        return TINY
    folder = Path(os.path.expanduser(name))
    if name in PACKAGES and not folder.exists():
        return _gguf_folder(packaged_file(name))
    if name.endswith(".gguf") and folder.is_file():
        return _gguf_folder(folder)
    if name and folder.is_dir():  # "" would be the current folder
        files = [] if (folder / "config.json").is_file() else sorted(folder.glob("*.gguf"))
        if files:
            raise ValueError(
                f"{name}: has no config.json; to take {files[0].name}, name the file: {files[0]}"
            )
        return folder
    if folder.is_file():
        raise ValueError(
            f"{name} is a file; a model is the folder that holds config.json, tokenizer.json and "
            "*.safetensors"
        )
    if found := HUB_GGUF.fullmatch(name):
        repository, quant, file = found.groups()
        return _gguf_folder(_download_gguf(repository, quant, file, revision))
    if not HUB_ID.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither a folder or a .gguf file (seen from {Path.cwd()}), nor 'tiny', nor "
            f"{', '.join(map(repr, PACKAGES))}, nor {EXAMPLE}; check the spelling"
        )
    folder = _download(name, revision, FILES + (WEIGHTS if weights else []))
    if not (folder / "config.json").is_file() or (weights and not list(folder.glob("*.safetensors"))):
        raise ValueError(
            f"{name}: no config.json with *.safetensors in {folder}: the model has another format, or a "
            "download was interrupted and the hub cannot be reached now; go online and run again, or choose "
            f"another model (a GGUF file is {name}:Q4_K_M or {name}/file.gguf)"
        )
    return folder


def _gguf_folder(path: Path) -> Path:
    from model.gguf_folder import gguf_folder  # it imports torch, which a folder does not need

    return gguf_folder(path)


def _download_gguf(repository: str, quant: str | None, file: str | None, revision: str) -> Path:
    """Returns the path of a hub model's GGUF file, given its type or its name; of a split file, part 1."""
    if quant:
        spellings = {quant, quant.lower(), quant.upper()}
        patterns = [f"*{spelling}{end}" for spelling in spellings for end in (".gguf", "-*-of-*.gguf")]
    else:
        assert file
        patterns = [re.sub(r"-\d{5}-of-", "-*-of-", file)]
    folder = _download(repository, revision, patterns)
    found = [path for path in sorted(folder.rglob("*.gguf")) if any(path.match(p) for p in patterns)]
    found = [path for path in found if not path.name.startswith("mmproj")]
    if not found:
        what = f"file of the type {quant}" if quant else f"file {file}"
        raise ValueError(f"{repository}: has no GGUF {what}; look at the hub's list of its files")
    return found[0]


def _download(name: str, revision: str, patterns: list[str]) -> Path:
    """Returns the cached folder with those files of a hub model that fit a pattern."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # The errors of the HTTP library come through, and that library differs between releases.
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # the disk's own error, for example that it is full
        raise ValueError(_explain(name, revision, e)) from e


def _explain(name: str, revision: str, error: Exception) -> str:
    """Returns a one-line error message for a failed download: its cause, and what the user can do."""
    from huggingface_hub import constants, errors

    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{name}"
    licence = f"accept the licence at {page}"
    login = "then run `hf auth login` or set HF_TOKEN to a token of your account"
    causes: list[BaseException] = [error]  # outermost first
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    responses = (getattr(e, "response", None) for e in causes)
    status = next((r.status_code for r in responses if r is not None), None)
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; check model.revision against {page}/tree/main"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return f"{name} is gated: {licence} in your browser, {login}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        remedy = f"check the id, or if it is gated {licence}, {login}"
        return f"{name} is neither a folder here nor a model {hub} shows you; {remedy}"
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in causes):
        where = f"{name} is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set"
        return f"{where}; set HF_HUB_OFFLINE=0 to download it, or give a folder"
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is neither a folder here nor {EXAMPLE}; check the spelling"
    reason = f"{type(causes[-1]).__name__}: {causes[-1]}".splitlines()[0]
    remedy = "check the connection, HF_ENDPOINT and proxies, or give a folder"
    return f"{name} is not in the cache and {hub} did not serve it ({reason}); {remedy}"

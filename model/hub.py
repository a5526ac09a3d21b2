"""Finds the folder of a model; downloads a model of the Hugging Face hub once and caches it."""

import os
import re
from pathlib import Path

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # an organisation or user, and a name
EXAMPLE = "a hub id such as google/gemma-3-270m-it"
FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.*".split()
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def resolve(name: str, revision: str = "main", weights: bool = True) -> Path:
    """Returns the folder of a model.

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
    if name and folder.is_dir():  # "" would be the current folder
        return folder
    if folder.is_file():
        raise ValueError(
            f"{name} is a file; a model is the folder that holds config.json, tokenizer.json and "
            "*.safetensors"
        )
    if not HUB_ID.fullmatch(name):
        raise ValueError(
            f"{name!r} is neither a folder (seen from {Path.cwd()}), nor 'tiny', nor {EXAMPLE}; "
            "check the spelling"
        )
    return _download(name, revision, weights)


def _download(name: str, revision: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = FILES + (WEIGHTS if weights else [])
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # The errors of the HTTP library come through, and that library differs between releases.
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise  # the disk's own error, for example that it is full
        raise ValueError(_explain(name, revision, e)) from e
    if not (folder / "config.json").is_file() or (weights and not list(folder.glob("*.safetensors"))):
        raise ValueError(
            f"{name}: no config.json with *.safetensors in {folder}: the model has another format, or a "
            "download was interrupted and the hub cannot be reached now; go online and run again, or choose "
            "another model"
        )
    return folder


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

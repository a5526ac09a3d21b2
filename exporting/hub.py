"""Uploads the merged model, in the format of transformers, to the Hugging Face hub as one commit."""

from pathlib import Path

from exporting.hf_folder import export_safetensors
from exporting.source import Source
from model.hub import EXAMPLE, HUB_ID


def export_to_hub(source: Source, scratch: Path, repo: str, quant: str) -> str:
    """Writes the merged model to the folder `scratch`, uploads it, and returns a summary with the URL.

    `quant` is that of export_safetensors.
    """
    check_repo(repo)
    summary = export_safetensors(source, scratch, repo, quant)
    return f"{summary}; {upload(scratch, repo, 'Exported by Loupe')}"


def check_repo(repo: str) -> None:
    """Raises ValueError unless `repo` has the form of a hub id, user/name."""
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"--out {repo}: not a hub id to upload to; give user/name, {EXAMPLE}")


def upload(folder: Path, repo: str, message: str) -> str:
    """Uploads every file of `folder` to the hub's repository `repo` and returns the repository's URL.

    The repository is created if it does not exist. Raises ValueError, one line with a remedy, if nobody is
    logged in, access is refused, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message=message)
    # The errors of the HTTP library come through, and that library differs between releases.
    except Exception as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise ValueError(_explain(repo, e, constants.ENDPOINT)) from e
    return f"{constants.ENDPOINT}/{repo}"


def _explain(repo: str, error: Exception, hub: str) -> str:
    """Returns one line for the user: why the hub did not accept the upload, and the remedy."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        remedy = "log in with `hf auth login` or set HF_TOKEN to a token that may write there"
        return f"{hub} does not let you write to {repo}: {remedy}"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{repo} was not uploaded to {hub} ({reason}); run the export again"

"""Uploads an exported folder to the Hugging Face hub, as one commit."""

from pathlib import Path

from model.hub import EXAMPLE, HUB_ID


def check_repo(repo: str) -> None:
    """ValueError for what is no hub id."""
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"--out {repo}: is no hub id to upload to; give user/name, {EXAMPLE}")


def upload(folder: Path, repo: str, message: str) -> str:
    """Creates the model repository `repo` where there is none and uploads every file of the folder; returns
    its address.

    Raises ValueError, in one line and with the remedy, where nobody is logged in, access is refused, or the
    hub is out of reach.
    """
    from huggingface_hub import HfApi, constants

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, commit_message=message)
    except (
        Exception
    ) as e:  # the HTTP library's errors come through, and which library that is changes between releases
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise ValueError(explain(repo, e)) from e
    return f"{constants.ENDPOINT}/{repo}"


def explain(repo: str, error: Exception) -> str:
    """One line: what the hub's answer means and what to do about it."""
    from huggingface_hub import constants

    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError":
        remedy = "log in with `hf auth login` or set HF_TOKEN to a token that may write there"
        return f"{constants.ENDPOINT} does not let you write to {repo}: {remedy}"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{repo} was not uploaded to {constants.ENDPOINT} ({reason}); run the export again"

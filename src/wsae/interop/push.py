"""Sending a folder to the model hub. The token comes from HF_TOKEN and is written nowhere."""

import os
import re
from pathlib import Path

from wsae.core.errors import UserError
from wsae.core.hub import hub_errors, quiet_hub

_REPO = re.compile(r"[\w.-]+/[\w.-]+", flags=re.ASCII)


def check_repo(repo: str) -> str:
    """Return a repository's name; raises UserError unless it is owner/name."""
    if not _REPO.fullmatch(repo):
        raise UserError(f"'{repo}' is not a repository on the hub; give owner/name")
    return repo


def upload(folder: Path, files: list[str], repo: str, private: bool) -> str:
    """Send those files of a folder to a repository, made if need be, and return its address.

    Raises UserError without a token, without the extra, or with the hub's own reason.
    """
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError(
            "no token for the hub: put one with write access into HF_TOKEN, or add --dry-run to write the folder only"
        )
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("wsae push needs the extra hub (pip install 'wsae[hub]')") from error
    api = HfApi(token=token)
    try:
        with quiet_hub():
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=files,
                commit_message="SAEs trained with wsae",
            )
    except hub_errors() as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{repo}: not sent to the hub ({reason})") from error
    return str(done.commit_url)

"""Files of the Hugging Face Hub, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

# The form of a repository id, owner/repo.
HUB_ID = r"\w[\w.-]*/[\w.-]+"
HTTP_CLIENTS = ("httpx", "httpx2", "requests")
SAVE_INSTEAD = "save on this machine with clear_attn.save_pretrained(pipe, directory), and upload later"


def fetch(repo: str, file: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Download a file through huggingface_hub's cache and return its path.

    Raises:
        ValueError: `repo` is not an id.
        FileNotFoundError: the repository, revision or file does not exist, or is private and the token has no access.
        PermissionError: the repository is gated.
        ConnectionError: the Hub cannot be reached, and the file is not in the cache.
    """
    where = repo + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, token=token))
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is not the id of a Hub repository ({error}); give 'owner/repo'") from error
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{where} is gated: accept its terms on https://huggingface.co/{repo}, then log in or give token="
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{where} is not a local path, and is missing on the Hub or private; check the id, or log in or give token="
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision!r}; leave revision= out, or give another") from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{where} is not a local path, the Hub cannot be reached (or HF_HUB_OFFLINE is set), and {file} is not in "
            f"the cache, which has {cached_files(repo) or 'nothing'} of it; connect once, or give the path of a file"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"{where} has no file {file}; name one that it has, owner/repo/file") from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"the Hub did not give {file} of {where} ({error}); try again later") from error


def check_upload(repo: str, token: str | bool | None) -> None:
    """Check what an upload needs of this machine.

    Raises:
        ValueError: `repo` is not an id.
        PermissionError: there is no token.
        ConnectionError: HF_HUB_OFFLINE is set.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repo)  # type: ignore[attr-defined]
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is not the id of a Hub repository ({error}); give 'owner/repo'") from error
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{repo} cannot be uploaded, because HF_HUB_OFFLINE is set; {SAVE_INSTEAD}")
    if not isinstance(token, str) and (token is False or huggingface_hub.get_token() is None):
        raise PermissionError(f"uploading {repo} takes a token with write access; run `hf auth login`, or give token=")


def upload(folder: Path, repo: str, private: bool | None, token: str | bool | None, message: str) -> str:
    """Upload the files of a folder in one commit, to a repository that is created if missing; return its address.

    Raises:
        PermissionError: the token has no write access.
        ConnectionError: the Hub cannot be reached, or did not take the files.
    """
    try:
        created = huggingface_hub.create_repo(repo, private=private, token=token, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=created.repo_id, folder_path=folder, token=token, commit_message=message
        )
    except errors.HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise PermissionError(
                f"the token has no write access to {repo} ({error}); give another token=, or an id of your own"
            ) from error
        raise ConnectionError(f"the Hub did not take the files of {repo} ({error}); try again later") from error
    except Exception as error:
        # huggingface_hub passes on the errors of its HTTP client, which differs by version.
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in HTTP_CLIENTS:
            raise
        raise ConnectionError(
            f"the Hub cannot be reached ({error}), so {repo} was not uploaded; {SAVE_INSTEAD}"
        ) from error
    return str(commit.commit_url)


def in_cache(repo: str) -> bool:
    """Return whether huggingface_hub's cache holds files of a repository."""
    return Path(constants.HF_HUB_CACHE, f"models--{repo.replace('/', '--')}").is_dir()


def cached_files(repo: str) -> list[str]:
    """Return the safetensors files of a repository in the cache."""
    try:
        cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except errors.CacheNotFound:
        return []
    revisions = (revision for each in cache.repos if each.repo_id == repo for revision in each.revisions)
    names = {file.file_name for revision in revisions for file in revision.files}
    return sorted(name for name in names if name.endswith(".safetensors"))

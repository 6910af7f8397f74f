"""Files of the Hugging Face Hub, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

# The form of a repository id, owner/repo.
HUB_ID = r"\w[\w.-]*/[\w.-]+"


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

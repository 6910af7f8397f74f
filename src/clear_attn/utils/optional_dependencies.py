"""What metrics need that may not be here: packages, and weights that are downloaded only where that is asked for."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from transformers import AutoModel

# A torchvision for another build of torch breaks transformers and diffusers, so no extra brings it along.
REMEDIES = {
    "torchmetrics": "pip install 'clear-attn[eval]'",
    "torchvision": "install the one made for your build of torch, see pytorch.org",
    "torch_fidelity": "pip install torch-fidelity, after a torchvision made for your build of torch, see pytorch.org",
}


class Missing(Exception):  # noqa: N818 - no error where the metric was not asked for by name
    """A metric that cannot be computed; says why, and what to do."""


def imported(name: str) -> ModuleType:
    """A module of an optional package.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise Missing(f"{package} is not installed: {REMEDIES.get(package, f'pip install {package}')}") from None


def first_line(error: Exception) -> str:
    """Of a message, or the kind of error where there is none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def torch_hub_file(url: str, what: str, download: bool) -> Iterator[None]:
    """Around what loads a file of torch's cache: nothing is fetched unasked, and nothing read but tensors.

    Raises:
        Missing: it is not in the cache, or cannot be fetched or read.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if not file.is_file() and not download:
        raise Missing(f"{what}'s weights are not here ({file}); download=True or --download fetches them")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except pickle.UnpicklingError:
        raise Missing(f"{file} holds more than tensors, and is not read; delete it") from None
    except (OSError, RuntimeError) as error:
        raise Missing(f"{what}'s weights cannot be fetched or read ({first_line(error)})") from None
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def pretrained(loader: Any, name: str, download: bool, **options: Any) -> Any:
    """What a class of transformers loads by a Hub id or from a folder.

    Raises:
        Missing: it is not there, or not such a thing.
    """
    try:
        return loader.from_pretrained(name, local_files_only=not download, **options)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise Missing(f"the folder {name} does not hold what is needed ({first_line(error)})") from None
        if download:
            raise Missing(f"{name} cannot be fetched ({first_line(error)})") from None
        raise Missing(
            f"{name} is no folder and not in the cache of the Hugging Face Hub; download=True or --download fetches it"
        ) from None


def pretrained_model(name: str, download: bool) -> Any:
    """A model of transformers in float32, with all its weights.

    Raises:
        Missing: as `pretrained`; or some weights are not there.
    """
    model, loading = pretrained(AutoModel, name, download, dtype=torch.float32, output_loading_info=True)
    # DINO has no pooler, though transformers makes one; it is not used here.
    random = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if random:
        raise Missing(f"{name} lacks weights of a {type(model).__name__}, {random[0]} first")
    return model.eval().requires_grad_(False)

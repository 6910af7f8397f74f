"""Load optional packages of metrics, and weights that are downloaded only on request."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor

# transformers 4 has no backends of image processors, and calls those of torchvision fast.
PILLOW: dict[str, Any] = (
    {"backend": "pil"} if importlib.util.find_spec("transformers.image_processing_backends") else {"use_fast": False}
)

# A torchvision for another build of torch breaks transformers and diffusers, so no extra installs it.
REMEDIES = {
    "torchvision": "install the one for your build of torch, see pytorch.org",
    "torch_fidelity": "pip install torch-fidelity, after a torchvision for your build of torch, see pytorch.org",
}


class Missing(Exception):  # noqa: N818 - not an error unless the metric was requested by name
    """A metric cannot be computed; the message says why, and what to do."""


def imported(name: str) -> ModuleType:
    """Import a module of an optional package.

    Raises:
        Missing: it is not installed.

    Examples:
        >>> imported("json").__name__
        'json'
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise Missing(f"{package} is not installed: {REMEDIES.get(package, f'pip install {package}')}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


@contextlib.contextmanager
def torch_hub_file(url: str, what: str, download: bool) -> Iterator[None]:
    """Guard loading of a file from torch's cache: download only on request, and read only tensors.

    Args:
        url: the address of the file.
        what: the name of the network, for errors.
        download: whether it may be downloaded.

    Raises:
        Missing: the file is not in the cache, or cannot be downloaded or read.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
    if not file.is_file() and not download:
        raise Missing(f"{what}'s weights are not here ({file}); download=True downloads them")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    except pickle.UnpicklingError:
        raise Missing(f"{file} holds more than tensors, and is not read; delete it") from None
    except (OSError, RuntimeError) as error:
        raise Missing(f"{what}'s weights cannot be downloaded or read ({_first_line(error)})") from None
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def pretrained(loader: Any, name: str, download: bool, **options: Any) -> Any:
    """Load an object of a transformers class from the Hub or a folder.

    Args:
        loader: a class with `from_pretrained`.
        name: Hub id or folder.
        download: whether it may be downloaded.
        options: options of `from_pretrained`.

    Raises:
        Missing: the files do not exist, or contain something else.
    """
    try:
        return loader.from_pretrained(name, local_files_only=not download, **options)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            raise Missing(f"the folder {name} does not hold what is needed ({_first_line(error)})") from None
        if download:
            raise Missing(f"{name} cannot be downloaded ({_first_line(error)})") from None
        raise Missing(
            f"{name} is no folder and not in the cache of the Hugging Face Hub; download=True downloads it"
        ) from None


def pretrained_image_processor(name: str, download: bool) -> Any:
    """Load an image processor that resizes with Pillow, so the same whether torchvision is installed or not.

    Raises:
        Missing: as `pretrained`.
    """
    return pretrained(AutoImageProcessor, name, download, **PILLOW)


def pretrained_model(name: str, download: bool) -> Any:
    """Load a transformers model in float32, with all its weights.

    Raises:
        Missing: as `pretrained`; or some weights are missing.
    """
    # With peft installed, AutoModel looks for an adapter too, in the Hub even with local_files_only.
    config = pretrained(AutoConfig, name, download)
    model_class = MODEL_MAPPING.get(type(config), None)
    if not isinstance(model_class, type):
        raise Missing(f"{name} is a {config.model_type}, which has no model without a head in transformers")
    model, loading = pretrained(model_class, name, download, dtype=torch.float32, output_loading_info=True)
    # DINO has no pooler, though transformers makes one; it is not used here.
    random = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if random:
        raise Missing(f"{name} lacks weights of a {type(model).__name__}, {random[0]} first")
    return model.eval().requires_grad_(False)

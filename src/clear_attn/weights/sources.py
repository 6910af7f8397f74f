"""Find distilled weights: in a file, in a folder, on the Hub, or published for a model."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clear_attn.methods import Method
from clear_attn.methods.records import method_from_dict
from clear_attn.methods.schedule import Schedule
from clear_attn.weights import packaged
from clear_attn.weights.hub import HUB_ID, fetch
from clear_attn.weights.metadata import CONFIG_FILE, read_record
from clear_attn.weights.parameters import pooled_factor, read_checkpoint
from clear_attn.weights.published import (
    BASE,
    FILES,
    LICENSE_TEXT,
    REPO,
    fine_tune_served,
    published_file,
    published_method,
)

WEIGHTS_FILE = "clear_weights.safetensors"
HUB_FILE = re.compile(rf"({HUB_ID})(?:/(.+\.safetensors))?")

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """Distilled weights, not yet validated against a model.

    Attributes:
        values: tensors by name.
        name: where they came from, as a user would give it.
        label: the name without private paths, for files that others read.
        method: the method that they were distilled for; None if not recorded.
        down_factor: side of the pooled cells, from their shapes; 1 for none.
        architecture: the transformer class that they are for; None if not recorded.
        origin: where they first came from, such as the published file that `name` is a copy of.
        schedule: the schedule that they were saved with.
    """

    values: dict[str, Tensor]
    name: str
    label: str
    method: Method | None
    down_factor: int = 1
    architecture: str | None = None
    origin: str | None = None
    schedule: Schedule = Schedule()


def with_absolute_path(weights: str | os.PathLike[str] | None) -> str | None:
    """Return the argument of `linearize` with a local path made absolute.

    From another working directory, a relative path would be taken for a Hub id.
    """
    if weights is None:
        return None
    path = Path(weights).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(weights)


def shared_name(weights: str) -> str:
    """Return a Hub id, or the name of a local file or folder without its absolute path."""
    return weights if HUB_FILE.fullmatch(weights) else Path(weights).name


def load(
    weights: str | os.PathLike[str],
    pipe: Any,
    transformer: Any,
    wanted: Method,
    revision: str | None,
    token: str | bool | None,
) -> Checkpoint:
    """Find and read the weights that the arguments of `linearize` name.

    Of several published files it takes the one for the wanted method.

    Raises:
        TypeError: `weights` is not a path or name.
        ValueError, FileNotFoundError, PermissionError, ConnectionError: they do not exist or cannot be read.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights must be a path, a Hub id, 'auto' or None, got {weights!r} of type {type(weights).__name__}"
        )
    if weights == "auto":
        return _load_auto(pipe, transformer, wanted, revision, token)
    path = Path(weights).expanduser()
    on_hub = HUB_FILE.fullmatch(weights) if isinstance(weights, str) else None
    # "folder/file.safetensors" has the form of a repository id, but means a file.
    if path.exists() or not on_hub or (on_hub[2] is None and path.suffix == ".safetensors"):
        return _load_local(path)
    repo, file = on_hub.groups()
    if file is None and repo == REPO:
        file = published_file(wanted)
    return _load_hub_folder(repo, revision, token) if file is None else _load_hub_file(repo, file, revision, token)


def load_packaged() -> Checkpoint:
    """Read the distilled weights of the small FLUX in the package, which are named "auto", as on any machine."""
    return _load_local(packaged.WEIGHTS)._replace(name="auto", origin=packaged.WEIGHTS.name)


def _load_auto(
    pipe: Any, transformer: Any, wanted: Method, revision: str | None, token: str | bool | None
) -> Checkpoint:
    fine_tune = fine_tune_served(pipe, transformer)
    file = published_file(wanted)
    if fine_tune:
        logger.warning(
            "%s is not %s by name: the published weights replace its own to_q, to_k, to_v and to_out.0 in every "
            "attention layer, and a fine-tune's changes there are lost while it is linearized. weights=None keeps "
            "them; weights='%s/%s' does the same without this warning.",
            fine_tune,
            BASE,
            REPO,
            file,
        )
    return _load_hub_file(REPO, file, revision, token)


def _load_local(path: Path) -> Checkpoint:
    folder, weights = (path, path / WEIGHTS_FILE) if path.is_dir() else (path.parent, path)
    if path.is_dir() or (path.name == WEIGHTS_FILE and (folder / CONFIG_FILE).is_file()):
        found = _load_folder(folder / CONFIG_FILE, weights, str(path))
    else:
        origin = f"{REPO}/{path.name}" if path.name in FILES.values() else None
        found = _load_file(path, str(path), published_method(path.name), origin)
    return found._replace(label=path.resolve().name)


def _load_file(path: Path, name: str, published: Method | None, origin: str | None) -> Checkpoint:
    """Read a file that has no clear_config.json. Its method may be recorded in the file's own metadata."""
    values, recorded = read_checkpoint(path)
    factor = pooled_factor(values)
    method = published and published.with_settings(None, factor)
    if recorded is not None:
        method = method_from_dict(recorded, str(path))
    return Checkpoint(values, name, name, method, factor, origin=origin)


def _load_hub_file(repo: str, file: str, revision: str | None, token: str | bool | None) -> Checkpoint:
    if repo == REPO:
        logger.warning("%s/%s: weights %s", repo, file, LICENSE_TEXT)
    name = f"{repo}/{file}"
    return _load_file(
        Path(fetch(repo, file, revision, token)), name, published_method(file) if repo == REPO else None, origin=name
    )


def _load_hub_folder(repo: str, revision: str | None, token: str | bool | None) -> Checkpoint:
    config, weights = (fetch(repo, file, revision, token) for file in (CONFIG_FILE, WEIGHTS_FILE))
    return _load_folder(config, weights, repo)


def _load_folder(config_file: Path, weights_file: Path, name: str) -> Checkpoint:
    if not config_file.is_file():
        raise FileNotFoundError(
            f"weights={name!r} is a directory without {CONFIG_FILE}, so clear_attn.save_pretrained() did not write "
            "it completely; give a .safetensors file in it, or save it again"
        )
    record = read_record(config_file)
    values, _ = read_checkpoint(weights_file)
    factor = pooled_factor(values)
    if record.method.pooled_factor not in (None, factor):
        raise ValueError(
            f"{config_file} says {record.method.as_arguments()}, and the weights next to it were distilled for "
            f"down_factor={factor}; save or fetch both again"
        )
    return Checkpoint(values, name, name, record.method, factor, record.architecture, record.source, record.schedule)

"""Find distilled weights: in a file, in a folder, on the Hub, or published for a model."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clear_attn.methods import Method
from clear_attn.methods.records import method_from_dict
from clear_attn.methods.schedule import Schedule
from clear_attn.utils.validation import check_no_revision
from clear_attn.weights.hub import HUB_ID
from clear_attn.weights.metadata import CONFIG_FILE, WEIGHTS_FILE, read_record
from clear_attn.weights.parameters import pooled_factor, read_checkpoint
from clear_attn.weights.published import (
    HubRepository,
    PublishedWeights,
    published_as,
    published_for,
    published_from,
    published_in,
)
from clear_attn.weights.recognition import Model

# Values of `weights` that are easily misspelled, in lower case.
MEANT = {"none": "None", "auto": "'auto'"}
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
        training: facts about their training; None if not recorded.
    """

    values: dict[str, Tensor]
    name: str
    label: str
    method: Method | None
    down_factor: int = 1
    architecture: str | None = None
    origin: str | None = None
    schedule: Schedule = Schedule()
    training: Mapping[str, Any] | None = None


def with_absolute_path(weights: str | os.PathLike[str] | None) -> str | None:
    """Return the argument of `linearize` with a local path made absolute.

    From another working directory, a relative path would be taken for a Hub id.
    """
    if weights is None:
        return None
    path = Path(weights).expanduser()
    return str(path.resolve()) if path.exists() else os.fspath(weights)


def has_revision(weights: str | None) -> bool:
    """Return whether the argument of `linearize`, with an absolute path, may name weights on the Hub."""
    return weights is not None and (weights == "auto" or HUB_FILE.fullmatch(weights) is not None)


def shared_name(weights: str) -> str:
    """Return a Hub id, or the name of a local file or folder without its absolute path."""
    return weights if HUB_FILE.fullmatch(weights) else Path(weights).name


def load(
    weights: str | os.PathLike[str],
    model: Model,
    wanted: Method,
    fits: Callable[[Method], bool],
    revision: str | None,
    token: str | bool | None,
) -> Checkpoint:
    """Find and read the weights that the arguments of `linearize` name.

    Args:
        weights: the argument.
        model: the model to load them for.
        wanted: the method that the other arguments name, with defaults.
        fits: whether the other arguments name a method or leave it open; of several published files the first that
            fits is read.
        revision, token: the arguments.

    Raises:
        TypeError: `weights` is not a path or name.
        ValueError, FileNotFoundError, PermissionError, ConnectionError: they do not exist or cannot be read.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights must be a path, a Hub id, 'auto' or None, got {weights!r} of type {type(weights).__name__}"
        )
    if weights == "auto":
        published = published_for(model)
        file = published.files[published.select(fits, wanted)]
        _warn_of_fine_tune(published, file, model)
        return _load_published(published, file, revision, token)
    path = Path(weights).expanduser()
    if not path.exists() and (meant := MEANT.get(str(weights).lower())):
        raise ValueError(f"weights={str(weights)!r} does not exist; did you mean weights={meant}?")
    if not path.exists() and (recorded := published_from(str(weights))):
        return _load_published(*recorded, revision, token)
    on_hub = HUB_FILE.fullmatch(weights) if isinstance(weights, str) else None
    # "folder/file.safetensors" has the form of a repository id, but means a file.
    if path.exists() or not on_hub or (on_hub[2] is None and path.suffix == ".safetensors"):
        if path.exists():
            check_no_revision(revision, f"{path} is on this machine")
        return _load_local(path)
    repo, file_in_repo = on_hub.groups()
    known = published_in(repo)
    if known:
        return _load_published(known, file_in_repo or known.files[known.select(fits, wanted)], revision, token)
    return _load_hub(repo, file_in_repo, revision, token)


def _warn_of_fine_tune(published: PublishedWeights, file: str, model: Model) -> None:
    if published.recognizer.is_fine_tune(model):
        logger.warning(
            "%s is not %s by name: the published weights replace its own to_q, to_k, to_v and to_out.0 in every "
            "attention layer, and a fine-tune's changes there are lost while it is linearized. weights=None keeps "
            "them; weights='%s' does the same without this warning.",
            model.name or f"an unnamed {type(model.transformer).__name__}",
            published.base_model,
            published.location.name(file),
        )


def _load_published(
    published: PublishedWeights, file: str, revision: str | None, token: str | bool | None
) -> Checkpoint:
    location = published.location
    if published.license:
        logger.warning("%s: weights %s", location.name(file), published.license.text)
    path = location.fetch(file, revision, token)
    if path.name == WEIGHTS_FILE:
        config = location.fetch(f"{file.removesuffix(WEIGHTS_FILE)}{CONFIG_FILE}", revision, token)
        found = _load_folder(config, path, location.name(file))
    else:
        found = _load_file(path, location.name(file), published.method_of(file))
    return found._replace(label=location.origin(file), origin=location.origin(file))


def _load_local(path: Path) -> Checkpoint:
    folder, weights = (path, path / WEIGHTS_FILE) if path.is_dir() else (path.parent, path)
    if path.is_dir() or (path.name == WEIGHTS_FILE and (folder / CONFIG_FILE).is_file()):
        found = _load_folder(folder / CONFIG_FILE, weights, str(path))
    else:
        published, origin = published_as(path.name)
        found = _load_file(path, str(path), published)._replace(origin=origin)
    return found._replace(label=path.resolve().name)


def _load_file(path: Path, name: str, published: Method | None = None) -> Checkpoint:
    """Read a file that has no clear_config.json. Its method may be recorded in the file's own metadata."""
    values, recorded = read_checkpoint(path)
    factor = pooled_factor(values)
    pools = published is not None and published.pooled_factor is not None
    method = published.with_settings(None, factor) if published and pools else published
    if recorded is not None:
        method = method_from_dict(recorded, str(path))
    return Checkpoint(values, name, name, method, factor)


def _load_hub(repo: str, file: str | None, revision: str | None, token: str | bool | None) -> Checkpoint:
    location = HubRepository(repo)
    if file is None:
        config, weights = (location.fetch(each, revision, token) for each in (CONFIG_FILE, WEIGHTS_FILE))
        return _load_folder(config, weights, repo)
    return _load_file(location.fetch(file, revision, token), location.name(file))._replace(origin=location.origin(file))


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
    recorded = record.architecture, record.source, record.schedule, record.training
    return Checkpoint(values, name, name, record.method, factor, *recorded)

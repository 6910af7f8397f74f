"""Where distilled weights come from: a file, a folder, the Hub, or what is published for a model."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from clear_attn.methods import Method, named
from clear_attn.methods.schedule import Schedule
from clear_attn.utils.validation import ClearConfig
from clear_attn.weights.hub import fetch
from clear_attn.weights.metadata import CONFIG_FILE, read_record
from clear_attn.weights.parameters import method_in, pooled_factor, read_checkpoint
from clear_attn.weights.published import BASE, FILES, LICENCE, REPO, check_served, published_file, window_of

WEIGHTS_FILE = "clear_weights.safetensors"
HUB_FILE = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:/(.+\.safetensors))?")

logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """Distilled weights, not yet compared with a model.

    Attributes:
        values: tensors by name.
        name: where they came from, as a user would give it.
        window, down_factor: what they were distilled for; a window of None is unknown, or of another method.
        method: what they were distilled for, where that is not CLEAR.
        architecture: the class of transformer they are for, where that is known.
        source: where they first came from, which `name` may be a copy of.
        schedule: what they were saved with.
    """

    values: dict[str, Tensor]
    name: str
    window: int | None
    down_factor: int | None
    method: Method | None = None
    architecture: str | None = None
    source: str | None = None
    schedule: Schedule = Schedule()

    @property
    def unknown(self) -> bool:
        """Whether nothing tells what they were distilled for, but whether keys were pooled."""
        return self.window is None and self.method is None and self.down_factor == 1


def load(
    weights: str | os.PathLike[str],
    pipe: Any,
    transformer: Any,
    wanted: ClearConfig | Method,
    revision: str | None,
    token: str | bool | None,
) -> Checkpoint:
    """Finds and reads what `linearize` was asked for; its docstring tells the forms.

    Of several published files it takes the one for the settings that are wanted.

    Raises:
        TypeError: not a path or a name.
        ValueError, FileNotFoundError, PermissionError, ConnectionError: nothing there, or not to be read.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(
            f"weights must be a path, a Hub id, 'auto' or None, got {weights!r} of type {type(weights).__name__}"
        )
    if weights == "auto":
        return _load_auto(pipe, transformer, wanted, revision, token)
    path = Path(weights).expanduser()
    on_hub = HUB_FILE.fullmatch(weights) if isinstance(weights, str) else None
    # "folder/file.safetensors" could be a repository by its form; nobody means that.
    if path.exists() or not on_hub or (on_hub[2] is None and path.suffix == ".safetensors"):
        return _load_local(path)
    repo, file = on_hub.groups()
    if file is None and repo == REPO:
        config = _of_clear(wanted)
        file = published_file(config.window, config.down_factor)
    return _load_hub_folder(repo, revision, token) if file is None else _load_hub_file(repo, file, revision, token)


def _load_auto(
    pipe: Any, transformer: Any, wanted: ClearConfig | Method, revision: str | None, token: str | bool | None
) -> Checkpoint:
    config = _of_clear(wanted)
    fine_tune = check_served(pipe, transformer)
    file = published_file(config.window, config.down_factor)
    if fine_tune:
        logger.warning(
            "%s is not %s by name: the published weights replace its own to_q, to_k, to_v and to_out.0 in every "
            "attention layer, and what it learned there is lost while it is linearized. weights=None keeps them; "
            "weights='%s/%s' says that you mean it.",
            fine_tune,
            BASE,
            REPO,
            file,
        )
    return _load_hub_file(REPO, file, revision, token)


def _of_clear(wanted: ClearConfig | Method) -> ClearConfig:
    """Raises ValueError for other methods, for which nothing is published."""
    if isinstance(wanted, Method):
        raise ValueError(
            f"no weights are published for {wanted}, only for CLEAR; give weights= a folder or a Hub id of some that "
            "were distilled for it, or None for the model's own"
        )
    return wanted


def _load_local(path: Path) -> Checkpoint:
    if path.is_dir():
        return _load_folder(path / CONFIG_FILE, path / WEIGHTS_FILE, str(path))
    if path.name == WEIGHTS_FILE and path.with_name(CONFIG_FILE).is_file():
        return _load_folder(path.with_name(CONFIG_FILE), path, str(path))
    source = f"{REPO}/{path.name}" if path.name in FILES.values() else None
    return _load_file(path, str(path), window_of(path.name), source)


def _load_file(path: Path, name: str, window: int | None, source: str | None) -> Checkpoint:
    """Without a record; other methods than CLEAR are told in the file itself."""
    values, method = read_checkpoint(path), method_in(path)
    if method:
        return Checkpoint(values, name, None, None, named(method), source=source)
    return Checkpoint(values, name, window, pooled_factor(values), source=source)


def _load_hub_file(repo: str, file: str, revision: str | None, token: str | bool | None) -> Checkpoint:
    if repo == REPO:
        logger.warning("%s/%s: weights %s", repo, file, LICENCE)
    name = f"{repo}/{file}"
    return _load_file(
        Path(fetch(repo, file, revision, token)), name, window_of(file) if repo == REPO else None, source=name
    )


def _load_hub_folder(repo: str, revision: str | None, token: str | bool | None) -> Checkpoint:
    config, weights = (fetch(repo, file, revision, token) for file in (CONFIG_FILE, WEIGHTS_FILE))
    return _load_folder(config, weights, repo)


def _load_folder(config_file: Path, weights_file: Path, name: str) -> Checkpoint:
    if not config_file.is_file():
        raise FileNotFoundError(
            f"weights={name!r} is a directory without {CONFIG_FILE}, not one that clear_attn.save_pretrained() wrote "
            "in full; give a .safetensors file in it, or save it again"
        )
    record = read_record(config_file)
    values = read_checkpoint(weights_file)
    config, about = record.config, (record.architecture, record.source, record.schedule)
    if isinstance(config, Method):
        return Checkpoint(values, name, None, None, config, *about)
    factor = pooled_factor(values)
    if factor != config.down_factor:
        raise ValueError(
            f"{config_file} says down_factor={config.down_factor}, and the weights beside it were distilled for "
            f"{factor}; save or fetch both again"
        )
    return Checkpoint(values, name, config.window, factor, None, *about)

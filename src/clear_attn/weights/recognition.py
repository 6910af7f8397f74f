"""Recognize the models for which distilled weights are published."""

from __future__ import annotations

import abc
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.models._diffusers import name_or_path_of
from clear_attn.models.class_names import is_exactly
from clear_attn.utils.json_records import read_json
from clear_attn.utils.tensor_files import read_tensors
from clear_attn.weights.hub import HUB_ID


class Model(NamedTuple):
    """A model to find weights for.

    Attributes:
        pipe: the pipeline or transformer that a user gave.
        transformer: its transformer, with its own values or others in its attention.
        originals: its own values of the parameters that were replaced, by name.
    """

    pipe: Any
    transformer: Any
    originals: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The Hub id or path that it was loaded from, or ""."""
        return name_of(self.pipe, self.transformer)

    def __str__(self) -> str:
        pipeline = f" in a {type(self.pipe).__name__}" if hasattr(self.pipe, "transformer") else ""
        name = f", {self.name}" if self.name else ""
        return f"a {type(self.transformer).__name__}{pipeline}{name}"


class Recognizer(abc.ABC):
    """Recognize the model that weights were distilled for.

    Attributes:
        names: the Hub ids of the model, if it is on the Hub.
    """

    names: tuple[str, ...] = ()

    @abc.abstractmethod
    def recognizes(self, model: Model) -> bool:
        """Return whether the weights are for a model."""

    def is_fine_tune(self, model: Model) -> bool:
        """Return whether a recognized model may have attention of its own, which the weights would replace."""
        return False


@dataclass(frozen=True)
class ByName(Recognizer):
    """Recognize models by the class and config of their transformer, and by their name.

    Attributes:
        architecture: the transformer class in diffusers.
        config: entries of its config that other models of this class do not have.
        names: the Hub ids of the models. A folder with the same name counts as a copy.
    """

    architecture: str
    config: Mapping[str, Any]
    names: tuple[str, ...] = ()

    def recognizes(self, model: Model) -> bool:
        return self._has_architecture(model) and self._is_named(model)

    def _has_architecture(self, model: Model) -> bool:
        own = {setting: model.transformer.config.get(setting) for setting in self.config}
        return is_exactly(model.transformer, [self.architecture]) and own == self.config

    def _is_named(self, model: Model) -> bool:
        if looks_like_hub_id(model.name):
            return model.name in self.names
        return Path(model.name).name in {Path(name).name for name in self.names}


@dataclass(frozen=True)
class WithFineTunes(ByName):
    """Recognize fine-tunes, too: models of any other name with the same architecture.

    Attributes:
        other_tasks: words in the names of models, or of their pipelines, that have the same architecture and another
            task.
    """

    other_tasks: tuple[str, ...] = ()

    def recognizes(self, model: Model) -> bool:
        names = f"{type(model.pipe).__name__} {model.name}".lower()
        return self._has_architecture(model) and not any(task.lower() in names for task in self.other_tasks)

    def is_fine_tune(self, model: Model) -> bool:
        return not self._is_named(model)


@dataclass(frozen=True)
class ByValues(Recognizer):
    """Recognize a model by its config and its values, wherever it was loaded from and in whatever dtype.

    Attributes:
        folder: the model's transformer, as diffusers saves it in one file.
        ignored: a regular expression; values with such names may differ. None compares all.
    """

    folder: Path
    ignored: str | None = None

    def recognizes(self, model: Model) -> bool:
        own = read_json(self.folder / "config.json")
        config = {name: model.transformer.config.get(name) for name in own if not name.startswith("_")}
        expected = {name: value for name, value in own.items() if not name.startswith("_")}
        # The text of a tuple in a config is that of a list.
        if not is_exactly(model.transformer, [own["_class_name"]]) or json.dumps(config) != json.dumps(expected):
            return False
        # A LoRA wraps a layer and keeps it as its base layer.
        parameters = {name.replace(".base_layer.", "."): value for name, value in model.transformer.named_parameters()}
        values, _ = read_tensors(self.folder / "diffusion_pytorch_model.safetensors")
        own_values = {**parameters, **model.originals}
        return all(
            _same(own_values.get(name), value)
            for name, value in values.items()
            if self.ignored is None or not re.search(self.ignored, name)
        )


def _same(value: Tensor | None, expected: Tensor) -> bool:
    """Return whether a value is the expected one in its own dtype; a sharded one or one on meta is not."""
    if value is None or type(value.data) is not Tensor or value.is_meta:
        return False
    return torch.equal(value.detach().cpu().float(), expected.to(value.dtype).float())


def name_of(pipe: Any, transformer: Any) -> str:
    """Return the Hub id or path that a transformer or its pipeline was loaded from, "" if neither has one."""
    path = path_of(pipe, transformer)
    return cached_id(path) or path


def path_of(pipe: Any, transformer: Any) -> str:
    """Return the path that a transformer or its pipeline was loaded from, which may be a Hub id, or ""."""
    configs = (getattr(part, "config", {}) for part in (transformer, pipe))
    return next(filter(None, map(name_or_path_of, configs)), "").removesuffix("/transformer")


def cached_id(path: str) -> str | None:
    """Return the id of the repository whose snapshot in a cache of the Hub a path names, or None."""
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots", path)
    return "/".join(cached.groups()) if cached else None


def looks_like_hub_id(name: str) -> bool:
    """Return whether a name has the form of a Hub id and is not a local path."""
    return re.fullmatch(HUB_ID, name) is not None and not os.path.exists(name)

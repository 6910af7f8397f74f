"""Load pipelines of diffusers, ordinary and modular ones."""

from __future__ import annotations

import inspect
import os
from typing import Any

import diffusers
import torch
from huggingface_hub.errors import EntryNotFoundError

from clear_attn.models import adapter_for
from clear_attn.models._diffusers import load_modular, load_pretrained, progress_bar_config_of
from clear_attn.utils.validation import check_no_revision

ORDINARY_INDEX = "model_index.json"


def load_pipeline(name: str | os.PathLike[str], dtype: torch.dtype, revision: str | None = None) -> Any:
    """Load a pipeline from a folder or the Hub.

    The components of a modular pipeline are loaded, and it becomes an ordinary one if diffusers has one for its model.

    Raises:
        OSError: there is no such model, or no index of a pipeline.
        RuntimeError: components of a modular pipeline cannot be loaded.
        ValueError: a revision is given for a folder. ValueError, AttributeError: diffusers cannot read it.
    """
    if os.path.isdir(name):
        check_no_revision(revision, f"{name} is on this machine")
    options = {} if revision is None else {"revision": revision}
    try:
        return load_pretrained(diffusers.DiffusionPipeline, name, dtype=dtype, **options)
    except (OSError, EntryNotFoundError) as error:
        if ORDINARY_INDEX not in str(error):
            raise
        pipe = load_modular(name, dtype=dtype, **options)
        if pipe is None:
            raise
    specs = {each: pipe.get_component_spec(each) for each in pipe.null_component_names}
    failed = [each for each, spec in specs.items() if spec.pretrained_model_name_or_path is not None]
    if failed:
        raise RuntimeError(
            f"{name} is a {type(pipe).__name__}, and diffusers could not load its {', '.join(failed)} (see its warning "
            "above); load it with diffusers.ModularPipeline, and save it complete"
        )
    return as_ordinary(pipe)


def as_ordinary(modular: Any) -> Any:
    """Return the ordinary pipeline with the components of a modular one, or the modular one if diffusers has none."""
    adapter = adapter_for(modular.transformer)
    pipelines = adapter.highres_pipelines if adapter else ()
    found = next((each.text_to_image for each in pipelines if each.is_modular(modular)), None)
    return with_components_of(modular, getattr(diffusers, found)) if found and hasattr(diffusers, found) else modular


def with_components_of(modular: Any, cls: Any) -> Any:
    """Return a pipeline of a class with the components and settings of a modular one.

    Raises:
        RuntimeError: components are not loaded.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    given = {**modular.config, **modular.components}
    parts = {each.name: given.get(each.name) for each in parameters if given.get(each.name) is not None}
    needed = [each.name for each in parameters if each.default is each.empty or each.name in modular.components]
    missing = [name for name in needed if name not in parts]
    if missing:
        raise RuntimeError(
            f"this {type(modular).__name__} has not loaded its {', '.join(missing)} yet; call "
            f"pipe.load_components({missing!r}) first, or give one whose blocks do not use them"
        )
    pipe = cls(**parts)
    pipe.set_progress_bar_config(**progress_bar_config_of(modular))
    return pipe

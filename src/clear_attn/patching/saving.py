"""Distilled weights, written: to a folder, and to the Hub."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors.torch import save_file
from torch import Tensor

from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.patching.changes import changed_parameters
from clear_attn.patching.target import find_target, find_transformer
from clear_attn.utils.atomic import atomic_file, check_folder
from clear_attn.weights.metadata import CONFIG_FILE, Record, metadata_of
from clear_attn.weights.parameters import (
    DTYPES,
    METHOD,
    check_in_memory,
    check_replaceable,
    own_parameters,
    replaced_parameters,
)
from clear_attn.weights.published import BASE, LICENCE, base_model_of, is_published
from clear_attn.weights.sources import WEIGHTS_FILE

CARD_FILE = "README.md"


def save_pretrained(pipe: Any, directory: str | os.PathLike[str]) -> None:
    """Saves what distillation trains of a linearized pipeline, and what it takes to use it, nothing else.

    Writes `clear_weights.safetensors` (the projections that distilled weights replace, and the pooled weights, in
    the model's own dtype), `clear_config.json` and a model card. They appear when all are written; until then an
    earlier save in the same directory stays as it was. A README.md that is there is left alone.

    Args:
        pipe: a linearized pipeline or transformer.
        directory: where to; made where there is none.

    Raises:
        TypeError: not a supported pipeline.
        RuntimeError: it is not linearized, or no longer in whole; it has the model's own weights, and nothing was
            trained; its parameters are on the meta device, stored in
            eight bits, or mixed with a fused LoRA.
        NotADirectoryError: ``directory`` is a file.
    """
    target = find_target(pipe)
    hook, layers = target.hook, target.layers
    if hook is None:
        raise RuntimeError("this pipeline is not linearized, so there is nothing to save; call clear_attn.linearize()")
    folder = check_folder(directory)
    hook.validate_installed(target.transformer)
    check_in_memory(target.transformer, layers)
    check_replaceable(layers)
    metadata = metadata_of(target.transformer)
    if metadata and metadata["weights"] is None and not changed_parameters(target):
        raise RuntimeError(
            "this pipeline has the model's own weights (weights=None), and nothing was trained since, so there is "
            "nothing to save: the same call of clear_attn.linearize() gives the same pipeline again; train with "
            "`python -m clear_attn.distill`, or give distilled weights first"
        )
    values = {name: parameter.detach() for name, parameter in replaced_parameters(layers).items()}
    coarse = next((value.dtype for value in values.values() if value.dtype not in DTYPES), None)
    if coarse:
        raise RuntimeError(
            f"this model's weights are stored in {coarse} by layerwise casting, and would be saved so; save before "
            "enable_layerwise_casting()"
        )
    values |= {name: own.detach() for name, own in own_parameters(target.processors).items()}
    save_values(pipe, hook.method, values, folder, hook.schedule)


def save_values(
    pipe: Any,
    method: Method,
    values: Mapping[str, Tensor],
    folder: Path,
    schedule: Schedule = Schedule(),  # noqa: B008, for it is frozen
) -> None:
    """Writes distilled weights, by their names in a checkpoint, as `save_pretrained` does."""
    transformer, _ = find_transformer(pipe)
    values = {name: value.to("cpu").contiguous() for name, value in values.items()}
    metadata = metadata_of(transformer)
    source = metadata["source"] if metadata else None
    record = Record(method, type(transformer).__name__, base_model_of(pipe, transformer), source, schedule)
    folder.mkdir(parents=True, exist_ok=True)
    # An existing card may be the user's own.
    card = {} if (folder / CARD_FILE).exists() else {CARD_FILE: _card(record)}
    # The files take their places in reverse: the weights first, and the record last.
    with contextlib.ExitStack() as files:
        for name, text in {CONFIG_FILE: record.to_json(), **card}.items():
            files.enter_context(atomic_file(folder / name)).write_text(text, encoding="utf-8")
        # A file may be parted from its record.
        recorded = {METHOD: json.dumps(method.to_dict())}
        save_file(
            values, files.enter_context(atomic_file(folder / WEIGHTS_FILE)), metadata={"format": "pt", **recorded}
        )
        # Never an old record with new weights.
        (folder / CONFIG_FILE).unlink(missing_ok=True)


def push_to_hub(
    pipe: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload CLEAR weights",
) -> str:
    """Uploads what `save_pretrained` writes.

    Args:
        pipe: a linearized pipeline or transformer.
        repo_id (`str`): `owner/repo`; made where there is none.
        private (`bool`, *optional*): whether a new repository is private; by default as the owner's settings say.
        token (`str` or `bool`, *optional*): of the Hub, with the right to write; by default that of `hf auth login`.
        commit_message (`str`): of the upload.

    Returns:
        The address of the commit.

    Raises:
        As `save_pretrained`, and huggingface_hub's own errors.
    """
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(pipe, directory)
        repo = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=repo.repo_id, folder_path=directory, token=token, commit_message=commit_message
        )
    return str(commit.commit_url)


def _card(record: Record) -> str:
    name = record.method.title
    head = ["library_name: clear_attn", "tags:", f"- {name.lower()}", "- text-to-image"]
    model, licence = "a " + record.architecture, ""
    if record.base_model:
        head += [f"base_model: {record.base_model}"]
        model = f"[{record.base_model}](https://huggingface.co/{record.base_model})"
    if record.base_model == BASE or is_published(record.source):
        head += ["license: other", "license_name: flux-1-dev-non-commercial-license"]
        licence = f"\nThe weights are {LICENCE}.\n"
    return f"""---
{chr(10).join(head)}
---

# {name} weights for {model}

Projections of query, key, value and output {record.method.purpose(model)}
{licence}
```python
import clear_attn as clear

clear.linearize(pipe, weights="this repository's id, or a folder with its files")
```
"""

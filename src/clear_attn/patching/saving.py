"""Save distilled weights to a folder or to the Hub."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from clear_attn.methods import Method
from clear_attn.methods.schedule import Schedule
from clear_attn.patching.changes import changed_parameters
from clear_attn.patching.target import find_target, find_transformer
from clear_attn.utils.atomic import atomic_file, check_folder
from clear_attn.utils.tensor_files import write_tensors
from clear_attn.weights.hub import check_upload, upload
from clear_attn.weights.metadata import CONFIG_FILE, WEIGHTS_FILE, Record, metadata_of
from clear_attn.weights.parameters import (
    DTYPES,
    METHOD,
    check_in_memory,
    check_replaceable,
    own_parameters,
    replaced_parameters,
)
from clear_attn.weights.published import base_model_of, license_of, shared_name_of

CARD_FILE = "README.md"


def save_pretrained(pipe: Any, directory: str | os.PathLike[str]) -> None:
    """Save the distilled attention weights of a linearized pipeline and their settings.

    Writes `clear_weights.safetensors` (the query, key, value and output projections and the method's own parameters,
    in the model's dtype), `clear_config.json`, and a model card unless there is a README.md. The files appear
    together when all are written; until then an earlier save in the directory stays as it is.

    Args:
        pipe: a linearized pipeline or transformer.
        directory: created if missing.

    Raises:
        TypeError: the pipeline is not supported.
        RuntimeError: it is not linearized, or parts of that were removed; it has the model's own weights, and nothing
            was trained; its parameters are on the meta device, stored in eight bits, or mixed with a fused LoRA.
        NotADirectoryError: ``directory`` is a file.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline())
        >>> clear.save_pretrained(pipe, "my-clear")  # doctest: +SKIP
        >>> clear.linearize(demo.pipeline(), weights="my-clear")  # doctest: +SKIP
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
    # What was trained since is not in the record of the training before.
    training = metadata["training"] if metadata and not changed_parameters(target) else None
    save_values(pipe, hook.method, values, folder, hook.schedule, training)


def save_values(
    pipe: Any,
    method: Method,
    values: Mapping[str, Tensor],
    folder: Path,
    schedule: Schedule = Schedule(),  # noqa: B008, for it is frozen
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write distilled weights, by their names in a checkpoint, as `save_pretrained` does.

    `training` has facts about their training for the record, as values of JSON.
    """
    transformer, _ = find_transformer(pipe)
    values = {name: value.to("cpu").contiguous() for name, value in values.items()}
    metadata = metadata_of(transformer)
    source = metadata["source"] if metadata else None
    record = Record(
        method,
        type(transformer).__name__,
        base_model_of(pipe, transformer),
        source,
        schedule,
        model=shared_name_of(pipe, transformer) or None,
        training=training,
    )
    folder.mkdir(parents=True, exist_ok=True)
    # An existing card may be the user's own.
    card = {} if (folder / CARD_FILE).exists() else {CARD_FILE: _card(record)}
    # The files are renamed in reverse: the weights first, and the record last.
    with contextlib.ExitStack() as files:
        for name, text in {CONFIG_FILE: record.to_json(), **card}.items():
            files.enter_context(atomic_file(folder / name)).write_text(text, encoding="utf-8")
        # The weights may be copied without the record.
        recorded = {METHOD: json.dumps(method.to_dict())}
        write_tensors(
            values, files.enter_context(atomic_file(folder / WEIGHTS_FILE)), metadata={"format": "pt", **recorded}
        )
        # An interrupt must not leave an old record with new weights.
        (folder / CONFIG_FILE).unlink(missing_ok=True)


def push_to_hub(
    pipe: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload CLEAR weights",
) -> str:
    """Upload the files of `save_pretrained` to the Hub.

    Args:
        pipe: a linearized pipeline or transformer.
        repo_id (`str`): `owner/repo`, created if missing.
        private (`bool`, *optional*): whether a new repository is private; by default the owner's setting.
        token (`str` or `bool`, *optional*): a Hub token with write access; by default that of `hf auth login`.
        commit_message (`str`): the message of the commit.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: `repo_id` is not an id.
        PermissionError: there is no token, or it has no write access.
        ConnectionError: the Hub cannot be reached, or HF_HUB_OFFLINE is set.
        And the errors of `save_pretrained`.

    Examples:
        >>> clear.push_to_hub(pipe, "me/my-clear")  # doctest: +SKIP
    """
    check_upload(repo_id, token)
    with tempfile.TemporaryDirectory() as directory:
        save_pretrained(pipe, directory)
        return upload(Path(directory), repo_id, private, token, commit_message)


def _card(record: Record) -> str:
    name = record.method.title
    head = ["library_name: clear_attn", "tags:", f"- {name.lower()}", "- text-to-image"]
    model, license = "a " + record.architecture, ""
    if record.base_model:
        head += [f"base_model: {record.base_model}"]
        model = f"[{record.base_model}](https://huggingface.co/{record.base_model})"
    if known := license_of(record.base_model, record.source):
        head += ["license: other", f"license_name: {known.name}"]
        license = f"\nThe weights are {known.text}.\n"
    facts = "\n".join(f"- {fact.replace('_', ' ')}: {value}" for fact, value in (record.training or {}).items())
    training = f"\nTraining:\n\n{facts}\n" if facts else ""
    return f"""---
{chr(10).join(head)}
---

# {name} weights for {model}

Projections of query, key, value and output {record.method.purpose(model)}
{license}{training}
```python
import clear_attn as clear

clear.linearize(pipe, weights="this repository's id, or a folder with its files")
```
"""

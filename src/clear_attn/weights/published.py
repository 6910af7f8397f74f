"""The distilled weights that are published, and the models that they are for.

An entry of `PUBLISHED` is all that `weights="auto"` needs to find weights for another model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clear_attn.methods import Clear, Method
from clear_attn.models import adapter_for
from clear_attn.models.pipeline_defaults import native_grid
from clear_attn.utils.validation import check_no_revision
from clear_attn.weights import packaged
from clear_attn.weights.hub import fetch, in_cache
from clear_attn.weights.metadata import WEIGHTS_FILE
from clear_attn.weights.recognition import (
    ByValues,
    Model,
    Recognizer,
    WithFineTunes,
    cached_id,
    looks_like_hub_id,
    path_of,
)


class HubRepository(NamedTuple):
    """A repository on the Hub, by its id."""

    id: str

    def fetch(self, file: str, revision: str | None, token: str | bool | None) -> Path:
        """Return the path of a file."""
        return fetch(self.id, file, revision, token)

    def name(self, file: str) -> str:
        """Return the argument of `linearize` that gives a file."""
        return self.origin(file)

    def origin(self, file: str) -> str:
        """Return what records name as the origin of weights."""
        return f"{self.id}/{file}"


class PackagedFolder(NamedTuple):
    """A folder in this package."""

    path: Path

    def fetch(self, file: str, revision: str | None, token: str | bool | None) -> Path:
        """Return the path of a file.

        Raises:
            ValueError: a revision is given, and a package has none.
        """
        check_no_revision(revision, "these weights are in the package")
        return self.path / file

    def name(self, file: str) -> str:
        """Return the argument of `linearize` that gives a file, the same on any machine."""
        return "auto"

    def origin(self, file: str) -> str:
        """Return what records name as the origin of weights: no path, and not of the form of a Hub id."""
        return "_".join((self.path.name, *Path(file).parent.parts))


class License(NamedTuple):
    """The license of weights: its name in model cards, and a sentence about it after "The weights are"."""

    name: str
    text: str


@dataclass(frozen=True)
class PublishedWeights:
    """The weights that are published for a model.

    Attributes:
        location: a repository on the Hub, or a folder in this package.
        files: the file for each method; without other arguments, `linearize` takes the first. One that
            `save_pretrained` wrote, `clear_weights.safetensors` in the repository or in a folder of it, has its
            `clear_config.json` next to it.
        recognizer: recognizes the model.
        base_model: the Hub id of the model, or its name.
        license: the license, if it needs a warning.
    """

    location: HubRepository | PackagedFolder
    files: Mapping[Method, str]
    recognizer: Recognizer
    base_model: str
    license: License | None = None

    def select(self, fits: Callable[[Method], bool], wanted: Method) -> Method:
        """Return the first method that fits the arguments of `linearize`.

        Raises:
            ValueError: none does; the message lists those that exist.
        """
        found = next(filter(fits, self.files), None)
        if found is None:
            existing = "; ".join(method.as_arguments() for method in self.files)
            raise ValueError(
                f"no weights are published for {wanted.as_arguments()}; for {self.base_model} there are some for "
                f"{existing}; give one of these, weights= a folder or a Hub id of others, or weights=None to keep the "
                "model's own (training-free)"
            )
        return found

    def method_of(self, file: str) -> Method | None:
        """Return the method of a file, or None for a file of another name."""
        return next((method for method, name in self.files.items() if name == file), None)


FLUX_LICENSE = License(
    "flux-1-dev-non-commercial-license",
    "derived from FLUX.1-dev and under its non-commercial license, "
    "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
)

# The image tokens of 1024 px, for which most models are trained.
USUAL_GRID = (64, 64)

PUBLISHED: list[PublishedWeights] = [
    PublishedWeights(
        HubRepository("Huage001/CLEAR"),
        {
            Clear(16, 1): "clear_local_16.safetensors",
            Clear(8, 1): "clear_local_8.safetensors",
            Clear(32, 1): "clear_local_32.safetensors",
            Clear(16, 4): "clear_local_16_down_4.safetensors",
            Clear(8, 4): "clear_local_8_down_4.safetensors",
        },
        WithFineTunes(
            "FluxTransformer2DModel",
            # Smaller models differ in these, and Fill, Control and Redux variants have wider inputs.
            {
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "num_attention_heads": 24,
                "attention_head_dim": 128,
            },
            names=("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"),
            other_tasks=("Kontext",),
        ),
        base_model="black-forest-labs/FLUX.1-dev",
        license=FLUX_LICENSE,
    ),
    PublishedWeights(
        PackagedFolder(packaged.WEIGHTS),
        {Clear(*variant): f"{folder}/{WEIGHTS_FILE}" for variant, folder in packaged.FOLDERS.items()},
        ByValues(packaged.MODEL / "transformer"),
        base_model="the small FLUX",
    ),
]


def published_for(model: Model) -> PublishedWeights:
    """Return the weights that are published for a model.

    Raises:
        ValueError: there are none; the message says how to run the model without, and how to train some.
    """
    found = next((each for each in PUBLISHED if each.recognizer.recognizes(model)), None)
    if found is None:
        raise ValueError(f"weights='auto' finds none for this model, {model}; {_remedies(model)}")
    return found


def _remedies(model: Model) -> str:
    """Return what to do without distilled weights, in words."""
    adapter = adapter_for(model.transformer)
    trains = adapter is not None and adapter.training is not None
    train = ", or train some with `python -m clear_attn.distill` and give their folder" if trains else ""
    grid = native_grid(model.pipe, model.transformer, adapter)
    size = f"its {_size(grid)}" if grid else f"{_size(USUAL_GRID)}, if that is its size"
    return (
        f"give weights=None for its own (training-free){train}. Training-free, a window that covers the images that it "
        f"was trained on keeps their attention: window={_covering_window(grid or USUAL_GRID)} for {size}; the smaller "
        "the window, the more its images change"
    )


def _size(grid: tuple[int, int]) -> str:
    return f"{grid[0]} x {grid[1]} tokens"


def _covering_window(grid: tuple[int, int]) -> int:
    """Return the smallest window with which attention is dense."""
    return math.isqrt((grid[0] - 1) ** 2 + (grid[1] - 1) ** 2) + 1


def published_in(repository: str) -> PublishedWeights | None:
    """Return the entry of a repository on the Hub, or None."""
    return next((each for each in PUBLISHED if each.location == HubRepository(repository)), None)


def published_from(origin: str) -> tuple[PublishedWeights, str] | None:
    """Return the entry and the file that records name as the origin of weights, or None."""
    files = ((each, file) for each in PUBLISHED for file in each.files.values())
    return next(((each, file) for each, file in files if each.location.origin(file) == origin), None)


def published_as(file: str) -> tuple[Method | None, str | None]:
    """Return the method and origin of a copy of a published file, by its name; None for each if it has another name."""
    named = [each for each in PUBLISHED if file != WEIGHTS_FILE and each.method_of(file)]
    return (named[0].method_of(file), named[0].location.origin(file)) if named else (None, None)


def license_of(base_model: str | None, source: str | None) -> License | None:
    """Return the license of weights by their model and origin, or None if none is known."""
    derived = (each for each in PUBLISHED if each.base_model == base_model or _is_from(each, source))
    return next((each.license for each in derived if each.license), None)


def _is_from(published: PublishedWeights, source: str | None) -> bool:
    return source is not None and source.startswith(published.location.origin(""))


def base_model_of(pipe: Any, transformer: Any) -> str | None:
    """Return the Hub id of a pipeline, or None if it was not loaded from the Hub.

    A relative path looks like a Hub id, so an id counts if the Hub's cache holds the repository.
    """
    path = path_of(pipe, transformer)
    return cached_id(path) or (path if _is_known(path) or (looks_like_hub_id(path) and in_cache(path)) else None)


def _is_known(name: str) -> bool:
    return any(name in each.recognizer.names for each in PUBLISHED)


def shared_name_of(pipe: Any, transformer: Any) -> str:
    """Return the Hub id of a pipeline, or the name of its folder without the path, for files that are shared."""
    return base_model_of(pipe, transformer) or Path(path_of(pipe, transformer)).name

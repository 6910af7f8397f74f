"""Options that several commands share, and what is made of them. Nothing heavy is imported before it is used."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    import torch

# By device type, unless --dtype is given.
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
OF_PIPELINE = "the pipeline's"
EXISTS = "{} exists; give another file, or --overwrite"

Model = Annotated[
    str,
    typer.Option(
        help="The diffusers pipeline: a folder or a Hub id (owner/repo), not a name as cost takes; demo is the small "
        "FLUX in the package."
    ),
]


def window(default: str) -> Any:
    """Return the option of a window, with its default in words."""
    return typer.Option(min=1, help="The radius of the window in tokens.", show_default=default)


def down_factor(default: str) -> Any:
    """Return the option of a down_factor, with its default in words."""
    return typer.Option(min=1, help="The side of pooled cells in tokens; 1 means no pooling.", show_default=default)


Window = Annotated[int | None, window("the weights', or 16")]
DownFactor = Annotated[int | None, down_factor("the weights', or 1")]
Weights = Annotated[
    str,
    typer.Option(
        help="The distilled weights: auto takes the published ones, none keeps the model's own (training-free); or "
        "give a folder, a .safetensors file or a Hub id."
    ),
]
HEIGHT = "The height of the image in pixels, rounded down to whole tokens."
WIDTH = "The width of the image in pixels, rounded down to whole tokens."
Height = Annotated[int | None, typer.Option(help=HEIGHT, show_default=OF_PIPELINE)]
Width = Annotated[int | None, typer.Option(help=WIDTH, show_default=OF_PIPELINE)]
TextTokens = Annotated[
    int | None, typer.Option(min=1, help="The length of the text in tokens.", show_default=OF_PIPELINE)
]
Device = Annotated[
    str | None, typer.Option(help="The device: cpu, cuda or cuda:N.", show_default="a GPU if there is one")
]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="The precision of the weights.", show_default="bfloat16; float32 on a CPU"),
]
# Eager, so that it is known when the outputs are checked.
Overwrite = Annotated[bool, typer.Option("--overwrite", is_eager=True, help="Replace outputs that exist.")]


def input_file(help: str, **settings: Any) -> Any:
    """Return an option that takes a file that exists."""
    return typer.Option(exists=True, dir_okay=False, help=help, **settings)


def refused(option: str, message: str) -> typer.BadParameter:
    """Return the error for the value of an option."""
    return typer.BadParameter(message, param_hint=f"'{option}'")


@contextlib.contextmanager
def refusing(option: str) -> Iterator[None]:
    """Report the errors of files and values in the block as errors for the value of an option."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise refused(option, str(error)) from error


def none_or(weights: str) -> str | None:
    """Return `--weights` as `linearize` takes it."""
    return None if weights.lower() == "none" else weights


def check_output(context: typer.Context, file: Path | None) -> Path | None:
    """Check that a file can be written: its folder exists, and the file does not, unless `--overwrite` is given.

    Raises:
        BadParameter: it cannot.
    """
    if file and not file.resolve().parent.is_dir():
        raise typer.BadParameter(f"no such directory: {file.resolve().parent}")
    if file and os.path.exists(file) and not context.params["overwrite"]:
        raise typer.BadParameter(EXISTS.format(file))
    return file


def check_image_output(context: typer.Context, file: Path) -> Path:
    """Check that an image can be saved as this file, by a trial write.

    Raises:
        BadParameter: as `check_output`; its format is unknown or loses pixels; nothing can be written there.
    """
    check_output(context, file)
    return check_image_can_be_saved(file)


def check_image_can_be_saved(file: Path) -> Path:
    """Check that an image can be saved as this file, which may exist, by a trial write.

    Raises:
        BadParameter: its format is unknown or loses pixels; nothing can be written there.
    """
    from clear_attn.utils.image_files import try_write, validate_image_file

    try:
        validate_image_file(file)
        try_write(file)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    return file


def select_device(name: str | None) -> torch.device:
    """Return the device of a name; without one, a GPU if there is one.

    Raises:
        BadParameter: it does not exist.
    """
    import torch

    gpus = torch.cuda.device_count()
    name = name or ("cuda" if gpus else "cpu")
    available = ["cpu", *(f"cuda:{number}" for number in range(gpus))]
    if name not in available and not (name == "cuda" and gpus):
        raise refused("--device", f"{name!r} does not exist; there is {', '.join(available)}")
    return torch.device(name)


def select_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; without one, the usual one of the device."""
    import torch

    dtype: torch.dtype = getattr(torch, name or DTYPES[device.type])
    return dtype


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype, *, offload: bool = False) -> Any:
    """Load a pipeline onto a device, or for offloading to it.

    Args:
        model: a folder, a Hub id, or `"demo"` for the small FLUX in the package.
        device, dtype: where it runs, and how precisely.
        offload: keep only the model at work on the GPU.

    Raises:
        BadParameter: there is no GPU to offload from, or no such model; diffusers cannot load it.
        ValueError: the device has no room for the weights.
        TypeError, RuntimeError: it is a modular pipeline that is not supported, or lacks components.
    """
    from diffusers import DiffusionPipeline

    from clear_attn.cascade.memory_check import check_weights_fit
    from clear_attn.cascade.pipelines import find_cascade_target
    from clear_attn.models._diffusers import load_modular, load_pretrained
    from clear_attn.weights.packaged import resolve_name

    if offload and device.type == "cpu":
        raise refused("--offload", "it saves a GPU's memory, and there is no GPU; leave it out")
    with refusing("--model"):
        name = resolve_name(model)
        try:
            pipe = load_pretrained(DiffusionPipeline, name, dtype=dtype)
        except (OSError, ValueError, AttributeError) as error:  # of a folder that diffusers cannot read
            has_no_index = "file named model_index.json" in str(error)
            if not has_no_index or (modular := load_modular(name, dtype=dtype)) is None:
                raise ValueError(f"diffusers cannot load {model!r} as a pipeline: {error}") from error
            pipe = find_cascade_target(modular).pipe
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    check_weights_fit(pipe, device)
    return pipe.to(device)

"""A small trained FLUX that ships with the library: it draws scenes of one to three colored shapes.

A plain diffusers `FluxPipeline` of 3 M parameters with its own autoencoder, text encoders and tokenizers, for
trying the library without a GPU or a download. `examples/train_small_flux.py` trained it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clear_attn.demo.flux_pipeline import TEXT_TOKENS, FluxPipeline
from clear_attn.demo.scenes import SIZE
from clear_attn.methods import Clear
from clear_attn.models._diffusers import load_pretrained
from clear_attn.models.pipeline_defaults import native_side
from clear_attn.weights import packaged

__all__ = ["SIZE", "TEXT_TOKENS", "distilled", "path", "pipeline"]


def path() -> Path:
    """Return the folder of the pipeline, for `FluxPipeline.from_pretrained`.

    Examples:
        >>> from clear_attn import demo
        >>> demo.path().name
        'small_flux'
    """
    return packaged.MODEL


def distilled(window: int = 8, down_factor: int = 1) -> Path:
    """Return the folder of its distilled weights, which `clear_attn.linearize` takes for it by itself.

    `examples/distill_small_flux.py` trained them for windows of 4, 8 and 16 of its 32 x 32 tokens, and for a window of
    8 with a down_factor of 4.

    Args:
        window: the radius in tokens.
        down_factor: of the pooled keys and values.

    Raises:
        ValueError: there are none for these arguments.

    Examples:
        >>> from clear_attn import demo
        >>> demo.distilled(16).name
        'window_16'
    """
    folder = packaged.FOLDERS.get((window, down_factor))
    if folder is None:
        raise ValueError(
            f"no weights are in the package for {window=}, {down_factor=}; there are some for {variants()}"
        )
    return packaged.WEIGHTS / folder


def variants() -> str:
    """Return the arguments of all distilled weights in the package, in words."""
    return "; ".join(Clear(*variant).as_arguments() for variant in packaged.FOLDERS)


def pipeline(dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """Load the pipeline. By default it draws at the size it was trained at, and pads prompts to 32 tokens.

    Args:
        dtype: of its models.

    Examples:
        >>> from clear_attn import demo
        >>> pipe = demo.pipeline()
        >>> image = pipe("a red circle on a blue ground, in the middle", num_inference_steps=12).images[0]
        >>> image.size
        (256, 256)
    """
    pipe: FluxPipeline = load_pretrained(FluxPipeline, path(), dtype=dtype, local_files_only=True)
    pipe.default_sample_size = native_side(pipe, pipe.transformer) // pipe.vae_scale_factor
    return pipe

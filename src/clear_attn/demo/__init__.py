"""A small trained FLUX that ships with the library: it draws one colored shape on a colored ground.

A plain diffusers `FluxPipeline` of 3 M parameters with its own autoencoder, text encoders and tokenizers, for
trying the library without a GPU or a download. `examples/train_small_flux.py` trained it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from clear_attn.demo.flux_pipeline import TEXT_TOKENS, FluxPipeline
from clear_attn.models._diffusers import load_pretrained
from clear_attn.models.pipeline_defaults import native_side
from clear_attn.weights import packaged

__all__ = ["SIZE", "TEXT_TOKENS", "distilled", "path", "pipeline"]

# Pixels; the size it was trained at, 16 x 16 tokens.
SIZE = 128


def path() -> Path:
    """Return the folder of the pipeline, for `FluxPipeline.from_pretrained`.

    Examples:
        >>> from clear_attn import demo
        >>> demo.path().name
        'small_flux'
    """
    return packaged.MODEL


def distilled() -> Path:
    """Return the folder of its distilled weights, which `clear_attn.linearize` takes for it by itself.

    A window of 8 of its 16 x 16 tokens, trained by `examples/distill_small_flux.py`.

    Examples:
        >>> from clear_attn import demo
        >>> demo.distilled().name
        'small_flux_clear'
    """
    return packaged.WEIGHTS


def pipeline(dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """Load the pipeline. By default it draws at the size it was trained at, and pads prompts to 24 tokens.

    Args:
        dtype: of its models.

    Examples:
        >>> from clear_attn import demo
        >>> pipe = demo.pipeline()
        >>> image = pipe("a red circle on a blue ground, in the middle").images[0]
        >>> image.size
        (128, 128)
    """
    pipe: FluxPipeline = load_pretrained(FluxPipeline, path(), dtype=dtype, local_files_only=True)
    pipe.default_sample_size = native_side(pipe, pipe.transformer) // pipe.vae_scale_factor
    return pipe

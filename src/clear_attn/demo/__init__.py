"""A small trained FLUX that ships with the library: it draws one coloured shape on a coloured ground.

A plain diffusers `FluxPipeline` of 3 M parameters with its own autoencoder, text encoders and tokenizers, for
trying the library without a GPU or a download. `examples/train_small_flux.py` made it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxPipeline

# Pixels; the size it was trained at, 16 x 16 tokens.
SIZE = 128
# The captions it knows are shorter; the default of FluxPipeline, 512, works too but takes three times as long.
TEXT_TOKENS = 24


def path() -> Path:
    """The folder of the pipeline, for `FluxPipeline.from_pretrained`."""
    return Path(__file__).parent / "small_flux"


def distilled() -> Path:
    """The folder of its distilled weights, for `clear_attn.linearize(pipe, weights=...)`.

    A window of 8 of its 16 x 16 tokens, trained by `examples/distill_small_flux.py`.
    """
    return Path(__file__).parent / "small_flux_clear"


def pipeline() -> FluxPipeline:
    """The pipeline, loaded in float32, which draws at the size it was trained at unless told otherwise."""
    pipe = FluxPipeline.from_pretrained(path(), dtype=torch.float32, local_files_only=True)
    pipe.default_sample_size = SIZE // pipe.vae_scale_factor
    return pipe

"""Tiny random pipelines of the families that have no small model in the box, and embedded text for some."""

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler

from tests.helpers import dummy_models


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unasked():
    """Return a text encoder that is not called: a pipeline reads the device from it."""
    return dummy_models.small_sd3().text_encoder_3


def flux2():
    """A FLUX.2 whose tokens have a side of 4 pixels, to be called with `flux2_text`."""
    torch.manual_seed(2)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=1,
        mid_block_add_attention=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    kind = diffusers.Flux2KleinPipeline  # which diffusers has from 0.37 on
    return _quiet(kind(scheduler, vae.eval(), unasked(), None, dummy_models.flux2_transformer()))


def flux2_text(negative=5):
    """Keywords of a call that tell what to draw and, in so many tokens, what not, random."""
    rng = torch.Generator().manual_seed(4)
    text, negative = torch.randn(2, 9, 12, generator=rng), torch.randn(2, negative, 12, generator=rng)
    return {"prompt_embeds": text, "negative_prompt_embeds": negative}


def qwen(kind, **parts):
    """A Qwen-Image pipeline of this class whose tokens have a side of 16 pixels, to be called with `qwen_text`."""
    torch.manual_seed(2)
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler, transformer = FlowMatchEulerDiscreteScheduler(shift=3.0), dummy_models.qwen_transformer()
    others = {"text_encoder": unasked(), "tokenizer": None, **parts}
    return _quiet(kind(scheduler=scheduler, vae=vae.eval(), transformer=transformer, **others))


def qwen_text(batch=1, padded=0):
    """Keywords of a call that tell what to draw and what not, random; the last text has this much padding."""
    rng = torch.Generator().manual_seed(4)
    text, negative = torch.randn(batch, 9, 12, generator=rng), torch.randn(batch, 5, 12, generator=rng)
    mask = torch.ones(batch, 9, dtype=torch.long)
    mask[-1, 9 - padded :] = 0
    return {
        "prompt_embeds": text,
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": negative,
        "negative_prompt_embeds_mask": torch.ones(batch, 5, dtype=torch.long),
        "true_cfg_scale": 3.0,
    }


def chroma(kind):
    """A Chroma pipeline of this class around the small SD3.5's third text encoder, which pads and masks the text."""
    parts = dummy_models.small_sd3().components
    channels = 4 * parts["vae"].config.latent_channels
    return _quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=parts["vae"],
            text_encoder=parts["text_encoder_3"],
            tokenizer=parts["tokenizer_3"],
            transformer=dummy_models.chroma_transformer(in_channels=channels, joint_attention_dim=32),
        )
    )

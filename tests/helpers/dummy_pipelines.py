"""Small random pipelines of FLUX.2, Qwen-Image and Chroma, and embedded text for the first two."""

from unittest import mock

import diffusers
import torch
from diffusers import AutoencoderKLFlux2, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler

from tests.helpers import dummy_models


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unused_text_encoder():
    """Return a text encoder that is not called; the pipeline reads its device."""
    return dummy_models.small_sd3().text_encoder_3


def _flux2_vae():
    torch.manual_seed(2)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=2,
        norm_num_groups=1,
        mid_block_add_attention=False,
    ).eval()


def flux2():
    """Return a FLUX.2 pipeline with tokens of 4 x 4 pixels. Call it with `flux2_text`."""
    return _flux2(diffusers.Flux2KleinPipeline)  # from diffusers 0.37


def flux2_dev():
    """Return a FLUX.2-dev pipeline of the parts of `flux2`, which takes the guidance scale as an input."""
    return _flux2(diffusers.Flux2Pipeline)


def _flux2(kind):
    vae, scheduler = _flux2_vae(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _quiet(kind(scheduler, vae, unused_text_encoder(), None, dummy_models.flux2_transformer()))


def flux2_text(negative=5):
    """Return random embeddings of a prompt and, with this number of tokens, of a negative prompt."""
    rng = torch.Generator().manual_seed(4)
    text, negative = torch.randn(2, 9, 12, generator=rng), torch.randn(2, negative, 12, generator=rng)
    return {"prompt_embeds": text, "negative_prompt_embeds": negative}


def flux3(name="Flux3ModularPipeline", text_blocks=()):
    """Return a modular pipeline of FLUX.3 with tokens of 4 x 4 pixels.

    diffusers has no other pipeline for FLUX.3. The one of the distilled model has a flow map. Without blocks for text
    it is called with `flux3_text`, with "text_encoder" or "prompt_upsampler" among them after `fake_flux3_text`.
    """
    kind = getattr(diffusers, name)
    blocks = getattr(diffusers, kind.default_blocks_name)()
    for block in {"prompt_upsampler", "text_encoder"} - {*text_blocks}:
        blocks.sub_blocks.pop(block)
    pipe = kind(blocks=blocks)
    encoder, tokenizer = unused_text_encoder(), dummy_models.small_sd3().tokenizer_3
    parts = {
        "vae": _flux2_vae(),
        "transformer": dummy_models.flux3_transformer(flow_map="Distilled" in name),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "prompt_upsampler": encoder,
        "prompt_upsampler_processor": tokenizer,
    }
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.components})
    return _quiet(pipe)


def fake_flux3_text(set_attribute):
    """Replace FLUX.3's text encoder by random embeddings of each text, and its upsampler by one that adds a word."""
    from diffusers.modular_pipelines.flux3 import encoders, prompt_upsampler

    def embed(text_encoder, tokenizer, prompt, **settings):
        rng = torch.Generator().manual_seed(len(prompt))
        return torch.randn(1, 5 + len(prompt) % 7, 12, generator=rng)

    set_attribute(encoders.Flux3TextEncoderStep, "_get_qwen3_vl_prompt_embeds", staticmethod(embed))
    set_attribute(
        prompt_upsampler, "upsample_prompt", lambda upsampler, processor, request, **settings: f"{request}!!!"
    )


def flux3_text(negative=5):
    """Return random embeddings of a prompt and a negative prompt, which may have different lengths."""
    rng = torch.Generator().manual_seed(4)
    lengths = {"prompt_embeds": 9, "negative_prompt_embeds": negative}
    return {name: torch.randn(1, length, 12, generator=rng) for name, length in lengths.items()}


def qwen(kind, **parts):
    """Return a Qwen-Image pipeline of a class, with tokens of 16 x 16 pixels. Call it with `qwen_text`."""
    vae, transformer = _qwen_vae(), dummy_models.qwen_transformer()
    others = {"text_encoder": unused_text_encoder(), "tokenizer": None, **parts}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _quiet(kind(scheduler=scheduler, vae=vae, transformer=transformer, **others))


def _qwen_vae():
    torch.manual_seed(2)
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def qwen_text(batch=1, padded=0):
    """Return random embeddings of prompts and negative prompts; the last prompt has this number of padding tokens."""
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


def krea2():
    """Return a Krea 2 pipeline with tokens of 16 x 16 pixels. Call it with `krea2_text`."""
    return _quiet(
        diffusers.Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=_qwen_vae(),
            text_encoder=unused_text_encoder(),
            tokenizer=None,
            transformer=dummy_models.krea2_transformer(),
        )
    )


def krea2_text(batch=1):
    """Return random prompts for a call, both with padding in the middle, as the pipeline pads."""
    rng = torch.Generator().manual_seed(4)
    keywords, length = {"guidance_scale": 3.0}, 9
    for name, padded in (("prompt_embeds", slice(5, 7)), ("negative_prompt_embeds", slice(2, 7))):
        keywords[name] = torch.randn(batch, length, 3, 12, generator=rng)
        keywords[f"{name}_mask"] = torch.ones(batch, length, dtype=torch.bool)
        keywords[f"{name}_mask"][-1, padded] = False
    return keywords


def chroma(kind):
    """Return a Chroma pipeline of a class, with the third text encoder of the small SD3.5."""
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


def z_image(kind="ZImagePipeline", **parts):
    """A Z-Image pipeline of the class of this name around the random FLUX's autoencoder, to be called with captions."""
    return _quiet(
        getattr(diffusers, kind)(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=dummy_models.random_flux().vae,
            text_encoder=unused_text_encoder(),
            tokenizer=None,
            transformer=dummy_models.z_image_transformer(),
            **parts,
        )
    )


def z_image_captions(batch=2):
    """Keywords of a call that tell what to draw and what not, random; each caption has a length of its own."""
    rng = torch.Generator().manual_seed(4)
    lengths = {"prompt_embeds": (9, 40), "negative_prompt_embeds": (33, 5)}
    captions = {name: [torch.randn(n, 12, generator=rng) for n in each[:batch]] for name, each in lengths.items()}
    return {**captions, "guidance_scale": 3.0}


class UnusedProcessor:
    """A processor that encodes no prompts; its pipeline reads a template and a token from it."""

    def __init__(self):
        self.tokenizer = self

    def apply_chat_template(self, *_, **__):
        return [[0]]

    def encode(self, _):
        return [1]


def qwen21(**settings):
    """Return a Qwen-Image 2.1 pipeline with tokens of 16 x 16 pixels. Call it with `qwen21_text`."""
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1] * 5,
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.0, 1.2],
    ).eval()
    return _quiet(
        diffusers.QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=unused_text_encoder(),
            processor=UnusedProcessor(),
            transformer=dummy_models.qwen21_transformer(),
            **settings,
        )
    )


def qwen21_text(batch=1):
    """Return random prompts for a call; the last prompt has four tokens of padding."""
    text = qwen_text(batch, padded=4)
    return {name: x.bool() if "mask" in name else x for name, x in text.items()}


def qwen21_encoder(tokens):
    """Return a context manager in which the pipeline of Qwen-Image 2.1 encodes prompts as random text.

    `tokens` are the latent tokens of each condition image, between text tokens.
    """

    def encode(pipe, prompt, image=None, device=None):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        slots = [False] + [slot for each in tokens for slot in [*[True] * (each // 4), False]] + [False] * 3
        rng = torch.Generator().manual_seed(len(prompts[0]))
        text = torch.randn(len(prompts), len(slots), 12, generator=rng).to(pipe.transformer.dtype)
        mask = torch.ones(text.shape[:2], dtype=torch.long)
        return text, mask, torch.tensor([slots] * len(prompts))

    return mock.patch.object(diffusers.QwenImage21Pipeline, "_get_qwen_prompt_embeds", encode)

"""A pipeline around the transformer of FLUX.3, for which diffusers has modular pipelines only."""

from types import SimpleNamespace

import diffusers.loaders
import torch
from diffusers import DiffusionPipeline

from tests.helpers import dummy_models


class Flux3Loop(DiffusionPipeline, getattr(diffusers.loaders, "Flux3LoraLoaderMixin", object)):
    """Denoise latents with guidance. What a modular pipeline does besides is left out."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds,
        negative_prompt_embeds,
        grids,
        num_inference_steps,
        generator,
        guidance_scale=3.0,
        attention_kwargs=None,
        **ignored,
    ):
        text = {False: prompt_embeds, True: negative_prompt_embeds}
        calls = {
            negative: dummy_models.flux3_call(self.transformer, *grids, text=embeds.shape[1])
            | {"encoder_hidden_states": embeds, "attention_kwargs": attention_kwargs, "return_dict": False}
            for negative, embeds in text.items()
        }
        for call in calls.values():
            references = call["image_cond_hidden_states"]
            call["image_cond_hidden_states"] = references if references is None else references.to(prompt_embeds.dtype)
        latents = torch.randn(calls[False]["hidden_states"].shape, generator=generator).to(prompt_embeds.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            at = {"hidden_states": latents, "timestep": (timestep / 1000).expand(1).to(latents.dtype)}
            wanted, unwanted = (self.transformer(**{**calls[negative], **at})[0] for negative in (False, True))
            velocity = unwanted + guidance_scale * (wanted - unwanted)
            latents = self.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return SimpleNamespace(images=latents)

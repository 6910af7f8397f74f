"""The contract of the pipelines that `highres` runs for a transformer class."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from clear_attn.models.class_names import DIFFUSERS, is_exactly, is_instance
from clear_attn.models.training import TrainingAdapter


class ForwardPasses(NamedTuple):
    """The forward passes of the transformer in a step.

    Attributes:
        number: how many run one after the other.
        batch: the number of images in each.
    """

    number: int
    batch: int


class HighresPipelines:
    """Name the pipelines that draw a base image and its stages, and give a stage its first image.

    Attributes:
        packages: the top-level packages that define the pipelines.
        text_to_image: the name of a pipeline class in diffusers.
        image_to_image: the name of one that shares its components and takes an image and `strength`.
        batched_guidance: whether guidance runs two images in one forward pass.
        guidance: the keyword of the guidance scale.
        unguided: the largest guidance scale that gives no guidance.
        modular: names of the modular pipelines that have the components of `text_to_image`.
        native_side: pixels of the longer side that the model was trained on, where the pipeline names none.
    """

    packages: Collection[str] = DIFFUSERS

    def __init__(
        self,
        text_to_image: str,
        image_to_image: str,
        *,
        batched_guidance: bool = False,
        guidance: str = "guidance_scale",
        unguided: float = 1,
        modular: tuple[str, ...] = (),
        native_side: int = 1024,
    ) -> None:
        self.text_to_image, self.image_to_image = text_to_image, image_to_image
        self.batched_guidance, self.guidance, self.unguided = batched_guidance, guidance, unguided
        self.modular, self.native_side = modular, native_side

    @property
    def supported(self) -> tuple[str, ...]:
        """The names of the pipelines of diffusers that `highres` takes."""
        return (self.text_to_image, self.image_to_image, *self.modular)

    def takes(self, pipe: Any) -> bool:
        """Return whether a pipeline is one of these."""
        return self.is_modular(pipe) or is_instance(pipe, (self.text_to_image, self.image_to_image), self.packages)

    def is_modular(self, pipe: Any) -> bool:
        """Return whether a pipeline is one of these modular ones."""
        return is_exactly(pipe, self.modular)

    def classes(self) -> tuple[Any, Any]:
        """Return the classes that draw the base image and the stages. They are imported here."""
        return getattr(diffusers, self.text_to_image), getattr(diffusers, self.image_to_image)

    def predictions(self, pipe: Any, guidance: float | None, options: Mapping[str, Any]) -> int:
        """Return how many predictions of an image a step computes.

        Args:
            pipe: the pipeline.
            guidance: its guidance scale.
            options: further keywords of its call.
        """
        return 2 if (guidance or 0) > self.unguided else 1

    def passes(self, pipe: Any, guidance: float | None, options: Mapping[str, Any]) -> ForwardPasses:
        """Return the forward passes of a step. The arguments are those of `predictions`."""
        predictions = self.predictions(pipe, guidance, options)
        return ForwardPasses(1, predictions) if self.batched_guidance else ForwardPasses(predictions, 1)

    def encode(self, pipe: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latents of pixels in -1..1 as the transformer takes them, `[1, channels, height, width]`."""
        vae = pipe.vae
        encoded = vae.encode(pixels)
        latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
        shift = getattr(vae.config, "shift_factor", None) or 0
        scaled: Tensor = (latents - shift) * vae.config.scaling_factor
        return scaled

    def start(
        self, pipe: Any, latents: Tensor, strength: float, steps: int, generator: torch.Generator
    ) -> dict[str, Any]:
        """Return the keywords with which an image-to-image pipeline draws from latents."""
        # Chroma's and Z-Image's would take latents for pixels.
        pipe.image_processor.register_to_config(vae_latent_channels=latents.shape[1])
        return {"image": latents, "strength": strength, "num_inference_steps": steps}


class FromNoisedLatents(HighresPipelines):
    """For a model without an image-to-image pipeline: text to image, from noised latents and inside the schedule.

    Args:
        text_to_image: the name of a pipeline class in diffusers that takes `latents` and `sigmas`.
        training: encodes and packs images for the transformer.
        **options: as in `HighresPipelines`.
    """

    def __init__(self, text_to_image: str, training: TrainingAdapter, **options: Any) -> None:
        super().__init__(text_to_image, text_to_image, **options)
        self.training = training

    def encode(self, pipe: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
        mean, _ = self.training.encode_image(pipe, pixels)
        return mean

    def start(
        self, pipe: Any, latents: Tensor, strength: float, steps: int, generator: torch.Generator
    ) -> dict[str, Any]:
        """Return the keywords with which a text-to-image pipeline draws from noised latents: SDEdit."""
        skipped = int(max(steps - min(steps * strength, steps), 0))  # as image-to-image pipelines of diffusers round
        sigmas = np.linspace(1.0, 1 / steps, steps)[skipped:]
        scheduler, tokens = copy.deepcopy(pipe.scheduler), latents.shape[-2] * latents.shape[-1] // 4
        scheduler.set_timesteps(sigmas=sigmas, mu=self.dynamic_shift(pipe, tokens, steps), device=latents.device)
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        noised = scheduler.scale_noise(latents, scheduler.timesteps[:1], noise)
        return {"latents": self.pack(noised), "sigmas": sigmas, "num_inference_steps": steps}

    def dynamic_shift(self, pipe: Any, tokens: int, steps: int) -> float | None:
        """Return the `mu` that the pipeline computes for its scheduler. By default it computes none."""
        return None

    def pack(self, latents: Tensor) -> Tensor:
        """Return latents as the pipeline's `latents` argument."""
        return self.training.pack(latents)

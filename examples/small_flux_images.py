"""The images that the small FLUX is trained on, and their latents."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor

from clear_attn.demo.scenes import SIZE, Scene, draw, poses
from training_state import load_state, save_state

TOKEN = 8  # pixels
IMAGE_TOKENS = (SIZE // TOKEN) ** 2
ENLARGED = (2, 4)  # times the side


def draw_images(scenes: list[Scene], seed: int) -> Iterator[Tensor]:
    """Return the image of each scene, with jitter, uint8 `[3, SIZE, SIZE]`."""
    rng = np.random.default_rng(seed)
    for scene in scenes:
        yield torch.from_numpy(draw(scene, SIZE, poses(scene, rng))).permute(2, 0, 1).contiguous()


def draw_crops(scenes: list[Scene], seed: int) -> Iterator[Tensor]:
    """Return a crop of each scene, drawn enlarged, at a random multiple of a token's side, like `draw_images`."""
    rng = np.random.default_rng(seed)
    for scene in scenes:
        size = SIZE * int(rng.choice(ENLARGED))
        top, left = TOKEN * rng.integers((size - SIZE) // TOKEN + 1, size=2)
        image = draw(scene, size, poses(scene, rng))[top : top + SIZE, left : left + SIZE]
        yield torch.from_numpy(image).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """Return images in -1..1 from images in uint8."""
    return images.float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return packed latents `[count, tokens, channels]`, the transformer's input."""
    latents = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


def cached_latents(
    vae: AutoencoderKL,
    scenes: list[Scene],
    draw_all: Callable[[list[Scene], int], Iterator[Tensor]],
    seed: int,
    folder: Path,
    chunk: int = 500,
) -> Tensor:
    """Return the packed latents of drawn scenes in float16, from files that are written once."""
    folder.mkdir(exist_ok=True)
    parts = []
    for first in range(0, len(scenes), chunk):
        file = folder / f"{first}.pt"
        if not file.exists():
            images = draw_all(scenes[first : first + chunk], seed + first)
            encoded = torch.cat([encode(vae, normalize(image[None])) for image in images])
            save_state(file, latents=encoded.half())
            print(f"encoded {first + len(encoded)} images", flush=True)
        parts.append(load_state(file)["latents"])
    return torch.cat(parts)

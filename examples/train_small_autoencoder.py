"""Train the autoencoder of the small FLUX on crops of drawn scenes, and its decoder on enlarged ones too."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

import training_state
from clear_attn.demo.scenes import SIZE, training_scenes
from small_flux_images import TOKEN, draw_crops, draw_images, normalize
from training_state import generator_of, load_state, report, save_state

LATENT_NOISE = 0.1  # as a share of the standard deviation of the latents


class Phase(NamedTuple):
    """Part of the training, on crops at multiples of a token's side, where textures repeat."""

    steps: int
    crop: int
    batch: int


IMAGES = 1024
RATE = 2e-3
PHASES = (Phase(2400, 64, 16), Phase(900, 128, 4), Phase(400, 256, 2))
# The decoder learns enlarged images afterwards, so that latents stay as they are.
DECODER_RATE = 5e-4
DECODER_PHASES = (Phase(600, 64, 16),)


def crops(images: Tensor, phase: Phase, rng: torch.Generator) -> Tensor:
    """Return a batch of crops of images."""
    chosen = torch.randint(len(images), (phase.batch,), generator=rng)
    corners = TOKEN * torch.randint((SIZE - phase.crop) // TOKEN + 1, (phase.batch, 2), generator=rng)
    return torch.stack(
        [
            images[index, :, top : top + phase.crop, left : left + phase.crop]
            for index, (top, left) in zip(chosen.tolist(), corners.tolist(), strict=True)
        ]
    )


def train_autoencoder(vae: AutoencoderKL, state_file: Path, seed: int) -> None:
    """Train encoder and decoder on whole scenes."""
    images = torch.stack(list(draw_images(training_scenes(IMAGES, seed), seed)))
    _train(vae, vae, images, PHASES, RATE, state_file, seed)


def train_decoder(vae: AutoencoderKL, state_file: Path, seed: int) -> None:
    """Train the decoder alone on scenes, half of them enlarged."""
    drawn = [
        image for draw_all in (draw_images, draw_crops) for image in draw_all(training_scenes(IMAGES // 2, seed), seed)
    ]
    _train(vae, vae.decoder, torch.stack(drawn), DECODER_PHASES, DECODER_RATE, state_file, seed)


def _train(
    vae: AutoencoderKL,
    trained: nn.Module,
    images: Tensor,
    phases: Sequence[Phase],
    rate: float,
    state_file: Path,
    seed: int,
) -> None:
    """Train with absolute and squared error. Noise on the latents keeps the effect of their small errors small."""
    vae.requires_grad_(False)
    trained.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    plan = [phase for phase in phases for _ in range(phase.steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
    )
    state = load_state(state_file)
    if state:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    first = state.get("step", 0)

    def save(step: int) -> None:
        parts = {"model": vae, "optimizer": optimizer, "schedule": schedule}
        save_state(state_file, step=step, **{name: part.state_dict() for name, part in parts.items()})

    started = saved = time.monotonic()
    for step in range(first, len(plan)):
        rng = generator_of(seed, 1, step)
        batch = normalize(crops(images, plan[step], rng))
        with torch.autocast("cpu", torch.bfloat16, enabled=plan[step] != phases[-1]):
            latents = vae.encode(batch).latent_dist.mode().float()
            noise = LATENT_NOISE * latents.detach().std() * torch.randn(latents.shape, generator=rng)
            decoded = vae.decode(latents + noise).sample.float()
        loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            report(state_file.stem, step, len(plan), loss.item(), started)
        if time.monotonic() - saved > training_state.SAVE_EVERY or step == len(plan) - 1:
            saved = time.monotonic()
            save(step + 1)
    vae.requires_grad_(False)


def set_latent_statistics(vae: AutoencoderKL, latents: Tensor) -> None:
    """Record the mean and the spread of latents, and set the encoder's variance to that of the noise in training."""
    spread = latents.std().item()
    vae.register_to_config(scaling_factor=1 / spread, shift_factor=latents.mean().item())
    _, log_variance = vae.encoder.conv_out.weight.chunk(2)
    log_variance.zero_()
    vae.encoder.conv_out.bias.chunk(2)[1].fill_(2 * math.log(LATENT_NOISE * spread))

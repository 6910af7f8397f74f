"""Train the small FLUX that ships with clear_attn, from random weights, on a CPU, in as many sittings as needed.

    python examples/train_small_flux.py --output small-flux

trains the autoencoder on drawn scenes, then the transformer and both text encoders by flow matching, in phases: most
steps take a small part of each image's tokens, at random positions. It saves a `FluxPipeline` in bfloat16 after each
phase, and its state every few minutes. Started again, it goes on from there, with the result of an uninterrupted run:
the randomness of a step depends on the seed and the step's number alone.
"""

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn

from build_small_flux import SHIFT, build_autoencoder, build_pipeline, load_in_float32, support_transformers_4
from clear_attn.demo.scenes import SIZE, Scene, draw, poses, training_scenes
from clear_attn.utils.atomic import atomic_file

# Share of the training batches with each text length. FLUX attends to the padding of prompts, and FluxPipeline pads to
# 512 by default, so training must include long padding.
TEXT_LENGTHS = {32: 0.92, 96: 0.05, 512: 0.03}
AVERAGE = 0.998  # decay of the moving average of the weights
LATENT_NOISE = 0.1  # as a share of the standard deviation of the latents
SAVE_EVERY = 180  # seconds


class Phase(NamedTuple):
    """A part of the transformer's training.

    Attributes:
        steps: of the optimizer.
        image_tokens: number of tokens of each image, at random positions.
        batch_sizes: for each text length.
        rates: the learning rate at the start and at the end, with half a cosine between them.
        swapped: the share of the captions that name the second figure first, at the start and at the end.
    """

    steps: int
    image_tokens: int
    batch_sizes: dict[int, int]
    rates: tuple[float, float]
    swapped: tuple[float, float]


# Tokens learn from text and position alone, so most steps take few tokens of many images. Captions in both orders
# equally often would say nothing about places by their order or their "left of" alone, and both together are hard to
# learn at once.
PHASES = (
    Phase(3500, 64, {32: 64, 96: 36, 512: 8}, (2e-3, 1.2e-3), (0.05, 0.3)),
    Phase(1600, 256, {32: 24, 96: 18, 512: 7}, (1.2e-3, 7e-4), (0.3, 0.5)),
    Phase(1500, 1024, {32: 6, 96: 6, 512: 3}, (7e-4, 0.0), (0.5, 0.5)),
)
WARMUP = 100
IMAGES = 10_000


class AutoencoderPhase(NamedTuple):
    """Part of the autoencoder's training, on crops at multiples of a token's side, where textures repeat."""

    steps: int
    crop: int
    batch: int


TOKEN = 8  # pixels
IMAGE_TOKENS = (SIZE // TOKEN) ** 2
AUTOENCODER_IMAGES = 1024
AUTOENCODER_RATE = 2e-3
AUTOENCODER_PHASES = (AutoencoderPhase(2400, 64, 16), AutoencoderPhase(900, 128, 4), AutoencoderPhase(400, 256, 2))


def generator_of(seed: int, purpose: int, step: int) -> torch.Generator:
    """Return the randomness of a step."""
    return torch.Generator().manual_seed((seed * 16 + purpose) * 2**24 + step)


def save_state(file: Path, **state: Any) -> None:
    with atomic_file(file) as unfinished:
        torch.save(state, unfinished)


def load_state(file: Path) -> dict[str, Any]:
    """Return what was saved, or nothing."""
    return torch.load(file, weights_only=True) if file.exists() else {}


def draw_images(scenes: list[Scene], seed: int) -> Iterator[Tensor]:
    """Return the image of each scene, with jitter, uint8 `[3, SIZE, SIZE]`."""
    rng = np.random.default_rng(seed)
    for scene in scenes:
        yield torch.from_numpy(draw(scene, SIZE, poses(scene, rng))).permute(2, 0, 1).contiguous()


def normalize(images: Tensor) -> Tensor:
    """Return images in -1..1 from images in uint8."""
    return images.float() / 127.5 - 1


def report(name: str, step: int, steps: int, loss: float, started: float) -> None:
    """Print the progress, the seconds of this sitting, and those of all cores."""
    seconds, cores = time.monotonic() - started, time.process_time()
    print(f"{name} {step + 1}/{steps} loss {loss:.4f} {seconds:.0f} s, {cores:.0f} core s", flush=True)


def crops(images: Tensor, phase: AutoencoderPhase, rng: torch.Generator) -> Tensor:
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
    """Train with absolute and squared error. Noise on the latents keeps the effect of their small errors small."""
    images = torch.stack(list(draw_images(training_scenes(AUTOENCODER_IMAGES, seed), seed)))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=AUTOENCODER_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    plan = [phase for phase in AUTOENCODER_PHASES for _ in range(phase.steps)]
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
        with torch.autocast("cpu", torch.bfloat16, enabled=plan[step] != AUTOENCODER_PHASES[-1]):
            latents = vae.encode(batch).latent_dist.mode().float()
            noise = LATENT_NOISE * latents.detach().std() * torch.randn(latents.shape, generator=rng)
            decoded = vae.decode(latents + noise).sample.float()
        loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            report("autoencoder", step, len(plan), loss.item(), started)
        if time.monotonic() - saved > SAVE_EVERY or step == len(plan) - 1:
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


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return packed latents `[count, tokens, channels]`, the transformer's input."""
    latents = (vae.encode(images).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


def cached_latents(vae: AutoencoderKL, scenes: list[Scene], seed: int, folder: Path, chunk: int = 500) -> Tensor:
    """Return the packed latents of jittered scenes in float16, from files that are written once."""
    folder.mkdir(exist_ok=True)
    parts = []
    for first in range(0, len(scenes), chunk):
        file = folder / f"{first}.pt"
        if not file.exists():
            images = draw_images(scenes[first : first + chunk], seed + first)
            encoded = torch.cat([encode(vae, normalize(image[None])) for image in images])
            save_state(file, latents=encoded.half())
            print(f"encoded {first + len(encoded)} images", flush=True)
        parts.append(load_state(file)["latents"])
    return torch.cat(parts)


class Trained(nn.Module):
    """All that the transformer's training changes."""

    def __init__(self, pipe: FluxPipeline) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.text_encoder_2 = (
            pipe.transformer,
            pipe.text_encoder,
            pipe.text_encoder_2,
        )

    def hidden(self) -> list[nn.Parameter]:
        """Return the matrices between hidden activations, which Muon trains."""
        others = ("embed", "norm", "shared", "bias", "transformer.proj_out")
        return [
            value
            for name, value in self.named_parameters()
            if value.ndim == 2 and not any(other in name for other in others)
        ]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Return Muon for the hidden matrices, which takes a third fewer steps here, and AdamW for the rest."""
        hidden = self.hidden()
        chosen = set(map(id, hidden))
        rest = [value for value in self.parameters() if id(value) not in chosen]
        return [
            torch.optim.Muon(hidden, lr=1.0, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.99), weight_decay=0.01),
        ]


def locate(step: int) -> tuple[int, float]:
    """Return the number of a step's phase, and the share of the phase before it."""
    for number, phase in enumerate(PHASES):
        if step < phase.steps:
            return number, step / phase.steps
        step -= phase.steps
    raise ValueError(f"step {step} is past the last phase")


def learning_rate(step: int) -> float:
    number, share = locate(step)
    start, end = PHASES[number].rates
    return min(1.0, (step + 1) / WARMUP) * (end + (start - end) * 0.5 * (1 + math.cos(math.pi * share)))


def swapped_share(step: int) -> float:
    number, share = locate(step)
    start, end = PHASES[number].swapped
    return start + (end - start) * share


def flow_loss(pipe: FluxPipeline, scenes: list[Scene], latents: Tensor, step: int, rng: torch.Generator) -> Tensor:
    """Return the error of the velocity on a random batch."""
    phase = PHASES[locate(step)[0]]
    length = list(TEXT_LENGTHS)[int(torch.multinomial(torch.tensor(list(TEXT_LENGTHS.values())), 1, generator=rng))]
    batch = phase.batch_sizes[length]
    chosen = torch.randint(len(scenes), (batch,), generator=rng)
    swapped = torch.rand(batch, generator=rng) < swapped_share(step)
    captions = [scenes[i].captions[-1 if swap else 0] for i, swap in zip(chosen, swapped, strict=True)]
    text, pooled, text_ids = pipe.encode_prompt(captions, None, device="cpu", max_sequence_length=length)

    side = SIZE // TOKEN
    positions = torch.randperm(IMAGE_TOKENS, generator=rng)[: phase.image_tokens]
    image_ids = pipe._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)[positions]
    clean = latents[chosen[:, None], positions].float()
    uniform = torch.rand(batch, generator=rng)
    sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    noise = torch.randn(clean.shape, generator=rng)
    noisy = torch.lerp(clean, noise, sigma[:, None, None])
    velocity = pipe.transformer(noisy, text, pooled, sigma, image_ids, text_ids, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - clean)


def save_pipeline(pipe: FluxPipeline, average: dict[str, Tensor], folder: Path) -> None:
    """Save the pipeline with the averaged weights in bfloat16; its own weights stay as they are."""
    trained = Trained(pipe)
    own = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.load_state_dict(average)
    pipe.to(torch.bfloat16).save_pretrained(folder)
    pipe.to(torch.float32)
    trained.load_state_dict(own)
    support_transformers_4(folder)
    load_in_float32(folder)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


def train_transformer(pipe: FluxPipeline, scenes: list[Scene], latents: Tensor, output: Path, seed: int) -> None:
    """Train transformer and text encoders by flow matching, and save a moving average after each phase."""
    trained = Trained(pipe)
    optimizers = trained.optimizers()
    average = {name: value.detach().clone() for name, value in trained.state_dict().items()}
    state_file = output / "transformer.pt"
    state = load_state(state_file)
    if state:
        trained.load_state_dict(state["model"])
        for optimizer, own in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
        average = state["average"]
    first = state.get("step", 0)
    total, losses = sum(phase.steps for phase in PHASES), []
    started = saved = time.monotonic()
    for step in range(first, total):
        number, _ = locate(step)
        for group in itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = learning_rate(step)
        # Phases with a part of the tokens compute in bfloat16, in two thirds of the time. The others train the details.
        with torch.autocast("cpu", torch.bfloat16, enabled=PHASES[number].image_tokens < IMAGE_TOKENS):
            loss = flow_loss(pipe, scenes, latents, step, generator_of(seed, 2, step))
        trained.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            decay = min(AVERAGE, (1 + step) / (10 + step))
            for name, value in trained.state_dict().items():
                average[name].lerp_(value, 1 - decay) if value.is_floating_point() else average[name].copy_(value)
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            report(f"transformer, phase {number}", step, total, float(np.mean(losses[-50:])), started)
        phase_ends = step + 1 == total or locate(step + 1)[0] != number
        if phase_ends:
            save_pipeline(pipe, average, output / f"phase-{number}")
        if phase_ends or time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            parts = {"model": trained.state_dict(), "average": average}
            own = [optimizer.state_dict() for optimizer in optimizers]
            save_state(state_file, step=step + 1, optimizers=own, **parts)


def main(
    output: Annotated[Path, typer.Option(help="Folder for states and pipelines; an existing one is resumed.")],
    seed: int = 0,
) -> None:
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = build_autoencoder()
    train_autoencoder(vae, output / "autoencoder.pt", seed)
    # Round now as for saving, so that the transformer trains on the same latents as it gets later.
    vae.to(torch.bfloat16).to(torch.float32)
    samples = draw_images(training_scenes(256, seed + 1), seed + 1)
    with torch.no_grad():
        latents = torch.cat([vae.encode(normalize(image[None])).latent_dist.mode() for image in samples])
        set_latent_statistics(vae, latents)
    scenes = training_scenes(IMAGES, seed + 2)
    latents = cached_latents(vae, scenes, seed + 2, output / "latents")
    torch.manual_seed(seed + 3)
    train_transformer(build_pipeline(vae), scenes, latents, output, seed)


if __name__ == "__main__":
    typer.run(main)

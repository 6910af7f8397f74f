"""Handwritten digits for small diffusion models: the data, how a model is trained on it, and how good its digits are.

The digits are the 1797 of 8 x 8 pixels in 17 greys that scikit-learn carries. The models are class-conditional
`DiTTransformer2DModel`s that predict noise and variance, in diffusers' own schedule. All losses are pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

SIZE, CLASSES, GREY_STEP = 8, 10, 1 / 8
BATCH, LEARNING_RATE, WARMUP, AVERAGE = 32, 2e-3, 50, 0.998
PART = 100  # pictures at a time, where no gradients are asked for


class Digits(NamedTuple):
    """Pictures `[count, 1, 8, 8]` in -1..1 and what they show, `[count]` in 0..9."""

    pictures: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Four fifths to train with and a fifth held out, each digit in both alike."""
    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=0.2, stratify=data.target, random_state=0)
    seen, held_out, seen_labels, held_out_labels = (torch.from_numpy(part) for part in parts)
    return tuple(
        Digits((pictures.float() * GREY_STEP - 1)[:, None], labels.long())
        for pictures, labels in ((seen, seen_labels), (held_out, held_out_labels))
    )


def new_model(seed: int) -> DiTTransformer2DModel:
    """An untrained one of 64 tokens and three layers, with DiT's start: no layer does anything (arXiv 2212.09748)."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=1,
        out_channels=2,
        num_layers=3,
        sample_size=SIZE,
        patch_size=1,
        num_embeds_ada_norm=CLASSES,
    )
    for linear in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model.eval()


def scheduler() -> DDPMScheduler:
    """DiT's: 1000 timesteps, betas on a line, a variance that the model picks between the smallest and the largest."""
    return DDPMScheduler(variance_type="learned_range")


class Noisy(NamedTuple):
    """Pictures at some timesteps, and what they were made of."""

    pictures: Tensor
    timesteps: Tensor
    clean: Tensor
    labels: Tensor
    noise: Tensor


def add_noise(digits: Digits, timesteps: Tensor, schedule: DDPMScheduler, rng: torch.Generator) -> Noisy:
    noise = torch.randn(digits.pictures.shape, generator=rng)
    noisy = schedule.add_noise(digits.pictures, noise, timesteps)
    return Noisy(noisy, timesteps, digits.pictures, digits.labels, noise)


class Prediction(NamedTuple):
    """A model's output `[batch, 2, 8, 8]` in its halves: the noise, and where the log-variance lies, -1 to 1."""

    noise: Tensor
    variance: Tensor


def predict(model: DiTTransformer2DModel, noisy: Noisy) -> Prediction:
    output = model(noisy.pictures, timestep=noisy.timesteps, class_labels=noisy.labels).sample
    return Prediction(*output.chunk(2, dim=1))


def noise_error(prediction: Prediction, noisy: Noisy) -> Tensor:
    """The mean squared error of the noise, `[]`; DDPM's simple loss (arXiv 2006.11239, equation 14)."""
    return F.mse_loss(prediction.noise, noisy.noise)


def bound(prediction: Prediction, noisy: Noisy, schedule: DDPMScheduler) -> Tensor:
    """A timestep's term of the variational bound in bits per pixel, mean over the batch, `[]`.

    KL of the model's step back from that of the clean picture, and at timestep 0 the bits of the clean picture's greys
    (arXiv 2006.11239, section 3); the variance between its bounds as in arXiv 2102.09672, equation 15. As there, it
    trains the variance alone: no gradient reaches the predicted noise.
    """
    every, at = schedule.alphas_cumprod, noisy.timesteps
    before = F.pad(every, (1, 0), value=1.0)[at]
    every, beta = (x.view(-1, 1, 1, 1) for x in (every[at], schedule.betas[at]))
    before = before.view(-1, 1, 1, 1)
    first = (at == 0).view(-1, 1, 1, 1)
    # At timestep 0 the smallest variance is 0, and that of timestep 1 takes its place.
    smallest = beta * (1 - before) / (1 - every)
    smallest = torch.where(first, schedule.betas[1] * schedule.betas[0] / (1 - schedule.alphas_cumprod[1]), smallest)
    guess = (noisy.pictures - (1 - every).sqrt() * prediction.noise.detach()) / every.sqrt()

    def mean(clean: Tensor) -> Tensor:
        of_clean, of_noisy = before.sqrt() * beta, (1 - beta).sqrt() * (1 - before)
        return (of_clean * clean + of_noisy * noisy.pictures) / (1 - every)

    share = (prediction.variance + 1) / 2
    step = Normal(mean(guess), (0.5 * (share * beta.log() + (1 - share) * smallest.log())).exp())
    divergence = kl_divergence(Normal(mean(noisy.clean), smallest.sqrt()), step)
    darkest, brightest = noisy.clean < -1 + GREY_STEP / 2, noisy.clean > 1 - GREY_STEP / 2
    below = torch.where(darkest, 0.0, step.cdf(noisy.clean - GREY_STEP / 2))
    up_to = torch.where(brightest, 1.0, step.cdf(noisy.clean + GREY_STEP / 2))
    surprise = -(up_to - below).clamp(min=1e-12).log()
    return torch.where(first, surprise, divergence).mean() / math.log(2)


def train(
    model: DiTTransformer2DModel,
    loss: Callable[[Prediction, Noisy], Tensor],
    digits: Digits,
    schedule: DDPMScheduler,
    checkpoints: Collection[int],
    seed: int,
    name: str = "",
) -> Iterator[int]:
    """Trains up to the last of some checkpoints; at each it gives the step, and the model is its moving average.

    The model stays in eval mode: nothing in it differs but the labels, which each layer would drop for itself.
    """
    model.eval().requires_grad_(True)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    average = EMAModel(model.parameters(), decay=AVERAGE)
    for step in tqdm(range(1, max(checkpoints) + 1), name, mininterval=5):
        chosen = torch.randint(len(digits.labels), (BATCH,), generator=rng)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (BATCH,), generator=rng)
        noisy = add_noise(Digits(digits.pictures[chosen], digits.labels[chosen]), timesteps, schedule, rng)
        optimizer.zero_grad()
        loss(predict(model, noisy), noisy).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        average.step(model.parameters())
        if step in checkpoints:
            average.store(model.parameters())
            average.copy_to(model.parameters())
            yield step
            average.restore(model.parameters())


@torch.no_grad()
def draw(model: DiTTransformer2DModel, count: int, steps: int, seed: int) -> Digits:
    """Digits 0 to 9 in turn, by diffusers' own steps from noise; the same noise for every model."""
    schedule, rng = scheduler(), torch.Generator().manual_seed(seed)
    schedule.set_timesteps(steps)
    labels = torch.arange(count) % CLASSES
    drawn = []
    for part in labels.split(PART):
        pictures = torch.randn(len(part), 1, SIZE, SIZE, generator=rng)
        for timestep in schedule.timesteps:
            output = model(pictures, timestep=timestep.expand(len(part)), class_labels=part).sample
            pictures = schedule.step(output, timestep, pictures, generator=rng).prev_sample
        drawn.append(pictures.clamp(-1, 1))
    return Digits(torch.cat(drawn), labels)


@torch.no_grad()
def bits(model: DiTTransformer2DModel, digits: Digits, each: int, seed: int) -> float:
    """The variational bound in bits per pixel, from so many of the digits at each timestep."""
    schedule, rng = scheduler(), torch.Generator().manual_seed(seed)
    steps = schedule.config.num_train_timesteps
    terms = []
    for timesteps in torch.arange(steps).repeat_interleave(each).split(PART):
        chosen = torch.randint(len(digits.labels), (len(timesteps),), generator=rng)
        noisy = add_noise(Digits(digits.pictures[chosen], digits.labels[chosen]), timesteps, schedule, rng)
        terms += len(timesteps) * [bound(predict(model, noisy), noisy, schedule).item()]
    return steps * sum(terms) / len(terms)


class Judge(nn.Module):
    """A convolutional classifier of digits; its last hidden layer is what the Frechet distance compares."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(64 * (SIZE // 2) ** 2, self.num_features),
            nn.ReLU(),
        )
        self.classes = nn.Linear(self.num_features, CLASSES)

    def forward(self, pictures: Tensor) -> Tensor:
        """Features `[count, 64]`."""
        return self.features(pictures)

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        """The share of pictures that show their label, 0 to 1."""
        return (self.classes(self(digits.pictures)).argmax(-1) == digits.labels).float().mean().item()

    @torch.no_grad()
    def distance(self, real: Digits, drawn: Digits) -> float:
        """The Frechet distance between the features of both (arXiv 1706.08500, equation 6)."""
        metric = FrechetInceptionDistance(self, input_img_size=(1, SIZE, SIZE))
        metric.update(real.pictures, real=True)
        metric.update(drawn.pictures, real=False)
        return metric.compute().item()


def train_judge(digits: Digits, epochs: int = 40, seed: int = 0) -> Judge:
    """Learns from the digits and from themselves moved by up to a pixel."""
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    steps = epochs * (len(digits.labels) // BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), "judge", mininterval=5):
        chosen = torch.randint(len(digits.labels), (BATCH,))
        down, right = torch.randint(-1, 2, (2,)).tolist()
        moved = F.pad(digits.pictures[chosen], (1, 1, 1, 1), value=-1)[..., 1 + down :, 1 + right :][..., :SIZE, :SIZE]
        optimizer.zero_grad()
        F.cross_entropy(judge.classes(judge(moved)), digits.labels[chosen]).backward()
        optimizer.step()
        decay.step()
    return judge.eval().requires_grad_(False)

"""Handwritten digits for small diffusion models: the data, training, and measures of quality.

The data is scikit-learn's 1797 digits of 8 x 8 pixels with 17 gray levels. The models are class-conditional
`DiTTransformer2DModel`s that predict noise and variance, with diffusers' own schedule. All losses are pure functions.
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

SIZE, CLASSES, GRAY_STEP = 8, 10, 1 / 8
BATCH, LEARNING_RATE, WARMUP, AVERAGE = 32, 2e-3, 50, 0.998
PART = 100  # batch size without gradients


class Digits(NamedTuple):
    """Images `[count, 1, 8, 8]` in -1..1 and their digits, `[count]` in 0..9."""

    images: Tensor
    labels: Tensor


def load() -> tuple[Digits, Digits]:
    """Return four fifths for training and a fifth held out, stratified by digit."""
    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=0.2, stratify=data.target, random_state=0)
    seen, held_out, seen_labels, held_out_labels = (torch.from_numpy(part) for part in parts)
    return tuple(
        Digits((images.float() * GRAY_STEP - 1)[:, None], labels.long())
        for images, labels in ((seen, seen_labels), (held_out, held_out_labels))
    )


def new_model(seed: int) -> DiTTransformer2DModel:
    """Return an untrained model of 64 tokens and three layers, the identity at first as in DiT (arXiv 2212.09748)."""
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
    """Return DiT's scheduler: 1000 timesteps, linear betas, a learned variance between the smallest and the largest."""
    return DDPMScheduler(variance_type="learned_range")


class Noisy(NamedTuple):
    """Images at some timesteps, with the clean images, labels and noise."""

    images: Tensor
    timesteps: Tensor
    clean: Tensor
    labels: Tensor
    noise: Tensor


def add_noise(digits: Digits, timesteps: Tensor, schedule: DDPMScheduler, rng: torch.Generator) -> Noisy:
    noise = torch.randn(digits.images.shape, generator=rng)
    noisy = schedule.add_noise(digits.images, noise, timesteps)
    return Noisy(noisy, timesteps, digits.images, digits.labels, noise)


class Prediction(NamedTuple):
    """The halves of a model's output `[batch, 2, 8, 8]`: the noise, and the position of the log-variance, -1 to 1."""

    noise: Tensor
    variance: Tensor


def predict(model: DiTTransformer2DModel, noisy: Noisy) -> Prediction:
    output = model(noisy.images, timestep=noisy.timesteps, class_labels=noisy.labels).sample
    return Prediction(*output.chunk(2, dim=1))


def noise_error(prediction: Prediction, noisy: Noisy) -> Tensor:
    """Return the mean squared error of the noise, `[]`: DDPM's simple loss (arXiv 2006.11239, equation 14)."""
    return F.mse_loss(prediction.noise, noisy.noise)


def bound(prediction: Prediction, noisy: Noisy, schedule: DDPMScheduler) -> Tensor:
    """Return a timestep's term of the variational bound in bits per pixel, mean over the batch, `[]`.

    It is the KL divergence of the model's denoising step from that of the clean image. At timestep 0 it is the bits of
    the clean image's gray levels (arXiv 2006.11239, section 3). The variance is interpolated as in arXiv 2102.09672,
    equation 15. As there, it trains only the variance: no gradient reaches the predicted noise.
    """
    every, at = schedule.alphas_cumprod, noisy.timesteps
    before = F.pad(every, (1, 0), value=1.0)[at]
    every, beta = (x.view(-1, 1, 1, 1) for x in (every[at], schedule.betas[at]))
    before = before.view(-1, 1, 1, 1)
    first = (at == 0).view(-1, 1, 1, 1)
    # At timestep 0 the smallest variance is 0; use that of timestep 1.
    smallest = beta * (1 - before) / (1 - every)
    smallest = torch.where(first, schedule.betas[1] * schedule.betas[0] / (1 - schedule.alphas_cumprod[1]), smallest)
    guess = (noisy.images - (1 - every).sqrt() * prediction.noise.detach()) / every.sqrt()

    def mean(clean: Tensor) -> Tensor:
        of_clean, of_noisy = before.sqrt() * beta, (1 - beta).sqrt() * (1 - before)
        return (of_clean * clean + of_noisy * noisy.images) / (1 - every)

    share = (prediction.variance + 1) / 2
    step = Normal(mean(guess), (0.5 * (share * beta.log() + (1 - share) * smallest.log())).exp())
    divergence = kl_divergence(Normal(mean(noisy.clean), smallest.sqrt()), step)
    darkest, brightest = noisy.clean < -1 + GRAY_STEP / 2, noisy.clean > 1 - GRAY_STEP / 2
    below = torch.where(darkest, 0.0, step.cdf(noisy.clean - GRAY_STEP / 2))
    up_to = torch.where(brightest, 1.0, step.cdf(noisy.clean + GRAY_STEP / 2))
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
    """Train up to the last checkpoint. Yield the step at each one, while the model is its moving average.

    The model stays in eval mode: the only difference is that each layer would drop labels on its own.
    """
    model.eval().requires_grad_(True)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    average = EMAModel(model.parameters(), decay=AVERAGE)
    for step in tqdm(range(1, max(checkpoints) + 1), name, mininterval=5):
        chosen = torch.randint(len(digits.labels), (BATCH,), generator=rng)
        timesteps = torch.randint(schedule.config.num_train_timesteps, (BATCH,), generator=rng)
        noisy = add_noise(Digits(digits.images[chosen], digits.labels[chosen]), timesteps, schedule, rng)
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
    """Draw digits 0 to 9 in turn, with diffusers' scheduler and the same noise for every model."""
    schedule, rng = scheduler(), torch.Generator().manual_seed(seed)
    schedule.set_timesteps(steps)
    labels = torch.arange(count) % CLASSES
    drawn = []
    for part in labels.split(PART):
        images = torch.randn(len(part), 1, SIZE, SIZE, generator=rng)
        for timestep in schedule.timesteps:
            output = model(images, timestep=timestep.expand(len(part)), class_labels=part).sample
            images = schedule.step(output, timestep, images, generator=rng).prev_sample
        drawn.append(images.clamp(-1, 1))
    return Digits(torch.cat(drawn), labels)


@torch.no_grad()
def bits(model: DiTTransformer2DModel, digits: Digits, each: int, seed: int) -> float:
    """Return the variational bound in bits per pixel, from `each` digits at each timestep."""
    schedule, rng = scheduler(), torch.Generator().manual_seed(seed)
    steps = schedule.config.num_train_timesteps
    terms = []
    for timesteps in torch.arange(steps).repeat_interleave(each).split(PART):
        chosen = torch.randint(len(digits.labels), (len(timesteps),), generator=rng)
        noisy = add_noise(Digits(digits.images[chosen], digits.labels[chosen]), timesteps, schedule, rng)
        terms += len(timesteps) * [bound(predict(model, noisy), noisy, schedule).item()]
    return steps * sum(terms) / len(terms)


class Judge(nn.Module):
    """A convolutional classifier of digits; the Frechet distance compares its last hidden layer."""

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

    def forward(self, images: Tensor) -> Tensor:
        """Return features `[count, 64]`."""
        return self.features(images)

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        """Return the share of images that are classified as their label, 0 to 1."""
        return (self.classes(self(digits.images)).argmax(-1) == digits.labels).float().mean().item()

    @torch.no_grad()
    def distance(self, real: Digits, drawn: Digits) -> float:
        """Return the Frechet distance between the features of both (arXiv 1706.08500, equation 6)."""
        metric = FrechetInceptionDistance(self, input_img_size=(1, SIZE, SIZE))
        metric.update(real.images, real=True)
        metric.update(drawn.images, real=False)
        return metric.compute().item()


def train_judge(digits: Digits, epochs: int = 40, seed: int = 0) -> Judge:
    """Train a classifier on the digits, shifted by up to a pixel."""
    torch.manual_seed(seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    steps = epochs * (len(digits.labels) // BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), "judge", mininterval=5):
        chosen = torch.randint(len(digits.labels), (BATCH,))
        down, right = torch.randint(-1, 2, (2,)).tolist()
        moved = F.pad(digits.images[chosen], (1, 1, 1, 1), value=-1)[..., 1 + down :, 1 + right :][..., :SIZE, :SIZE]
        optimizer.zero_grad()
        F.cross_entropy(judge.classes(judge(moved)), digits.labels[chosen]).backward()
        optimizer.step()
        decay.step()
    return judge.eval().requires_grad_(False)

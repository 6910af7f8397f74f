"""Metrics that compare two sets of pictures; the models that some of them look through are given to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor, nn

from clear_attn.utils.optional_dependencies import imported

TEACHER, STUDENT = "teacher", "student"


class Batch(NamedTuple):
    """Pictures of the same prompts and seeds, uint8 `[pictures, 3, height, width]`."""

    teacher: Tensor
    student: Tensor
    prompts: Sequence[str]


Score = Callable[[Batch], Mapping[str, Tensor]]


class Mean(nn.Module):
    """The mean of what a score gives for each picture.

    Attributes:
        score: numbers of a batch, `[pictures]`, for the rows `"teacher"` or `"student"` or both.
        per_picture: the numbers so far, by row.
    """

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score
        self.per_picture: dict[str, list[float]] = {}

    def update(self, batch: Batch) -> None:
        for row, numbers in self.score(batch).items():
            self.per_picture.setdefault(row, []).extend(numbers.tolist())

    def compute(self) -> dict[str, float]:
        return {row: fmean(numbers) for row, numbers in self.per_picture.items()}


class Frechet(nn.Module):
    """The distance of two sets of pictures, which no picture has alone.

    d^2 = |m - n|^2 + tr(C + D - 2 (C D)^1/2), with means m and n and covariances C and D of the features of either set
    (Heusel et al., arXiv 1706.08500).

    Attributes:
        distance: torchmetrics' `FrechetInceptionDistance`.
    """

    def __init__(self, distance: Any) -> None:
        super().__init__()
        self.distance = distance
        self.per_picture: dict[str, list[float]] = {}

    def update(self, batch: Batch) -> None:
        self.distance.update(batch.teacher, real=True)
        self.distance.update(batch.student, real=False)

    def compute(self) -> dict[str, float]:
        return {STUDENT: float(self.distance.compute())}


Metric = Mean | Frechet


def unit_range(pictures: Tensor) -> Tensor:
    """From 0..255 to 0..1, float32."""
    return pictures.float() / 255


def psnr(batch: Batch) -> dict[str, Tensor]:
    """Peak signal-to-noise ratio of each picture in dB: 10 log10(1 / mean squared error), pixels in 0..1."""
    functional: Any = imported("torchmetrics.functional.image")
    teacher, student = unit_range(batch.teacher), unit_range(batch.student)
    ratio = functional.peak_signal_noise_ratio
    return {STUDENT: ratio(student, teacher, data_range=1.0, reduction="none", dim=(1, 2, 3))}


def ssim(batch: Batch) -> dict[str, Tensor]:
    """Structural similarity of each picture (Wang et al. 2004): the mean over Gaussian windows of sigma 1.5.

    As torchmetrics counts it: windows of 11 x 11 around every pixel, the picture reflected at its border.
    """
    functional: Any = imported("torchmetrics.functional.image")
    teacher, student = unit_range(batch.teacher), unit_range(batch.student)
    similarity = functional.structural_similarity_index_measure(student, teacher, data_range=1.0, reduction="none")
    return {STUDENT: similarity.reshape(-1)}


class Lpips(nn.Module):
    """Learned perceptual distance of each picture (Zhang et al., arXiv 1801.03924), through AlexNet.

    Attributes:
        distance: torchmetrics' `LearnedPerceptualImagePatchSimilarity` of pixels in 0..1, without a reduction.
    """

    def __init__(self, distance: Any) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {STUDENT: self.distance(unit_range(batch.student), unit_range(batch.teacher)).reshape(-1)}

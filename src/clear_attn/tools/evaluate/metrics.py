"""Metrics that compare two sets of images. The models that some of them use are arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from clear_attn.tools.evaluate.embeddings import Clip, Embedding
from clear_attn.utils.optional_dependencies import imported

TEACHER, STUDENT = "teacher", "student"


class Batch(NamedTuple):
    """Images of the same prompts and seeds, uint8 `[images, 3, height, width]`."""

    teacher: Tensor
    student: Tensor
    prompts: Sequence[str]


# From a batch to numbers `[images]`, for the rows "teacher" or "student" or both.
Score = Callable[[Batch], Mapping[str, Tensor]]


class Mean:
    """The mean of a score over all images.

    Attributes:
        per_image: the numbers so far, by row.
    """

    def __init__(self, score: Score) -> None:
        self.score = score
        self.per_image: dict[str, list[float]] = {}

    def update(self, batch: Batch) -> None:
        for row, numbers in self.score(batch).items():
            self.per_image.setdefault(row, []).extend(numbers.tolist())

    def compute(self) -> dict[str, float]:
        return {row: fmean(numbers) for row, numbers in self.per_image.items()}


class Frechet:
    """The distance of two sets of images, by torchmetrics' `FrechetInceptionDistance`. No image has one of its own.

    d^2 = |m - n|^2 + tr(C + D - 2 (C D)^1/2), with means m and n and covariances C and D of the features of either set
    (Heusel et al., arXiv 1706.08500).
    """

    def __init__(self, distance: Any) -> None:
        self.distance = distance
        self.per_image: dict[str, list[float]] = {}

    def update(self, batch: Batch) -> None:
        self.distance.to(batch.teacher.device)
        self.distance.update(batch.teacher, real=True)
        self.distance.update(batch.student, real=False)

    def compute(self) -> dict[str, float]:
        return {STUDENT: float(self.distance.compute())}


Metric = Mean | Frechet


def _unit_range(images: Tensor) -> Tensor:
    return images.float() / 255


def psnr(batch: Batch) -> dict[str, Tensor]:
    """Return the peak signal-to-noise ratio of each image in dB: 10 log10(1 / mean squared error), pixels in 0..1."""
    ratio: Any = imported("torchmetrics.functional.image").peak_signal_noise_ratio
    student, teacher = _unit_range(batch.student), _unit_range(batch.teacher)
    return {STUDENT: ratio(student, teacher, data_range=1.0, reduction="none", dim=(1, 2, 3))}


def ssim(batch: Batch) -> dict[str, Tensor]:
    """Return the structural similarity of each image (Wang et al. 2004): the mean over Gaussian windows of sigma 1.5.

    As torchmetrics computes it: windows of 11 x 11 around every pixel, the image reflected at its border.
    """
    similarity: Any = imported("torchmetrics.functional.image").structural_similarity_index_measure
    student, teacher = _unit_range(batch.student), _unit_range(batch.teacher)
    return {STUDENT: similarity(student, teacher, data_range=1.0, reduction="none").reshape(-1)}


def lpips(distance: Any) -> Score:
    """Return the learned perceptual distance of each image (Zhang et al., arXiv 1801.03924).

    Args:
        distance: torchmetrics' `LearnedPerceptualImagePatchSimilarity` of pixels in 0..1, without a reduction.
    """

    def score(batch: Batch) -> dict[str, Tensor]:
        student, teacher = _unit_range(batch.student), _unit_range(batch.teacher)
        return {STUDENT: distance.to(student.device)(student, teacher).reshape(-1)}

    return score


def image_similarity(embedding: Embedding) -> Score:
    """Return 100 x the cosine of the embeddings of the teacher's and the student's image: CLIP-I, or DINO."""
    return lambda batch: {
        STUDENT: 100 * (embedding.images(batch.teacher) * embedding.images(batch.student)).sum(dim=-1)
    }


def text_similarity(clip: Clip) -> Score:
    """Return 100 x the cosine of the embeddings of an image and its prompt, for either model: CLIP-T."""

    def score(batch: Batch) -> dict[str, Tensor]:
        images = {TEACHER: clip.images(batch.teacher), STUDENT: clip.images(batch.student)}
        texts = clip.texts(batch.prompts)
        return {row: 100 * (each * texts).sum(dim=-1) for row, each in images.items()}

    return score

"""The metrics by name: what each means, and how it is made from what is installed and downloaded.

All but PSNR and SSIM are columns of the table with which CLEAR's authors compare a linearized FLUX.1-dev with its
original (arXiv 2412.16112, 1024 x 1024 px, 5,000 captions of COCO 2014).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from clear_attn.tools.evaluate import metrics
from clear_attn.tools.evaluate.embeddings import Clip, Dino
from clear_attn.tools.evaluate.metrics import Mean, Metric
from clear_attn.utils.optional_dependencies import Missing, imported, torch_hub_file

CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dino-vits16"
INCEPTION_FEATURES = 2048


class Sources:
    """The prompts and models of metrics. Each model is loaded when a metric first needs it.

    Attributes:
        prompts: the prompts of the images.
        clip_name, dino_name: Hub ids or folders.
        download: whether missing weights may be downloaded.
    """

    def __init__(self, prompts: Sequence[str], clip_name: str, dino_name: str, download: bool) -> None:
        self.prompts, self.clip_name, self.dino_name, self.download = prompts, clip_name, dino_name, download

    @functools.cached_property
    def clip(self) -> Clip:
        return Clip(self.clip_name, self.download)

    @functools.cached_property
    def dino(self) -> Dino:
        return Dino(self.dino_name, self.download)


class Definition(NamedTuple):
    """A metric.

    Attributes:
        title: the title of its column.
        better: `"higher"` or `"lower"`.
        meaning: its meaning in a sentence.
        make: a function that makes it, or raises `Missing` if it cannot be computed.
    """

    title: str
    better: str
    meaning: str
    make: Callable[[Sources], Metric]


def _of_pixels(score: metrics.Score) -> Mean:
    imported("torchmetrics.functional.image")
    return Mean(score)


def _lpips(sources: Sources) -> Metric:
    lpip: Any = imported("torchmetrics.image.lpip")
    models: Any = imported("torchvision.models")
    with torch_hub_file(models.AlexNet_Weights.DEFAULT.url, "AlexNet", sources.download):
        distance = lpip.LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
    return Mean(metrics.lpips(distance))


def _fid(sources: Sources) -> Metric:
    check_enough_for_fid(len(sources.prompts), INCEPTION_FEATURES)
    inception: Any = imported("torch_fidelity.feature_extractor_inceptionv3")
    fid: Any = imported("torchmetrics.image.fid")
    with torch_hub_file(inception.URL_INCEPTION_V3, "Inception-v3", sources.download):
        return metrics.Frechet(fid.FrechetInceptionDistance(INCEPTION_FEATURES))


def check_enough_for_fid(images: int, features: int) -> None:
    """Raise Missing if the covariances of the features cannot have full rank; more images are better still."""
    if images <= features:
        raise Missing(
            f"it takes more images than the {features} features whose covariances are compared, here {images}"
        )


def _clip_t(sources: Sources) -> Metric:
    cut = sources.clip.too_long(sources.prompts)
    if cut:
        warnings.warn(
            f"{cut} of {len(sources.prompts)} prompts have more than the {sources.clip.text_tokens} tokens that "
            f"{sources.clip_name} reads; clip_t compares images with what comes before",
            stacklevel=2,
        )
    return Mean(metrics.text_similarity(sources.clip))


METRICS = {
    "fid": Definition(
        *("FID", "lower"),
        "Frechet distance of the two sets of images by 2048 features of Inception-v3 (arXiv 1706.08500)",
        _fid,
    ),
    "lpips": Definition(
        *("LPIPS", "lower", "learned distance of each pair of images through AlexNet (arXiv 1801.03924)"), _lpips
    ),
    "clip_i": Definition(
        *("CLIP-I", "higher", "100 x cosine of the CLIP embeddings of each pair of images"),
        lambda sources: Mean(metrics.image_similarity(sources.clip)),
    ),
    "dino": Definition(
        *("DINO", "higher", "100 x cosine of the DINO class tokens of each pair of images"),
        lambda sources: Mean(metrics.image_similarity(sources.dino)),
    ),
    "clip_t": Definition(
        *("CLIP-T", "higher", "100 x cosine of the CLIP embeddings of each image and its prompt"), _clip_t
    ),
    "psnr": Definition(
        *("PSNR", "higher", "peak signal-to-noise ratio of each pair of images in dB, infinite for equal ones"),
        lambda sources: _of_pixels(metrics.psnr),
    ),
    "ssim": Definition(
        *("SSIM", "higher", "structural similarity of each pair of images (Wang et al. 2004)"),
        lambda sources: _of_pixels(metrics.ssim),
    ),
}


def make_metrics(names: Sequence[str] | None, sources: Sources) -> tuple[dict[str, Metric], dict[str, str]]:
    """Return the metrics that can be computed, and why the others cannot.

    Args:
        names: those that must be computed; None for all that can be.
        sources: what they are made from.

    Raises:
        ValueError: a name is unknown.
        RuntimeError: a metric of ``names`` cannot be computed, or none at all.
    """
    for name in names or ():
        if name not in METRICS:
            raise ValueError(f"{name!r} is not a metric; there is {', '.join(METRICS)}")
    made: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    for name in METRICS if names is None else dict.fromkeys(names):
        try:
            made[name] = METRICS[name].make(sources)
        except Missing as reason:
            missing[name] = str(reason)
    if not made or (names and missing):
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in missing.items())
        raise RuntimeError(f"metrics cannot be computed:{reasons or ' none was asked for'}")
    return made, missing

"""Which metrics there are, what each means, and how each is made of what is at hand.

All but PSNR and SSIM are columns of the table with which CLEAR's authors compare a linearized FLUX.1-dev with its
original (arXiv 2412.16112, 1024 x 1024 px, 5,000 captions of COCO 2014).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from clear_attn.tools.evaluate.embeddings import Clip, Dino, ImageSimilarity, TextSimilarity
from clear_attn.tools.evaluate.metrics import Frechet, Lpips, Mean, Metric, Score, psnr, ssim
from clear_attn.utils.optional_dependencies import Missing, imported, torch_hub_file

CLIP = "openai/clip-vit-large-patch14"
DINO = "facebook/dino-vits16"
INCEPTION_FEATURES = 2048


class Judges:
    """What metrics look through, each loaded once, when it is first asked for.

    Attributes:
        prompts: of the pictures to judge.
        clip_name, dino_name: Hub ids or folders.
        download: whether what is not here may be fetched.
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
        title: of its column.
        better: `"higher"` or `"lower"`.
        meaning: in a sentence.
        make: makes it; raises `Missing` where it cannot be computed.
    """

    title: str
    better: str
    meaning: str
    make: Callable[[Judges], Metric]


def _of_pixels(score: Score) -> Callable[[Judges], Metric]:
    def make(judges: Judges) -> Metric:
        imported("torchmetrics.functional.image")
        return Mean(score)

    return make


def _lpips(judges: Judges) -> Metric:
    metrics: Any = imported("torchmetrics.image.lpip")
    models: Any = imported("torchvision.models")
    with torch_hub_file(models.AlexNet_Weights.DEFAULT.url, "AlexNet", judges.download):
        distance = metrics.LearnedPerceptualImagePatchSimilarity("alex", reduction="none", normalize=True)
    return Mean(Lpips(distance))


def _fid(judges: Judges) -> Metric:
    enough_for_fid(len(judges.prompts), INCEPTION_FEATURES)
    inception: Any = imported("torch_fidelity.feature_extractor_inceptionv3")
    metrics: Any = imported("torchmetrics.image.fid")
    with torch_hub_file(inception.URL_INCEPTION_V3, "Inception-v3", judges.download):
        return Frechet(metrics.FrechetInceptionDistance(INCEPTION_FEATURES))


def enough_for_fid(pictures: int, features: int) -> None:
    """Raises Missing where the features' covariances could not have full rank; more pictures are better still."""
    if pictures <= features:
        raise Missing(
            f"it takes more pictures than the {features} features whose covariances are compared, here {pictures}"
        )


def _clip_t(judges: Judges) -> Metric:
    cut = judges.clip.too_long(judges.prompts)
    if cut:
        warnings.warn(
            f"{cut} of {len(judges.prompts)} prompts have more than the {judges.clip.text_tokens} tokens that "
            f"{judges.clip_name} reads; clip_t compares pictures with what comes before",
            stacklevel=2,
        )
    return Mean(TextSimilarity(judges.clip))


METRICS = {
    "fid": Definition(
        "FID",
        "lower",
        "Frechet distance of the two sets of pictures by 2048 features of Inception-v3 (arXiv 1706.08500)",
        _fid,
    ),
    "lpips": Definition(
        "LPIPS", "lower", "learned distance of each two pictures through AlexNet (arXiv 1801.03924)", _lpips
    ),
    "clip_i": Definition(
        "CLIP-I",
        "higher",
        "100 x cosine of the CLIP embeddings of each two pictures",
        lambda judges: Mean(ImageSimilarity(judges.clip)),
    ),
    "dino": Definition(
        "DINO",
        "higher",
        "100 x cosine of the DINO class tokens of each two pictures",
        lambda judges: Mean(ImageSimilarity(judges.dino)),
    ),
    "clip_t": Definition(
        "CLIP-T", "higher", "100 x cosine of the CLIP embeddings of each picture and its prompt", _clip_t
    ),
    "psnr": Definition(
        "PSNR",
        "higher",
        "peak signal-to-noise ratio of each two pictures in dB, infinite for equal ones",
        _of_pixels(psnr),
    ),
    "ssim": Definition(
        "SSIM", "higher", "structural similarity of each two pictures (Wang et al. 2004)", _of_pixels(ssim)
    ),
}


def check_names(names: Sequence[str] | None) -> None:
    """Raises ValueError where a name is no metric's."""
    for name in names or ():
        if name not in METRICS:
            raise ValueError(f"{name!r} is no metric; there is {', '.join(METRICS)}")


def make_metrics(names: Sequence[str] | None, judges: Judges) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can be computed, on the CPU, and why the others cannot.

    Args:
        names: those that are wanted, all of which must be there; None for all that can be.
        judges: what they look through.

    Raises:
        ValueError: a name is unknown.
        RuntimeError: one that is wanted cannot be computed, or none at all.
    """
    check_names(names)
    made: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    for name in METRICS if names is None else dict.fromkeys(names):
        try:
            made[name] = METRICS[name].make(judges)
        except Missing as reason:
            if names is not None:
                raise RuntimeError(f"{name} cannot be computed: {reason}") from None
            missing[name] = str(reason)
    if not made:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise RuntimeError(f"no metric can be computed ({reasons or 'none was asked for'})")
    return made, missing

"""The settings of a cascade: of its first image and of each stage after it. Plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from clear_attn.utils.validation import check_whole_number

# Height and width in pixels.
Size = tuple[int, int]


def size_name(size: Size) -> str:
    """Return a size as messages write it."""
    return f"{size[0]} x {size[1]} px"


def check_number(name: str, value: Any, least: float, remedy: str) -> None:
    """Raises ValueError where a value is no finite number of at least so much."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a number of at least {least:g}, got {value!r}; {remedy}")


@dataclass(frozen=True)
class _Sized:
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height={self.height} and width={self.width}: give both in pixels, or neither")
        for name, side in (("height", self.height), ("width", self.width)):
            if side is not None:
                check_whole_number(name, side, "it is in pixels")

    @property
    def size(self) -> Size:
        """Height and width in pixels, of a plan's, where they are filled in."""
        assert self.height is not None
        assert self.width is not None
        return self.height, self.width


@dataclass(frozen=True)
class Base(_Sized):
    """The first image of a cascade: text to image, with dense attention and the model's own weights.

    Args:
        height, width (`int`, *optional*): pixels. By default the longer side is the model's native one (1024 for
            FLUX.1) and the other follows the picture's aspect ratio, as in CLEAR's published run: 512 x 1024 for
            2048 x 4096.
        steps (`int`, *optional*), guidance (`float`, *optional*): number of steps and guidance scale; by default the
            pipeline's own.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of range.
    """

    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            check_whole_number("steps", self.steps, "it is the number of denoising steps")
        if self.guidance is not None:
            check_number("guidance", self.guidance, 0, "it is a guidance scale, 3.5 is usual")


@dataclass(frozen=True)
class Stage(_Sized):
    """One stage of a cascade: the image so far, enlarged, noised and drawn again by the linearized model.

    That is SDEdit (arXiv 2108.01073). All defaults are those of CLEAR's published high-resolution run (the notebook
    of github.com/Huage001/CLEAR), unless another source is named.

    Args:
        height, width (`int`, *optional*): pixels; by default those of the whole picture. Published: four times the
            base image's.
        strength (`float`, defaults to 0.7): the share of the steps that is run, in (0, 1]; the more, the less is kept
            of the image so far.
        steps (`int`, defaults to 20): of the whole schedule; strength x steps of them are run.
        guidance (`float`, defaults to 7.5): guidance scale.
        ntk_factor (`float`, *optional*): of the rotary embedding's theta, see `ntk_scaling`. By default 10, or 1 for
            models without rotary embedding, which allow no other.
        proportional (`bool`, defaults to `True`): proportional attention, see `proportional_attention`.
        shift (`float`, *optional*, defaults to 3.0): of a static schedule. Published is "no dynamic shifting", which
            leaves FLUX.1-dev's static 3.0; at 65,536 tokens its dynamic shift would be 1e5. None keeps the
            pipeline's own schedule.
        low_resolution_guidance (`int`, *optional*): draws the low frequencies towards the image so far, in the
            manner of I-Max (arXiv 2410.07536): the coarse band of a Haar wavelet transform of so many levels, that
            is, means over 2^level x 2^level latents, with a weight that falls from 1 to 0. Off by default, as in the
            published run; for an image enlarged four times, 2 is natural.

    Raises:
        TypeError, ValueError: a value of the wrong kind or out of range.
    """

    strength: float = 0.7
    steps: int = 20
    guidance: float = 7.5
    ntk_factor: float | None = None
    proportional: bool = True
    shift: float | None = 3.0
    low_resolution_guidance: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        strength = self.strength
        if not isinstance(strength, (int, float)) or isinstance(strength, bool) or not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {strength!r}; 0.7 is usual")
        check_whole_number("steps", self.steps, "it is the number of denoising steps of the whole schedule")
        check_number("guidance", self.guidance, 0, "it is a guidance scale, 7.5 is usual")
        if self.ntk_factor is not None:
            check_number("ntk_factor", self.ntk_factor, 1e-6, "10 is usual, 1 changes nothing")
        if not isinstance(self.proportional, bool):
            raise TypeError(f"proportional must be True or False, got {self.proportional!r}")
        if self.shift is not None:
            check_number("shift", self.shift, 1e-6, "3 is usual; None keeps the pipeline's own schedule")
        if self.low_resolution_guidance is not None:
            check_whole_number(
                "low_resolution_guidance", self.low_resolution_guidance, "it is a number of wavelet levels; None is off"
            )

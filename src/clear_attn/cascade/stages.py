"""Settings of a cascade's base image and of its stages, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from clear_attn.utils.image_sizes import Size
from clear_attn.utils.validation import check_whole_number


def validate_number(name: str, value: Any, least: float, remedy: str) -> None:
    """Raise ValueError for a value that is not a finite number of at least `least`."""
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
        """Height and width in pixels, which a plan has resolved."""
        assert self.height is not None
        assert self.width is not None
        return self.height, self.width


@dataclass(frozen=True)
class Base(_Sized):
    """Settings of the base image: text to image, with dense attention and the original weights.

    Args:
        height, width (`int`, *optional*): pixels. By default the longer side is the model's native one (1024 for
            FLUX.1) and the aspect ratio is that of the final image, as in CLEAR's published run: 512 x 1024 for
            2048 x 4096.
        steps (`int`, *optional*): number of steps; by default the pipeline's.
        guidance (`float`, *optional*): guidance scale; by default the pipeline's.

    Raises:
        TypeError, ValueError: a value has the wrong type or is out of range.

    Examples:
        >>> Base(height=512, width=1024, steps=28).size
        (512, 1024)
    """

    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None:
            check_whole_number("steps", self.steps, "it is the number of denoising steps")
        if self.guidance is not None:
            validate_number("guidance", self.guidance, 0, "it is a guidance scale, 3.5 is usual")


@dataclass(frozen=True)
class Stage(_Sized):
    """Settings of one stage: the previous image, enlarged, noised, and denoised by the linearized model.

    This is SDEdit (arXiv 2108.01073). Unless another source is named, the defaults are those of CLEAR's published
    high-resolution run (the notebook of github.com/Huage001/CLEAR).

    Args:
        height, width (`int`, *optional*): pixels; default to the size of the final image. Published: four times the
            base image's sides.
        strength (`float`, defaults to 0.7): share of the steps that run, in (0, 1]. Lower values keep more of the
            previous image.
        steps (`int`, defaults to 20): length of the whole schedule; strength x steps of them run.
        guidance (`float`, defaults to 7.5): guidance scale; `true_cfg_scale` for Qwen-Image.
        ntk_factor (`float`, *optional*): factor of the rotary embedding's theta, see `ntk_scaling`. Defaults to 10, and
            to 1 for models without rotary embedding, which allow no other value.
        proportional (`bool`, defaults to `True`): whether attention is proportional, see `proportional_attention`.
        shift (`float`, *optional*, defaults to 3.0): shift of a static schedule. The published run disables dynamic
            shifting, which leaves FLUX.1-dev's static 3.0; its dynamic shift would be 1e5 at 65,536 tokens. None keeps
            the pipeline's own schedule.
        low_resolution_guidance (`int`, *optional*): levels of the Haar wavelet transform; its coarse band is guided
            toward the previous image, in the manner of I-Max (arXiv 2410.07536): means over 2^level x 2^level latents,
            with a weight that falls from 1 to 0. Defaults to None, off, as in the published run; 2 suits an image that
            is enlarged four times.

    Raises:
        TypeError, ValueError: a value has the wrong type or is out of range.

    Examples:
        >>> Stage(strength=0.4, low_resolution_guidance=2).steps
        20
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
        validate_number("guidance", self.guidance, 0, "it is a guidance scale, 7.5 is usual")
        if self.ntk_factor is not None:
            validate_number("ntk_factor", self.ntk_factor, 1e-6, "10 is usual, 1 changes nothing")
        if not isinstance(self.proportional, bool):
            raise TypeError(f"proportional must be True or False, got {self.proportional!r}")
        if self.shift is not None:
            validate_number("shift", self.shift, 1e-6, "3 is usual; None keeps the pipeline's own schedule")
        if self.low_resolution_guidance is not None:
            check_whole_number(
                "low_resolution_guidance", self.low_resolution_guidance, "it is a number of wavelet levels; None is off"
            )

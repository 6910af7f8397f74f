"""Settings of a cascade's base image and of its stages, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clear_attn.utils.image_sizes import Size
from clear_attn.utils.validation import check_whole_number


def validate_number(name: str, value: Any, least: float, remedy: str, most: float = math.inf) -> None:
    """Raise ValueError for a value that is not a finite number from `least` to `most`."""
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or not least <= value <= most
        or value == math.inf
    ):
        limits = f"of at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be a number {limits}, got {value!r}; {remedy}")


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
class StepwiseGuidance:
    """Settings of guidance by the run before: at each step, by its prediction of the clean image at the same noise.

    This is HiFlow (arXiv 2504.06232). The defaults are those of its published run with FLUX.1-dev at 2048 px; at 4096
    px, its second stage, `structure` is 0.25. Both weights fall linearly to 0 after the last step.

    Args:
        structure (`float`, defaults to 1): weight a, 0 to 1. The low frequencies of the predicted clean image x0 move
            toward those of the reference r: `x0 + a (low(r) - low(x0))`.
        acceleration (`float`, defaults to 0.5): weight b, 0 to 1. The velocity's change from step to step moves toward
            the reference's.
        cutoff (`float`, defaults to 0.2): where the Butterworth filter of order 4 lets half pass, above 0 to 1, as a
            share of the highest frequency. HiFlow calls it ratio.
        sharpening (`float`, defaults to 1): strength with which the enlarged image that starts the stage is sharpened;
            0 is off. Without effect in a stage that `continues`, which starts from no image.

    Raises:
        ValueError: a value is out of range.

    Examples:
        >>> Stage(stepwise_guidance=StepwiseGuidance(structure=0.25)).stepwise_guidance.acceleration
        0.5
    """

    structure: float = 1.0
    acceleration: float = 0.5
    cutoff: float = 0.2
    sharpening: float = 1.0

    def __post_init__(self) -> None:
        validate_number("structure", self.structure, 0, "1 is usual, 0 is off", most=1)
        validate_number("acceleration", self.acceleration, 0, "0.5 is usual, 0 is off", most=1)
        validate_number("cutoff", self.cutoff, 1e-6, "0.2 is usual, 1 is the highest frequency of a side", most=1)
        validate_number("sharpening", self.sharpening, 0, "1 is usual, 0 is off")


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
            with a weight that falls from 1 to 0. Defaults to None, off, as in the published run; the preset "refined"
            uses 1.
        stepwise_guidance (`StepwiseGuidance`, *optional*): guidance toward what the run before predicted at the same
            noise level, in the manner of HiFlow. Not together with `low_resolution_guidance`.
        continues (`bool`, defaults to `False`): whether the stage continues the run before instead of drawing its
            finished image again: progressive resolution (arXiv 2605.18736). The run before stops where its latents have
            the signal-to-noise ratio at which this stage starts, and its image is what it predicts there. Its latents
            are enlarged, and fresh noise fills the band that they do not have. A lower `strength` leaves more steps to
            the smaller size. With `stepwise_guidance` the run before goes on to its end, for its predictions. Not
            together with `low_resolution_guidance`, which needs the finished image.

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
    stepwise_guidance: StepwiseGuidance | None = None
    continues: bool = False

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
            if self.stepwise_guidance is not None:
                raise ValueError(
                    f"low_resolution_guidance={self.low_resolution_guidance} and stepwise_guidance both guide the low "
                    "frequencies, toward different references; leave one out"
                )
        if self.stepwise_guidance is not None and not isinstance(self.stepwise_guidance, StepwiseGuidance):
            raise TypeError(
                f"stepwise_guidance must be a clear_attn.StepwiseGuidance, got {self.stepwise_guidance!r}; "
                "StepwiseGuidance() has the published settings"
            )
        if not isinstance(self.continues, bool):
            raise TypeError(f"continues must be True or False, got {self.continues!r}")
        if self.continues and self.low_resolution_guidance is not None:
            raise ValueError(
                f"low_resolution_guidance={self.low_resolution_guidance} guides toward the finished image before, and "
                "with continues=True the run before is not finished; leave one out, or guide with stepwise_guidance"
            )

    @staticmethod
    def preset(name: str) -> Stage:
        """Return the settings of a preset; change some with `dataclasses.replace`.

        Args:
            name: "published", the settings of CLEAR's published run with FLUX.1-dev, or "refined", which starts with
                less noise and follows the image before (docs/highres.md).

        Raises:
            ValueError: there is no such preset.

        Examples:
            >>> Stage.preset("published") == Stage()
            True
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be {' or '.join(map(repr, PRESETS))}, got {name!r}")
        return PRESETS[name]

    @property
    def needs_recording(self) -> bool:
        """Whether the run before must be recorded."""
        return self.continues or self.stepwise_guidance is not None

    @property
    def steps_run(self) -> int:
        """The number of steps that run, as image-to-image pipelines of diffusers round."""
        return self.steps - int(max(self.steps - min(self.steps * self.strength, self.steps), 0))


PRESETS = {
    "published": Stage(),
    "refined": Stage(strength=0.4, ntk_factor=1, proportional=False, shift=1.0, low_resolution_guidance=1),
}


def read_stage(values: Mapping[str, Any]) -> Stage:
    """Return a stage from a plan's JSON."""
    settings = {**values}
    guidance = settings.pop("stepwise_guidance", None)
    return Stage(**settings, stepwise_guidance=None if guidance is None else StepwiseGuidance(**guidance))

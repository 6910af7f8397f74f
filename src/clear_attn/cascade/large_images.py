"""`highres`: large pictures in one call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from clear_attn.cascade import stage_runner as cascade
from clear_attn.cascade.memory_check import check_fits
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.planning import draws_as_it_is, make_plan, with_settings
from clear_attn.cascade.result import HighresError, HighresInterrupted, HighresResult
from clear_attn.cascade.stages import Base, Stage
from clear_attn.methods.schedule import Schedule
from clear_attn.patching.linearization import Change, prepare
from clear_attn.patching.restoration import restored_state


def highres(
    pipe: Any,
    prompt: str,
    *,
    height: int,
    width: int,
    window: int | None = None,
    down_factor: int | None = None,
    schedule: Schedule | None = None,
    weights: str | os.PathLike[str] | None = "auto",
    revision: str | None = None,
    token: str | bool | None = None,
    backend: str = "auto",
    image: Image.Image | None = None,
    base: Base | None = None,
    stages: Stage | Sequence[Stage] = Stage(),  # noqa: B008, for it is frozen
    seed: int | None = None,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    callback_on_stage_end: Callable[[int, Image.Image, HighresPlan], None] | None = None,
    **options: Any,
) -> HighresResult:
    """Draws a picture much larger than a model was trained on.

    A base image at the model's own size comes first, with dense attention and the original weights; then each stage
    enlarges it and draws it again with the linearized model (SDEdit). Afterwards the pipeline is as it was, also
    after an error. All is checked before the first step: sizes, settings, weights, and whether memory can suffice.

    Args:
        pipe: a FLUX.1, Stable Diffusion 3 or 3.5 pipeline, text to image or image to image, linearized or not.
        prompt (`str`): what to draw.
        height, width (`int`): pixels; rounded down to whole tokens, with a warning.
        window, down_factor, schedule, weights, revision, token, backend: as in `linearize`, for all stages. A
            linearized pipeline draws as it is where none of the first five is given.
        image (`PIL.Image.Image`, *optional*): comes first instead of a base image; of the picture's aspect ratio.
        base (`Base`, *optional*): settings of the base image.
        stages (`Stage` or a sequence of them, defaults to `Stage()`): each stage in turn, the last one of the picture's
            size. Or one without a size, whose settings are those of as few stages as grow by about four at most.
        seed (`int`, *optional*): of the noise, see `HighresPlan`; by default drawn from torch's.
        callback_on_step_end, callback_on_step_end_tensor_inputs: as in the pipelines. `_interrupt`, set on
            the pipeline that a callback gets or on ``pipe``, from anywhere, ends the picture after that step: the
            result has the images finished so far.
        callback_on_stage_end (*optional*): called with the number of each finished image (0 is the first one), the
            image, and the plan.
        **options: further keywords for every call of the pipelines, plain data: `negative_prompt`,
            `max_sequence_length`, ...

    Returns:
        `HighresResult`: all images, and the plan, from which the picture can be made again.

    Raises:
        TypeError: not a supported pipeline; values of the wrong kind; unknown options.
        ValueError: sizes, aspect ratios or settings that do not fit each other or the model; sizes that memory cannot
            hold; another backend than that of a pipeline that is drawn as it is.
        HighresInterrupted: Ctrl-C; its `result` has what was finished. It is a KeyboardInterrupt.
        HighresError: any error while drawing, which is its `__cause__`; its `result` has what was finished.
        And all that `linearize` raises, and with a base image `restore`.
    """
    plan = make_plan(
        pipe,
        prompt,
        (height, width),
        image=image,
        base=base,
        stages=stages,
        seed=seed,
        window=window,
        down_factor=down_factor,
        schedule=schedule,
        weights=weights,
        revision=revision,
        backend=backend,
        options=options,
    )
    change = _prepare(pipe, plan, token)
    plan = with_settings(pipe, plan, change)
    if plan.base:
        restored_state(pipe)  # it is drawn with the original weights, which may have been given up
    check_fits(pipe, plan)
    callbacks = {
        "callback_on_step_end": callback_on_step_end,
        "callback_on_step_end_tensor_inputs": list(callback_on_step_end_tensor_inputs),
    }
    result = HighresResult([], plan)

    def finished(drawn: Image.Image) -> None:
        result.images.append(drawn)
        if callback_on_stage_end:
            callback_on_stage_end(len(result.images) - 1, drawn, plan)

    try:
        with contextlib.suppress(cascade.Interrupted):
            cascade.draw(pipe, plan, change, image, callbacks, finished)
    except KeyboardInterrupt:
        raise HighresInterrupted(result) from None
    except Exception as error:
        raise HighresError(result, error) from error
    return result


def _prepare(pipe: Any, plan: HighresPlan, token: str | bool | None) -> Change | None:
    """Return the change that linearizes a pipeline as planned; None for one that stays as it is."""
    if draws_as_it_is(pipe, plan):
        return None
    how = {
        name: getattr(plan, name) for name in ("window", "down_factor", "schedule", "weights", "revision", "backend")
    }
    return prepare(pipe, **how, token=token)

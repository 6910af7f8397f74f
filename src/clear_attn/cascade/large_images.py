"""`highres`: large pictures in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from clear_attn.cascade import stage_runner as cascade
from clear_attn.cascade.memory_check import check_fits, check_ranks_have_rows
from clear_attn.cascade.plan import HighresPlan
from clear_attn.cascade.planning import make_plan
from clear_attn.cascade.result import HighresError, HighresInterrupted, HighresResult
from clear_attn.cascade.stages import Base, Stage
from clear_attn.methods.schedule import Schedule
from clear_attn.patching.context_managers import linearized
from clear_attn.patching.linearization import find_transformer, restored_state
from clear_attn.patching.state import entry_hook_of
from clear_attn.weights.metadata import metadata_of


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
    plan = make_plan(pipe, prompt, (height, width), image, base, stages, seed, weights, revision, backend, options)
    if plan.base:
        restored_state(pipe)  # it is drawn with the original weights, which may have been given up
    check_ranks_have_rows(pipe, plan)
    check_fits(pipe, plan)
    callbacks = {
        "callback_on_step_end": callback_on_step_end,
        "callback_on_step_end_tensor_inputs": list(callback_on_step_end_tensor_inputs),
    }
    result = None
    try:
        with _linearized_as_asked(pipe, plan, window, down_factor, schedule, token):
            images: list[Image.Image] = []
            result = HighresResult(images, _with_settings_of(pipe, plan))

            def finished(drawn: Image.Image) -> None:
                images.append(drawn)
                if callback_on_stage_end:
                    callback_on_stage_end(len(images) - 1, drawn, result.plan)

            with contextlib.suppress(cascade.Interrupted):
                cascade.draw(pipe, result.plan, image, callbacks, finished)
    except KeyboardInterrupt:
        if result is None:
            raise
        raise HighresInterrupted(result) from None
    except Exception as error:
        if result is None:
            raise
        raise HighresError(result, error) from error
    return result


@contextlib.contextmanager
def _linearized_as_asked(
    pipe: Any,
    plan: HighresPlan,
    window: int | None,
    down_factor: int | None,
    schedule: Schedule | None,
    token: str | bool | None,
) -> Iterator[None]:
    hook = entry_hook_of(find_transformer(pipe)[0])
    if hook and (window, down_factor, schedule, plan.weights, plan.revision) == (None, None, None, "auto", None):
        if plan.backend not in ("auto", hook.backend):
            raise ValueError(
                f"backend={plan.backend!r} is not that of this linearized pipeline, {hook.backend!r}; leave it out, or "
                "say what to linearize with: window, down_factor, schedule and weights"
            )
        yield
    else:
        with linearized(
            pipe,
            window,
            down_factor,
            schedule=schedule,
            weights=plan.weights,
            revision=plan.revision,
            token=token,
            backend=plan.backend,
        ):
            yield


def _with_settings_of(pipe: Any, plan: HighresPlan) -> HighresPlan:
    """The plan with the settings that a linearized pipeline has, as far as it knows them."""
    transformer, _ = find_transformer(pipe)
    hook, metadata = entry_hook_of(transformer), metadata_of(transformer)
    assert hook
    method: Any = hook.method
    if method.pooled_factor is None:
        raise RuntimeError(
            f"this pipeline is linearized with {method}, and highres draws with CLEAR; give it weights= of CLEAR "
            "or None, or call clear_attn.restore() first"
        )
    weights = plan.weights if plan.weights != "auto" else metadata["weights"] if metadata else None
    return dataclasses.replace(
        plan,
        window=method.window,
        down_factor=method.down_factor,
        schedule=hook.schedule,
        weights=weights,
        backend=hook.backend,
    )

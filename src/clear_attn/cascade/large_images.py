"""`highres`: images larger than a model was trained on, in one call."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from clear_attn.cascade import stage_runner
from clear_attn.cascade.memory_check import check_fits
from clear_attn.cascade.pipelines import CascadeTarget, find_cascade_target
from clear_attn.cascade.plan import UNRESOLVED, HighresPlan, comparable, differences
from clear_attn.cascade.planning import make_plan, resolve_attention, runs_as_it_is, validate_calls
from clear_attn.cascade.presets import default_preset
from clear_attn.cascade.recording import Recording
from clear_attn.cascade.result import HighresError, HighresInterrupted, HighresResult
from clear_attn.cascade.stages import Base, Stage
from clear_attn.methods.schedule import Schedule
from clear_attn.patching.linearization import prepare
from clear_attn.patching.restoration import restored_state
from clear_attn.patching.target import Target


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
    resume: HighresResult | None = None,
    base: Base | None = None,
    stages: Stage | Sequence[Stage] | None = None,
    preset: str | None = None,
    seed: int | None = None,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    callback_on_start: Callable[[HighresResult], None] | None = None,
    callback_on_stage_end: Callable[[HighresResult], None] | None = None,
    **options: Any,
) -> HighresResult:
    """Draw an image much larger than the model was trained on.

    The base image has the model's own size, dense attention and the original weights. Each stage then enlarges the
    previous image and draws it again with the linearized model (SDEdit). Afterwards the pipeline is restored, also
    after an error. Sizes, settings, weights and memory are checked before the first step.

    Args:
        pipe: a FLUX.1, FLUX.2, FLUX.3, Qwen-Image, Chroma, Krea 2, Z-Image or Stable Diffusion 3 pipeline, text or
            image to image, modular or not, linearized or not.
        prompt (`str`): text to draw.
        height, width (`int`): pixels; rounded down to whole tokens, with a warning.
        window, down_factor, schedule, weights, revision, token, backend: arguments of `linearize` for all stages. A
            linearized pipeline keeps its settings if none of the first five is given.
        image (`PIL.Image.Image`, *optional*): starts the cascade instead of a base image; it needs the final image's
            aspect ratio.
        resume (`HighresResult`, *optional*): the unfinished result of a call with the same arguments, from
            `HighresInterrupted`, `HighresError` or `HighresResult.load`. Only what it lacks is drawn:
            ``highres(pipe, **result.plan.arguments(), resume=result)``. It has the image if one was given.
        base (`Base`, *optional*): settings of the base image.
        stages (`Stage` or a sequence of them, *optional*): settings of each stage; the last one has the final size.
            One without a size means as few stages as grow by a factor of at most about four.
        preset (`str`, *optional*): instead of `stages`, the name of settings, see `Stage.preset`. Defaults to
            "published", and to "refined" for the small FLUX, the one model that it was tried on.
        seed (`int`, *optional*): seed of the noise, see `HighresPlan`; drawn from torch's generator by default.
        callback_on_step_end, callback_on_step_end_tensor_inputs: as in the pipelines. A callback may set `_interrupt`
            on the pipeline to stop after the step; so may other threads, on ``pipe`` unless it is modular. The result
            then has the finished images.
        callback_on_start, callback_on_stage_end (*optional*): called with the result so far, before the first step and
            when each image is finished, the first and the last one included. It is the one that is returned, and its
            `images` grow: copy the list to keep it. ``lambda result: result.save("out.png")`` for both keeps what
            `resume` needs, even if the process is killed.
        **options: further keywords for every call of the pipelines, plain data: `negative_prompt`,
            `max_sequence_length`, ...

    Returns:
        `HighresResult`: all images, and the plan, from which the image can be drawn again.

    Raises:
        TypeError: the pipeline is not supported; a value has the wrong type; an option is unknown.
        ValueError: sizes, aspect ratios or settings do not fit each other, the model or memory; a
            linearized pipeline keeps its settings, and has another backend; `resume` is of another plan, or lacks the
            record of a run.
        RuntimeError: the original weights that the base image needs were discarded, or cannot be copied back into a
            model that was quantized or offloaded sequentially since; components of a modular pipeline are not loaded.
        HighresInterrupted: Ctrl-C; its `result` has the finished images. It is a KeyboardInterrupt.
        HighresError: an error while drawing, its `__cause__`; its `result` has the finished images. The cause is a
            FloatingPointError for latents or pixels with NaN or infinity.
        And the errors of `linearize`.

    Examples:
        >>> from clear_attn import demo
        >>> result = highres(
        ...     demo.pipeline(),
        ...     "a red circle",
        ...     height=128,
        ...     width=128,
        ...     window=4,
        ...     weights=None,
        ...     base=Base(height=64, width=64, steps=1),
        ...     stages=Stage(steps=1, strength=1.0),
        ... )
        >>> [image.size for image in result.images]
        [(64, 64), (128, 128)]
    """
    if resume is not None and not isinstance(resume, HighresResult):
        raise TypeError(
            f"resume must be a HighresResult, got a {type(resume).__name__}; HighresResult.load reads one from files"
        )
    if image is None and resume and resume.plan.image and resume.images:
        image = resume.images[0]
    target = find_cascade_target(pipe)
    options = {**target.own_options, **options}
    attention: dict[str, Any] = {
        "window": window,
        "down_factor": down_factor,
        "schedule": schedule,
        "weights": weights,
        "revision": revision,
        "backend": backend,
    }
    stages = _stages(target, stages, preset)
    plan = make_plan(target, prompt, (height, width), image, base, stages, seed, attention, options)
    if resume:
        check_resumable(plan, resume, resolved=False)
    inputs = stage_runner.callback_inputs(callback_on_step_end, callback_on_step_end_tensor_inputs)
    validate_calls(target, plan, inputs)
    change = None if runs_as_it_is(target, plan) else prepare(pipe, **attention, token=token)
    plan = resolve_attention(target, plan, change)
    if plan.base and not (resume and resume.images):
        _check_original_weights(target.patched)
    check_fits(target, plan)
    if resume:
        check_resumable(plan, resume)
        # What other versions of diffusers add to a config would make another plan, of which no image was saved.
        plan = dataclasses.replace(plan, model=resume.plan.model)
    result = HighresResult(list(resume.images) if resume else [], plan, dict(resume.runs) if resume else {})
    count = len(result.images)
    finished = stage_runner.Finished(count, result.image if count else image, result.runs.get(count - 1))

    def on_image(drawn: Image.Image, recording: Recording | None) -> None:
        result.keep(drawn, recording)
        if callback_on_stage_end:
            callback_on_stage_end(result)

    try:
        if callback_on_start:
            callback_on_start(result)
        with contextlib.suppress(stage_runner.Interrupted):
            stage_runner.Cascade(target, plan, callback_on_step_end, inputs).draw(change, finished, on_image)
    except KeyboardInterrupt:
        raise HighresInterrupted(result) from None
    except Exception as error:
        raise HighresError(result, error) from error
    return result


def _stages(
    target: CascadeTarget, stages: Stage | Sequence[Stage] | None, preset: str | None
) -> Stage | Sequence[Stage]:
    if stages is None:
        return Stage.preset(default_preset(target.patched) if preset is None else preset)
    if preset is not None:
        raise ValueError(
            f"preset={preset!r} and stages are both given; leave one out, or change a preset with "
            f"stages=dataclasses.replace(clear_attn.Stage.preset({preset!r}), ...)"
        )
    return stages


def _check_original_weights(target: Target) -> None:
    """Raise RuntimeError if the base image cannot have the original weights."""
    try:
        restored_state(target)
    except RuntimeError as error:
        raise RuntimeError(
            f"the base image needs the original weights: {error}; or start from an image of your own, with image="
        ) from None


class ResumeError(ValueError):
    """An unfinished result that cannot be resumed with these arguments.

    Attributes:
        reason: what is wrong with it, without a remedy.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"resume {reason}; {remedy}")
        self.reason = reason


def check_resumable(plan: HighresPlan, resume: HighresResult, *, resolved: bool = True) -> None:
    """Check that an unfinished result is of a plan, and has the record that its next stage needs.

    Args:
        plan: what to draw.
        resume: the unfinished result.
        resolved: whether `resolve_attention` has filled in the plan's settings of attention.

    Raises:
        ResumeError: it is of another plan, or lacks the record.
    """
    now, before = (dataclasses.asdict(comparable(each)) for each in (plan, resume.plan))
    unknown = () if resolved else [name for name, value in UNRESOLVED.items() if now[name] == value]
    changed = [name for name in now if now[name] != before[name] and name not in unknown]
    if not any(differences(before["model"], now["model"])):
        changed = [name for name in changed if name != "model"]
    if changed:
        raise ResumeError(
            f"has a plan with another {', '.join(changed)}",
            "draw with the same pipeline, the keywords of resume.plan.arguments(), and the image if one was given, or "
            "leave resume out",
        )
    count = len(resume.images)
    if count and not resume.finished and plan.stages[count - 1].needs_recording and count - 1 not in resume.runs:
        raise ResumeError(
            f"has no record of the run before stage {count}, which its settings need",
            "resume from the result of the interrupted call or from the files that it saved, or leave resume out",
        )

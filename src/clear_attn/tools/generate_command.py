"""The options of `clear-attn generate`, and what it writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from PIL import Image, ImageOps

from clear_attn.cascade import Base, HighresError, HighresInterrupted, HighresPlan, HighresResult, Stage, highres
from clear_attn.cascade.memory_check import check_weights_fit
from clear_attn.cascade.plan import describe, fingerprint
from clear_attn.cascade.planning import random_seed
from clear_attn.cascade.result import plan_file, save_plan, save_with_plan, stage_file, validate_output
from clear_attn.models._diffusers import execution_device_of
from clear_attn.parallel import launch, parallelize
from clear_attn.patching.linearization import linearize
from clear_attn.tools.options import DTYPES, DType, device_of

BASE, STAGES, MACHINE = "Base image", "Each stage", "Machine"
OF_PIPELINE = "the pipeline's"
# Options that a plan does not stand for; the weights may lie elsewhere than the plan says.
BESIDE_A_PLAN = {"model", "output", "plan", "weights", "init_image", "save_stages", "device", "dtype", "offload"}


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a diffusers pipeline, or demo, the one in the box.")],
    output: Annotated[Path, typer.Option(help="Where the picture goes; its plan goes next to it, as out.png.json.")],
    prompt: Annotated[str | None, typer.Option(help="What to draw.")] = None,
    height: Annotated[int | None, typer.Option(help="Height of the picture in pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the picture in pixels.")] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Radius of the window in tokens.", show_default="the weights'")
    ] = None,
    down_factor: Annotated[
        int | None, typer.Option(min=1, help="Side of pooled cells in tokens; 1 for none.", show_default="the weights'")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="auto: those published; none: the model's own; or a folder, file or Hub id.")
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option(help="Of the weights: branch, tag or commit on the Hub.", show_default="the newest")
    ] = None,
    init_image: Annotated[
        Path | None, typer.Option(help="Start from this picture.", show_default="a base image is drawn")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Draw again what this .json or .png says."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise.", show_default="random")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw, for models guided by it.")] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance by the negative prompt, for FLUX.1; 1 is off.", show_default="1")
    ] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Text tokens.", show_default=OF_PIPELINE)
    ] = None,
    save_stages: Annotated[bool, typer.Option("--save-stages", help="Save each image on the way as it comes.")] = False,
    base_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps.", show_default=OF_PIPELINE, rich_help_panel=BASE)
    ] = None,
    base_guidance: Annotated[
        float | None, typer.Option(min=0, help="Guidance scale.", show_default=OF_PIPELINE, rich_help_panel=BASE)
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Share of the steps that is run.", rich_help_panel=STAGES)
    ] = Stage.strength,
    steps: Annotated[
        int, typer.Option(min=1, help="Steps of the whole schedule.", rich_help_panel=STAGES)
    ] = Stage.steps,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.", rich_help_panel=STAGES)] = Stage.guidance,
    ntk_factor: Annotated[
        float | None,
        typer.Option(help="Of the rotary embedding's theta.", show_default="10 with one", rich_help_panel=STAGES),
    ] = Stage.ntk_factor,
    proportional: Annotated[
        bool, typer.Option(help="Proportional attention.", rich_help_panel=STAGES)
    ] = Stage.proportional,
    shift: Annotated[
        float, typer.Option(min=0, help="Of a static schedule; 0: the pipeline's own.", rich_help_panel=STAGES)
    ] = Stage.shift or 0,
    low_resolution_guidance: Annotated[
        int, typer.Option(min=0, help="Wavelet levels; 0 is off.", rich_help_panel=STAGES)
    ] = Stage.low_resolution_guidance or 0,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default="a GPU if any", rich_help_panel=MACHINE)
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Of the model.", show_default="bfloat16, float32 on a CPU", rich_help_panel=MACHINE),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Only the model at work is on the GPU.", rich_help_panel=MACHINE)
    ] = False,
) -> None:
    """Draw a picture much larger than the model was trained on; under torchrun, on all its processes together."""
    ranks = launch.launched()
    where = _device_of_rank(device) if ranks and device != "cpu" else device_of(device)

    def keep(number: int, image: Image.Image, plan: HighresPlan) -> None:
        if not launch.is_first():
            return
        if number == 0:
            save_plan(plan, output)
        if save_stages and number < len(plan.stages):
            save_with_plan(image, stage_file(output, number, image), plan)

    try:
        image = _open(init_image)
        if plan:
            _check_alone(context)
            again = HighresPlan.load(plan)
            asked = _again(again, plan, image)
            if _is_given(context, "weights"):
                asked["weights"] = _none_or(weights)
        else:
            stage = Stage(
                strength=strength,
                steps=steps,
                guidance=guidance,
                ntk_factor=ntk_factor,
                proportional=proportional,
                shift=shift or None,
                low_resolution_guidance=low_resolution_guidance or None,
            )
            options = {
                "negative_prompt": negative_prompt,
                "true_cfg_scale": true_cfg_scale,
                "max_sequence_length": max_sequence_length,
            }
            own_base = (base_steps, base_guidance) != (None, None)
            asked = {
                **_needed(prompt=prompt, height=height, width=width),
                **{name: value for name, value in options.items() if value is not None},
                "window": window,
                "down_factor": down_factor,
                "weights": _none_or(weights),
                "revision": revision,
                "seed": seed,
                "base": Base(steps=base_steps, guidance=base_guidance) if own_base else None,
                "stages": stage,
            }
        if launch.is_first():
            validate_output(output, (asked["height"], asked["width"]))
        pipe = _load(model, where, dtype, offload)
        if plan:
            _warn_of_another(again.model, describe(pipe))
        if ranks:
            asked = _split(pipe, asked)
        result = highres(pipe, **asked, image=image, callback_on_stage_end=keep)
    except HighresInterrupted as stop:
        _save_finished("Interrupted", stop.result, output)
        raise typer.Exit(130) from None
    except HighresError as failure:
        cause = failure.__cause__
        _save_finished(f"{type(cause).__name__}: {cause}", failure.result, output)
        if _is_out_of_memory(cause):
            offloading = "" if offload or where.type == "cpu" else ", or with --offload"
            typer.echo(f"Less memory is needed for a smaller picture{offloading}", err=True)
        raise typer.Exit(1) from None
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from None
    if launch.is_first():
        saved = result.save(output)[-1]
        typer.echo(f"Saved {saved} and {plan_file(output)}, seed {result.plan.seed}")
    if ranks:
        dist.destroy_process_group()


def _device_of_rank(device: str | None) -> torch.device:
    if device is not None:
        raise typer.BadParameter("under torchrun each process has a GPU of its own, or take cpu", param_hint="--device")
    try:
        return launch.own_device()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _split(pipe: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Splits a pipeline over the ranks; what is asked, with one seed for all."""
    launch.join()
    launch.interrupt_on_sigterm()
    settings = {"weights": asked["weights"], "revision": asked.get("revision")}
    linearize(pipe, asked["window"], asked["down_factor"], **settings)
    parallelize(pipe)
    if asked["seed"] is None:
        seed = random_seed(execution_device_of(pipe))
        dist.broadcast(seed, src=0)
        asked = {**asked, "seed": int(seed)}
    if not launch.is_first():
        pipe.set_progress_bar_config(disable=True)
    return asked


def _open(file: Path | None) -> Image.Image | None:
    if file is None:
        return None
    with Image.open(file) as picture:
        # As it is shown: cameras note down how they were held.
        return ImageOps.exif_transpose(picture).convert("RGB")


def _none_or(weights: str) -> str | None:
    return None if weights == "none" else weights


def _needed(**given: Any) -> dict[str, Any]:
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, or a --plan")
    return given


def _check_alone(context: typer.Context) -> None:
    """Raises ValueError where another option says what the plan says."""
    given = [name for name in context.params if _is_given(context, name) and name not in BESIDE_A_PLAN]
    said = [f"--{name.replace('_', '-')}" for name in given]
    if said:
        raise ValueError(f"--plan and {', '.join(said)} both say what to draw; give one of them, or edit the .json")


def _is_given(context: typer.Context, name: str) -> bool:
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"


def _again(plan: HighresPlan, file: Path, image: Image.Image | None) -> dict[str, Any]:
    """The arguments that a plan was made from, where the image that it starts from is given."""
    given = fingerprint(image) if image else None
    if given != plan.image:
        wanted = f"starts from an image {plan.image}" if plan.image else "starts from no image"
        raise ValueError(f"{file} {wanted}, and --init-image is {given or 'not given'}")
    return plan.arguments()


def _load(model: str, device: torch.device, dtype: DType | None, offload: bool) -> Any:
    from diffusers import DiffusionPipeline

    from clear_attn import demo

    if offload and device.type == "cpu":
        raise ValueError("--offload keeps a GPU's memory free, and there is none; leave it out")
    kind = getattr(torch, dtype or DTYPES[device.type])
    if model == "demo":
        pipe = demo.pipeline() if kind == torch.float32 else demo.pipeline().to(kind)
    else:
        pipe = DiffusionPipeline.from_pretrained(model, dtype=kind)
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    check_weights_fit(pipe, device)
    return pipe.to(device)


def _warn_of_another(planned: dict[str, Any], present: dict[str, Any]) -> None:
    """Says in what a pipeline is not the one that a picture was planned for."""
    before, now = dict(_flat(planned)), dict(_flat(present))
    changes = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changes:
        typer.echo(f"Warning: the picture will differ, as the pipeline does: {'; '.join(changes)}", err=True)


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def _is_out_of_memory(error: BaseException | None) -> bool:
    # What torch raises on a CPU and on Apple's GPUs has no class of its own.
    said = any(words in str(error) for words in ("allocate memory", "out of memory"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or said


def _save_finished(reason: str, result: HighresResult, output: Path) -> None:
    if launch.launched():
        launch.ignore_signals()
    if not launch.is_first():
        typer.echo(reason, err=True)
        return
    files = result.save(output) if result.images else []
    typer.echo(f"{reason}; saved {', '.join(map(str, files)) or 'nothing'}", err=True)

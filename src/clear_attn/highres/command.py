"""The options of `clear-attn generate`, and what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from clear_attn.highres import HighresInterrupted, HighresPlan, HighresResult, Stage, highres
from clear_attn.highres.planning import fingerprint
from clear_attn.highres.result import save_with_plan, stage_file
from clear_attn.options import DTYPES, DType, check_picture_file, device_of

STAGES, MACHINE = "Each stage", "Machine"
# Options that a plan does not stand for.
BESIDE_A_PLAN = {"model", "output", "plan", "init_image", "save_stages", "device", "dtype", "offload"}


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a diffusers pipeline, or demo, the one in the box.")],
    output: Annotated[Path, typer.Option(help="Where the picture goes; its plan goes beside it, ending in .json.")],
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
    init_image: Annotated[
        Path | None, typer.Option(help="Start from this picture.", show_default="a base image is drawn")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Draw again what this .json or .png says."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise.", show_default="random")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to draw, for models guided by it.")] = None,
    max_sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Text tokens.", show_default="the pipeline's")
    ] = None,
    save_stages: Annotated[bool, typer.Option("--save-stages", help="Save each image on the way as it comes.")] = False,
    strength: Annotated[float, typer.Option(help="Share of the steps that is run.", rich_help_panel=STAGES)] = 0.7,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the whole schedule.", rich_help_panel=STAGES)] = 20,
    guidance: Annotated[float, typer.Option(min=0, help="Guidance scale.", rich_help_panel=STAGES)] = 7.5,
    ntk_factor: Annotated[
        float | None,
        typer.Option(help="Of the rotary embedding's theta.", show_default="10 with one", rich_help_panel=STAGES),
    ] = None,
    proportional: Annotated[bool, typer.Option(help="Proportional attention.", rich_help_panel=STAGES)] = True,
    shift: Annotated[
        float, typer.Option(min=0, help="Of a static schedule; 0: the pipeline's own.", rich_help_panel=STAGES)
    ] = 3.0,
    low_resolution_guidance: Annotated[
        int, typer.Option(min=0, help="Wavelet levels; 0 is off.", rich_help_panel=STAGES)
    ] = 0,
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
    """Draw a picture much larger than the model was trained on."""
    check_picture_file(output, "--output")
    where = device_of(device)

    def save_on_the_way(number: int, image: Image.Image, plan: HighresPlan) -> None:
        if number < len(plan.stages):
            save_with_plan(image, stage_file(output, number, image), plan)

    try:
        image = _open(init_image)
        if plan:
            _check_alone(context)
            asked = _again(HighresPlan.load(plan), plan, image)
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
            options = {"negative_prompt": negative_prompt, "max_sequence_length": max_sequence_length}
            asked = {
                **_needed(prompt=prompt, height=height, width=width),
                **{name: value for name, value in options.items() if value is not None},
                "window": window,
                "down_factor": down_factor,
                "weights": None if weights == "none" else weights,
                "seed": seed,
                "stages": stage,
            }
        pipe = _load(model, where, dtype, offload)
        callback = save_on_the_way if save_stages else None
        result = highres(pipe, **asked, image=image, callback_on_stage_end=callback)
    except HighresInterrupted as stop:
        _save_finished(stop.result, output)
        raise typer.Exit(130) from None
    except (ValueError, TypeError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    result.save(output)
    typer.echo(f"Saved {output} and {output.with_suffix('.json')}, seed {result.plan.seed}")


def _open(file: Path | None) -> Image.Image | None:
    if file is None:
        return None
    with Image.open(file) as picture:
        return picture.convert("RGB")


def _needed(**given: Any) -> dict[str, Any]:
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given, or a --plan")
    return given


def _check_alone(context: typer.Context) -> None:
    """Raises ValueError where another option says what the plan says."""
    given = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    said = [f"--{name.replace('_', '-')}" for name in given if name not in BESIDE_A_PLAN]
    if said:
        raise ValueError(f"--plan and {', '.join(said)} both say what to draw; give one of them, or edit the .json")


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
    return pipe.to(device)


def _save_finished(result: HighresResult, output: Path) -> None:
    files = [stage_file(output, number, image) for number, image in enumerate(result.images)]
    for file, image in zip(files, result.images, strict=True):
        save_with_plan(image, file, result.plan)
    typer.echo(f"Interrupted; saved {', '.join(map(str, files)) or 'nothing'}", err=True)

"""The command `clear-attn generate`: its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from clear_attn.tools import options

# Options that may be given with --plan: the weights may have moved.
GO_WITH_PLAN = {
    *(
        "model",
        "output",
        "overwrite",
        "plan",
        "weights",
        "init_image",
        "save_stages",
        "device",
        "dtype",
        "offload",
        "resume",
    )
}

# Options that are arguments of `highres`, which has defaults of its own.
PASSED_ON = ("window", "down_factor", "revision", "seed", "negative_prompt", "true_cfg_scale", "max_sequence_length")

# Options that are settings of `Stage`; those of guidance by the image before.
GUIDANCES = ("low_resolution_guidance", "stepwise_guidance")
OF_STAGE = ("strength", "steps", "guidance", "ntk_factor", "proportional", "shift", *GUIDANCES, "continues")

FROM_PLAN = "from --plan"


def _of_base(help: str, **settings: Any) -> Any:
    return typer.Option(help=help, show_default=options.OF_PIPELINE, **settings)


def _of_stage(help: str, default: str, **settings: Any) -> Any:
    return typer.Option(help=help, show_default=default, **settings)


def generate(
    context: typer.Context,
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option(
            callback=options.check_image_output, help="The file of the image; its plan is saved next to it, as .json."
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="The text to draw.", show_default=FROM_PLAN)] = None,
    height: Annotated[int | None, typer.Option(help=options.HEIGHT, show_default=FROM_PLAN)] = None,
    width: Annotated[int | None, typer.Option(help=options.WIDTH, show_default=FROM_PLAN)] = None,
    window: options.Window = None,
    down_factor: options.DownFactor = None,
    weights: options.Weights = "auto",
    revision: Annotated[
        str | None, typer.Option(help="The branch, tag or commit of the weights on the Hub.", show_default="the newest")
    ] = None,
    init_image: Annotated[
        Path | None,
        options.input_file("The image to start from.", show_default="a base image, drawn at the model's own size"),
    ] = None,
    plan: Annotated[
        Path | None,
        options.input_file("The .json or .png with the plan of an image to draw again.", show_default="none"),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed of the noise.", show_default="random")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="The text not to draw, for models with such guidance.", show_default="none")
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        typer.Option(help="The scale of guidance by the negative prompt, for FLUX.1; 1 is off.", show_default="1"),
    ] = None,
    max_sequence_length: options.TextTokens = None,
    save_stages: Annotated[bool, typer.Option("--save-stages", help="Keep the image of each stage, too.")] = False,
    base_steps: Annotated[int | None, _of_base("The number of steps of the base image.", min=1)] = None,
    base_guidance: Annotated[float | None, _of_base("The guidance scale of the base image.", min=0)] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="The settings of the stages: published or refined.", show_default="published; refined for demo"
        ),
    ] = None,
    strength: Annotated[
        float | None, _of_stage("The share of the steps that each stage runs.", "0.7; refined 0.4")
    ] = None,
    steps: Annotated[
        int | None, _of_stage("The number of steps of the whole schedule of each stage.", "20", min=1)
    ] = None,
    guidance: Annotated[float | None, _of_stage("The guidance scale of each stage.", "7.5", min=0)] = None,
    ntk_factor: Annotated[
        float | None,
        _of_stage(
            "The factor of the rotary embedding's theta in each stage.", "10; 1 without rotary embedding; refined 1"
        ),
    ] = None,
    proportional: Annotated[
        bool | None, _of_stage("Whether stages use proportional attention.", "yes; refined no")
    ] = None,
    shift: Annotated[
        float | None,
        _of_stage("The static shift of each stage; 0 keeps the pipeline's schedule.", "3; refined 1", min=0),
    ] = None,
    low_resolution_guidance: Annotated[
        int | None,
        _of_stage("The wavelet levels in which stages follow the image before; 0 is off.", "0; refined 1", min=0),
    ] = None,
    stepwise_guidance: Annotated[
        float | None,
        _of_stage(
            "The weight with which stages follow the run before step by step, 0 to 1; 0 is off. It turns "
            "--low-resolution-guidance off.",
            "0",
            min=0,
            max=1,
        ),
    ] = None,
    continues: Annotated[
        bool | None,
        _of_stage(
            "Whether stages continue the run before instead of drawing its image again. It turns "
            "--low-resolution-guidance off.",
            "no",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Draw what is missing of what an interrupted or killed run saved under --output, a .png file.",
        ),
    ] = False,
    device: options.Device = None,
    dtype: options.DType = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep only the model at work on the GPU, the others in memory.")
    ] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Draw an image much larger than the model was trained on; under torchrun, on all its processes together."""
    from clear_attn.cascade import Base, HighresResult, Stage
    from clear_attn.cascade.large_images import check_resumable
    from clear_attn.cascade.saved_files import plan_file, stage_files, validate_output
    from clear_attn.cascade.stages import PRESETS
    from clear_attn.parallel import launch
    from clear_attn.tools import generation
    from clear_attn.weights.sources import with_absolute_path

    # The plan of an unfinished image may be replaced; `validate_output` refuses other files of its name.
    if not (resume or overwrite) and (left := stage_files(output)):
        go_on = ", or --resume to go on" if plan_file(output).exists() and output.suffix.lower() == ".png" else ""
        raise options.refused("--output", options.EXISTS.format(left[0]) + go_on)
    kept = None
    if resume:
        if plan:
            raise typer.BadParameter("--resume and --plan both say what to draw; give one")
        kept, plan = HighresResult.load(output), plan_file(output)
    if init_image:
        generation.refuse_as_first_image(init_image, output)
    image = generation.open_image(init_image) if init_image else None
    if plan:
        _check_not_in_plan(context)
        planned = generation.load_plan(plan, image)
        arguments = planned.arguments()
        if _is_given(context, "weights"):
            arguments["weights"] = options.none_or(weights)
            # The revision was that of the weights before; of a run that is resumed, auto has named the same ones.
            if arguments["weights"] not in {planned.weights, "auto" if resume else planned.weights}:
                arguments["revision"] = None
        if kept:
            now = replace(planned, weights=with_absolute_path(arguments["weights"]))
            with generation.refusing_resume():
                check_resumable(now, kept, resolved=False)
    else:
        required = {"prompt": prompt, "height": height, "width": width}
        if missing := [f"--{name}" for name, value in required.items() if value is None]:
            raise typer.BadParameter(f"{', '.join(missing)} must be given, or a --plan")
        planned = None
        given_stage = _given_stage(context)
        for name in PRESETS if preset is None else (preset,):
            replace(Stage.preset(name), **given_stage)  # refused before the pipeline is loaded
        own_base = (base_steps, base_guidance) != (None, None)
        base = {"base": Base(steps=base_steps, guidance=base_guidance)} if own_base else {}
        given = {name: context.params[name] for name in PASSED_ON if context.params[name] is not None}
        arguments = {**required, **base, **given, "weights": options.none_or(weights)}
    if launch.is_first():
        with options.refusing("--output"):
            validate_output(output, (arguments["height"], arguments["width"]))
    where = generation.select_rank_device(device)
    pipe = options.load_pipeline(model, where, options.select_dtype(dtype, where), offload=offload)
    if not planned:
        arguments["stages"] = replace(Stage.preset(preset or generation.preset_of(pipe)), **given_stage)
    else:
        report = generation.refuse_differences if resume else generation.warn_of_differences
        report(planned, pipe)
    generation.draw(pipe, {**arguments, "image": image, "resume": kept}, output, save_stages=save_stages)


def _given_stage(context: typer.Context) -> dict[str, Any]:
    """Return the settings of `Stage` that were given, and what they turn off of a preset: `Stage` refuses both."""
    from clear_attn.cascade import StepwiseGuidance

    given = {name: context.params[name] for name in OF_STAGE if context.params[name] is not None}
    given |= {name: None for name in ("shift", *GUIDANCES) if given.get(name) == 0}
    if given.get("stepwise_guidance"):
        given["stepwise_guidance"] = StepwiseGuidance(structure=given["stepwise_guidance"])
    guided = any(given.get(name) for name in (*GUIDANCES, "continues"))
    return {**dict.fromkeys(GUIDANCES), **given} if guided else given


def _check_not_in_plan(context: typer.Context) -> None:
    given = [name for name in context.params if _is_given(context, name) and name not in GO_WITH_PLAN]
    if given:
        options_given = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        plan = "--resume" if context.params["resume"] else "--plan"
        raise typer.BadParameter(f"{plan} and {options_given} both say what to draw; give one, or edit the .json")


def _is_given(context: typer.Context, name: str) -> bool:
    return getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"

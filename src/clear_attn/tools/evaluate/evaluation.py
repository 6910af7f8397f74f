"""Evaluate linearized weights: check, draw with the student, draw with the teacher, compare, write."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from clear_attn.cascade.pipelines import call_defaults, validate_inputs
from clear_attn.methods.schedule import Schedule
from clear_attn.models._diffusers import execution_device_of
from clear_attn.models.pipeline_defaults import default_text_tokens, native_side, pixels_per_token
from clear_attn.patching.context_managers import linearized
from clear_attn.patching.target import find_transformer
from clear_attn.tools.evaluate.fingerprint import describe_sources
from clear_attn.tools.evaluate.metric_registry import CLIP, DINO, Sources, make_metrics
from clear_attn.tools.evaluate.metrics import STUDENT, TEACHER, Batch, Metric
from clear_attn.tools.evaluate.report import Evaluation, evaluation_sheet
from clear_attn.tools.evaluate.unfinished import (
    check_output,
    check_settings,
    finish,
    locked,
    unfinished_run,
    warn_of_kept,
)
from clear_attn.utils.atomic import atomic_file, atomic_text, warn_if_unwritten
from clear_attn.utils.dtypes import dtype_name
from clear_attn.utils.image_sizes import Size, round_down
from clear_attn.utils.seeded_images import generate_with_seeds, save_images_with_seeds
from clear_attn.utils.validation import LARGEST_SEED, check_whole_number
from clear_attn.utils.versions import installed_versions
from clear_attn.weights.metadata import metadata_of
from clear_attn.weights.published import shared_name_of

NUMBERS, SHEET = "eval.json", "contact_sheet.png"
LIBRARIES = ("clear_attn", "torch", "diffusers", "transformers", "torchmetrics")


def evaluate(
    pipe: Any,
    prompts: Sequence[str],
    output_dir: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = "auto",
    window: int | None = None,
    down_factor: int | None = None,
    schedule: Schedule | None = None,
    backend: str = "auto",
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    batch_size: int = 1,
    metrics: Sequence[str] | None = None,
    clip: str = CLIP,
    dino: str = DINO,
    download: bool = False,
    save_images: bool = False,
    resume: bool = False,
) -> Evaluation:
    """Draw the same prompts and seeds with a pipeline and with the same pipeline linearized, and compare the images.

    Writes `eval.json`, `contact_sheet.png` of the first images, and with ``save_images`` the folders `teacher` and
    `student`, into ``output_dir``, after all images are drawn; warns of a file that cannot be written. Restores the
    pipeline. After an error or a kill, and if a file is missing, the images stay in the folder `unfinished` there.

    Args:
        pipe: a dense text-to-image pipeline that `linearize` supports.
        prompts: what to draw; each image has the next seed.
        output_dir: a new or an empty folder, or that of the run to resume.
        weights, window, down_factor, schedule, backend: the arguments of `linearize` for the student.
        height, width (`int`, *optional*): the size in pixels, rounded down to whole tokens; by default the
            pipeline's.
        seed (`int`, defaults to 0): the seed of the first image's noise, which is drawn on the CPU.
        num_inference_steps, guidance_scale, max_sequence_length: arguments of the pipeline; None means its default.
        batch_size (`int`, defaults to 1): images per call of the pipeline.
        metrics (*optional*): names of `metric_registry.METRICS`; an error if one cannot be computed. By default all
            that can be computed.
        clip, dino (`str`): Hub ids or folders of the models for CLIP-I and CLIP-T, and for DINO. CLEAR's paper names
            neither; numbers from different models do not compare.
        download (`bool`, defaults to `False`): download missing weights of metrics.
        save_images (`bool`, defaults to `False`): keep the images, as PNG.
        resume (`bool`, defaults to `False`): draw only what is missing of an unfinished run to ``output_dir`` with the
            same arguments; metrics, and whether images are kept, may change.

    Returns:
        The `Evaluation`, which prints as a table.

    Raises:
        TypeError, ValueError: an argument is out of range or unknown; the pipeline is linearized, or was saved so.
        RuntimeError: a metric of ``metrics`` cannot be computed, or none can.
        FileExistsError, NotADirectoryError: ``output_dir`` is not a new or an empty folder, or another process
            evaluates to it.
        FileNotFoundError: there is no unfinished run to resume. ValueError: it had other arguments.
        And the errors of `linearize` and of the pipeline's check of its arguments, before anything is drawn.

    Examples:
        >>> import tempfile
        >>> from clear_attn import demo
        >>> from clear_attn.tools.evaluate import evaluate
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     call = {"height": 128, "width": 128, "num_inference_steps": 4, "window": 16, "weights": None}
        ...     found = evaluate(demo.pipeline(), ["a red circle"], folder, metrics=["psnr"], **call)
        >>> found.means["psnr"]["student"] > 10
        True
    """
    transformer, _ = find_transformer(pipe)
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, which draws images; got a {type(pipe).__name__}")
    if metadata_of(transformer):
        raise ValueError(
            "this pipeline is linearized, or was saved while it was; give the original: clear_attn.restore(pipe), "
            "or load it again"
        )
    _check_prompts(prompts)
    check_whole_number("batch_size", batch_size, "it is the number of images per call")
    if num_inference_steps is not None:
        check_whole_number("num_inference_steps", num_inference_steps, "it is the number of denoising steps")
    height, width = _whole_tokens(pipe, height, width)
    arguments = {
        "height": height,
        "width": width,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": default_text_tokens(pipe) if max_sequence_length is None else max_sequence_length,
    }
    seed = check_whole_number("seed", seed, "it is the first image's", least=0, most=LARGEST_SEED + 1 - len(prompts))
    seeds = range(seed, seed + len(prompts))
    if hasattr(pipe, "check_inputs"):
        given = {name: value for name, value in arguments.items() if value is not None}
        defaults = {name: value for name, value in call_defaults(type(pipe)).items() if name != "self"}
        validate_inputs(type(pipe), pipe, {**defaults, **given, "prompt": list(prompts[:batch_size])})
    output, device = Path(output_dir), execution_device_of(pipe)
    shared = {
        "model": shared_name_of(pipe, transformer),
        "backend": backend,
        **arguments,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype_name(transformer.dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    drawn_from = {
        **shared,
        **describe_sources(pipe, transformer, weights),
        "window": window,
        "down_factor": down_factor,
        "schedule": repr(schedule),
        "prompts": list(prompts),
    }
    with locked(output):
        check_output(output, resume=resume)
        if resume:
            check_settings(output, drawn_from)
        made, missing = make_metrics(metrics, Sources(prompts, clip, dino, download))
        with unfinished_run(output, drawn_from, (STUDENT, TEACHER), 2 * len(prompts)) as folder:
            files = {row: [folder / row / f"{n:05}.png" for n in range(len(prompts))] for row in (STUDENT, TEACHER)}

            def draw(row: str) -> dict[str, float]:
                (folder / row).mkdir(exist_ok=True)
                progress = functools.partial(tqdm, desc=row, unit="batch")
                if not all(file.exists() for file in files[row]):
                    # What happens once per process or model, such as building plans, is in no row's seconds.
                    warm_up = {**arguments, "num_inference_steps": 1, "prompt": list(prompts[:batch_size])}
                    generate_with_seeds(pipe, seeds[:batch_size], **warm_up)
                seconds = save_images_with_seeds(
                    pipe, prompts, seeds, files[row], batch_size=batch_size, progress=progress, **arguments
                )
                return {"total": sum(seconds), "per_image": median(seconds)}

            # The student first, since linearizing checks all that can be checked of its weights.
            with linearized(pipe, window, down_factor, schedule=schedule, weights=weights, backend=backend):
                metadata = metadata_of(transformer) or {}
                seconds = {STUDENT: draw(STUDENT)}
            seconds[TEACHER] = draw(TEACHER)
            _compare(made, files, prompts, batch_size, device)
            evaluation = Evaluation(
                settings={
                    **shared,
                    **{name: metadata[name] for name in ("weights", "method", "schedule")},
                    "clip": clip,
                    "dino": dino,
                },
                versions=installed_versions(*LIBRARIES),
                seconds=seconds,
                means={name: metric.compute() for name, metric in made.items()},
                missing=missing,
                images=[
                    {"prompt": prompt, "seed": seeds[n], **{row: _numbers(made, row, n) for row in (TEACHER, STUDENT)}}
                    for n, prompt in enumerate(prompts)
                ],
            )
            for name in (NUMBERS, SHEET):  # of a run that could not write the other
                (output / name).unlink(missing_ok=True)
            # The numbers are returned even if the disk is full.
            with warn_if_unwritten(output / NUMBERS):
                atomic_text(output / NUMBERS, evaluation.to_json())
            with warn_if_unwritten(output / SHEET), atomic_file(output / SHEET) as unfinished:
                evaluation_sheet(evaluation, files).save(unfinished)
        if (output / NUMBERS).is_file() and (output / SHEET).is_file():
            finish(output, files if save_images else ())
        else:
            warn_of_kept(folder, 2 * len(prompts), 2 * len(prompts), stacklevel=3)
    return evaluation


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of strings, got {prompts!r}")
    if not prompts:
        raise ValueError("prompts is empty; give at least one")


def _whole_tokens(pipe: Any, height: int | None, width: int | None) -> Size:
    """Return the size of the images, by default the pipeline's, in whole tokens."""
    transformer, adapter = find_transformer(pipe)
    native = native_side(pipe, transformer)
    height, width = (
        native if side is None else check_whole_number(name, side, "it is in pixels")
        for name, side in (("height", height), ("width", width))
    )
    return round_down((height, width), pixels_per_token(pipe, transformer, adapter), stacklevel=3)


@torch.inference_mode()
def _compare(
    metrics: Mapping[str, Metric],
    files: Mapping[str, Sequence[Path]],
    prompts: Sequence[str],
    batch_size: int,
    device: torch.device,
) -> None:
    for start in tqdm(range(0, len(prompts), batch_size), desc="comparing", unit="batch"):
        part = slice(start, start + batch_size)
        teacher, student = (read_images(files[row][part]).to(device) for row in (TEACHER, STUDENT))
        for metric in metrics.values():
            metric.update(Batch(teacher, student, prompts[part]))


def read_images(files: Sequence[Path]) -> Tensor:
    """Return images of one size as uint8 `[images, 3, height, width]`, on the CPU."""
    arrays = [np.array(Image.open(file).convert("RGB")) for file in files]
    return torch.from_numpy(np.stack(arrays)).movedim(-1, 1)


def _numbers(metrics: Mapping[str, Metric], row: str, number: int) -> dict[str, float]:
    """Return the numbers of one image by metric."""
    return {name: metric.per_image[row][number] for name, metric in metrics.items() if row in metric.per_image}

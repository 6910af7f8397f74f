"""The way through an evaluation: check, draw with the student, draw with the teacher, compare, write."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from clear_attn.methods.schedule import Schedule
from clear_attn.models._diffusers import execution_device_of
from clear_attn.patching.context_managers import linearized
from clear_attn.patching.target import find_transformer
from clear_attn.tools.evaluate.metric_registry import CLIP, DINO, Judges, make_metrics
from clear_attn.tools.evaluate.metrics import STUDENT, TEACHER, Batch, Metric
from clear_attn.tools.evaluate.report import Evaluation, seconds_of, sheet
from clear_attn.tools.evaluate.student_images import Drawing, Drawn, draw, read_all
from clear_attn.utils.atomic import atomic_contents
from clear_attn.utils.validation import LARGEST_SEED, check_whole_number
from clear_attn.weights.metadata import metadata_of
from clear_attn.weights.published import shared_name_of

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
    save_pictures: bool = False,
) -> Evaluation:
    """Draws the same prompts and seeds with a pipeline and with the same pipeline linearized, and compares.

    Writes `eval.json`, `contact_sheet.png` of the first pictures, and with ``save_pictures`` the folders `teacher` and
    `student`, into ``output_dir``, when all is done. The pipeline is afterwards as it was.

    Args:
        pipe: a text-to-image pipeline that `linearize` supports, dense.
        prompts: what to draw, each with the next seed.
        output_dir: a new or an empty folder.
        weights, window, down_factor, schedule, backend: of the student, as `linearize` takes them.
        height, width (`int`, *optional*): in pixels, whole tokens; by default the pipeline's.
        seed (`int`, defaults to 0): of the first picture's noise, which is drawn on the CPU.
        num_inference_steps, guidance_scale, max_sequence_length: as the pipeline takes them, and by default its own.
        batch_size (`int`, defaults to 1): pictures at a time.
        metrics (*optional*): names of `catalogue.METRICS`, all of which must be at hand; by default those that are.
        clip, dino (`str`): Hub ids or folders of the models for CLIP-I and CLIP-T, and for DINO. CLEAR's paper names
            neither; numbers from different models do not compare.
        download (`bool`, defaults to `False`): fetch weights of metrics that are not here.
        save_pictures (`bool`, defaults to `False`): keep the pictures, as PNG.

    Returns:
        The `Evaluation`, which prints as a table.

    Raises:
        TypeError, ValueError: an argument is out of range or unknown; the pipeline is linearized, or was saved so.
        RuntimeError: a metric that was asked for by name cannot be computed, or none can.
        FileExistsError, NotADirectoryError: ``output_dir`` is not a new or an empty folder.
        As `linearize` and the pipeline. All but the pipeline's own come before anything is drawn.
    """
    transformer, _ = find_transformer(pipe)
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers pipeline, for it is to draw; got a {type(pipe).__name__}")
    if metadata_of(transformer):
        raise ValueError(
            "this pipeline is linearized, or was saved while it was; give the original one: clear_attn.restore(pipe), "
            "or load it anew"
        )
    prompts = _checked_prompts(prompts)
    drawing = Drawing(
        _whole_tokens(pipe, "height", height),
        _whole_tokens(pipe, "width", width),
        check_whole_number("seed", seed, "it is the first image's", least=0, most=LARGEST_SEED),
        num_inference_steps,
        guidance_scale,
        max_sequence_length,
        check_whole_number("batch_size", batch_size, "it is the number of pictures at a time"),
    )
    if num_inference_steps is not None:
        check_whole_number("num_inference_steps", num_inference_steps, "it is the number of denoising steps")
    made, missing = make_metrics(metrics, Judges(prompts, clip, dino, download))
    with atomic_contents(Path(output_dir)) as folder, tempfile.TemporaryDirectory(dir=folder) as passing:
        pictures = folder if save_pictures else Path(passing)
        # The student first, for linearizing checks all that can be checked of its weights.
        with linearized(pipe, window, down_factor, schedule=schedule, weights=weights, backend=backend):
            metadata = metadata_of(transformer) or {}
            student = draw(pipe, prompts, drawing, pictures / STUDENT)
        teacher = draw(pipe, prompts, drawing, pictures / TEACHER)
        _compare(made, teacher, student, prompts, batch_size, execution_device_of(pipe))
        evaluation = Evaluation(
            settings={
                "model": shared_name_of(pipe, transformer),
                "weights": metadata["weights"],
                "method": metadata["method"],
                "schedule": metadata["schedule"],
                "backend": backend,
                **drawing._asdict(),
                "dtype": str(transformer.dtype).removeprefix("torch."),
                "device": _device_name(execution_device_of(pipe)),
                "clip": clip,
                "dino": dino,
            },
            versions=_versions(),
            seconds={TEACHER: seconds_of(teacher, batch_size), STUDENT: seconds_of(student, batch_size)},
            means={name: metric.compute() for name, metric in made.items()},
            missing=missing,
            pictures=_by_picture(made, prompts, seed),
        )
        sheet(evaluation, teacher, student).save(folder / "contact_sheet.png")
        (folder / "eval.json").write_text(evaluation.to_json(), encoding="utf-8")
    return evaluation


def _checked_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts must be a list of texts, got {prompts!r}")
    if not prompts:
        raise ValueError("prompts is empty; give at least one")
    return list(prompts)


def _whole_tokens(pipe: Any, name: str, side: int | None) -> int:
    """A side of the picture in pixels; diffusers would round it down to whole tokens."""
    transformer, adapter = find_transformer(pipe)
    pixels = adapter.latents_per_token(transformer) * pipe.vae_scale_factor
    if side is None:
        return int(pipe.default_sample_size * pipe.vae_scale_factor)
    side = check_whole_number(name, side, "it is in pixels")
    if side % pixels:
        raise ValueError(f"{name}={side} is not in whole tokens of {pixels} pixels; give a multiple of {pixels}")
    return side


@torch.inference_mode()
def _compare(
    metrics: Mapping[str, Metric],
    teacher: Drawn,
    student: Drawn,
    prompts: Sequence[str],
    batch_size: int,
    device: torch.device,
) -> None:
    for metric in metrics.values():
        metric.to(device)
    for start in tqdm(range(0, len(prompts), batch_size), desc="comparing", unit="batch"):
        part = slice(start, start + batch_size)
        of_teacher, of_student = (read_all(drawn.files[part]).to(device) for drawn in (teacher, student))
        for metric in metrics.values():
            metric.update(Batch(of_teacher, of_student, prompts[part]))


def _by_picture(metrics: Mapping[str, Metric], prompts: Sequence[str], seed: int) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "seed": seed + number,
            **{
                row: {
                    name: metric.per_picture[row][number]
                    for name, metric in metrics.items()
                    if row in metric.per_picture
                }
                for row in (TEACHER, STUDENT)
            },
        }
        for number, prompt in enumerate(prompts)
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

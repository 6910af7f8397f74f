"""The teacher's own pictures to learn from, which serve better than photographs (arXiv 2412.16112, section 3.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clear_attn.distill.data import METADATA, Example, opener
from clear_attn.distill.files import put, same_origin
from clear_attn.distill.seeds import hash_of

INDEX = "generated.json"


class Drawing(NamedTuple):
    """How pictures are drawn: a folder holds those of one way alone.

    Attributes:
        model, revision: the teacher.
        resolution: side in pixels.
        text_tokens: the length that prompts are padded to.
        steps: of denoising, None for the pipeline's own.
        seed: picture by picture, seeds follow from it.
    """

    model: str
    revision: str | None
    resolution: int
    text_tokens: int
    steps: int | None
    seed: int


def examples(folder: Path, prompts: Sequence[str], count: int) -> list[Example]:
    """The pictures that will be there: the prompts in turn, as often as the count asks for."""
    names = [f"{number:06}.png" for number in range(count)]
    return [
        Example(name, prompts[number % len(prompts)], opener((folder / name).read_bytes))
        for number, name in enumerate(names)
    ]


def missing(folder: Path, wanted: Sequence[Example]) -> list[int]:
    """The numbers of the pictures that are not there."""
    return [number for number, example in enumerate(wanted) if not (folder / example.name).exists()]


def begin(folder: Path, wanted: Sequence[Example], drawing: Drawing) -> None:
    """Makes the folder, with its captions, so that it can be trained on as any other.

    Raises:
        ValueError: the folder's pictures were drawn otherwise, or were not drawn here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / INDEX
    if index.is_file():
        same_origin(json.loads(index.read_text(encoding="utf-8")), drawing, f"the pictures in {folder} were drawn")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else already; give an empty folder to draw pictures in")
    lines = [json.dumps({"file_name": each.name, "prompt": each.prompt}) + "\n" for each in wanted]
    put(index, lambda path: path.write_text(json.dumps(drawing._asdict(), indent=1) + "\n", encoding="utf-8"))
    put(folder / METADATA, lambda path: path.write_text("".join(lines), encoding="utf-8"))


def draw(
    pipe: Any,
    folder: Path,
    wanted: Sequence[Example],
    numbers: Sequence[int],
    drawing: Drawing,
    batch_size: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Draws pictures, each with a seed of its own, so that those of an interrupted run are never drawn twice.

    Args:
        pipe: the teacher, on its device.
        folder: that `begin` has made.
        wanted: all pictures.
        numbers: which of them to draw.
        drawing: how.
        batch_size: pictures at a time.
        progress: wraps the places where batches start, as tqdm does.
    """
    steps = {} if drawing.steps is None else {"num_inference_steps": drawing.steps}
    for start in progress(range(0, len(numbers), batch_size)):
        batch = numbers[start : start + batch_size]
        drawn = pipe(
            [wanted[number].prompt for number in batch],
            height=drawing.resolution,
            width=drawing.resolution,
            max_sequence_length=drawing.text_tokens,
            generator=[torch.Generator().manual_seed(hash_of(drawing.seed, number)) for number in batch],
            **steps,
        )
        for number, image in zip(batch, drawn.images, strict=True):
            put(folder / wanted[number].name, image.save)

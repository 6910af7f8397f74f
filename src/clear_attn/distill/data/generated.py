"""The teacher's own pictures to learn from, which serve better than photographs (arXiv 2412.16112, section 3.3)."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clear_attn.distill.data.examples import METADATA, Example, check_same_origin, listed_in, on_disk
from clear_attn.distill.data.seeds import hash_of
from clear_attn.utils.atomic import atomic_file, atomic_text
from clear_attn.utils.seeded_images import generate_with_seeds

INDEX = "generated.json"


class Drawing(NamedTuple):
    """How pictures are drawn: a folder holds those of one way alone.

    Attributes:
        model, revision: the teacher.
        resolution: side in pixels.
        text_tokens: the length that prompts are padded to.
        steps: of denoising, None for the pipeline's own.
        guidance: what a guided model is told, None for others, whose pipelines use their own.
        seed: picture by picture, seeds follow from it.
    """

    model: str
    revision: str | None
    resolution: int
    text_tokens: int
    steps: int | None
    guidance: float | None
    seed: int

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `generate_with_seeds`."""
        return {
            "height": self.resolution,
            "width": self.resolution,
            "max_sequence_length": self.text_tokens,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }


def examples(folder: Path, prompts: Sequence[str], count: int) -> list[Example]:
    """The pictures that will be there: the prompts in turn, as often as the count asks for."""
    numbered = enumerate(itertools.islice(itertools.cycle(prompts), count))
    return [on_disk(folder / f"{number:06}.png", prompt) for number, prompt in numbered]


def missing(folder: Path, wanted: Sequence[Example]) -> list[int]:
    """The numbers of the pictures that are not there."""
    return [number for number, example in enumerate(wanted) if not (folder / example.name).exists()]


def begin(folder: Path, wanted: Sequence[Example], drawing: Drawing) -> None:
    """Makes the folder, with its captions, so that it can be trained on as any other.

    Raises:
        ValueError: the folder's pictures were drawn otherwise, or of other prompts, or were not drawn here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / INDEX
    if index.is_file():
        before = json.loads(index.read_text(encoding="utf-8"))
        check_same_origin(before, drawing, f"the pictures in {folder} were drawn")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else already; give an empty folder to draw pictures in")
    captions = listed_in(folder / METADATA) if (folder / METADATA).is_file() else {}
    for each in wanted:
        if captions.get(each.name, each.prompt) != each.prompt and (folder / each.name).exists():
            raise ValueError(
                f"{folder / each.name} was drawn for {captions[each.name]!r}, and the prompts now say {each.prompt!r}; "
                "give another folder, or the prompts as they were"
            )
    # Those of an earlier, longer run stay.
    captions |= {each.name: each.prompt for each in wanted}
    lines = [json.dumps({"file_name": name, "prompt": prompt}) + "\n" for name, prompt in captions.items()]
    atomic_text(index, json.dumps(drawing._asdict(), indent=1) + "\n")
    atomic_text(folder / METADATA, "".join(lines))


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
    for start in progress(range(0, len(numbers), batch_size)):
        batch = numbers[start : start + batch_size]
        prompts = [wanted[number].prompt for number in batch]
        seeds = [hash_of(drawing.seed, number) for number in batch]
        images = generate_with_seeds(pipe, seeds, prompt=prompts, **drawing.arguments())
        for number, image in zip(batch, images, strict=True):
            with atomic_file(folder / wanted[number].name) as unfinished:
                image.save(unfinished)

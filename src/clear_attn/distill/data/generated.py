"""Generate the teacher's images as training data, which work better than photos (arXiv 2412.16112, section 3.3)."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from clear_attn.distill.data.examples import METADATA, Example, check_same_origin, on_disk, read_metadata
from clear_attn.distill.data.seeds import hash_of
from clear_attn.models import TrainingAdapter
from clear_attn.utils.atomic import atomic_file, atomic_text
from clear_attn.utils.json_records import read_json
from clear_attn.utils.seeded_images import generate_with_seeds

INDEX = "generated.json"


class Generation(NamedTuple):
    """The settings of generated images, the same for all images of a folder.

    Attributes:
        model, revision: the teacher.
        resolution: the side of the images in pixels.
        text_tokens: the length that prompts are padded to.
        steps: the number of denoising steps, or None for the pipeline's default.
        guidance: the embedded guidance scale, or None for the pipeline's default in other models.
        seed: the seed from which the images' seeds are computed.
    """

    model: str
    revision: str | None
    resolution: int
    text_tokens: int
    steps: int | None
    guidance: float | None
    seed: int

    def run(
        self, pipe: Any, training: TrainingAdapter, seeds: Sequence[int], text: dict[str, Tensor], **arguments: Any
    ) -> list[Image.Image]:
        """Return an image per seed, given text encoded as keywords of the pipeline."""
        return generate_with_seeds(
            functools.partial(training.draw, pipe),
            seeds,
            height=self.resolution,
            width=self.resolution,
            max_sequence_length=self.text_tokens,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            **text,
            **arguments,
        )


def examples(folder: Path, prompts: Sequence[str], count: int) -> list[Example]:
    """Return the examples that will be in the folder: `count` images, with the prompts in turn."""
    numbered = enumerate(itertools.islice(itertools.cycle(prompts), count))
    return [on_disk(folder / f"{number:06}.png", prompt) for number, prompt in numbered]


def missing(folder: Path, wanted: Sequence[Example]) -> list[int]:
    """Return the numbers of the images that do not exist yet."""
    return [number for number, example in enumerate(wanted) if not (folder / example.name).exists()]


def begin(folder: Path, wanted: Sequence[Example], generation: Generation) -> None:
    """Create the folder with its captions, in the format that `from_folder` reads.

    Raises:
        ValueError: the folder's images have other settings or prompts, or were not generated here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / INDEX
    if index.is_file():
        check_same_origin(read_json(index), generation, f"the images in {folder} were generated")
    elif any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; give an empty folder to generate images in")
    captions = read_metadata(folder / METADATA) if (folder / METADATA).is_file() else {}
    for each in wanted:
        if captions.get(each.name, each.prompt) != each.prompt and (folder / each.name).exists():
            raise ValueError(
                f"{folder / each.name} was generated for {captions[each.name]!r}, and the prompts now say "
                f"{each.prompt!r}; give another folder, or the prompts as they were"
            )
    captions |= {each.name: each.prompt for each in wanted}  # keep the captions of an earlier, longer run
    lines = [json.dumps({"file_name": name, "prompt": prompt}) + "\n" for name, prompt in captions.items()]
    atomic_text(index, json.dumps(generation._asdict(), indent=1) + "\n")
    atomic_text(folder / METADATA, "".join(lines))


def generate(
    pipe: Any,
    training: TrainingAdapter,
    folder: Path,
    wanted: Sequence[Example],
    numbers: Sequence[int],
    generation: Generation,
    batch_size: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Generate images, each with its own seed, so that an interrupted run can continue.

    Args:
        pipe: the teacher, on its device.
        training: the training adapter of its transformer.
        folder: a folder that `begin` prepared.
        wanted: the examples of all images.
        numbers: the numbers of the images to generate.
        generation: the settings.
        batch_size: the number of images per call of the pipeline.
        progress: a wrapper of the loop over batches, such as tqdm.
    """
    for start in progress(range(0, len(numbers), batch_size)):
        batch = numbers[start : start + batch_size]
        with torch.no_grad():
            prompts = [wanted[number].prompt for number in batch]
            text = training.pipeline_arguments(pipe, prompts, generation.text_tokens)
        images = generation.run(pipe, training, [hash_of(generation.seed, number) for number in batch], text)
        for number, image in zip(batch, images, strict=True):
            with atomic_file(folder / wanted[number].name) as unfinished:
                image.save(unfinished)

"""What comes before training: the model, the teacher's pictures, and the cache of what they are encoded to."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from tqdm.auto import tqdm

from clear_attn.distill.data import cache
from clear_attn.distill.data import generated as generate
from clear_attn.distill.data.cache import Cache, Origin
from clear_attn.distill.data.examples import Example, from_dataset, from_folder
from clear_attn.distill.data.generated import Drawing
from clear_attn.distill.settings import Settings
from clear_attn.models import training_adapter_for
from clear_attn.patching.target import find_transformer
from clear_attn.utils.prompts import read_prompts
from clear_attn.weights.metadata import metadata_of

# Of mixed precision, by accelerate's name.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def examples(settings: Settings) -> list[Example]:
    """The pictures to train on; those that the teacher is to draw may not be there yet.

    Raises:
        As `from_folder`, `from_dataset` and `read_prompts`; ImportError without the datasets library.
    """
    if settings.generate:
        return generate.examples(_drawn_folder(settings), read_prompts(Path(str(settings.prompts))), settings.generate)
    if settings.train_data_dir:
        return from_folder(Path(settings.train_data_dir))
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("dataset_name needs the datasets library: pip install 'clear-attn[train]'") from None
    rows = load_dataset(settings.dataset_name, split="train")
    return from_dataset(rows, settings.image_column, settings.caption_column)


def load(settings: Settings, accelerator: Accelerator) -> Any:
    """The pipeline, on the CPU, in the dtype that mixed precision computes in.

    Raises:
        TypeError: not a supported pipeline.
        ValueError: one that was saved while it was linearized, which is no teacher.
    """
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    name = settings.pretrained_model_name_or_path
    pipe = DiffusionPipeline.from_pretrained(name, revision=settings.revision, dtype=dtype)
    transformer, _ = find_transformer(pipe)
    training_adapter_for(transformer)
    if metadata_of(transformer):
        raise ValueError(f"{name} was saved while it was linearized, and the teacher is dense; give the original model")
    return pipe


def text_tokens(settings: Settings, pipe: Any) -> int:
    """The length that prompts are padded to: the pipeline's `max_sequence_length`."""
    usual = inspect.signature(pipe.__call__).parameters["max_sequence_length"].default
    return int(usual if settings.max_sequence_length is None else settings.max_sequence_length)


def drawing_of(settings: Settings, pipe: Any) -> Drawing:
    """How the run draws pictures: the training set, and at validation."""
    transformer, _ = find_transformer(pipe)
    return Drawing(
        settings.pretrained_model_name_or_path,
        settings.revision,
        settings.resolution,
        text_tokens(settings, pipe),
        settings.num_inference_steps,
        guidance_of(settings, transformer),
        settings.seed,
    )


def guidance_of(settings: Settings, transformer: Any) -> float | None:
    """What a model with an embedding of its guidance is told; None for others."""
    return settings.guidance_scale if transformer.config.get("guidance_embeds") else None


def data(settings: Settings, accelerator: Accelerator, pipe: Any, pictures: list[Example]) -> Cache:
    """Draws and encodes what is missing, each process its share, and lets go of what only that needs."""
    if settings.generate:
        _draw(settings, accelerator, pipe, pictures)
    folder = Path(settings.latents_dir or Path(settings.output_dir, "cache"))
    transformer, _ = find_transformer(pipe)
    model, length = settings.pretrained_model_name_or_path, text_tokens(settings, pipe)
    origin = Origin.of(model, settings.revision, settings.resolution, length, pictures)
    if accelerator.is_main_process:
        cache.begin(folder, origin, len(pictures))
    accelerator.wait_for_everyone()
    todo = _share(cache.missing(folder, pictures), accelerator)
    if todo:
        encoders = [part for part in _modules(pipe) if part is not transformer]
        for part in encoders:
            part.to(accelerator.device)
        cache.build(pipe, training_adapter_for(transformer), pictures, folder, origin, tqdm(todo, "encoding"))
        for part in encoders:
            part.to("cpu")
    accelerator.wait_for_everyone()
    return Cache(folder)


def drop_text_encoders(pipe: Any) -> None:
    """Lets go of what no step needs, and no save."""
    for name in [name for name in pipe.components if name.startswith("text_encoder")]:
        setattr(pipe, name, None)


def _drawn_folder(settings: Settings) -> Path:
    return Path(settings.train_data_dir or Path(settings.output_dir, "generated"))


def _draw(settings: Settings, accelerator: Accelerator, pipe: Any, pictures: list[Example]) -> None:
    folder = _drawn_folder(settings)
    drawing = drawing_of(settings, pipe)
    if accelerator.is_main_process:
        generate.begin(folder, pictures, drawing)
    accelerator.wait_for_everyone()
    todo = _share(generate.missing(folder, pictures), accelerator)
    if todo:
        pipe.to(accelerator.device)
        pipe.set_progress_bar_config(disable=True)
        generate.draw(pipe, folder, pictures, todo, drawing, settings.train_batch_size, lambda it: tqdm(it, "drawing"))
        pipe.to("cpu")
    accelerator.wait_for_everyone()


def _share(numbers: list[int], accelerator: Accelerator) -> list[int]:
    """Of what is to do, this process's part; the same list on all, for they look before anyone begins."""
    accelerator.wait_for_everyone()
    return numbers[accelerator.process_index :: accelerator.num_processes]


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]

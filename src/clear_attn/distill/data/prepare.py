"""Prepare training: load the model, generate the teacher's images, cache latents and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from clear_attn.distill.data import buckets, cache, generated
from clear_attn.distill.data.cache import Cache, Origin
from clear_attn.distill.data.examples import Example, from_dataset, from_folder
from clear_attn.distill.data.generated import Generation
from clear_attn.distill.settings import Settings
from clear_attn.models import training_adapter_for
from clear_attn.models.class_names import is_instance
from clear_attn.models.loading import load_pipeline
from clear_attn.models.pipeline_defaults import default_text_tokens, native_side
from clear_attn.patching.target import find_transformer
from clear_attn.utils.prompts import read_prompts
from clear_attn.weights.metadata import metadata_of
from clear_attn.weights.packaged import resolve_name

# The dtypes of mixed precision, by accelerate's names.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def examples(settings: Settings) -> list[Example]:
    """Return the images to train on. Images that the teacher generates may not exist yet.

    Raises:
        ImportError: the datasets library is not installed.
        Other errors: see `from_folder`, `from_dataset` and `read_prompts`.
    """
    if settings.generate:
        prompts = read_prompts(Path(str(settings.prompts)))
        return generated.examples(_generated_folder(settings), prompts, settings.generate)
    if settings.train_data_dir:
        return from_folder(Path(settings.train_data_dir))
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError("dataset_name needs the datasets library: pip install datasets") from None
    rows = load_dataset(settings.dataset_name, split="train")
    return from_dataset(rows, settings.image_column, settings.caption_column)


def load(settings: Settings, accelerator: Accelerator) -> Any:
    """Return the pipeline on the CPU, in the dtype of mixed precision.

    Raises:
        OSError: there is no such model.
        RuntimeError: components of a modular pipeline cannot be loaded.
        TypeError: the pipeline is not supported, or needs more than text.
        ValueError: the model was saved while it was linearized, but the teacher must be dense.
    """
    dtype = DTYPES.get(accelerator.mixed_precision, torch.float32)
    name = settings.pretrained_model_name_or_path
    pipe = load_pipeline(resolve_name(name), dtype, settings.revision)
    transformer, _ = find_transformer(pipe)
    supported = training_adapter_for(transformer).pipelines
    if not is_instance(pipe, supported):
        raise TypeError(f"{name} is a {type(pipe).__name__}; give a text-to-image pipeline: {', '.join(supported)}")
    if metadata_of(transformer):
        raise ValueError(
            f"{name} was saved while it was linearized, but the teacher must be dense; give the original model"
        )
    return pipe


def text_tokens(settings: Settings, pipe: Any) -> int:
    """Return the length that prompts are padded to: the pipeline's `max_sequence_length`."""
    own = training_adapter_for(find_transformer(pipe)[0]).text_tokens or default_text_tokens(pipe)
    tokens = own if settings.max_sequence_length is None else settings.max_sequence_length
    assert tokens is not None  # every pipeline that can be distilled takes text
    return tokens


def resolution(settings: Settings, pipe: Any) -> int:
    """Return the side of a square image in pixels: the size that the model was trained at, unless another is given.

    Raises:
        ValueError: images cannot have that size.
    """
    given, transformer = settings.resolution, find_transformer(pipe)[0]
    side = native_side(pipe, transformer) if given is None else given
    buckets.sizes(side, training_adapter_for(transformer).pixel_step)
    return side


def generation_of(settings: Settings, pipe: Any) -> Generation:
    """Return the settings of generated images, for the training set and for validation."""
    return Generation(
        settings.pretrained_model_name_or_path,
        settings.revision,
        resolution(settings, pipe),
        text_tokens(settings, pipe),
        settings.num_inference_steps,
        guidance_of(settings, find_transformer(pipe)[0]),
        settings.seed,
    )


def guidance_of(settings: Settings, transformer: Any) -> float | None:
    """Return the embedded guidance scale; None for a model without it."""
    return settings.guidance_scale if training_adapter_for(transformer).embeds_guidance(transformer) else None


def data(settings: Settings, accelerator: Accelerator, pipe: Any, images: list[Example]) -> Cache:
    """Generate missing images and encode missing shards, split over the processes."""
    if settings.generate:
        _generate_images(settings, accelerator, pipe, images)
    return _encode_images(settings, accelerator, pipe, images)


def _generate_images(settings: Settings, accelerator: Accelerator, pipe: Any, images: list[Example]) -> None:
    folder, generation = _generated_folder(settings), generation_of(settings, pipe)
    training = training_adapter_for(find_transformer(pipe)[0])

    def generate(numbers: list[int]) -> None:
        pipe.set_progress_bar_config(disable=True)
        size = settings.train_batch_size
        generated.generate(pipe, training, folder, images, numbers, generation, size, lambda it: tqdm(it, "generating"))

    _begin(accelerator, lambda: generated.begin(folder, images, generation))
    _split(accelerator, generated.missing(folder, images), _modules(pipe), generate)


def _encode_images(settings: Settings, accelerator: Accelerator, pipe: Any, images: list[Example]) -> Cache:
    folder = Path(settings.latents_dir or Path(settings.output_dir, "cache"))
    model, length = settings.pretrained_model_name_or_path, text_tokens(settings, pipe)
    origin = Origin.of(model, settings.revision, resolution(settings, pipe), length, images)
    transformer, _ = find_transformer(pipe)
    training = training_adapter_for(transformer)

    def encode(shards: list[int]) -> None:
        cache.build(pipe, training, images, folder, origin, tqdm(shards, "encoding"))

    _begin(accelerator, lambda: cache.begin(folder, origin, len(images)))
    modules = [part for part in _modules(pipe) if part is not transformer]
    _split(accelerator, cache.missing(folder, images), modules, encode)
    return Cache(folder)


def _begin(accelerator: Accelerator, begin: Callable[[], None]) -> None:
    """Create a folder in the main process, while the others wait."""
    if accelerator.is_main_process:
        begin()
    accelerator.wait_for_everyone()


def _split(
    accelerator: Accelerator, missing: list[int], modules: list[nn.Module], make: Callable[[list[int]], None]
) -> None:
    """Make missing items, split over the processes. A process that has some moves the modules to its device for it."""
    accelerator.wait_for_everyone()  # every process lists the missing items before one of them adds any
    if mine := missing[accelerator.process_index :: accelerator.num_processes]:
        for module in modules:
            module.to(accelerator.device)
        make(mine)
        for module in modules:
            module.to("cpu")
    accelerator.wait_for_everyone()


def drop_text_encoders(pipe: Any) -> None:
    """Free the text encoders, which neither training nor saving needs."""
    for name in [name for name in pipe.components if name.startswith(("text_encoder", "prompt_upsampler"))]:
        setattr(pipe, name, None)


def _generated_folder(settings: Settings) -> Path:
    return Path(settings.train_data_dir or Path(settings.output_dir, "generated"))


def _modules(pipe: Any) -> list[nn.Module]:
    return [part for part in pipe.components.values() if isinstance(part, nn.Module)]

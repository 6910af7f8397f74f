"""A small run of distillation: images, settings, result."""

import dataclasses
import itertools
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from clear_attn.demo.scenes import draw, has_no_texture, training_scenes
from clear_attn.distill import Settings
from clear_attn.distill.step import Batch
from clear_attn.models import adapter_for, training_adapter_for
from clear_attn.weights.metadata import WEIGHTS_FILE


def fill(folder, count=5, sizes=((64, 64),)):
    """Write images of scenes, each with a caption in a text file."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = filter(has_no_texture, training_scenes(1000))  # textures are finer than pixels here
    for number, scene in enumerate(itertools.islice(plain, count)):
        height, width = sizes[number % len(sizes)]
        Image.fromarray(draw(scene, 64)).resize((width, height)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(scene.captions[0])
    return folder


def small_settings(folder, data, model):
    """Return settings for four steps of the FLUX in a folder, with a checkpoint after two."""
    return Settings(
        pretrained_model_name_or_path=str(model),
        train_data_dir=str(data),
        output_dir=str(folder / "out"),
        latents_dir=str(folder / "cache"),
        window=2,
        down_factor=2,
        resolution=64,
        max_sequence_length=24,
        train_batch_size=2,
        max_train_steps=4,
        optimizer="adamw",
        learning_rate=1e-3,
        gradient_checkpointing=False,
        checkpointing_steps=2,
        report_to="none",
    )


def change(settings, **changes):
    return dataclasses.replace(settings, **changes)


def weights_of(settings):
    return load_file(Path(settings.output_dir) / WEIGHTS_FILE)


def text_dim_of(config):
    """The channels of text before a model's own projection."""
    return next(config[name] for name in ("joint_attention_dim", "cap_feat_dim", "context_in_dim") if name in config)


def training_batch(transformer, grid, batch=2, seed=3):
    """Return random latents of a grid of tokens, and random texts; the last has two tokens of padding."""
    rng = torch.Generator().manual_seed(seed)
    config, side = transformer.config, adapter_for(transformer).latents_per_token(transformer)
    packed = training_adapter_for(transformer).pack(torch.zeros(1, 1, 2, 2)).ndim == 3
    channels = config.in_channels // (side**2 if packed else 1)
    krea2 = "num_text_layers" in config
    shape = (config.num_text_layers, config.text_hidden_dim) if krea2 else (text_dim_of(config),)
    text = {"text": torch.randn(batch, 5, *shape, generator=rng)}
    if "pooled_projection_dim" in config:
        text["pooled"] = torch.randn(batch, config.pooled_projection_dim, generator=rng)
    else:
        text["mask"] = torch.ones(batch, 5)
        text["mask"][-1, 3:] = 0
    return Batch(torch.randn(batch, channels, side * grid[0], side * grid[1], generator=rng), text)

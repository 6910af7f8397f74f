"""The default size, text length and timesteps of a pipeline, and the side of its tokens, from its models' configs."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from clear_attn.models.class_names import is_instance

# The side of images, in pixels, where a pipeline does not say it.
DEFAULT_SIDE = 1024


def pixels_per_token(pipe: Any, transformer: Any, adapter: Any) -> int:
    """Return the side of an image token in pixels."""
    scale = getattr(pipe, "vae_scale_factor", None) or adapter.vae_scale_factor
    return int(adapter.latents_per_token(transformer) * scale)


def native_side(pipe: Any, transformer: Any) -> int:
    """Return the side in pixels of the square images that a pipeline's model was trained on.

    The transformer's config records it for Stable Diffusion 3, in latents, and the autoencoder's for FLUX.1, in pixels.
    Without a record it is the default of the pipeline's class.
    """
    vae, scale = getattr(pipe, "vae", None), int(pipe.vae_scale_factor)
    in_latents, in_pixels = (getattr(model, "config", {}).get("sample_size") for model in (transformer, vae))
    if in_latents or not in_pixels or in_pixels == _class_default(type(vae), "sample_size"):
        latents = in_latents or getattr(pipe, "default_sample_size", None)
        return int(latents * scale if latents else _default_height(pipe))
    return int(in_pixels)


def _default_height(pipe: Any) -> int:
    """Return the default height of a pipeline's calls, which a modular pipeline has as an attribute or in a block."""
    return int(getattr(pipe, "default_height", None) or call_defaults(pipe).get("height") or DEFAULT_SIDE)


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Return the keywords of a pipeline's call with their defaults; a modular pipeline has them in its blocks."""
    if is_instance(pipe, ("ModularPipeline",)):
        return {each.name: each.default for each in pipe.blocks.inputs if each.name}
    return {each.name: each.default for each in inspect.signature(pipe.__call__).parameters.values()}


def native_grid(pipe: Any, transformer: Any, adapter: Any) -> tuple[int, int] | None:
    """Return the image tokens, in rows and columns, that a pipeline's model was trained on.

    None for a transformer without a pipeline, which does not know the size of its images.
    """
    if getattr(pipe, "vae_scale_factor", None) is None:
        return None
    side = native_side(pipe, transformer) // pixels_per_token(pipe, transformer, adapter)
    return side, side


def _class_default(model: type, name: str) -> Any:
    """Return the default of an entry of a model's config. It is saved like an entry that was given."""
    parameter = inspect.signature(model).parameters.get(name)
    return parameter and parameter.default


def longest_text(pipe: Any) -> int:
    """Return the most tokens that the tokenizer of a pipeline's longest text takes, `sys.maxsize` if it has no limit.

    FLUX.1 and Stable Diffusion 3 have several tokenizers. T5's is the last, and gives the text sequence its length.
    """
    names = sorted(name for name in getattr(pipe, "components", {}) if name.startswith("tokenizer"))
    tokenizer = getattr(pipe, names[-1]) if names else None
    return int(min(getattr(tokenizer, "model_max_length", sys.maxsize), sys.maxsize))


def default_text_tokens(pipe: Any) -> int | None:
    """Return the `max_sequence_length` for a pipeline whose caller gives none; None if it takes no such argument.

    That is the default of its class, unless the tokenizer takes less.
    """
    usual = call_defaults(pipe).get("max_sequence_length")
    return None if usual is None else min(int(usual), longest_text(pipe))


def linear_shift(config: Mapping[str, Any], tokens: int, longest: int = 4096, highest: float = 1.15) -> float:
    """Return the `mu` of dynamic shifting that grows linearly with the tokens, as most pipelines compute it.

    Args:
        config: the config of a scheduler.
        tokens: the number of image tokens.
        longest: the number of tokens at which it is `max_shift`, if the config has none.
        highest: `max_shift`, if the config has none.
    """
    shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", longest)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", highest)
    slope = (high - low) / (longest - shortest)
    return float(tokens * slope + (low - slope * shortest))  # rounded as diffusers does


def sigmas_of_run(pipe: Any, adapter: Any, tokens: int, steps: int) -> list[float]:
    """Return the sigma of each call of the transformer when a pipeline draws an image.

    Args:
        pipe: the pipeline.
        adapter: the adapter of its transformer.
        tokens: the number of image tokens.
        steps: the number of steps.

    Raises:
        ValueError: there is no scheduler of flow matching, or it refuses the pipeline's timesteps.
    """
    scheduler: Any = copy.deepcopy(getattr(pipe, "scheduler", None))
    if getattr(scheduler, "sigmas", None) is None or not adapter.timestep_is_sigma:
        raise ValueError(
            f"steps={steps} needs a pipeline with a scheduler of flow matching, got a {type(pipe).__name__} with "
            f"{'none' if scheduler is None else 'a ' + type(scheduler).__name__}; give the sigmas of a run instead"
        )
    settings = adapter.timestep_settings(pipe, tokens, steps)
    if not scheduler.config.get("use_dynamic_shifting"):  # some schedulers refuse it then
        settings = {**settings, "mu": None}
    if scheduler.config.get("use_flow_sigmas"):  # it computes its own
        settings = {"num_inference_steps": steps, **settings, "sigmas": None}
    known = inspect.signature(scheduler.set_timesteps).parameters
    if settings.get("sigmas") is not None and "sigmas" not in known:
        raise ValueError(
            f"a {type(scheduler).__name__} takes no sigmas, which a {type(pipe).__name__} gives it; give the sigmas of "
            "a run instead of steps"
        )
    scheduler.set_timesteps(**{name: value for name, value in settings.items() if name in known})
    return [float(timestep) / scheduler.config.num_train_timesteps for timestep in scheduler.timesteps]

"""Qwen-Image in diffusers: grids in `img_shapes`, complex rotary embedding, text that may be padded.

Each further image in a sequence, a reference (Edit) or a layer (Layered), is a segment.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout, grid_permutation
from clear_attn.models.adapter import Architecture, Call, ModelAdapter
from clear_attn.models.context.context import ClearContext
from clear_attn.models.hooked import InnerHook, OutputHook
from clear_attn.models.image_to_image import HighresPipelines
from clear_attn.models.parsing.padding import HIDDEN, check_mask
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs
from clear_attn.models.training import TrainingAdapter

# An image's frames, rows and columns.
Shape = tuple[int, int, int]


class QwenTraining(TrainingAdapter):
    """Train Qwen-Image: texts have different lengths, and the autoencoder takes videos."""

    pipelines = ("QwenImagePipeline",)
    text_keywords = MappingProxyType({"text": "prompt_embeds", "mask": "prompt_embeds_mask"})
    negative_prompt = " "  # without one the pipeline applies no guidance

    def encode_image(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        moments, config = pipe.vae.encode(pixels[:, :, None]).latent_dist, pipe.vae.config
        center, scale = (
            torch.tensor(x).view(1, -1, 1, 1).to(pixels) for x in (config.latents_mean, config.latents_std)
        )
        return (moments.mean[:, :, 0] - center) / scale, moments.std[:, :, 0] / scale

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, mask = pipe.encode_prompt(prompts, pipe.vae.device, max_sequence_length=text_tokens)
        # The pipeline returns no mask if no text is padded.
        return {"text": text, "mask": text.new_ones(text.shape[:2], dtype=torch.long) if mask is None else mask}

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        shape = 1, noisy.shape[-2] // 2, noisy.shape[-1] // 2
        return {
            "hidden_states": self.pack(noisy),
            "encoder_hidden_states": text["text"],
            # A single text is not padded, and attention without a mask is faster.
            "encoder_hidden_states_mask": text["mask"].bool() if len(noisy) > 1 else None,
            "timestep": sigma.to(noisy.dtype),
            "guidance": None if guidance is None else torch.full_like(sigma, guidance, dtype=noisy.dtype),
            "img_shapes": [[shape]] * len(noisy),
            "attention_kwargs": attention_kwargs,
        }


class QwenHighres(HighresPipelines):
    """The pipelines of Qwen-Image, with an autoencoder of videos that normalizes each channel."""

    def predictions(self, pipe: Any, guidance: float | None, options: Mapping[str, Any]) -> int:
        return super().predictions(pipe, guidance, options) if options.get("negative_prompt") is not None else 1

    def encode(self, pipe: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
        latents, config = pipe.vae.encode(pixels[:, :, None]).latent_dist.sample(generator)[:, :, 0], pipe.vae.config
        center, scale = (
            torch.tensor(x).view(1, -1, 1, 1).to(latents) for x in (config.latents_mean, config.latents_std)
        )
        return (latents - center) * (1 / scale)  # as diffusers' pipelines compute it, bit for bit


class QwenProcessor(ClearAttnProcessor):
    """The processor with Qwen-Image's mask keyword, which is None: the entry hook turns the mask into a score bias."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_context: ClearContext | None = None,
    ) -> Any:
        inputs = Inputs(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.run(attn, inputs, clear_context)


class QwenImage(ModelAdapter):
    transformer_class = "QwenImageTransformer2DModel"
    first_version = (0, 39)  # the first that hides padded text in its layers and needs no `txt_seq_lens`
    accepts = ("QwenDoubleStreamAttnProcessor2_0",)
    text_first = True
    default_text_tokens = 512  # the maximum of its pipelines, which do not pad
    residuals: tuple[str, ...] = ("controlnet_block_samples",)
    keywords = "attention_kwargs"

    def processor_class(self, layer: str) -> type[ClearAttnProcessor]:
        return QwenProcessor

    def latents_per_token(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        return [OutputHook(transformer.pos_embed, join_positions)]

    def rotary_embedding(self, transformer: Any) -> Any:
        return transformer.pos_embed

    @contextlib.contextmanager
    def scaled_theta(self, transformer: Any, factor: float) -> Iterator[None]:
        # The embedding has tables, made from theta once. Its hook stays, and its `forward` is another one's.
        embedding = transformer.pos_embed
        before, kind = vars(embedding).get("forward"), cast(Any, type(embedding))
        with super().scaled_theta(transformer, factor):
            settings = embedding.theta, tuple(embedding.axes_dim), embedding.scale_rope
            embedding.forward = _embedding_of(kind, *settings).forward
            try:
                yield
            finally:
                del embedding.forward
                if before is not None:
                    embedding.forward = before

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        hidden_states, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        grids = _grids(shapes_of(kwargs.get("img_shapes")))
        tokens = sum(height * width for height, width in grids)
        if hidden_states.shape[1] != tokens:
            raise ValueError(
                f"img_shapes have {tokens} image tokens, hidden_states has {hidden_states.shape[1]}; give the shape in "
                "tokens of each image in the sequence"
            )
        self.check_residuals(kwargs, tokens)
        return Call(grids, text.shape[1], hidden_states.device)

    def text_bias(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        mask, text = kwargs.get("encoder_hidden_states_mask"), kwargs["encoder_hidden_states"]
        if mask is None:
            return None, None
        check_mask("encoder_hidden_states_mask", mask, tuple(text.shape[:2]))
        return torch.where(mask.bool(), 0.0, HIDDEN), None

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        return {
            **self.permute_residuals(kwargs, layout),
            "hidden_states": kwargs["hidden_states"][:, layout.permutation],
            "encoder_hidden_states_mask": None,
        }

    training: TrainingAdapter | None = QwenTraining()
    highres_pipelines: tuple[HighresPipelines, ...] = (
        QwenHighres(
            "QwenImagePipeline",
            "QwenImageImg2ImgPipeline",
            guidance="true_cfg_scale",
            modular=("QwenImageModularPipeline",),
        ),
    )
    architectures: tuple[Architecture, ...] = (Architecture("qwen-image"),)


class QwenControlNet(QwenImage):
    """Qwen-Image's ControlNet, which unlike others passes attention keywords on to its layers."""

    transformer_class = "QwenImageControlNetModel"
    residuals = ()
    keywords = "joint_attention_kwargs"

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        return {
            **super().permute_inputs(kwargs, layout),
            "controlnet_cond": kwargs["controlnet_cond"][:, layout.permutation],
        }


@functools.lru_cache(maxsize=4)  # diffusers keeps the tables of every embedding that was called
def _embedding_of(cls: Any, theta: float, axes_dim: tuple[int, ...], scale_rope: bool) -> Any:
    return cls(theta, list(axes_dim), scale_rope)


def shapes_of(img_shapes: Any) -> Sequence[Shape]:
    """Return the shapes of one sequence's images; a batch has a list of shapes, or one shape, per sequence."""
    if not img_shapes:
        raise ValueError(
            f"img_shapes must give the frames, rows and columns in tokens of each image, got {img_shapes}; pass them "
            "as QwenImagePipeline does"
        )
    if any(shapes != img_shapes[0] for shapes in img_shapes):
        raise ValueError(
            f"img_shapes must be the same for the whole batch, got {img_shapes}; draw images of different sizes in "
            "separate calls"
        )
    return img_shapes[0] if isinstance(img_shapes[0], list) else [img_shapes[0]]


def _grids(shapes: Sequence[Shape]) -> tuple[Grid, ...]:
    return tuple((height, width) for frames, height, width in shapes for _ in range(frames))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def join_positions(embedding: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Convert the complex rotary embedding to FLUX's form, (cos, sin) of text and image joined. A forward hook.

    The image's part is put into tile order.
    """
    image, text = output
    grids = _grids(shapes_of(args[0]))
    starts = itertools.accumulate(map(math.prod, grids), initial=0)
    permutation = torch.cat(
        [start + grid_permutation(grid, image.device) for start, grid in zip(starts, grids, strict=False)]
    )
    angles = torch.cat([text, image[permutation]])
    cos, sin = (part.repeat_interleave(2, dim=-1) for part in (angles.real, angles.imag))
    return cos, sin

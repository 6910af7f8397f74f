"""Qwen-Image 2.1 in diffusers: text and condition images first, which never attend to the target image after them.

This prefix attends block-causally: a text token to what is before it, a condition image to that and to itself. Here it
keeps its own attention, and its tokens are keys alone for the target's queries. So its keys can be cached.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from clear_attn.core.layout import TokenLayout
from clear_attn.models.adapter import Architecture, Call, ModelAdapter
from clear_attn.models.context.context_variable import PUBLISHED, current
from clear_attn.models.context.dense_attention import dense_attention
from clear_attn.models.hooked import InnerHook, OutputHook
from clear_attn.models.parsing.padding import HIDDEN, check_mask
from clear_attn.models.processors.processor import Inputs, normalize, rotate_complex, split_heads
from clear_attn.models.processors.publishing import PublishedProcessor, Publishing
from clear_attn.models.qwen_image import QwenTraining, Shape, shapes_of
from clear_attn.models.training import TrainingAdapter

# The maximum of Qwen-Image's pipelines; those of 2.1 have none, and do not pad.
DEFAULT_TEXT_TOKENS = 512
# Latents of a condition image or of the target for each slot among the text tokens.
TOKENS_PER_SLOT = 4
# Rows or columns. The table of positions begins at -1024, and those of an image are around its center.
MOST_PER_SIDE = 2048


class Qwen21Training(QwenTraining):
    """Train Qwen-Image 2.1: a token is one latent, and the autoencoder takes images with an alpha channel."""

    pipelines = ("QwenImage21Pipeline",)
    pixel_step = 32  # a slot has 2 x 2 tokens of 16 pixels
    text_tokens = DEFAULT_TEXT_TOKENS

    def encode_image(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return super().encode_image(pipe, torch.cat([pixels, torch.ones_like(pixels[:, :1])], dim=1))

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, mask, _ = pipe.encode_prompt(prompts, device=pipe.vae.device)  # it takes no maximum length
        # The pipeline returns no mask if no text is padded.
        return {"text": text, "mask": text.new_ones(text.shape[:2], dtype=torch.long) if mask is None else mask}

    def draw(self, pipe: Any, **arguments: Any) -> Any:
        names = {"guidance_scale": "true_cfg_scale", "max_sequence_length": None}
        renamed = {new: arguments[name] for name in arguments if (new := names.get(name, name))}
        if renamed.get("true_cfg_scale") is None:  # the pipeline warns about a negative prompt without guidance
            renamed = {name: value for name, value in renamed.items() if not name.startswith("negative_")}
        return pipe(**renamed)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def prediction(self, output: Any, call: Mapping[str, Any]) -> Tensor:
        prediction: Tensor = output[:, -math.prod(call["img_shapes"][0][-1]) :]  # the others are of the text
        return prediction

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        batch, (height, width) = len(noisy), noisy.shape[-2:]
        slots = torch.arange(text["text"].shape[1] + height * width // TOKENS_PER_SLOT, device=noisy.device)
        return {
            "hidden_states": self.pack(noisy),
            "encoder_hidden_states": text["text"],
            # A single text is not padded, and attention without a mask is faster.
            "encoder_hidden_states_mask": text["mask"].bool() if batch > 1 else None,
            "timestep": sigma.to(noisy.dtype),
            "img_shapes": [[(1, height, width)]] * batch,
            "img_mask": (slots >= text["text"].shape[1]).expand(batch, -1),
            "attention_kwargs": attention_kwargs,
        }


class Prefix(NamedTuple):
    """What a layer gets for the tokens before the target image.

    Attributes:
        segments: first token, end, and whether it is text, of each run of text and each image; None if their keys are
            cached, and the layer gets the target's tokens alone.
        key_valid: which keys of the sequence are not padding, bool `[batch, tokens]`; None if all.
        cache: the layer's cache of keys and values, `[batch, tokens, heads, head_dim]`, or None.
        writes: the tokens to write into the cache, or None.
    """

    segments: list[tuple[int, int, bool]] | None
    key_valid: Tensor | None
    cache: Any
    writes: slice | None


class Qwen21Processor(PublishedProcessor):
    """The processor with Qwen-Image 2.1's arguments. The entry hook turns the mask of padded keys into a score bias."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        layer_cache: Any = None,
        kv_cache_mode: str | None = None,
        cache_write_slice: slice | None = None,
        segments: list[tuple[int, int, bool]] | None = None,
        key_valid: Tensor | None = None,
    ) -> Any:
        prefix = Prefix(segments, key_valid, layer_cache, cache_write_slice)
        return self.run(attn, Inputs(hidden_states, None, None, rotary_emb, prefix), PUBLISHED)


class QwenImage21(Publishing, ModelAdapter):
    transformer_class = "QwenImage21Transformer2DModel"
    first_version = (0, 42)
    accepts = ("QwenImage21AttnProcessor", "QwenImage21FlexAttnProcessor")
    text_first = True
    text_queries = False
    default_text_tokens = DEFAULT_TEXT_TOKENS
    vae_scale_factor = 16
    keywords = "attention_kwargs"
    fused_qkv_reliable = False  # its own processors do not use them

    def processor_class(self, layer: str) -> type[PublishedProcessor]:
        return Qwen21Processor

    def project(self, attn: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Return the target's query, the key and value of all tokens, and the attention output of those before it."""
        x, prefix, head_dim = inputs.hidden_states, cast(Prefix, inputs.rest), attn.inner_dim // attn.heads
        query, key, value = (split_heads(to(x), head_dim) for to in (attn.to_q, attn.to_k, attn.to_v))
        query, key = (each.to(value.dtype) for each in normalize(attn, query, key, ("norm_q", "norm_k")))
        query, key, value = (each.transpose(1, 2) for each in (query, key, value))
        query, key = rotate_complex(query, key, cast(Tensor, inputs.image_rotary_emb))
        if prefix.writes is not None:
            prefix.cache.store(*(each.transpose(1, 2)[:, prefix.writes].clone() for each in (key, value)))
        elif prefix.segments is None and prefix.cache is not None:
            cached = (each.transpose(1, 2) for each in prefix.cache.get())
            key, value = (torch.cat(parts, dim=2) for parts in zip(cached, (key, value), strict=True))
        if not prefix.segments:
            return query, key, value, None
        start = prefix.segments[-1][1]
        return query[:, :, start:], key, value, attend_prefix(query, key, value, prefix.segments, prefix.key_valid)

    def project_out(self, attn: Any, joint: Tensor, inputs: Inputs, rest: Any) -> Any:
        joint = joint if rest is None else torch.cat([rest, joint], dim=1)
        return attn.to_out[1](attn.to_out[0](joint))

    def latents_per_token(self, transformer: Any) -> int:
        return int(transformer.config.patch_size)

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        return [OutputHook(transformer.pos_embed, permute_positions)]

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        hidden_states, text, slots = kwargs["hidden_states"], kwargs["encoder_hidden_states"], kwargs["img_mask"]
        *conditions, target = _images(kwargs)
        tokens, before = math.prod(target), sum(map(math.prod, conditions))
        if hidden_states.shape[1] != before + tokens:
            raise ValueError(
                f"img_shapes have {before + tokens} image tokens, hidden_states has {hidden_states.shape[1]}; give the "
                "shape in tokens of each image in the sequence, the target image last"
            )
        if slots.shape[1] != text.shape[1] + tokens // TOKENS_PER_SLOT:
            raise ValueError(
                f"img_mask must have a slot for each of {text.shape[1]} tokens of encoder_hidden_states and "
                f"{tokens // TOKENS_PER_SLOT} of the target image, got {slots.shape[1]}; pass it as the pipeline does"
            )
        if (mask := kwargs.get("encoder_hidden_states_mask")) is not None:
            check_mask("encoder_hidden_states_mask", mask, tuple(text.shape[:2]))
            # On a GPU counting them would wait for it; the model's own assignment of image tokens fails there.
            marked = int(slots[0, : text.shape[1]].sum()) if slots.device.type == "cpu" else before // TOKENS_PER_SLOT
            if marked != before // TOKENS_PER_SLOT:
                raise ValueError(
                    f"img_mask must mark {before // TOKENS_PER_SLOT} slots among the tokens of encoder_hidden_states, "
                    f"for the condition images in img_shapes, got {marked}; pass both as the pipeline does"
                )
        return Call((target[1:],), _prefix_tokens(text.shape[1], before), hidden_states.device)

    def text_bias(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        mask = kwargs.get("encoder_hidden_states_mask")
        if mask is None:
            return None, None
        slots = kwargs["img_mask"][0, : mask.shape[1]]
        *conditions, _ = _images(kwargs)
        tokens = _prefix_tokens(mask.shape[1], sum(map(math.prod, conditions)))
        bias = torch.where(mask.bool() | slots, 0.0, HIDDEN)
        # Unlike `repeat_interleave`, this neither waits for a GPU nor writes out of bounds for a wrong mask.
        ends = torch.where(slots, TOKENS_PER_SLOT, 1).cumsum(0)
        slot_of = torch.searchsorted(ends, torch.arange(tokens, device=ends.device), right=True)
        return bias[:, slot_of.clamp(max=len(slots) - 1)], None

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        whole = math.prod(layout.grids[0])
        permuted = {**kwargs, "hidden_states": _index_last(kwargs["hidden_states"], whole, layout.permutation)}
        if layout.image_tokens == whole:
            return permuted
        # A rank has some rows of the target. Their positions are those in the whole image, see `permute_positions`.
        width, slots = layout.grids[0][1], (whole - layout.image_tokens) // TOKENS_PER_SLOT
        shapes = [*_images(kwargs)[:-1], (1, layout.image_tokens // width, width)]
        img_mask = kwargs["img_mask"][:, :-slots]
        return {**permuted, "img_shapes": [shapes] * len(kwargs["img_shapes"]), "img_mask": img_mask}

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        return _index_last(sample, len(layout.inverse_permutation), layout.inverse_permutation)

    def timestep_settings(self, pipe: Any, tokens: int, steps: int) -> dict[str, Any]:
        settings = super().timestep_settings(pipe, tokens, steps)
        if (own := pipe.config.get("sample_sigmas")) is None:
            return settings
        if len(own) != steps:
            raise ValueError(
                f"steps={steps} differs from the {len(own)} sample_sigmas of this pipeline; give steps={len(own)}"
            )
        return {**settings, "sigmas": own}

    training: TrainingAdapter | None = Qwen21Training()
    architectures: tuple[Architecture, ...] = (Architecture("qwen-image-2.1"),)

    def rotary_embedding(self, transformer: Any) -> Any:
        return transformer.pos_embed

    @contextlib.contextmanager
    def scaled_theta(self, transformer: Any, factor: float) -> Iterator[None]:
        # The embedding has tables, made from theta once.
        embedding = transformer.pos_embed
        before = embedding.freqs
        with super().scaled_theta(transformer, factor):
            embedding.freqs = type(embedding)(embedding.theta, embedding.axes_dim).freqs
            try:
                yield
            finally:
                embedding.freqs = before

    def max_grid_side(self, transformer: Any) -> int | None:
        return MOST_PER_SIDE


def attend_prefix(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[tuple[int, int, bool]], key_valid: Tensor | None
) -> Tensor:
    """Return the attention of the tokens before the target image as the dense model computes it.

    Args:
        query, key, value: `[batch, heads, tokens, head_dim]`.
        segments, key_valid: see `Prefix`.

    Returns:
        `[batch, prefix tokens, heads x head_dim]`.
    """
    attend, scale = dense_attention(), query.shape[-1] ** -0.5
    hidden = None if key_valid is None else torch.where(key_valid, 0.0, HIDDEN)[:, None, None]
    outputs = []
    for start, end, is_text in segments:
        bias = None if hidden is None else hidden[..., :end]
        if is_text:
            later = torch.full((1, 1, end - start, end), HIDDEN, device=query.device).triu(start + 1)
            bias = later if bias is None else later + bias
        outputs.append(attend(query[:, :, start:end], key[:, :, :end], value[:, :, :end], scale, bias))
    return torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)


def _images(kwargs: Mapping[str, Any]) -> Sequence[Shape]:
    """Return the shapes of the images of a sequence, the target last.

    Raises:
        ValueError: there is none, or one that the model has no slots or positions for.
    """
    shapes = shapes_of(kwargs.get("img_shapes"))
    for shape in shapes:
        if shape[0] != 1 or math.prod(shape) % TOKENS_PER_SLOT:
            raise ValueError(
                f"img_shapes must give one frame, rows and columns in tokens of each image, {TOKENS_PER_SLOT} tokens "
                f"for each slot of img_mask, got {tuple(shape)}; give images a height and width in multiples of 32 "
                "pixels"
            )
        if max(shape) > MOST_PER_SIDE:
            raise ValueError(
                f"img_shapes must have at most {MOST_PER_SIDE} rows and columns of tokens, for which the model has "
                f"positions, got {tuple(shape)}; draw a smaller image"
            )
    return shapes


def _prefix_tokens(text: int, before: int) -> int:
    """Return the number of tokens before the target image, from those of text with slots and of condition images."""
    return text - before // TOKENS_PER_SLOT + before


def _index_last(sequence: Tensor, tokens: int, index: Tensor) -> Tensor:
    """Index this number of last tokens of `[batch, tokens, channels]`."""
    start = sequence.shape[1] - tokens
    return torch.cat([sequence[:, :start], sequence[:, start:][:, index]], dim=1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def permute_positions(embedding: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Put the target image's rows of the rotary embedding into tile order, on a rank its own ones. A forward hook."""
    context = current()
    if context is None:
        return output
    (shapes, is_image), layout = args, context.layout
    whole, start = math.prod(layout.grids[0]), len(is_image) - math.prod(shapes[-1])
    if layout.image_tokens != whole:
        places = torch.cat([is_image[:start], is_image.new_ones(whole)])
        output = type(embedding).forward(embedding, [*shapes[:-1], (1, *layout.grids[0])], places, output.device)
    return _index_last(output[None], whole, layout.permutation.to(output.device))[0]

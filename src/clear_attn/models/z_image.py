"""Z-Image in diffusers: lists of latents as input, learned padding after image and caption, image first.

The first layers refine the image with its padding, before it is joined with the caption. Captions of a batch may have
different lengths; the model pads and masks the shorter ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout
from clear_attn.models._diffusers import name_of_sequence_method
from clear_attn.models.adapter import Architecture, Call, ModelAdapter
from clear_attn.models.class_names import is_instance
from clear_attn.models.context.context_variable import PUBLISHED, current
from clear_attn.models.context.dense_attention import dense_attention
from clear_attn.models.hooked import InnerHook, MethodHook
from clear_attn.models.image_to_image import HighresPipelines
from clear_attn.models.parsing.padding import HIDDEN
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs, project, rotate_complex
from clear_attn.models.processors.publishing import PublishedProcessor, Publishing
from clear_attn.models.sd3 import unpermute_patches
from clear_attn.models.training import TrainingAdapter

# The model pads image and caption to multiples of this with learned tokens, which are attended to.
MULTIPLE = 32


class ZImageTraining(TrainingAdapter):
    """Train Z-Image: it predicts image minus noise, its timestep is 1 - sigma, and captions are a list."""

    pipelines = ("ZImagePipeline",)
    negative_prompt = ""

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        captions, _ = pipe.encode_prompt(
            list(prompts),  # the pipeline writes into it
            pipe.vae.device,
            do_classifier_free_guidance=False,
            max_sequence_length=text_tokens,
        )
        mask = pad_sequence([caption.new_ones(len(caption)) for caption in captions], batch_first=True)
        return {"text": pad_sequence(captions, batch_first=True), "mask": mask}

    def pipeline_arguments(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Any]:
        given, negative = prompts, [self.negative_prompt] * len(prompts)
        encoded = [_captions(self.encode_prompts(pipe, each, text_tokens)) for each in (given, negative)]
        return dict(zip(("prompt_embeds", "negative_prompt_embeds"), encoded, strict=True))

    def pack(self, latents: Tensor) -> Tensor:
        return latents

    def prediction(self, output: Any, call: Mapping[str, Any]) -> Tensor:
        return -torch.stack(output)[:, :, 0]

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            "x": list(noisy[:, :, None]),
            "t": 1 - sigma,
            "cap_feats": _captions(text),
            "joint_attention_kwargs": attention_kwargs,
        }


def _captions(text: Mapping[str, Tensor]) -> list[Tensor]:
    """Return padded texts as a list of tensors of their own lengths."""
    lengths = text["mask"].sum(dim=1).int().tolist()
    return [caption[:length] for caption, length in zip(text["text"], lengths, strict=True)]


class ZImageProcessor(PublishedProcessor):
    """The processor with Z-Image's keywords. The entry hook turns the mask of shorter captions into a score bias."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        return self.run(attn, Inputs(hidden_states, None, None, freqs_cis), PUBLISHED)


class RefinerProcessor(ZImageProcessor):
    """The processor of layers before the caption is joined, which a ControlNet shares with its transformer.

    A ControlNet calls them outside of its transformer's call, and with a mask, which the transformer does not give
    here. Its own attention is dense.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Any:
        if attention_mask is None:
            return super().__call__(attn, hidden_states, None, None, freqs_cis)
        inputs = Inputs(hidden_states, None, None, freqs_cis)
        query, key, value, rest = self.adapter.project(attn, inputs)
        bias = torch.where(attention_mask, 0.0, HIDDEN)[:, None, None]
        attended = dense_attention(self.attention_backend)(query, key, value, query.shape[-1] ** -0.5, bias)
        return self.adapter.project_out(attn, attended.transpose(1, 2).flatten(2), inputs, rest)


class ZImage(Publishing, ModelAdapter):
    transformer_class = "ZImageTransformer2DModel"
    first_version = (0, 42)  # the first that takes attention keywords
    accepts = ("ZSingleStreamAttnProcessor",)
    text_first = False
    default_text_tokens = 512  # the maximum of its pipelines, which pad to a multiple of 32
    residuals = ("controlnet_block_samples",)

    def attention_layers(self, transformer: Any) -> dict[str, Any]:
        return {
            name: module
            for name, module in transformer.named_modules()
            if is_instance(module, ("Attention",)) and name.startswith(("noise_refiner.", "layers."))
        }

    def has_text(self, transformer: Any, layer: str) -> bool:
        return layer.startswith("layers.")

    def processor_class(self, layer: str) -> type[ClearAttnProcessor]:
        return ZImageProcessor if layer.startswith("layers.") else RefinerProcessor

    def project(self, attn: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Any]:
        unrotated = inputs._replace(image_rotary_emb=None)
        query, key, value = project(attn, unrotated, self.text_first, self.takes_fused(attn))
        rotary: Tensor | None = inputs.image_rotary_emb
        return *rotate_complex(query, key, None if rotary is None else rotary[:, None]), value, None

    def latents_per_token(self, transformer: Any) -> int:
        return int(transformer.all_patch_size[0])

    def inner_hooks(self, transformer: Any) -> list[InnerHook]:
        return [MethodHook(transformer, name_of_sequence_method(transformer), permute_sequence)]

    def image_input(self, kwargs: Mapping[str, Any]) -> Tensor:
        image: Tensor = kwargs["x"][0]
        return image

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        grid = _grid(kwargs)
        text, padding = self.padded(grid, max(len(caption) for caption in kwargs["cap_feats"]))
        image_tokens = grid[0] * grid[1]
        for residual in (kwargs.get("controlnet_block_samples") or {}).values():
            if residual.shape[1] != image_tokens + padding + text:
                raise ValueError(
                    f"controlnet_block_samples must have a residual for each of {image_tokens} image tokens, {padding} "
                    f"of padding and {text} of the longest caption, got {residual.shape[1]}; give the ControlNet the "
                    "image's own height and width, and the same captions"
                )
        return Call((grid,), padding + text, kwargs["x"][0].device, padding)

    def padded(self, grid: Grid, text_tokens: int) -> tuple[int, int]:
        return text_tokens + -text_tokens % MULTIPLE, -(grid[0] * grid[1]) % MULTIPLE

    def text_bias(self, kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        grid, captions = _grid(kwargs), kwargs["cap_feats"]
        lengths = [sum(self.padded(grid, len(caption))) for caption in captions]
        if len(set(lengths)) == 1:
            return None, None
        device = captions[0].device
        position = torch.arange(max(lengths), device=device)
        return torch.where(position < torch.tensor(lengths, device=device)[:, None], 0.0, HIDDEN), None

    def sigma(self, kwargs: Mapping[str, Any]) -> Tensor:
        timestep: Tensor = kwargs["t"]
        return 1 - timestep

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        residuals = kwargs.get("controlnet_block_samples")
        if residuals is None:
            return dict(kwargs)
        permuted = {block: _permute_rows(residual, layout) for block, residual in residuals.items()}
        return {**kwargs, "controlnet_block_samples": permuted}

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        return unpermute_patches(sample, layout)

    training = ZImageTraining()
    highres_pipelines = (
        HighresPipelines(
            "ZImagePipeline",
            "ZImageImg2ImgPipeline",
            batched_guidance=True,
            unguided=0,
            modular=("ZImageModularPipeline",),
        ),
    )
    architectures = (Architecture("z-image"),)

    def output_layer(self, transformer: Any) -> nn.Module | None:
        layers = list(transformer.all_final_layer.values())
        return layers[0] if len(layers) == 1 else None

    def rotary_embedding(self, transformer: Any) -> Any:
        return transformer.rope_embedder

    @contextlib.contextmanager
    def scaled_theta(self, transformer: Any, factor: float) -> Iterator[None]:
        # The embedding makes its table from theta in its first call, and again if it has none.
        embedding = transformer.rope_embedder
        before = embedding.freqs_cis
        with super().scaled_theta(transformer, factor):
            embedding.freqs_cis = None
            try:
                yield
            finally:
                embedding.freqs_cis = before

    def max_grid_side(self, transformer: Any) -> int | None:
        return min(transformer.axes_lens[1:])


def _grid(kwargs: Mapping[str, Any]) -> Grid:
    """Return the grid of a call's images.

    Raises:
        ValueError: there is none, or several.
    """
    images, captions = kwargs["x"], kwargs["cap_feats"]
    if not len(images) or len(images) != len(captions):
        raise ValueError(
            f"x and cap_feats must have a latent image and a caption for each image of the batch, got {len(images)} "
            f"and {len(captions)}; pass them as ZImagePipeline does"
        )
    if not isinstance(images[0], Tensor):
        raise ValueError(
            "x has lists of images, as ZImageOmniPipeline passes them, which a linearized model does not support; use "
            "ZImagePipeline, or clear_attn.restore() the model"
        )
    sizes = list(dict.fromkeys(tuple(image.shape[1:]) for image in images))
    if len(sizes) > 1:
        raise ValueError(
            f"x must have images of one size in a call, got frames, height and width {sizes} in latent pixels; draw "
            "images of different sizes in separate calls"
        )
    (frames, height, width), side = sizes[0], kwargs.get("patch_size", 2)
    if frames != kwargs.get("f_patch_size", 1) or height % side or width % side or not height * width:
        raise ValueError(
            f"x must have [channels, 1, height, width] for each image, with sides in multiples of {side}, got "
            f"{list(images[0].shape)}; give the image a height and width in multiples of 16 pixels"
        )
    return height // side, width // side


def _permute_rows(sequence: Tensor, layout: TokenLayout) -> Tensor:
    """Put the image tokens at the start of `[batch, tokens, ...]` into tile order."""
    image_tokens = sum(height * width for height, width in layout.grids)
    return torch.cat([sequence[:, layout.permutation], sequence[:, image_tokens:]], dim=1)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def permute_sequence(transformer: Any, arguments: Mapping[str, Any], result: Any) -> Any:
    """Put the image and its positions into tile order, in a `MethodHook` where the model has both as sequences."""
    context = current()
    if context is None or arguments["pad_token"] is not transformer.x_pad_token:
        return result
    tokens, positions, *rest = result
    return _permute_rows(tokens, context.layout), _permute_rows(positions, context.layout), *rest

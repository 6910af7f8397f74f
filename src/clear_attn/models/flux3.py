"""FLUX.3 in diffusers: layers of the text, the image and the references alone, then joint ones, text first.

References are an input of their own. The layers of the text alone keep their own processors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.core.layout import Images, TokenLayout
from clear_attn.models.adapter import Architecture, Call, ModelAdapter
from clear_attn.models.context.context_variable import PUBLISHED
from clear_attn.models.flux import image_ids
from clear_attn.models.flux2 import Flux2Training
from clear_attn.models.image_to_image import FromNoisedLatents, HighresPipelines
from clear_attn.models.parsing.position_ids import IdFormat, read_ids
from clear_attn.models.processors.processor import Inputs, rotate, split_heads
from clear_attn.models.processors.publishing import PublishedProcessor, Publishing

# The distance of neighboring rows and columns in the ids.
ROPE_SCALE = 0.5
# References have numbers of their own on the last axis.
IMAGE_IDS, REFERENCE_IDS = IdFormat("img_ids", 0, ROPE_SCALE), IdFormat("image_cond_ids", 3, ROPE_SCALE)
# The blocks of the pipeline that need a prompt.
TEXT_BLOCKS = "prompt_upsampler", "text_encoder"
IMAGE, REFERENCES = Images(0, 1), Images(1)


class Flux3Training(Flux2Training):
    """Train FLUX.3: the model attends to padded text, so all texts are padded to one length by the text encoder."""

    pipelines = ("Flux3ModularPipeline",)
    text_tokens = 80  # the pipeline pads to a multiple of it; its maximum is 8192

    def validate_model(self, transformer: Any) -> None:
        if transformer.config.flow_map:
            raise TypeError(
                "this Flux3Transformer2DModel is a flow map, which predicts jumps between two timesteps and cannot be "
                "distilled; give the model with flow_map=False that it was made from"
            )

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

        encoder = Flux3TextEncoderStep(pad_multiple=text_tokens).init_pipeline()
        encoder.update_components(text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
        texts = [
            encoder(prompt=prompt, max_sequence_length=text_tokens, output="prompt_embeds")  # one prompt per call
            for prompt in prompts
        ]
        return {"text": torch.cat(texts)}

    def drawing(self, pipe: Any) -> Any:
        """Return a pipeline with the same components, without the blocks that need a prompt."""
        blocks = pipe.blocks
        for name in TEXT_BLOCKS:
            blocks.sub_blocks.pop(name, None)
        drawing = blocks.init_pipeline()
        components = {name: getattr(pipe, name, None) for name in drawing.component_names}
        drawing.update_components(**{name: part for name, part in components.items() if part is not None})
        drawing.set_progress_bar_config(disable=True)
        return drawing

    def draw(self, pipe: Any, **arguments: Any) -> Any:
        drawing = self.drawing(pipe)
        given = {name: value for name, value in arguments.items() if name in drawing.blocks.input_names}
        return SimpleNamespace(images=drawing(**given, output="images"))

    def training_call(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        text_tokens = torch.arange(text["text"].shape[1], dtype=torch.float32, device=noisy.device)
        return {
            "hidden_states": self.pack(noisy),
            "encoder_hidden_states": text["text"],
            "timestep": sigma.to(noisy.dtype),
            "img_ids": F.pad(ROPE_SCALE * image_ids(noisy), (0, 1)),
            "txt_ids": F.pad(text_tokens[:, None], (3, 0)),
            "attention_kwargs": attention_kwargs,
        }


class Flux3Highres(FromNoisedLatents):
    """The pipelines of FLUX.3, which are this package's: diffusers has modular ones alone."""

    packages = ("clear_attn",)

    @property
    def supported(self) -> tuple[str, ...]:
        return self.modular

    def classes(self) -> tuple[Any, Any]:
        from clear_attn.models import flux3_pipeline

        cls = getattr(flux3_pipeline, self.text_to_image)
        return cls, cls

    def predictions(self, pipe: Any, guidance: float | None, options: Mapping[str, Any]) -> int:
        predictions: int = pipe.predictions(guidance or 0)
        return predictions

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2)


class Flux3Processor(PublishedProcessor):
    """The processor with FLUX.3's arguments."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        return self.run(attn, Inputs(hidden_states, None, attention_mask, image_rotary_emb), PUBLISHED)


class Flux3(Publishing, ModelAdapter):
    transformer_class = "Flux3Transformer2DModel"
    first_version = (0, 42)
    accepts = ("Flux3AttnProcessor",)
    text_first = True
    default_text_tokens = 80  # its pipeline pads to multiples of it
    keywords = "attention_kwargs"
    output_images = IMAGE
    activation_factor = 32  # its modulations have a row per token: measured 29

    def attention_layers(self, transformer: Any) -> dict[str, Any]:
        layers = super().attention_layers(transformer)
        return {name: attn for name, attn in layers.items() if not name.startswith("txt_mode_blocks.")}

    def has_text(self, transformer: Any, layer: str) -> bool:
        return layer.startswith("single_transformer_blocks.")

    def images_of(self, transformer: Any, layer: str) -> Images:
        if layer.startswith("mode_blocks.image."):
            return IMAGE
        return REFERENCES if layer.startswith("mode_blocks.image_cond.") else Images()

    def processor_class(self, layer: str) -> type[PublishedProcessor]:
        return Flux3Processor

    def project(self, attn: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Any]:
        x = inputs.hidden_states
        fused = self.takes_fused(attn)
        parts = attn.to_qkv(x).chunk(3, dim=-1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        query, key, value = (split_heads(part, attn.head_dim) for part in parts)
        # Norms and rotary embedding are in float32, with a single rounding after them.
        query, key = rotate(attn.norm_q(query.float()), attn.norm_k(key.float()), inputs.image_rotary_emb)
        query, key, value = (part.to(value.dtype).transpose(1, 2) for part in (query, key, value))
        return query, key, value, None

    def latents_per_token(self, transformer: Any) -> int:
        return 2  # as the pipeline packs latents

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        grids = self._grids(kwargs, "hidden_states", IMAGE_IDS)
        if len(grids) > 1:
            raise ValueError(
                f"img_ids must number one image, got images of {grids}; give references as image_cond_hidden_states "
                "and image_cond_ids"
            )
        if kwargs.get("image_cond_hidden_states") is not None and kwargs.get("image_cond_ids") is not None:
            grids = *grids, *self._grids(kwargs, "image_cond_hidden_states", REFERENCE_IDS)
        return Call(grids, kwargs["encoder_hidden_states"].shape[1], kwargs["hidden_states"].device)

    def _grids(self, kwargs: Mapping[str, Any], tokens: str, ids: IdFormat) -> tuple[tuple[int, int], ...]:
        """Return the grids of one kind of images.

        Raises:
            ValueError: the number of tokens is not that of the ids.
        """
        grids = read_ids(kwargs[ids.name], ids).grids
        numbered, given = sum(math.prod(grid) for grid in grids), kwargs[tokens].shape[1]
        if given != numbered:
            raise ValueError(
                f"{ids.name} has {numbered} tokens, {tokens} has {given}; give each token a row in {ids.name}"
            )
        return grids

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        permuted = dict(kwargs)
        for images, tokens, ids in (
            (IMAGE, "hidden_states", IMAGE_IDS),
            (REFERENCES, "image_cond_hidden_states", REFERENCE_IDS),
        ):
            if (part := layout.of_images(images)) is not None:
                exact = read_ids(kwargs[ids.name], ids).exact
                positions = kwargs[ids.name] if exact is None else exact
                permuted[tokens] = kwargs[tokens][:, part.permutation]
                permuted[ids.name] = positions[part.permutation]
        return permuted

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        image: Any = layout.of_images(IMAGE)
        return sample[:, image.inverse_permutation]

    training = Flux3Training()
    highres_pipelines: tuple[HighresPipelines, ...] = (
        Flux3Highres("Flux3Pipeline", training, modular=("Flux3ModularPipeline",)),
        Flux3Highres("Flux3DistilledPipeline", training, modular=("Flux3DistilledModularPipeline",)),
    )
    architectures: tuple[Architecture, ...] = (Architecture("flux3"),)

    def rotary_embedding(self, transformer: Any) -> Any:
        return transformer.pos_embed

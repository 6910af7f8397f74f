"""FLUX.2 in diffusers: like FLUX.1, with ids on four axes, and single blocks with one joint projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, cat

from clear_attn.models.adapter import Architecture, Call
from clear_attn.models.context.context import ClearContext
from clear_attn.models.flux import Flux, FluxTraining, image_ids
from clear_attn.models.image_to_image import FromNoisedLatents
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs, normalize, rotate, split_heads

KLEIN_4B = {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B = {
    **KLEIN_4B,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}


class Flux2Training(FluxTraining):
    """Train FLUX.2: its pipelines normalize 2 x 2 patches of latents, and text tokens have ids on a fourth axis."""

    pipelines: tuple[str, ...] = ("Flux2Pipeline", "Flux2KleinPipeline")
    negative_prompt = ""

    def embeds_guidance(self, transformer: Any) -> bool:
        # diffusers 0.36 has no such entry, and always embeds it.
        return bool(transformer.config.get("guidance_embeds", True))

    def encode_image(self, pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        vae = pipe.vae
        moments = vae.encode(pixels).latent_dist
        center, variance = (x.view(1, -1, 1, 1).to(pixels) for x in (vae.bn.running_mean, vae.bn.running_var))
        scale = torch.sqrt(variance + vae.config.batch_norm_eps)
        mean, std = (F.pixel_unshuffle(x, 2) for x in (moments.mean, moments.std))
        return F.pixel_shuffle((mean - center) / scale, 2), F.pixel_shuffle(std / scale, 2)

    def encode_prompts(self, pipe: Any, prompts: list[str], text_tokens: int) -> dict[str, Tensor]:
        text, _ = pipe.encode_prompt(prompts, device=pipe.vae.device, max_sequence_length=text_tokens)
        return {"text": text}

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
            "guidance": None if guidance is None else torch.full_like(sigma, guidance, dtype=noisy.dtype),
            "img_ids": F.pad(image_ids(noisy), (0, 1)),
            "txt_ids": F.pad(text_tokens[:, None], (3, 0)),
            "joint_attention_kwargs": attention_kwargs,
        }


def dynamic_shift(tokens: int, steps: int) -> float:
    """Return the `mu` that the pipelines compute for their scheduler."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return float(compute_empirical_mu(tokens, steps))


class Flux2Highres(FromNoisedLatents):
    """The pipelines of FLUX.2, which has no image-to-image pipeline.

    A FLUX.2 klein that is not distilled predicts twice; all others take the guidance scale as an input or ignore it.
    """

    def predictions(self, pipe: Any, guidance: float | None, options: Mapping[str, Any]) -> int:
        return 1 if pipe.config.get("is_distilled", True) else super().predictions(pipe, guidance, options)

    def dynamic_shift(self, pipe: Any, tokens: int, steps: int) -> float:
        return dynamic_shift(tokens, steps)

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2)


class ParallelProcessor(ClearAttnProcessor):
    """The processor of a layer with one projection for query, key, value and the feed-forward network's input."""

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_context: ClearContext | None = None,
    ) -> Any:
        return self.run(attn, Inputs(hidden_states, None, attention_mask, image_rotary_emb), clear_context)


class Flux2(Flux):
    transformer_class = "Flux2Transformer2DModel"
    accepts = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")
    residuals = ()
    ip_adapter_processors = ()
    takes_scale = False
    activation_factor = 24  # its feed-forward networks are gated

    def timestep_settings(self, pipe: Any, tokens: int, steps: int) -> dict[str, Any]:
        return {**super().timestep_settings(pipe, tokens, steps), "mu": dynamic_shift(tokens, steps)}

    def processor_class(self, layer: str) -> type[ClearAttnProcessor]:
        return ParallelProcessor if layer.startswith("single_") else ClearAttnProcessor

    def project(self, attn: Any, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Any]:
        if not hasattr(attn, "to_qkv_mlp_proj"):
            return super().project(attn, inputs)
        *parts, feed_forward = attn.to_qkv_mlp_proj(inputs.hidden_states).split(
            [*3 * [attn.inner_dim], attn.mlp_hidden_dim * attn.mlp_mult_factor], dim=-1
        )
        query, key, value = (split_heads(part, attn.inner_dim // attn.heads) for part in parts)
        query, key = rotate(*normalize(attn, query, key, ("norm_q", "norm_k")), inputs.image_rotary_emb)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), feed_forward

    def project_out(self, attn: Any, joint: Tensor, inputs: Inputs, rest: Any) -> Any:
        if rest is None:
            return super().project_out(attn, joint, inputs, rest)
        return attn.to_out(cat([joint, attn.mlp_act_fn(rest)], dim=-1))

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        if kwargs.get("kv_cache_mode") is not None:
            raise ValueError(
                f"kv_cache_mode={kwargs['kv_cache_mode']!r} caches the keys of reference images between steps, which "
                "a linearized model does not support; use Flux2KleinPipeline instead of Flux2KleinKVPipeline, or "
                "clear_attn.restore() the model"
            )
        return super().parse_call(transformer, kwargs)

    training = Flux2Training()
    highres_pipelines = (
        Flux2Highres("Flux2Pipeline", training, modular=("Flux2ModularPipeline",)),
        Flux2Highres(
            "Flux2KleinPipeline",
            training,
            modular=("Flux2KleinModularPipeline", "Flux2KleinBaseModularPipeline"),
        ),
    )
    architectures = (
        Architecture("flux2"),
        Architecture("flux2-klein-4b", KLEIN_4B, first_version=(0, 37)),
        Architecture("flux2-klein-9b", KLEIN_9B, first_version=(0, 37)),
    )

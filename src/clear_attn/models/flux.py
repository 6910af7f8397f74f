"""FLUX.1 in diffusers: text first, positions in `img_ids`, a reference picture as a second segment (Kontext)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from torch import Tensor

from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout
from clear_attn.methods import Layer, Method
from clear_attn.models.adapter import Call, ModelAdapter
from clear_attn.models.context import ClearContext
from clear_attn.models.dense_attention import dense_attention
from clear_attn.models.processors import ClearAttnProcessor, Inputs
from clear_attn.models.tensor_cache import ReadOnce


class IPAdapterProcessor(FluxIPAdapterAttnProcessor, ClearAttnProcessor):
    """Adds each image token's attention to the few tokens of an IP-Adapter.

    It has the original processor's own projections, and is one of its kind to diffusers: `set_ip_adapter_scale` and
    `unload_ip_adapter` find it by its class.
    """

    layer_settings = (*ClearAttnProcessor.layer_settings, "scale")
    scale: Any
    to_k_ip: Any
    to_v_ip: Any

    def __init__(self, *args: Any) -> None:
        ClearAttnProcessor.__init__(self, *args)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_context: ClearContext | None = None,
        ip_hidden_states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = Inputs(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        image, text = self.run(attn, inputs, clear_context)
        # Projected again: here the query is taken without its position.
        fused = self.adapter.takes_fused(attn)
        query = attn.to_qkv(hidden_states).chunk(3, dim=-1)[0] if fused else attn.to_q(hidden_states)
        query = attn.norm_q(query.unflatten(-1, (attn.heads, -1))).transpose(1, 2)
        dense, adapted = dense_attention(self.attention_backend), torch.zeros_like(image)
        for tokens, scale, to_key, to_value in zip(
            ip_hidden_states or (), self.scale, self.to_k_ip, self.to_v_ip, strict=True
        ):
            # Several images may be apart in a dimension of their own.
            parts = (to(tokens).reshape(len(image), -1, *query.shape[1::2]) for to in (to_key, to_value))
            key, value = (part.transpose(1, 2) for part in parts)
            attended = dense(query, key, value, query.shape[-1] ** -0.5, None)
            adapted = adapted + scale * attended.transpose(1, 2).flatten(2, 3)
        return image, text, adapted


class Flux(ModelAdapter):
    transformer_class = FluxTransformer2DModel
    accepts: tuple[type, ...] = (FluxAttnProcessor,)
    ip_adapter_processors: tuple[type, ...] = (FluxIPAdapterAttnProcessor,)
    text_first = True
    default_text_tokens = 512
    takes_scale = True
    residuals: tuple[str, ...] = ("controlnet_block_samples", "controlnet_single_block_samples")

    def make_processor(self, original: Any, method: Method, layer: Layer, group: int) -> ClearAttnProcessor:
        if not isinstance(original, FluxIPAdapterAttnProcessor):
            return super().make_processor(original, method, layer, group)
        processor = IPAdapterProcessor(self, method, layer, group)
        processor.scale = original.scale
        processor.to_k_ip, processor.to_v_ip = original.to_k_ip, original.to_v_ip
        return processor

    def latents_per_token(self, transformer: Any) -> int:
        return 2  # the pipelines pack them so

    def parse_call(self, transformer: Any, kwargs: Mapping[str, Any]) -> Call:
        hidden_states, text = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        if kwargs.get("img_ids") is None:
            raise ValueError("img_ids must tell where the image tokens stand, got None; pass them as the pipeline does")
        grids = _read_ids(kwargs["img_ids"]).grids
        tokens = sum(height * width for height, width in grids)
        if hidden_states.shape[1] != tokens:
            raise ValueError(
                f"img_ids place {tokens} image tokens, hidden_states has {hidden_states.shape[1]}; give "
                "each image token its row in img_ids"
            )
        self.check_residuals(kwargs, tokens)
        return Call(grids, text.shape[1], hidden_states.device)

    def permute_inputs(self, kwargs: Mapping[str, Any], layout: TokenLayout) -> dict[str, Any]:
        ids = kwargs["img_ids"]
        exact = _read_ids(ids).exact
        ids = (ids[0] if ids.ndim == 3 else ids) if exact is None else exact
        return {
            **self.permute_residuals(kwargs, layout),
            "hidden_states": kwargs["hidden_states"][:, layout.permutation],
            "img_ids": ids[layout.permutation],
        }

    def unpermute_output(self, sample: Tensor, layout: TokenLayout) -> Tensor:
        return sample[:, layout.inverse_permutation]


class _Positions(NamedTuple):
    """What `img_ids` say: the grids, and the same ids in float32 where theirs is too coarse for integers."""

    grids: tuple[Grid, ...]
    exact: Tensor | None


def _parse_ids(ids: Tensor) -> _Positions:
    if ids.ndim not in (2, 3) or ids.shape[-1] < 3 or ids.numel() == 0:
        raise ValueError(
            f"img_ids must be [image tokens, 3 or more], the picture's number, row, column, got {list(ids.shape)}; "
            "pass them as diffusers' pipeline does"
        )
    values = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float32)
    _, lengths = torch.unique_consecutive(values[:, 0], return_counts=True)
    grids, regular = [], []
    for part in values.split(lengths.tolist()):
        # The first row's number is nobody else's, also where bfloat16 makes others collide.
        width = int((part[:, 1] == part[0, 1]).sum())
        height = len(part) // width
        rows, columns = part[::width, 1], part[:width, 2]
        others = part[:1, 3:].expand(len(part), -1)
        if not (torch.equal(part[:, 1:3], torch.cartesian_prod(rows, columns)) and torch.equal(part[:, 3:], others)):
            raise ValueError(
                f"img_ids must number the tokens of each picture row by row; {len(part)} of them with the first "
                f"number {part[0, 0].item():g} are no grid of {width} columns; pass them as diffusers' pipeline does"
            )
        grids.append((height, width))
        counted = torch.cartesian_prod(*(torch.arange(len(line), device="cpu") + line[0] for line in (rows, columns)))
        regular.append(torch.cat([part[:, :1], counted, others], dim=1))
    exact = torch.cat(regular)
    # Counted anew only where that is what the coarser numbers stand for; positions of another kind are left alone.
    counts = ids.dtype in (torch.bfloat16, torch.float16) and torch.equal(exact.to(ids.dtype).float(), values)
    return _Positions(tuple(grids), exact.to(ids.device) if counts else None)


_read_ids = ReadOnce(_parse_ids)

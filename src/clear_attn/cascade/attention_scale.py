"""Proportional attention: scores sharpened where there are more tokens than a model was trained on."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from clear_attn.models import ModelAdapter
from clear_attn.models.class_names import is_exactly
from clear_attn.models.processors import SHARPNESS, project, project_out
from clear_attn.patching.linearization import find_transformer
from clear_attn.patching.state import door_of, processors_of

# FLUX.1's at 1024 x 1024 px: image tokens and text tokens.
TRAINED_TOKENS = 64 * 64 + 512

PipelineOrTransformer = TypeVar("PipelineOrTransformer")


def sharpness(tokens: int, down_factor: int = 1) -> float:
    """By what the scale of the scores, head_dim^-0.5, is multiplied: sqrt(log(n) / log(4608)).

    From CLEAR's published high-resolution run: n is the number of text and image tokens, and ten times that with
    pooled keys. It keeps the entropy of attention about as it was at 64 x 64 + 512 tokens (arXiv 2306.08645).

    Args:
        tokens: text and image tokens, at least 1.
        down_factor: side of the pooled cells; 1 for none.
    """
    return math.sqrt(math.log(tokens * (10 if down_factor > 1 else 1)) / math.log(TRAINED_TOKENS))


@contextlib.contextmanager
def proportional_attention(pipe: PipelineOrTransformer) -> Iterator[PipelineOrTransformer]:
    """Proportional attention for the length of a `with` block, as `sharpness` says for each call, alike in all layers.

    Args:
        pipe: a supported pipeline or transformer, linearized or not; no ControlNet.

    Raises:
        TypeError: not a supported pipeline, or a ControlNet or Chroma.
        RuntimeError: attention processors of another library, or such that take no scale; layers other than FLUX.1's
            and SD3's, unless linearized; when called, also where the processors were replaced inside the block.
    """
    transformer, family = find_transformer(pipe)
    if type(family).publish is not ModelAdapter.publish:
        raise TypeError(
            f"proportional attention cannot tell the layers of a {type(transformer).__name__}; give the pipeline or "
            "its transformer, of FLUX or Stable Diffusion 3"
        )
    layers = family.attention_layers(transformer)
    before = processors_of(layers)
    _check_processors(before, family)
    for layer, attn in layers.items():
        if is_exactly(before[layer], family.accepts):
            attn.set_processor(_DenseProcessor(before[layer], family, layer))
    # First, so that it reads what the caller gave.
    handle = transformer.register_forward_pre_hook(_Sharpen(family), with_kwargs=True, prepend=True)
    try:
        yield pipe
    finally:
        handle.remove()
        for layer, attn in layers.items():
            if isinstance(attn.get_processor(), _DenseProcessor):
                attn.set_processor(before[layer])


class _Sharpen:
    """A forward pre-hook with keywords: tells the layers of a call by what to multiply their scale."""

    def __init__(self, family: ModelAdapter) -> None:
        self.family = family

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        for layer, processor in processors_of(self.family.attention_layers(transformer)).items():
            _check_takes_sharpness(layer, processor)
        call = inspect.signature(transformer.forward).bind(*args, **kwargs).arguments
        grids, text_tokens, _ = self.family.parse_call(transformer, call)
        door = door_of(transformer)
        config = door.config_of(call) if door else None
        tokens = text_tokens + sum(height * width for height, width in grids)
        own = {SHARPNESS: sharpness(tokens, config.down_factor if config else 1)}
        return (), {**call, self.family.keywords: {**(call.get(self.family.keywords) or {}), **own}}


class _Places(NamedTuple):
    image: slice
    text: slice


class _DenseProcessor:
    """Stands in for diffusers' own processors of FLUX and SD3, which take no scale."""

    def __init__(self, stock: Any, family: ModelAdapter, layer: str) -> None:
        self._attention_backend: AttentionBackendName | None = getattr(stock, "_attention_backend", None)
        self._parallel_config = getattr(stock, "_parallel_config", None)
        self.text_first = family.text_first
        self.fused_qkv_reliable = family.fused_qkv_reliable

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_sharpness: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        fused = self.fused_qkv_reliable and bool(attn.fused_projections)
        query, key, value = project(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb, self.text_first, fused
        )
        joint = dispatch_attention_fn(
            *(x.transpose(1, 2) for x in (query, key, value)),
            attn_mask=attention_mask,
            scale=clear_sharpness * query.shape[-1] ** -0.5,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        image, text = hidden_states.shape[1], 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        first = text if self.text_first else 0
        after = 0 if self.text_first else image
        places = _Places(slice(first, first + image), slice(after, after + text))
        return project_out(attn, joint.flatten(2, 3), encoder_hidden_states is not None, places)


def _check_processors(processors: dict[str, Any], family: ModelAdapter) -> None:
    for layer, processor in processors.items():
        if not is_exactly(processor, family.accepts):
            _check_takes_sharpness(layer, processor)
        elif not family.only_attends:
            raise RuntimeError(
                f"{layer} has a {type(processor).__name__}, in whose place proportional attention has none for dense "
                "attention; call clear_attn.linearize() first"
            )


def _check_takes_sharpness(layer: str, processor: Any) -> None:
    if SHARPNESS not in inspect.signature(type(processor).__call__).parameters:
        raise RuntimeError(
            f"{layer} has a {type(processor).__name__}, whose scores proportional attention cannot scale; put one of "
            "diffusers or of CLEAR in its place before the block, and leave it there until the end"
        )

"""`proportional_attention`: scale scores up for more tokens than a model was trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from clear_attn.methods.method import proportional_scale
from clear_attn.models import ModelAdapter
from clear_attn.models._diffusers import attention_backend_of, parallel_config_of
from clear_attn.models.class_names import is_exactly
from clear_attn.models.context.context import SCALE_MULTIPLIER
from clear_attn.models.processors.processor import ClearAttnProcessor, Inputs
from clear_attn.patching.target import PipelineOrTransformer, entry_hook_of, find_transformer, processors_of


@contextlib.contextmanager
def proportional_attention(pipe: PipelineOrTransformer) -> Iterator[PipelineOrTransformer]:
    """Multiply the scale of the scores in all attention layers for the length of a `with` block.

    As in CLEAR's published high-resolution run, the multiplier is sqrt(log(n) / log(4608)) for a call with n text and
    image tokens, and ten times that with pooled keys. It roughly keeps the entropy that attention has at 64 x 64 + 512
    tokens (arXiv 2306.08645).

    Args:
        pipe: a supported pipeline or transformer, linearized or not.

    Raises:
        TypeError: the pipeline is not supported.
        RuntimeError: attention processors are of another library, or of a method without scores; dense layers are not
            of FLUX.1 or SD3; during a call, also if processors were replaced inside the block.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline(), window=4, weights=None)
        >>> with proportional_attention(pipe):
        ...     image = pipe("a red circle", num_inference_steps=1).images[0]
    """
    transformer, adapter = find_transformer(pipe)
    layers = adapter.attention_layers(transformer)
    before = processors_of(layers)
    _check_processors(before, adapter)
    for layer, attn in layers.items():
        if is_exactly(before[layer], adapter.accepts):
            attn.set_processor(_DenseProcessor(before[layer], adapter))
    # Before other hooks, so that it gets the caller's own arguments.
    handle = transformer.register_forward_pre_hook(_ScaleHook(adapter), with_kwargs=True, prepend=True)
    try:
        yield pipe
    finally:
        handle.remove()
        for layer, attn in layers.items():
            if isinstance(attn.get_processor(), _DenseProcessor):
                attn.set_processor(before[layer])


class _ScaleHook:
    """A forward pre-hook that adds the multiplier to a call's attention keywords."""

    def __init__(self, adapter: ModelAdapter) -> None:
        self.adapter = adapter

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        for layer, processor in processors_of(self.adapter.attention_layers(transformer)).items():
            _check_takes_scale(layer, processor)
        call = self.adapter.bind_call(transformer, args, kwargs)
        parsed = self.adapter.parse_call(transformer, call)
        tokens = parsed.text_tokens + sum(height * width for height, width in parsed.grids)
        hook = entry_hook_of(transformer)
        multiplier = hook.method_of(call).scale_multiplier(tokens) if hook else proportional_scale(tokens)
        keywords = {**(call.get(self.adapter.keywords) or {}), SCALE_MULTIPLIER: multiplier}
        return (), {**call, self.adapter.keywords: keywords}


class _DenseProcessor:
    """Replace diffusers' processors of FLUX and SD3, which take no scale."""

    def __init__(self, original: Any, adapter: ModelAdapter) -> None:
        self._attention_backend = attention_backend_of(original)
        self._parallel_config = parallel_config_of(original)
        self.adapter = adapter

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_scale_multiplier: float = 1.0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        inputs = Inputs(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        query, key, value, rest = self.adapter.project(attn, inputs)
        joint = dispatch_attention_fn(
            *(x.transpose(1, 2) for x in (query, key, value)),
            attn_mask=attention_mask,
            scale=clear_scale_multiplier * query.shape[-1] ** -0.5,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        output: Tensor | tuple[Tensor, Tensor] = self.adapter.project_out(attn, joint.flatten(2, 3), inputs, rest)
        return output


def _check_processors(processors: dict[str, Any], adapter: ModelAdapter) -> None:
    for layer, processor in processors.items():
        if not is_exactly(processor, adapter.accepts):
            _check_takes_scale(layer, processor)
        elif not adapter.takes_scale:
            raise RuntimeError(
                f"{layer} has a {type(processor).__name__}, whose scores proportional attention cannot scale while it "
                "is dense; call clear_attn.linearize() first"
            )


def _check_takes_scale(layer: str, processor: Any) -> None:
    if not isinstance(processor, (ClearAttnProcessor, _DenseProcessor)):
        raise RuntimeError(
            f"{layer} has a {type(processor).__name__}, whose scores proportional attention cannot scale; set a "
            "processor of diffusers or clear_attn before the block, and keep it until the end"
        )

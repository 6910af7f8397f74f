"""The attention processor of linearized layers, which combines an adapter's projections with a method's attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clear_attn.methods import Layer, Method
from clear_attn.models.context.context import ClearContext


class Inputs(NamedTuple):
    """The arguments with which diffusers' layers call a processor, and `rest`, those of one model's layers alone."""

    hidden_states: Tensor
    encoder_hidden_states: Tensor | None = None
    attention_mask: Tensor | None = None
    image_rotary_emb: Any = None
    rest: Any = None


class ClearAttnProcessor(nn.Module):
    """Compute the attention of one layer of a linearized transformer with any method.

    `linearize` creates the processors. A layer calls its processor as it calls diffusers' own, with hidden states
    `[batch, tokens, channels]`. The entry hook of a linearized transformer adds the `clear_context` argument. A
    subclass only adapts the signature of `__call__` to another model's layers.

    The processor is a module because it has parameters. They are used in `forward` alone, so that offloading hooks
    fire.

    Args:
        adapter: the adapter of the model.
        method: the method of the linearized layers, which a schedule may replace in a call.
        layer: the properties of the layer.
        group: the number of the layer's group in a context.

    Raises:
        RuntimeError: when called without a context, with an attention mask, or under diffusers' context parallelism.

    Examples:
        >>> import clear_attn as clear
        >>> from clear_attn import demo
        >>> pipe = clear.linearize(demo.pipeline(), window=4, weights=None)
        >>> processors = pipe.transformer.attn_processors.values()
        >>> all(isinstance(processor, clear.ClearAttnProcessor) for processor in processors)
        True
    """

    # Settings that users make on a processor; the one that replaces it takes them over.
    layer_settings: tuple[str, ...] = ("_attention_backend", "_parallel_config")
    # The layer's method by the schedule, in words.
    description: str = ""
    # diffusers' set_attention_backend and enable_parallelism look for these attributes.
    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(
        self, adapter: Any = None, method: Method | None = None, layer: Layer | None = None, group: int = 0
    ) -> None:
        super().__init__()
        self.adapter, self.method, self.layer, self.group = adapter, method, layer, group
        initial = method.parameters_for(layer) if method and layer else {}
        self._names = tuple(initial)
        for name, value in initial.items():
            self.register_parameter(name, nn.Parameter(value))

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_context: ClearContext | None = None,
    ) -> Any:
        inputs = Inputs(hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.run(attn, inputs, clear_context)

    def run(self, attn: Any, inputs: Inputs, context: Any) -> Any:
        """Return the layer's output: project, attend, project out."""
        context = self.validate_call(inputs, context)
        query, key, value, rest = self.adapter.project(attn, inputs)
        joint = self.as_module(query, key, value, context)
        return self.adapter.project_out(attn, joint, inputs, rest)

    def as_module(self, *args: Any) -> Tensor:
        """Call `forward` with its hooks, since `__call__` has diffusers' signature."""
        output: Tensor = super().__call__(*args)
        return output

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: ClearContext) -> Tensor:
        """Return the layer's attention output, `[batch, tokens, heads x head_dim]`."""
        parameters = [getattr(self, name) for name in self._names]
        return context.attend(self.group, query, key, value, parameters, self._attention_backend)

    def extra_repr(self) -> str:
        return self.description or (repr(self.method) if self.method else "")

    def validate_call(self, inputs: Inputs, context: Any) -> Any:
        """Return the context, or raise RuntimeError for a call that is not supported."""
        # Read the layer's name only for errors: a compiled block that reads it is recompiled for each layer.
        if context is None or self.adapter is None:
            raise RuntimeError(
                f"{self._where} was called without a context: call the linearized transformer, not its blocks; if its "
                "hooks were removed, load the model again"
            )
        if inputs.attention_mask is not None:
            raise RuntimeError(
                f"{self._where} takes no attention mask, got one of shape {list(inputs.attention_mask.shape)}; leave "
                "it out of joint_attention_kwargs, or clear_attn.restore() the model"
            )
        if self._parallel_config is not None:
            raise RuntimeError(
                f"{self._where} does not work under diffusers' context parallelism; leave it switched off"
            )
        return context

    @property
    def attention_backend(self) -> Any:
        """The attention backend of diffusers that the user set on this layer, or None."""
        return self._attention_backend

    @property
    def _where(self) -> str:
        return f"{type(self).__name__} at {self.layer.name if self.layer else 'an unnamed layer'}"


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Reshape `[batch, tokens, heads x head_dim]` to `[batch, tokens, heads, head_dim]`."""
    return x.unflatten(-1, (-1, head_dim))


def normalize(attn: Any, query: Tensor, key: Tensor, norms: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Return query and key after the layer's norms, if it has them."""
    norm_query, norm_key = (getattr(attn, norm, None) for norm in norms)
    return norm_query(query) if norm_query else query, norm_key(key) if norm_key else key


def _project_stream(
    attn: Any, x: Tensor, names: tuple[str, str, str], fused: str | None, norms: tuple[str, str]
) -> list[Tensor]:
    parts = getattr(attn, fused)(x).chunk(3, dim=-1) if fused else [getattr(attn, name)(x) for name in names]
    query, key, value = (split_heads(part, attn.inner_dim // attn.heads) for part in parts)
    return [*normalize(attn, query, key, norms), value]


def project(attn: Any, inputs: Inputs, text_first: bool, fused: bool) -> list[Tensor]:
    """Return query, key and value `[batch, heads, tokens, head_dim]`, as FLUX's and SD3's own processors do.

    A layer gets one sequence, or text and image separately, which are then joined in the model's order.

    Args:
        attn: the layer.
        inputs: the inputs of its processor.
        text_first: the order in which text and image are joined.
        fused: whether query, key and value come from one fused projection.
    """
    names, norms = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")
    streams = [_project_stream(attn, inputs.hidden_states, names, "to_qkv" if fused else None, norms)]
    if inputs.encoder_hidden_states is not None:
        names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        text = _project_stream(attn, inputs.encoder_hidden_states, names, "to_added_qkv" if fused else None, norms)
        streams.insert(0 if text_first else 1, text)
    query, key, value = (torch.cat(each, dim=1) if len(each) > 1 else each[0] for each in zip(*streams, strict=True))
    query, key = rotate(query, key, inputs.image_rotary_emb)
    return [x.transpose(1, 2) for x in (query, key, value)]


def rotate(query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Apply the rotary embedding to query and key `[batch, tokens, heads, head_dim]`."""
    if rotary is None:
        return query, key
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(query, rotary, sequence_dim=1), apply_rotary_emb(key, rotary, sequence_dim=1)


def rotate_complex(query: Tensor, key: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    """Apply a complex rotary embedding that broadcasts to `[batch, heads, tokens, head_dim / 2]` of query and key."""
    if rotary is None:
        return query, key

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * rotary).flatten(3).type_as(x)

    with torch.autocast("cuda", enabled=False):
        return rotate(query), rotate(key)


def project_out(attn: Any, joint: Tensor, inputs: Inputs, text_first: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Return the layer's output, image and text separately if the layer got them separately.

    Args:
        attn: the layer.
        joint: the attention output, `[batch, tokens, heads x head_dim]`.
        inputs: the inputs of its processor.
        text_first: the order in which text and image are joined.
    """
    text_tokens = 0 if inputs.encoder_hidden_states is None else inputs.encoder_hidden_states.shape[1]
    split = text_tokens if text_first else joint.shape[1] - text_tokens
    first, second = joint[:, :split], joint[:, split:]
    text, image = (first, second) if text_first else (second, first)
    if getattr(attn, "to_out", None) is not None:
        image = attn.to_out[1](attn.to_out[0](image))
    if inputs.encoder_hidden_states is None:
        return image
    return image, text if getattr(attn, "context_pre_only", False) else attn.to_add_out(text)

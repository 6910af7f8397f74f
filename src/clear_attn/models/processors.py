"""The attention processors that stand in for diffusers' own, and how they project query, key and value."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from clear_attn.backends.attention import clear_attention, pool
from clear_attn.core.layout import TokenLayout
from clear_attn.models.padding import Padding, widen
from clear_attn.utils.validation import ClearConfig, Config

# The keywords beyond diffusers' own that a processor takes.
LAYOUT, BACKEND, SHARPNESS, PADDING = "clear_layout", "clear_backend", "clear_sharpness", "clear_padding"


class AttnProcessor(nn.Module, abc.ABC):
    """Attention of one layer of a linearized transformer, CLEAR's or another.

    It is called by the layer as diffusers calls its own processors; what it needs beyond that, the layout and the
    backend, arrives in the model's `joint_attention_kwargs` as `clear_layout` and `clear_backend`, which the door
    of a linearized transformer adds. `clear_sharpness` there multiplies the usual scale of the scores, and
    `clear_padding` tells of padding in the text.

    It is a module for the sake of its own parameters, so calling it as a module means what they do, its `forward`,
    and calling it as diffusers does means attention: offloading hooks wrap the former, and only the former touches
    the parameters.

    Args:
        layer (`str`, defaults to `""`): the layer's name, for errors.

    Raises:
        RuntimeError: when called without a layout, with an attention mask, or under diffusers' context
            parallelism.
    """

    # Where its window differs from the layout's: see `Schedule.window_of`.
    own_window: float | None = None
    # Whether a layer that calls itself fused may be believed: see `ModelAdapter.fused_qkv_reliable`.
    fused_qkv_reliable: bool = True
    # What a user set on a layer's processor, and the next one there takes over.
    of_the_layer: tuple[str, ...] = ("_attention_backend", "_parallel_config")
    # Declared, so that diffusers' set_attention_backend and enable_parallelism find them here.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config: Any = None

    def __init__(self, layer: str = "") -> None:
        super().__init__()
        self.layer = layer

    @abc.abstractmethod
    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        backend: str,
        sharpness: float = 1.0,
        padding: Padding | None = None,
    ) -> Tensor:
        """Attention of text and image, joined as the layout says: `[batch, tokens, heads x head_dim]`.

        Of query, key and value `[batch, heads, tokens, head_dim]`.
        """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        clear_layout: TokenLayout | None = None,
        clear_backend: str = "auto",
        clear_sharpness: float = 1.0,
        clear_padding: Padding | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        layout = self.layout_for(attention_mask, clear_layout, hidden_states, encoder_hidden_states)
        query, key, value = project(
            attn, hidden_states, encoder_hidden_states, image_rotary_emb, layout.text_first, self.takes_fused(attn)
        )
        joint = self.attend(query, key, value, layout, clear_backend, clear_sharpness, clear_padding)
        return project_out(attn, joint, encoder_hidden_states is not None, layout)

    def as_module(self, *args: Any) -> Tensor:
        """Calls `forward`, and the hooks on it."""
        output: Tensor = super().__call__(*args)
        return output

    def layout_for(
        self,
        attention_mask: Tensor | None,
        layout: TokenLayout | None,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
    ) -> TokenLayout:
        """The layout of this layer's tokens, all that a call brings checked."""
        layout = self._check(attention_mask, layout).within(self.own_window)
        alone = hidden_states.shape[1] == layout.image_tokens and encoder_hidden_states is None
        return layout.without_text if alone else layout

    @abc.abstractmethod
    def fits(self, config: Config) -> bool:
        """Whether a layout with this config, which is not None, is for this processor."""

    def takes_fused(self, attn: Any) -> bool:
        """Whether query, key and value come from one fused projection."""
        return self.fused_qkv_reliable and bool(attn.fused_projections)

    @property
    def _where(self) -> str:
        return f"{type(self).__name__} at {self.layer or 'an unnamed layer'}"

    def _check(self, attention_mask: Tensor | None, layout: TokenLayout | None) -> TokenLayout:
        # The layer's name is read only where it is needed: a compiled block that reads it is compiled anew for each.
        if layout is None:
            raise RuntimeError(
                f"{self._where} was called without a layout: call the linearized transformer, not its blocks; if its "
                "hooks were removed, load the model anew"
            )
        if attention_mask is not None:
            raise RuntimeError(
                f"{self._where} takes no attention mask, got one of shape {list(attention_mask.shape)}; leave it out "
                "of joint_attention_kwargs, or clear_attn.restore() the model"
            )
        if self._parallel_config is not None:
            raise RuntimeError(
                f"{self._where} does not work under diffusers' context parallelism; leave it switched off"
            )
        if layout.config is not None and not self.fits(layout.config):
            raise RuntimeError(
                f"{self._where} is for {self.extra_repr()}, the layout of this call for {layout.config}; give both the "
                "same"
            )
        return layout

    def _text_attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        # diffusers calls FlexAttention uncompiled, which would hold all scores in memory.
        if backend == AttentionBackendName.FLEX:
            backend = AttentionBackendName.NATIVE
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return dispatch_attention_fn(query, key, value, scale=scale, backend=backend).transpose(1, 2)


class ClearAttnProcessor(AttnProcessor):
    """CLEAR's attention for one layer.

    Its one parameter, `spatial_weight`, is what it pools with, so calling it as a module means pooling.

    Args:
        down_factor (`int`, defaults to 1): side of the pooled cells in tokens; above 1 the processor has the
            parameter `spatial_weight` of shape `(1, 1, 1, f, 1, f, 1)`, initially the plain mean, 1 / f^2.
        layer (`str`, defaults to `""`): the layer's name, for errors.

    Raises:
        RuntimeError: when called without a layout, with an attention mask, or under diffusers' context
            parallelism.
    """

    spatial_weight: nn.Parameter

    def __init__(self, down_factor: int = 1, layer: str = "") -> None:
        super().__init__(layer)
        self.down_factor = down_factor
        shape = (1, 1, 1, down_factor, 1, down_factor, 1)
        weight = nn.Parameter(torch.full(shape, 1 / down_factor**2)) if down_factor > 1 else None
        self.register_parameter("spatial_weight", weight)

    def extra_repr(self) -> str:
        return f"down_factor={self.down_factor}"

    def forward(self, image: Tensor, layout: TokenLayout) -> Tensor:
        """Pools image keys or values, see `clear_attn.backends.attention.pool`."""
        return pool(image, layout, self.spatial_weight)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        backend: str,
        sharpness: float = 1.0,
        padding: Padding | None = None,
    ) -> Tensor:
        """CLEAR's attention, `[batch, tokens, heads x head_dim]`."""
        head_dim = query.shape[-1]
        scale = sharpness * head_dim**-0.5
        if padding is not None:
            query, key, value = widen(query, key, value, padding, scale)
        pooled = None
        if layout.pooled_tokens:
            pool_key, pool_value = (self.as_module(x[:, :, layout.image], layout) for x in (key, value))
            pooled = pool_key, pool_value
        joint = (layout.attention or clear_attention)(
            query,
            key,
            value,
            layout,
            pooled=pooled,
            backend=backend,
            scale=scale,
            text_attention=self._text_attention,
        )
        return joint[..., :head_dim].transpose(1, 2).flatten(2, 3)

    def fits(self, config: Config) -> bool:
        return isinstance(config, ClearConfig) and config.down_factor == self.down_factor


def _project(
    attn: Any, names: tuple[str, str, str], fused: str | None, norms: tuple[str, str], x: Tensor
) -> list[Tensor]:
    """Query, key and value `[batch, tokens, heads, head_dim]` by three projections or by their fused one, normed."""
    parts = getattr(attn, fused)(x).chunk(3, dim=-1) if fused else [getattr(attn, name)(x) for name in names]
    return split_heads(attn, parts, norms)


def split_heads(attn: Any, parts: Sequence[Tensor], norms: tuple[str, str]) -> list[Tensor]:
    """Query, key and value `[batch, tokens, heads, head_dim]` of what a layer projected, normed."""
    query, key, value = (part.unflatten(-1, (-1, attn.inner_dim // attn.heads)) for part in parts)
    norm_query, norm_key = (getattr(attn, norm, None) or nn.Identity() for norm in norms)
    return [norm_query(query), norm_key(key), value]


def project(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    text_first: bool,
    fused: bool,
) -> list[Tensor]:
    """Query, key and value `[batch, heads, tokens, head_dim]` of a layer, as FLUX's and SD3's own processors do.

    A layer is given text and image apart, to be joined in the family's order, or one sequence.
    """
    parts = [_project(attn, ("to_q", "to_k", "to_v"), "to_qkv" if fused else None, ("norm_q", "norm_k"), hidden_states)]
    if encoder_hidden_states is not None:
        names, norms = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
        parts.insert(
            0 if text_first else 1,
            _project(attn, names, "to_added_qkv" if fused else None, norms, encoder_hidden_states),
        )
    query, key, value = (torch.cat(each, dim=1) if len(each) > 1 else each[0] for each in zip(*parts, strict=True))
    if rotary is not None:
        query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
    return [x.transpose(1, 2) for x in (query, key, value)]


class Places(Protocol):
    """Where image and text stand in a sequence of both."""

    @property
    def image(self) -> slice: ...

    @property
    def text(self) -> slice: ...


def project_out(attn: Any, joint: Tensor, apart: bool, layout: Places) -> Tensor | tuple[Tensor, Tensor]:
    """What a layer gives for the output of its attention: image and text apart where it was given them so."""
    image = joint[:, layout.image] if apart else joint
    if getattr(attn, "to_out", None) is not None:
        image = attn.to_out[1](attn.to_out[0](image))
    if not apart:
        return image
    text = joint[:, layout.text]
    return image, text if getattr(attn, "context_pre_only", False) else attn.to_add_out(text)

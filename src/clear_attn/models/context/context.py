"""The context of one call of a linearized transformer, which its attention layers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.core.plan import Plan
from clear_attn.methods import Method, Options, ScoreBias
from clear_attn.models.context.dense_attention import dense_attention

# The attention keyword with which the context reaches processors, if the model passes keywords on.
CONTEXT = "clear_context"
# Attention keywords of other packages, which the entry hook moves into the context.
SCALE_MULTIPLIER, ROLE, RECORDER = "clear_scale_multiplier", "clear_role", "clear_recorder"
# The roles in distillation. In a call of the teacher, all attention is dense.
TEACHER, STUDENT = "teacher", "student"


class Group(NamedTuple):
    """The method, plan and bias of one group of layers in a call; no plan if the call has no image for them."""

    method: Method
    plan: Plan | None
    bias: ScoreBias | None = None


MakeGroups = Callable[[torch.device], list[Group]]


class ClearContext:
    """The settings and index tensors of one call.

    This is a plain class, because FSDP2 and accelerate rebuild, cast or move dataclasses, tuples, mappings and objects
    with `.to`.

    Args:
        groups: the groups of layers, indexed by the number that a processor holds.
        layout: the `TokenLayout` of the call, or this rank's shard of it.
        make_groups: a function that makes the groups for another device, for models on several devices.
        backend: a backend of `clear_attn.backends`, or "auto".
        scale_multiplier: the factor of the scale head_dim^-0.5.
        role: "teacher" or "student" in distillation, else None.
        record: a function of a layer's name and attention output, for distillation.

    Attributes:
        permuted: whether the image tokens of the call are in tile order yet.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        layout: Any = None,
        *,
        make_groups: MakeGroups | None = None,
        backend: str = "auto",
        scale_multiplier: float = 1.0,
        role: str | None = None,
        record: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.groups, self.layout = list(groups), layout
        self.make_groups = make_groups
        self._on_other_devices: dict[torch.device, list[Group]] = {}
        self.backend, self.scale_multiplier = backend, scale_multiplier
        self.role, self.record = role, record
        self.permuted = True

    def on(self, device: torch.device) -> list[Group]:
        """Return the groups with their tensors on a device, made once per call and device."""
        if self.make_groups is None or self.layout is None or device == self.layout.device:
            return self.groups
        if device not in self._on_other_devices:
            self._on_other_devices[device] = self.make_groups(device)
        return self._on_other_devices[device]

    def attend(
        self,
        group: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parameters: Sequence[Tensor],
        attention_backend: Any = None,
    ) -> Tensor:
        """Return the attention of a layer, `[batch, tokens, heads x head_dim]`.

        Args:
            group: the number of the layer's group.
            query: `[batch, heads, tokens, head_dim]`, text and image joined, the image in tile order.
            key, value: `[batch, key heads, tokens, head_dim]`; the key heads divide the query's heads.
            parameters: the layer's learned parameters.
            attention_backend: the backend of diffusers for dense attention; None for the active one.
        """
        method, plan, bias = self.on(query.device)[group]
        options = self._options(bias, query, attention_backend)
        return method.attend(query, key, value, plan, parameters, options).transpose(1, 2).flatten(2, 3)

    def _options(self, bias: ScoreBias | None, query: Tensor, attention_backend: Any) -> Options:
        return Options(
            scale=self.scale_multiplier * query.shape[-1] ** -0.5,
            backend=self.backend,
            dense=dense_attention(attention_backend),
            bias=bias,
        )

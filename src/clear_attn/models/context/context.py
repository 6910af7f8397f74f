"""What one call of a linearized transformer carries to its attention layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clear_attn.core.plan import Plan
from clear_attn.methods import Method, Options, ScoreBias
from clear_attn.models.context.dense_attention import dense_attention

# The keyword by which it reaches processors, where the model passes attention keywords on.
CONTEXT = "clear_context"
# Keywords that others add to a call, which the entry hook takes into the context.
SCALE_MULTIPLIER, ROLE, RECORDER = "clear_scale_multiplier", "clear_role", "clear_recorder"
# Who computes in a call of a model with a student. All attention of the teacher is dense.
TEACHER, STUDENT = "teacher", "student"


class Group(NamedTuple):
    """What the layers of one group do in a call."""

    method: Method
    plan: Plan
    bias: ScoreBias | None = None


MakeGroups = Callable[[torch.device], list[Group]]


class ClearContext:
    """The settings and index tensors of one call.

    A plain class: wrappers such as FSDP2 and accelerate rebuild, cast or move dataclasses, tuples, mappings and
    whatever has `.to`.

    Args:
        groups: by the number that a processor holds.
        layout: the `TokenLayout` of the call, or the part of it that this rank has.
        make_groups: makes the groups for another device, where the layers of a model are on several.
        backend: of `clear_attn.backends`, or "auto".
        scale_multiplier: multiplies head_dim^-0.5.
        role: whether the teacher or the student computes, in distillation.
        record: takes a layer's name and attention output, in distillation.

    Attributes:
        permuted: whether the image tokens of the call are in tile order by now.
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
        self._elsewhere: dict[torch.device, list[Group]] = {}
        self.backend, self.scale_multiplier = backend, scale_multiplier
        self.role, self.record = role, record
        self.permuted = True

    def on(self, device: torch.device) -> list[Group]:
        """Return the groups with their tensors on the device of a layer, made once per call and device."""
        if self.make_groups is None or self.layout is None or device == self.layout.device:
            return self.groups
        if device not in self._elsewhere:
            self._elsewhere[device] = self.make_groups(device)
        return self._elsewhere[device]

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
            group: the layer's.
            query: `[batch, heads, tokens, head_dim]`, text and image joined, the image in tile order.
            key, value: likewise, with as many heads or a divisor of them.
            parameters: of the layer.
            attention_backend: of diffusers, for dense attention.
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

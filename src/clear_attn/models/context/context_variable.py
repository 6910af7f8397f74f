"""Pass the context of a call to attention layers that get no attention keywords.

The entry hook publishes the context in a context variable. The layers' custom operator reads it at run time: blocks
compiled with `fullgraph=True` contain the operator, never a context. Each thread has its own variable.

The operator's backward pass may run while another call's context is published, or in a thread of autograd without
one. The forward pass therefore also returns a handle, a small tensor with a storage that owns the context. Autograd
or a compiled graph saves the handle for the backward pass, and so keeps the context alive exactly that long.
"""

from __future__ import annotations

import contextlib
import contextvars
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from clear_attn.backends.derivatives import needs_transforms
from clear_attn.models.context.context import ClearContext


class PublishedContext:
    """The owner of a publication: layers can read the context while this object lives.

    The context itself may live longer, with the autograd graph of its call.
    """

    def __init__(self, context: ClearContext) -> None:
        self.context = context

    @property
    def layout(self) -> Any:
        """The layout of the context."""
        return self.context.layout


_published: contextvars.ContextVar[weakref.ref[PublishedContext] | None] = contextvars.ContextVar(
    "clear_attn_context", default=None
)


def publish(context: ClearContext) -> PublishedContext:
    """Let the layers read the context in this thread, until `clear` or until the returned object is dropped.

    Put the object into the keywords that the entry hook returns. They are dropped with the frame of the call, so an
    exception or Ctrl-C in a block ends the publication even though no exit hook runs.
    """
    owner = PublishedContext(context)
    _published.set(weakref.ref(owner))
    return owner


def clear() -> None:
    """End this thread's publication."""
    _published.set(None)


def current() -> ClearContext | None:
    """Return the context of the call that runs in this thread, or None."""
    reference = _published.get()
    owner = None if reference is None else reference()
    return None if owner is None else owner.context


@contextlib.contextmanager
def published(context: ClearContext) -> Iterator[None]:
    """Publish a context for a `with` block, then restore the previous publication."""
    owner = PublishedContext(context)
    token = _published.set(weakref.ref(owner))
    try:
        yield
    finally:
        _published.reset(token)


def attend_published(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parameters: list[Tensor],
    group: int,
    attention_backend: str | None,
) -> Tensor:
    """Return the attention by the context that is published when this runs, not when it is compiled.

    Raises:
        RuntimeError: no context is published.
    """
    if needs_transforms(query, key, value, *parameters):  # the operator would drop them
        return _required_context().attend(group, query, key, value, parameters, attention_backend)
    device = query.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    output: Tensor = torch.ops.clear_attn.attend(query, key, value, parameters, group, attention_backend, autocast)[0]
    return output


class PublishedAttention:
    """The part of `ClearContext` that a processor uses, read from the published context at run time."""

    @property
    def role(self) -> str | None:
        """The role of the published context."""
        context = current()
        return None if context is None else context.role

    @property
    def record(self) -> Callable[[str, Tensor], None] | None:
        """The recorder of the published context."""
        context = current()
        return None if context is None else context.record

    def attend(
        self,
        group: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        parameters: Sequence[Tensor],
        attention_backend: Any = None,
    ) -> Tensor:
        """Return the attention of a layer, `[batch, tokens, heads x head_dim]`."""
        name = None if attention_backend is None else str(getattr(attention_backend, "value", attention_backend))
        return attend_published(query, key, value, list(parameters), group, name)


PUBLISHED = PublishedAttention()


# `torch.library.custom_op` does not allow autograd inside the backward operator. A CUDA graph would replay the kernels
# of one context in all calls. A compiled block runs with autocast off, so the autocast dtype is an argument.
_library = torch.library.Library("clear_attn", "FRAGMENT")
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor[] parameters, "
    "int group, str? attention_backend, ScalarType? autocast"
)
_TAGS = (torch.Tag.cudagraph_unsafe,)
_library.define(f"attend({_ARGUMENTS}) -> (Tensor output, Tensor handle)", tags=_TAGS)
_library.define(f"attend_backward(Tensor grad, Tensor handle, bool[] needed, {_ARGUMENTS}) -> Tensor[]", tags=_TAGS)


def _attend_with(context: ClearContext, query: Tensor, *args: Any) -> Tensor:
    key, value, parameters, group, attention_backend, autocast = args
    with torch.autocast(query.device.type, dtype=autocast, enabled=autocast is not None, cache_enabled=False):
        output = context.attend(group, query, key, value, parameters, attention_backend)
    return output.contiguous()


def _required_context() -> ClearContext:
    context = current()
    if context is None:
        raise RuntimeError(
            "an attention layer was called outside a call of its linearized transformer; call the transformer, not "
            "its blocks, and enable gradient checkpointing with the model's own enable_gradient_checkpointing()"
        )
    return context


def _attend(query: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    context = _required_context()
    handle = torch.zeros((), dtype=torch.int64, device="cpu")
    handle.untyped_storage().clear_context = context  # type: ignore[attr-defined]
    return _attend_with(context, query, *args), handle


def _attend_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _dim = query.shape
    output = query.new_empty(batch, tokens, heads * value.shape[-1])
    return output, torch.empty((), dtype=torch.int64, device="cpu")


def _attend_backward(grad: Tensor, handle: Tensor, needed: list[bool], *args: Any) -> list[Tensor]:
    """Recompute attention under autograd and return the gradients of the tensors that need one."""
    context = getattr(handle.untyped_storage(), "clear_context", None)
    if context is None:
        raise RuntimeError(
            "a hook on saved tensors copied what a compiled block saved, and the call's context was lost "
            "(torch.autograd.graph.save_on_cpu with pin_memory=True does that); let it leave CPU tensors as they are"
        )
    query, key, value, parameters, *settings = args
    tensors = [
        x.detach().requires_grad_(need) for x, need in zip((query, key, value, *parameters), needed, strict=True)
    ]
    with torch.enable_grad():
        output = _attend_with(context, *tensors[:3], tensors[3:], *settings)
    wanted = [x for x in tensors if x.requires_grad]
    grads = torch.autograd.grad(output, wanted, grad, allow_unused=True)
    return [x.new_zeros(x.shape) if g is None else g.contiguous() for g, x in zip(grads, wanted, strict=True)]


def _attend_backward_fake(grad: Tensor, handle: Tensor, needed: list[bool], *args: Any) -> list[Tensor]:
    query, key, value, parameters, *_ = args
    return [x.new_empty(x.shape) for x, need in zip((query, key, value, *parameters), needed, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, parameters, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, *parameters)
    ctx.handle = output[1]  # not saved with the others: hooks on saved tensors may copy it and lose its storage


class _FirstDerivative(torch.autograd.Function):
    """Refuse second derivatives of a gradient.

    The backward operator cannot refuse itself: with an autograd formula it would run below autograd, which it uses.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the attention of this model has no second derivatives, because its layers get their context through a "
            "custom operator; clear_attn.restore() the model for them"
        )


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, *parameters = ctx.saved_tensors
    *direct, of_parameters = ctx.needs_input_grad[:4]
    needed = [*direct, *of_parameters]
    args = query, key, value, parameters, *ctx.settings
    found = torch.ops.clear_attn.attend_backward(grad, ctx.handle, needed, *args)
    if torch.is_grad_enabled():  # as under create_graph=True
        found = [_FirstDerivative.apply(each, grad, query, key, value) for each in found]
    grads = iter(found)
    query_grad, key_grad, value_grad, *rest = [next(grads) if need else None for need in needed]
    return query_grad, key_grad, value_grad, rest, None, None, None


_library.impl("attend", _attend, "CompositeExplicitAutograd")
_library.impl("attend_backward", _attend_backward, "CompositeExplicitAutograd")
torch.library.register_fake("clear_attn::attend", _attend_fake, lib=_library)
torch.library.register_fake("clear_attn::attend_backward", _attend_backward_fake, lib=_library)
torch.library.register_autograd("clear_attn::attend", _backward, setup_context=_setup_context, lib=_library)

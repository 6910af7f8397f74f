"""The level `model`: one denoising step of FLUX.1 with random weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.overrides import TorchFunctionMode

from clear_attn.backends import reference, selection
from clear_attn.patching.context_managers import linearized
from clear_attn.tools.bench.case import Case
from clear_attn.tools.bench.measure import Mark, Subject
from clear_attn.tools.bench.op_level import BACKENDS, fastest_dense, random_inputs, relative_error

TITLE = "one denoising step"
VARIANTS = ("dense", *BACKENDS, "bound")
LEGEND = {"bound": "a step in which attention takes no time, the most that any attention can save"}
# How half precision adds up over the blocks is not known.
MAX_ERRORS = {"float32": 1e-4}
# FLUX.1-dev has twice as many single blocks.
DOUBLE_BLOCKS = 19


class AttentionIsItsValues(TorchFunctionMode):
    """Within it, dense attention costs nothing and returns its values: the most that any attention can save."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return args[2] if len(args) > 2 else kwargs["value"]
        return function(*args, **(kwargs or {}))


def unsupported_reason(name: str, case: Case) -> str | None:
    """Return why a variant cannot compute a case, or None."""
    if case.backward:
        return "a step is timed forward only; leave out --backward"
    if case.head_dim % 32:
        return f"FLUX.1 takes a head_dim divisible by 32, got {case.head_dim}"
    if name not in selection.BACKENDS:
        return None
    return selection.BACKENDS[name].unsupported_reason(case.device, case.dtype, case.head_dim, False)


def subjects(case: Case, names: Sequence[str]) -> Iterator[Subject]:
    """Return variants of a case, with the same model and inputs."""
    model = transformer(case)
    keywords = random_call(case, model)
    layers, cost = 3 * DOUBLE_BLOCKS, case.cost
    subject = Subject(
        "bound",
        _three_parts(model, keywords),
        # All blocks of the model for those that are computed; what comes before and after them is computed once.
        weights=(1.0, DOUBLE_BLOCKS / case.blocks, 1.0),
        around=AttentionIsItsValues,
        peak_scales=False,
    )
    for name in names:
        if name == "dense":
            kernel = fastest_dense(name, case, random_inputs(case)).kernel
            assert kernel is not None
            yield subject._replace(
                name=name,
                flops=layers * cost.dense_step_flops,
                around=functools.partial(sdpa_kernel, [kernel]),
                kernel=kernel.name.lower(),
            )
        elif name == "bound":
            yield subject
        else:
            yield subject._replace(
                name=name,
                flops=layers * cost.step_flops,
                around=functools.partial(_warm, case, model, name, keywords),
                error=functools.partial(_error, case, model, keywords),
            )


def transformer(case: Case) -> Any:
    """Return FLUX.1-dev with random weights, fewer blocks and other heads if asked for."""
    rows_and_columns = 7 * case.head_dim // 16  # each; the rest of the rotary embedding numbers images
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(case.device):
            return FluxTransformer2DModel(
                num_layers=case.blocks,
                num_single_layers=2 * case.blocks,
                num_attention_heads=case.heads,
                attention_head_dim=case.head_dim,
                axes_dims_rope=(case.head_dim - 2 * rows_and_columns, rows_and_columns, rows_and_columns),
                guidance_embeds=True,
            ).eval()
    finally:
        torch.set_default_dtype(before)


def random_call(case: Case, model: Any) -> dict[str, Any]:
    """Return the arguments of one step, with random inputs."""
    like: dict[str, Any] = {"dtype": case.dtype, "device": case.device}
    axes = [torch.arange(length, **like) for length in (1, case.height, case.width)]
    image_tokens, config = case.height * case.width, model.config
    return {
        "hidden_states": torch.randn(case.batch, image_tokens, config.in_channels, **like),
        "encoder_hidden_states": torch.randn(case.batch, case.text, config.joint_attention_dim, **like),
        "pooled_projections": torch.randn(case.batch, config.pooled_projection_dim, **like),
        "timestep": torch.full((case.batch,), 0.5, **like),
        "guidance": torch.full((case.batch,), 3.5, **like),
        "img_ids": torch.cartesian_prod(*axes),
        "txt_ids": torch.zeros(case.text, 3, **like),
    }


def _linearized(case: Case, model: Any, backend: str) -> contextlib.AbstractContextManager[Any]:
    return linearized(model, case.window, case.down_factor, weights=None, backend=backend)


@contextlib.contextmanager
def _warm(case: Case, model: Any, backend: str, keywords: dict[str, Any]) -> Iterator[None]:
    """Linearize, and compute a step that builds what a pipeline keeps from its first step on: plan and lists."""
    with _linearized(case, model, backend), torch.no_grad():
        model(**keywords, return_dict=False)
        yield


def _three_parts(model: Any, keywords: dict[str, Any]) -> Callable[[Mark], Tensor]:
    """Return a call that marks where the blocks begin and where they end."""

    def run(mark: Mark) -> Tensor:
        first, last = model.transformer_blocks[0], model.single_transformer_blocks[-1]
        hooks = [
            first.register_forward_pre_hook(lambda *_: mark()),
            last.register_forward_hook(lambda *_: mark()),
        ]
        try:
            with torch.no_grad():
                return model(**keywords, return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()

    return run


def _error(case: Case, model: Any, keywords: dict[str, Any], result: Tensor) -> float | None:
    """Compare with the reference backend, if the sequence is short enough for it."""
    if case.height * case.width > reference.MAX_IMAGE_TOKENS:
        return None
    with _linearized(case, model, "reference"), torch.no_grad():
        return relative_error(result, model(**keywords, return_dict=False)[0].double())

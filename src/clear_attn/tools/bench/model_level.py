"""One denoising step of FLUX.1 with random weights: dense, linearized, and with attention replaced by its values."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from clear_attn.backends import flex, reference
from clear_attn.patching.context_managers import linearized
from clear_attn.tools.bench.measure import Mark, Subject
from clear_attn.tools.bench.op_level import BACKENDS, Case, distance, fastest_dense, inputs

VARIANTS = ("dense", *BACKENDS, "bound")
# FLUX.1-dev has twice as many single blocks.
DOUBLE_BLOCKS = 19


class AttentionIsItsValues(TorchFunctionMode):
    """Within it, dense attention costs nothing and gives its values: the most that any attention can save."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return args[2] if len(args) > 2 else kwargs["value"]
        return function(*args, **(kwargs or {}))


def transformer(case: Case, blocks: int) -> Any:
    """FLUX.1-dev with so many of its 19 double blocks and twice as many single ones, and other heads if asked."""
    rows_and_columns = 7 * case.head_dim // 16  # each; the rest of the rotary embedding numbers pictures
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(case.device):
            return FluxTransformer2DModel(
                num_layers=blocks,
                num_single_layers=2 * blocks,
                num_attention_heads=case.heads,
                attention_head_dim=case.head_dim,
                axes_dims_rope=(case.head_dim - 2 * rows_and_columns, rows_and_columns, rows_and_columns),
                guidance_embeds=True,
            ).eval()
    finally:
        torch.set_default_dtype(before)


def call(case: Case, model: Any) -> dict[str, Any]:
    """Random inputs of one step."""
    height, width = case.grid

    def random(*shape: int) -> Tensor:
        return torch.randn(case.batch, *shape, dtype=case.dtype, device=case.device)

    axes = [torch.arange(length, dtype=case.dtype, device=case.device) for length in (1, height, width)]
    return {
        "hidden_states": random(height * width, model.config.in_channels),
        "encoder_hidden_states": random(case.text, model.config.joint_attention_dim),
        "pooled_projections": random(model.config.pooled_projection_dim),
        "timestep": torch.full((case.batch,), 0.5, dtype=case.dtype, device=case.device),
        "guidance": torch.full((case.batch,), 3.5, dtype=case.dtype, device=case.device),
        "img_ids": torch.cartesian_prod(*axes),
        "txt_ids": torch.zeros(case.text, 3, dtype=case.dtype, device=case.device),
    }


def unsupported_reason(name: str, case: Case) -> str | None:
    """Why a variant cannot compute a case, or None where it can."""
    return flex.unsupported_reason(case.device, case.dtype, case.head_dim, False) if name == "flex" else None


def subjects(
    case: Case, names: tuple[str, ...], blocks: int, most_dense_queries: int
) -> Iterator[tuple[Subject, SDPBackend | None]]:
    """Those named, with the kernel of those that have one; all share one model."""
    model = transformer(case, blocks)
    keywords = call(case, model)
    run = _in_three_parts(model, keywords)
    # The blocks of the whole model for those that are there; what is before and after them stands once.
    weights = (1.0, DOUBLE_BLOCKS / blocks, 1.0)
    for name in names:
        if name == "dense":
            kernel = fastest_dense(name, case, inputs(case, False), most_dense_queries).kernel
            assert kernel is not None
            yield Subject(name, run, weights, around=functools.partial(sdpa_kernel, [kernel])), kernel
        elif name == "bound":
            yield Subject(name, run, weights, around=AttentionIsItsValues), None
        else:
            yield Subject(name, run, weights, _error(case, model, keywords), _linearized(case, model, name)), None


def _linearized(case: Case, model: Any, backend: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    return lambda: linearized(model, case.window, case.down_factor, weights=None, backend=backend)


def _in_three_parts(model: Any, keywords: dict[str, Any]) -> Callable[[Mark], Tensor]:
    """A call that marks where the blocks begin and where they end."""

    def run(mark: Mark) -> Tensor:
        hooks = [
            model.transformer_blocks[0].register_forward_pre_hook(lambda *_: mark()),
            model.single_transformer_blocks[-1].register_forward_hook(lambda *_: mark()),
        ]
        try:
            with torch.no_grad():
                return model(**keywords, return_dict=False)[0]
        finally:
            for hook in hooks:
                hook.remove()

    return run


def _error(case: Case, model: Any, keywords: dict[str, Any]) -> Callable[[Tensor], float | None]:
    """Compares with the reference backend, where the sequence is short enough for that."""

    def error(result: Tensor) -> float | None:
        if case.grid[0] * case.grid[1] > reference.MAX_IMAGE_TOKENS:
            return None
        with _linearized(case, model, "reference")(), torch.no_grad():
            return distance(result, model(**keywords, return_dict=False)[0].double())

    return error

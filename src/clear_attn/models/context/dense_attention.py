"""Dense attention with the kernels that the user chose with diffusers' `set_attention_backend`."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from clear_attn.backends.attention import DenseAttention
from clear_attn.models._diffusers import active_attention_backend


def dense_attention(backend: Any = None) -> DenseAttention:
    """Return a function that computes dense attention with a backend of diffusers, by default the active one.

    The function takes query, key and value `[batch, heads, tokens, head_dim]`, a scale, and a score bias or None.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        # diffusers calls FlexAttention without compiling it, which would store all scores.
        is_flex = (backend or active_attention_backend()) == AttentionBackendName.FLEX
        output: Tensor = dispatch_attention_fn(
            *(x.transpose(1, 2) for x in (query, key, value)),
            attn_mask=bias if bias is None else bias.to(query.dtype),
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
            # torch 2.11 cannot trace diffusers' lookup of a name on Python 3.12, so the default is not named.
            backend=AttentionBackendName.NATIVE if is_flex else backend,
        )
        return output.transpose(1, 2)

    return attend

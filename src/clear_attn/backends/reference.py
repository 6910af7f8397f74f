"""The rule as one mask over plain attention: the reference, for short sequences."""

from __future__ import annotations

from torch import Tensor

from clear_attn.backends.softmax import softmax_attention
from clear_attn.core.layout import Neighbourhood
from clear_attn.core.window_mask import dense_mask

# The mask takes 70 MB then, and the scores, which are held where the log-sum-exp is asked for, 280 MB a head.
MAX_IMAGE_TOKENS = 8192


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Neighbourhood, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """See `clear_attn.backends`."""
    if layout.image_tokens > MAX_IMAGE_TOKENS:
        raise ValueError(
            f"backend='dense' holds a mask of all pairs and takes at most {MAX_IMAGE_TOKENS} image tokens, got "
            f"{layout.image_tokens}; use backend='auto', 'tiled' or 'flex'"
        )
    mask = dense_mask(layout.query, layout.key, layout.reach)
    output, lse = softmax_attention(query[:, :, layout.image], key, value, mask, scale, return_lse)
    return layout.among_tokens(output), None if lse is None else layout.among_tokens(lse)

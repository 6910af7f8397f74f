"""The `reference` backend: the rule as a mask for dense attention, for short sequences."""

from __future__ import annotations

from torch import Tensor

from clear_attn.backends.softmax import softmax_attention
from clear_attn.core.region import AttentionRegion
from clear_attn.core.window_mask import window_mask

# At this length the mask takes 70 MB. With the log-sum-exp, the scores are stored as well, 280 MB per head.
MAX_IMAGE_TOKENS = 8192


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    region: AttentionRegion,
    key_bias: Tensor | None,
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `clear_attn.backends`."""
    if region.image_tokens > MAX_IMAGE_TOKENS:
        raise ValueError(
            f"backend='reference' holds a mask of all pairs and takes at most {MAX_IMAGE_TOKENS} image tokens, got "
            f"{region.image_tokens}; use backend='auto', 'tiled' or 'flex'"
        )
    mask = window_mask(region.query, region.key, region.radius_sq)
    bias = None if key_bias is None else key_bias[:, None, None]
    output, lse = softmax_attention(query[:, :, region.image], key, value, mask, scale, return_lse, bias)
    return region.expand_to_sequence(output), None if lse is None else region.expand_to_sequence(lse)

"""Each tile of queries with its gathered keys, over torch's own attention: no compiler, gradients everywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.softmax import softmax_attention
from clear_attn.layout import TokenLayout

# How much one step may gather: large enough for the kernels, small enough to stay a fraction of a model's memory.
MAX_GATHERED_ELEMENTS = 2**25
# With the log-sum-exp, a step holds the scores of all its pairs.
MAX_SCORES = 2**26


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float, return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Image queries against all keys; see `clear_attn.backends`.

    Linear in the image tokens in time and in memory. Not so its gradients' time: each step of gathering adds to
    gradients of all tokens.
    """
    batch, heads, _, head_dim = query.shape
    image_key, image_value = key[:, :, layout.image], value[:, :, layout.image]
    # What all image queries see: text before or after the image, and pooled keys.
    shared_key, shared_value = (
        torch.cat([x[:, :, : layout.image.start], x[:, :, layout.image.stop :]], dim=2) for x in (key, value)
    )
    outputs, sums = [], []
    for group in layout.tiles.groups:
        mask = F.pad(group.mask, (shared_key.shape[2], 0), value=True)
        pairs, width = mask.numel(), mask.shape[1]
        most = MAX_GATHERED_ELEMENTS // (batch * heads * head_dim * width)
        if return_lse:
            most = min(most, MAX_SCORES // (batch * heads * pairs))
        for tiles, keys in zip(group.queries.split(max(1, most)), group.keys.split(max(1, most)), strict=True):
            output, lse = softmax_attention(
                _gather(query, tiles),
                _with_shared(shared_key, _gather(image_key, keys)),
                _with_shared(shared_value, _gather(image_value, keys)),
                mask,
                scale,
                return_lse,
            )
            outputs.append(_scatter(output, batch))
            if lse is not None:
                sums.append(_scatter(lse[..., None], batch)[..., 0])
    place = layout.tiles.place
    output = torch.cat(outputs, dim=2).index_select(2, place)
    return output, torch.cat(sums, dim=2).index_select(2, place) if sums else None


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """`[batch, heads, tokens, d]` at `[tiles, n]` as `[batch * tiles, heads, n, d]`."""
    picked = x.index_select(2, index.flatten()).unflatten(2, index.shape)
    return picked.transpose(1, 2).flatten(0, 1)


def _with_shared(shared: Tensor, own: Tensor) -> Tensor:
    """Puts `[batch, heads, m, d]`, the same for every tile, before each tile's own `[batch * tiles, heads, n, d]`."""
    repeated = shared.repeat_interleave(own.shape[0] // shared.shape[0], dim=0)
    return torch.cat([repeated, own], dim=2)


def _scatter(x: Tensor, batch: int) -> Tensor:
    """`[batch * tiles, heads, n, d]` as `[batch, heads, tiles * n, d]`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)

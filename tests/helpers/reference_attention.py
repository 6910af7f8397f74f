"""CLEAR's attention written densely in raster order, for comparison."""

import torch


def coordinates(grids, unit=None):
    """Return positions of all image tokens in raster order, `[tokens, 2]`, later grids scaled to the first."""
    (first_height, first_width), parts = unit or grids[0], []
    for height, width in grids:
        y = (torch.arange(height) + 0.5) * first_height / height - 0.5
        x = (torch.arange(width) + 0.5) * first_width / width - 0.5
        parts.append(torch.cartesian_prod(y, x).mul(16).round().div(16).double())
    return torch.cat(parts)


def window_mask(grids, window, unit=None):
    """Return which image keys each image query attends to, bool `[tokens, tokens]`."""
    positions = coordinates(grids, unit)
    return (positions[:, None] - positions).square().sum(dim=-1) < window**2


def pool(x, grids, factor, weight):
    """Pool `[..., tokens, d]` to `[..., cells, d]`, one cell at a time."""
    cells, start = [], 0
    for height, width in grids:
        image = x[..., start : start + height * width, :].unflatten(-2, (height, width))
        for top in range(0, height, factor):
            for left in range(0, width, factor):
                cell = image[..., top : top + factor, left : left + factor, :]
                share = weight[: cell.shape[-3], : cell.shape[-2], None]
                scale = factor**2 / (cell.shape[-3] * cell.shape[-2])
                cells.append((cell * share).sum(dim=(-3, -2)) * scale)
        start += height * width
    return torch.stack(cells, dim=-2)


def attention(query, key, value, grids, text, config, weight=None, scale=None, bias=None, unit=None):
    """Return output and log-sum-exp; text first, image in raster order.

    The bias is a mask as for torch's attention: bool, or added to the scores. Pooled keys have the bias of image keys.
    """
    mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
    mask[text:, text:] = window_mask(grids, config.window, unit)
    if config.down_factor > 1:
        pooled = (pool(x[..., text:, :], grids, config.down_factor, weight) for x in (key, value))
        key, value = (torch.cat(parts, dim=-2) for parts in zip((key, value), pooled, strict=True))
        attends_to_pooled = (torch.arange(query.shape[-2]) >= text)[:, None].expand(-1, key.shape[-2] - mask.shape[1])
        mask = torch.cat([mask, attends_to_pooled], dim=1)
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if bias is not None:
        bias = torch.where(bias, 0.0, -torch.inf) if bias.dtype == torch.bool else bias
        scores = scores + torch.cat([bias, bias[..., -1:].expand(*bias.shape[:-1], key.shape[-2] - bias.shape[-1])], -1)
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1) @ value, scores.logsumexp(dim=-1)

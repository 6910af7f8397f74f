"""The rule of each method, written densely: for all pairs, in raster order, text first.

Each gets the query of the image, all keys and values, the grid, the processor, and a bias of the scores of text keys.
"""

import torch
import torch.nn.functional as F

from clear_attn import methods


def coordinates(grid):
    return torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 2)


def scores_of(query, key, bias):
    """Return the scores of all keys. The bias `[batch, 1, queries or 1, keys]` is added to the first keys."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores if bias is None else scores + F.pad(bias, (0, key.shape[2] - bias.shape[-1]))


def softmax(query, key, value, mask=True, bias=None):
    """Attend from image queries to all keys, text first. The mask is for image keys, or for keys in place of them."""
    scores = scores_of(query, key, bias)
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if mask is not True:
        allowed[:, -mask.shape[1] :] = mask
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ value


def swin(method, number):
    def rule(query, key, value, grid, processor, bias=None):
        move = number % 2 * (method.side - method.side // 2)
        window = (coordinates(grid) + move) // method.side
        return softmax(query, key, value, (window[:, None] == window).all(-1), bias)

    return rule


def strided(query, key, value, grid, processor, bias=None):
    phase = coordinates(grid) % processor.method.stride
    return softmax(query, key, value, (phase[:, None] == phase).all(-1), bias)


def cells(x, grid, kernel):
    """Return weighted sums over cells, by a matrix from image tokens to cells per channel; cut cells are scaled."""
    factor = kernel.shape[-1]
    y, x_, n = *coordinates(grid).mT, -(-grid[1] // factor)
    member = F.one_hot(y // factor * n + x_ // factor).to(x.dtype)
    weight = member[:, :, None] * kernel[:, 0, y % factor, x_ % factor].mT[:, None] * factor**2
    return torch.einsum("bhtd,tchd->bhcd", x, (weight / member.sum(0)[:, None]).unflatten(2, (x.shape[1], -1)))


def compressed(query, key, value, grid, processor, bias=None):
    text = key.shape[2] - query.shape[2]
    kernels = processor.key_kernel, processor.value_kernel
    return softmax(
        query,
        *(
            torch.cat([x[:, :, :text], cells(x[:, :, text:], grid, k)], 2)
            for x, k in zip((key, value), kernels, strict=True)
        ),
        bias=bias,
    )


def agent(query, key, value, grid, processor, bias=None):
    text = key.shape[2] - query.shape[2]
    factor = processor.method.factor
    agents = cells(
        query, grid, torch.full((query.shape[1] * query.shape[3], 1, factor, factor), 1 / factor**2, dtype=query.dtype)
    )
    gathered = softmax(agents, key[:, :, text:], value[:, :, text:])
    joined = (torch.cat([x[:, :, :text], own], 2) for x, own in ((key, agents), (value, gathered)))
    return softmax(query, *joined, bias=bias)


def sigmoid(query, key, value, grid, processor, bias=None):
    return 1 / (1 + key.shape[2] * (-scores_of(query, key, bias)).exp()) @ value


def lit(query, key, value, grid, processor, bias=None):
    assert bias is None
    own_heads = query.shape[1]
    heads = processor.method.heads or own_heads
    image = value[:, :, key.shape[2] - query.shape[2] :]
    query, key, value = (
        x.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value)
    )
    weights = query.relu() @ key.relu().mT
    output = (weights / weights.sum(-1, keepdim=True).clamp_min(1e-30) @ value).transpose(1, 2).flatten(2)
    output = output.unflatten(2, (own_heads, -1)).transpose(1, 2)
    if getattr(processor, "convolution", None) is None:
        return output
    offset = (coordinates(grid)[None] - coordinates(grid)[:, None] + processor.method.kernel_size // 2).unbind(-1)
    kernel = F.pad(processor.convolution[:, 0], [max(grid)] * 4)[:, offset[0] + max(grid), offset[1] + max(grid)]
    return output + torch.einsum("hdqk,bhkd->bhqd", kernel.unflatten(0, (own_heads, -1)), image)


# For each method class, a function that makes the rule of a layer from the method and the layer's number.
RULES = {
    methods.Agent: lambda method, number: agent,
    methods.KVCompression: lambda method, number: compressed,
    methods.LiT: lambda method, number: lit,
    methods.Sigmoid: lambda method, number: sigmoid,
    methods.Strided: lambda method, number: strided,
    methods.Swin: swin,
}

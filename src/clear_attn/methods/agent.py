"""Agent attention (arXiv 2312.08874): a few pooled queries, the agents, attend on behalf of all queries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_attn.backends.softmax import softmax_attention
from clear_attn.core.coordinates import Grid, cell_grid
from clear_attn.methods.image_grid import GridMethod, from_channels, to_channels
from clear_attn.methods.method import Options


@dataclass(frozen=True)
class Agent(GridMethod):
    """Attend to text and to agents, the means of image queries over cells, which attend to the image.

    An agent serves as a key, and its attention output as the value. The paper's depth-wise convolution and biases are
    left out; judging by its GFLOPs, CLEAR's paper leaves them out too.

    Its work grows with the square of the tokens, 2 / factor^2 of dense attention's. Of the four properties that CLEAR's
    paper asks for, it keeps features intact. It applies softmax twice, which is another formulation. It has no
    locality, and its rank is bounded by the number of agents.

    Args:
        factor (`int`, defaults to 4): the side of a cell in tokens. An agent at the border is the mean of the tokens
            inside the image.

    Raises:
        TypeError: factor is not a whole number.
        ValueError: factor is below 1.
    """

    quadratic = "attention from and to the agents"

    factor: int = 4

    def __post_init__(self) -> None:
        self._validate_whole("factor", "it is the side of a cell in tokens, 2 and 4 are usual")

    def flops(self, grid: Grid, text_tokens: int, heads: int, head_dim: int) -> dict[str, int]:
        image, inner = grid[0] * grid[1], heads * head_dim
        agents = math.prod(cell_grid(grid, self.factor))
        return {
            "agents, means of queries": image * inner,
            "agents, image keys": 4 * agents * image * inner,
            "image queries, text keys": 4 * image * text_tokens * inner,
            "image queries, agents": 4 * image * agents * inner,
        }

    def attend_image(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Any, parameters: Sequence[Tensor], options: Options
    ) -> Tensor:
        means = F.avg_pool2d(to_channels(query, plan), self.factor, ceil_mode=True, count_include_pad=False)
        agents = from_channels(means, query.shape[1])
        scale = options.scale
        gathered = F.scaled_dot_product_attention(
            agents, key[:, :, plan.image_keys], value[:, :, plan.image_keys], scale=scale
        )
        key, value = (torch.cat([x[:, :, plan.text_keys], own], dim=2) for x, own in ((key, agents), (value, gathered)))
        bias = options.bias.before(key.shape[2]) if options.bias else None
        return softmax_attention(query, key, value, None, scale, False, bias)[0]

"""One attention operation: dense, in raster order, and by each backend."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clear_attn.attention import clear_attention, pool
from clear_attn.backends import flex
from clear_attn.bench.measure import Mark, Subject, measure
from clear_attn.bench.raster import raster_attention
from clear_attn.config import ClearConfig
from clear_attn.cost import Cost
from clear_attn.layout import Grid, TokenLayout
from clear_attn.masks import BLOCK

# Not the backend "dense": that is the reference, no way to be fast.
BACKENDS = ("flex", "tiled")
VARIANTS = ("dense", "dense-pooled", "raster-flex", *BACKENDS)
KERNELS = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
}
# A backward pass has five matrix products, a forward pass two.
FORWARD_AND_BACKWARD = 3.5
# Rows to compare with the rule; all of them for gradients, up to so many tokens.
SAMPLED_ROWS, MOST_TOKENS_FOR_GRADIENTS = 64, 8192


class Case(NamedTuple):
    """What is computed; sizes in tokens."""

    grid: Grid
    text: int
    heads: int
    head_dim: int
    window: int
    down_factor: int
    dtype: torch.dtype
    batch: int
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.text + self.grid[0] * self.grid[1]

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    @property
    def cost(self) -> Cost:
        """Of one attention layer."""
        inner_dim = self.heads * self.head_dim
        return Cost(*self.grid, self.text, self.batch, 1, inner_dim, self.window, self.down_factor)

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout([self.grid], self.text, ClearConfig(self.window, self.down_factor), device=self.device)


class Variant(NamedTuple):
    """One way to compute a case.

    Attributes:
        name: as in a row.
        attend: from query, key and value to the output of the first queries or of all.
        rule: the keys that given queries see, `[queries, keys and pooled keys]`.
        pairs: how many pairs are visible, of all queries.
        order: int64, the raster index of each image token.
        share: of the queries that it computes.
        kernel: the name of torch's own kernel, where torch has several.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    rule: Callable[[Tensor], Tensor]
    pairs: int
    order: Tensor
    share: float = 1.0
    kernel: str | None = None


def reason_against(name: str, case: Case, backward: bool) -> str | None:
    """Why a variant cannot compute a case, or None where it can."""
    if name == "dense-pooled" and (case.down_factor == 1 or backward):
        return "it is for pooled keys alone, forward"
    if name in ("flex", "raster-flex"):
        if name == "raster-flex" and case.tokens < BLOCK:
            return f"it takes at least {BLOCK} tokens"
        return flex.reason_against(case.device, case.dtype, case.head_dim, backward)
    return None


def inputs(case: Case, backward: bool) -> list[Tensor]:
    """Random query, key and value `[batch, heads, tokens, head_dim]`, in memory as a model's projections make them."""
    shape = case.batch, case.tokens, case.heads, case.head_dim
    parts = [torch.randn(shape, dtype=case.dtype, device=case.device) for _ in range(3)]
    return [part.requires_grad_(backward).transpose(1, 2) for part in parts]


def variants(case: Case, names: tuple[str, ...], qkv: list[Tensor], most_dense_queries: int) -> Iterator[Variant]:
    """Those named, ready to run."""
    cost, layout = case.cost, case.layout
    raster = torch.arange(layout.image_tokens, device=case.device)
    kernel = best_kernel(case, qkv, most_dense_queries) if {"dense", "dense-pooled"} & {*names} else None
    for name in names:
        if name in ("dense", "dense-pooled"):
            assert kernel is not None
            yield _dense(name, case, layout, kernel, qkv, most_dense_queries)
        elif name == "raster-flex":
            yield Variant(name, _in_raster_order(case, raster), _rule(case, raster), cost.pairs, raster)
        else:
            yield Variant(name, _by_backend(name, case, layout), _rule(case, layout.order), cost.pairs, layout.order)


def best_kernel(case: Case, qkv: list[Tensor], most_queries: int) -> SDPBackend:
    """The fastest of torch's own kernels for dense attention to such inputs."""
    able = {}
    for kernel in KERNELS[case.device.type]:
        subject = Subject(kernel.name, functools.partial(_one_of, qkv, kernel, most_queries, case.scale))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells at length why a kernel cannot
            try:
                able[kernel] = measure([subject], case.device, 3)[0].median_s
            except RuntimeError:
                continue
    return min(able, key=lambda kernel: able[kernel]) if able else SDPBackend.MATH


def _one_of(qkv: list[Tensor], kernel: SDPBackend, most_queries: int, scale: float, mark: Mark) -> Tensor:
    return _sdpa(qkv, kernel, most_queries, scale)


def _sdpa(qkv: list[Tensor], kernel: SDPBackend, most_queries: int, scale: float) -> Tensor:
    query, key, value = qkv
    with sdpa_kernel([kernel]):
        return F.scaled_dot_product_attention(query[:, :, :most_queries], key, value, scale=scale)


def _dense(
    name: str, case: Case, layout: TokenLayout, kernel: SDPBackend, qkv: list[Tensor], most_queries: int
) -> Variant:
    """All tokens to all tokens, or the image tokens to the pooled keys alone, made beforehand."""
    order = torch.arange(layout.image_tokens, device=case.device)
    pooled = name == "dense-pooled"
    queries, pairs = (layout.image_tokens, case.cost.pooled_pairs) if pooled else (case.tokens, case.cost.dense_pairs)
    computed = min(queries, most_queries)
    cells = [_pooled(x, case, order) for x in qkv[1:]] if pooled else []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        given = [query[:, :, layout.image], *cells] if pooled else [query, key, value]
        return _sdpa(given, kernel, computed, case.scale)

    def rule(rows: Tensor) -> Tensor:
        return ((torch.arange(layout.key_tokens, device=case.device) >= case.tokens) == pooled).expand(len(rows), -1)

    return Variant(name, attend, rule, pairs, order, computed / queries, kernel.name.lower())


def _by_backend(name: str, case: Case, layout: TokenLayout) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    weight = torch.full((case.down_factor**2,), 1 / case.down_factor**2, device=case.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        images = key[:, :, layout.image], value[:, :, layout.image]
        pooled = tuple(pool(image, layout, weight) for image in images) if layout.pooled_tokens else None
        return clear_attention(query, key, value, layout, pooled=pooled, backend=name, scale=case.scale)  # type: ignore[arg-type]

    return attend


def _in_raster_order(case: Case, order: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    attend = raster_attention(case.grid, case.text, case.window, case.down_factor, case.device)

    def joined(x: Tensor) -> Tensor:
        return torch.cat([x, _pooled(x, case, order)], dim=2) if case.down_factor > 1 else x

    return lambda query, key, value: attend(query, joined(key), joined(value), case.scale)


def _pooled(x: Tensor, case: Case, order: Tensor) -> Tensor:
    """Means of keys or values over cells, without the library's own pooling."""
    image = x[:, :, case.text :][:, :, order.argsort()].transpose(2, 3).unflatten(3, case.grid)
    means = F.avg_pool2d(image.flatten(0, 1), case.down_factor, ceil_mode=True, count_include_pad=False)
    return means.unflatten(0, image.shape[:2]).flatten(3).transpose(2, 3)


def _rule(case: Case, order: Tensor) -> Callable[[Tensor], Tensor]:
    """The rule in dense lines: which keys, the pooled ones last, given queries see."""
    pooled = case.cost.pooled_tokens

    def seen(rows: Tensor) -> Tensor:
        yx = torch.stack([order // case.grid[1], order % case.grid[1]], dim=1)
        near = (yx[(rows - case.text).clamp(min=0)][:, None] - yx).square().sum(dim=2) < case.window**2
        is_text = (rows < case.text)[:, None]
        return torch.cat([near.new_ones(len(rows), case.text), near | is_text, ~is_text.expand(-1, pooled)], dim=1)

    return seen


def _exact(variant: Variant, case: Case, qkv: list[Tensor], rows: Tensor) -> Tensor:
    """The output of some queries in float64, one head at a time."""
    outputs = []
    for query, key, value in zip(*(x.flatten(0, 1).unsqueeze(1).double() for x in qkv), strict=True):
        if case.down_factor > 1:
            key, value = (torch.cat([x, _pooled(x[None], case, variant.order)[0]], dim=1) for x in (key, value))
        scores = query[0, rows] @ key[0].T * case.scale
        outputs.append(scores.masked_fill(~variant.rule(rows), -torch.inf).softmax(dim=1) @ value[0])
    return torch.stack(outputs).unflatten(0, (case.batch, case.heads))


def distance(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((ours.double() - expected).norm() / expected.norm())


def subject(variant: Variant, case: Case, qkv: list[Tensor], backward: bool) -> Subject:
    """A variant, to be measured forward, or forward and backward."""
    direction = torch.randn(qkv[0].transpose(1, 2).shape, dtype=case.dtype, device=case.device).transpose(1, 2)
    first_row = case.text if variant.name == "dense-pooled" else 0

    def call(mark: Mark) -> Any:
        output = variant.attend(*qkv)
        if not backward:
            return (output,)
        return output, *torch.autograd.grad(output, qkv, direction[:, :, first_row : first_row + output.shape[2]])

    def error(result: tuple[Tensor, ...]) -> float | None:
        output, *gradients = result
        if not backward:
            rows = torch.randperm(output.shape[2], device=case.device)[:SAMPLED_ROWS]
            return distance(output[:, :, rows], _exact(variant, case, qkv, first_row + rows))
        if case.tokens > MOST_TOKENS_FOR_GRADIENTS:
            return None
        rows = torch.arange(output.shape[2], device=case.device)
        expected = _exact(variant, case, qkv, first_row + rows)
        exact = torch.autograd.grad(expected, qkv, direction[:, :, first_row + rows].double())
        pairs = zip((output, *gradients), (expected, *exact), strict=True)
        return max(distance(ours.detach(), theirs.detach()) for ours, theirs in pairs)

    return Subject(variant.name, call, (1 / variant.share,), error)

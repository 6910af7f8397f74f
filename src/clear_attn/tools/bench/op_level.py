"""One attention operation: dense, in raster order, and by each backend."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from clear_attn.backends import flex, selection
from clear_attn.backends.attention import clear_attention, pool
from clear_attn.core.coordinates import Grid
from clear_attn.core.layout import TokenLayout
from clear_attn.core.plan import WindowPlan
from clear_attn.core.window_mask import BLOCK
from clear_attn.methods import Clear
from clear_attn.profiling.cost_report import Cost
from clear_attn.tools.bench.measure import Mark, Subject, measure
from clear_attn.tools.bench.raster import raster_attention

BACKENDS = tuple(name for name in selection.BACKENDS if name != "reference")  # which is not meant to be fast
VARIANTS = ("dense", "dense-pooled", "raster-flex", *BACKENDS)
KERNELS = {
    "cpu": (SDPBackend.FLASH_ATTENTION,),
    "cuda": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
}
# A backward pass has five matrix products, a forward pass two.
FORWARD_AND_BACKWARD = 3.5
# How many rows are compared with the rule; for gradients all of them, with up to so many scores.
SAMPLED_ROWS, MOST_SCORES = 64, 2**27


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
        return Cost.of_layer(self.grid, self.text, self.heads, self.head_dim, self.method, self.batch)

    @property
    def method(self) -> Clear:
        return Clear(self.window, self.down_factor)

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout([self.grid], self.text, device=self.device)

    @property
    def pairs(self) -> int:
        """The number of pairs of query and key that CLEAR computes."""
        return sum(self.cost.layer_work(self.method).values()) // (4 * self.heads * self.head_dim)

    @property
    def pooled_pairs(self) -> int:
        return self.grid[0] * self.grid[1] * self.cost.pooled_tokens


class Variant(NamedTuple):
    """One way to compute a case.

    Attributes:
        name: as in a row.
        attend: from query, key and value to the output of the first queries or of all.
        rule: the keys that given queries see, `[queries, keys and pooled keys]`.
        pairs: how many pairs are visible, of all queries.
        order: int64, the raster index of each image token.
        share: of the queries that it computes.
        kernel: which of torch's own kernels it is, where torch has several.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    rule: Callable[[Tensor], Tensor]
    pairs: int
    order: Tensor
    share: float = 1.0
    kernel: SDPBackend | None = None


def unsupported_reason(name: str, case: Case, backward: bool) -> str | None:
    """Why a variant cannot compute a case, or None where it can."""
    if name == "dense-pooled" and (case.down_factor == 1 or backward):
        return "it is for pooled keys alone, forward"
    if name in ("flex", "raster-flex"):
        if name == "raster-flex" and case.tokens < BLOCK:
            return f"it takes at least {BLOCK} tokens"
        return flex.unsupported_reason(case.device, case.dtype, case.head_dim, backward)
    return None


def inputs(case: Case, backward: bool) -> list[Tensor]:
    """Random query, key and value `[batch, heads, tokens, head_dim]`, in memory as a model's projections make them."""
    shape = case.batch, case.tokens, case.heads, case.head_dim
    parts = [torch.randn(shape, dtype=case.dtype, device=case.device) for _ in range(3)]
    return [part.requires_grad_(backward).transpose(1, 2) for part in parts]


def variants(case: Case, names: tuple[str, ...], qkv: list[Tensor], most_dense_queries: int) -> Iterator[Variant]:
    """Those named, ready to run."""
    layout, plan = case.layout, case.method.plan(case.layout)
    raster = torch.arange(layout.image_tokens, device=case.device)
    for name in names:
        if name in ("dense", "dense-pooled"):
            yield fastest_dense(name, case, qkv, most_dense_queries)
        elif name == "raster-flex":
            yield Variant(name, _in_raster_order(case), _rule(case, raster), case.pairs, raster)
        else:
            yield Variant(
                name, _by_backend(name, case, plan), _rule(case, layout.permutation), case.pairs, layout.permutation
            )


def fastest_dense(name: str, case: Case, qkv: list[Tensor], most_queries: int) -> Variant:
    """Dense attention by the fastest of torch's own kernels."""
    kernels, plan = KERNELS[case.device.type], case.method.plan(case.layout)
    candidates = [_dense(name, case, plan, kernel, qkv, most_queries) for kernel in kernels]
    if len(candidates) == 1:
        return candidates[0]
    able = {}
    for candidate in candidates:
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")  # it tells at length why a kernel cannot
            if timing := measure([subject(candidate, case, qkv)], case.device, 3)[0]:
                able[timing.median_s] = candidate
    return able[min(able)] if able else _dense(name, case, plan, SDPBackend.MATH, qkv, most_queries)


def _dense(
    name: str, case: Case, plan: WindowPlan, kernel: SDPBackend, qkv: list[Tensor], most_queries: int
) -> Variant:
    """All tokens to all tokens, or the image tokens to the pooled keys alone, made beforehand."""
    order = torch.arange(plan.image_tokens, device=case.device)
    pooled = name == "dense-pooled"
    queries, pairs = (plan.image_tokens, case.pooled_pairs) if pooled else (case.tokens, case.tokens**2)
    computed = min(queries, most_queries)
    cells = [_pooled(x, case).contiguous() for x in qkv[1:]] if pooled else []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (query[:, :, plan.image], *cells) if pooled else (query, key, value)
        with sdpa_kernel([kernel]):
            return F.scaled_dot_product_attention(query[:, :, :computed], key, value, scale=case.scale)

    def rule(rows: Tensor) -> Tensor:
        return ((torch.arange(plan.key_tokens, device=case.device) >= case.tokens) == pooled).expand(len(rows), -1)

    return Variant(name, attend, rule, pairs, order, computed / queries, kernel)


def _by_backend(name: str, case: Case, plan: WindowPlan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    weight = torch.full((case.down_factor**2,), 1 / case.down_factor**2, device=case.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        images = key[:, :, plan.image], value[:, :, plan.image]
        pooled = (pool(images[0], plan, weight), pool(images[1], plan, weight)) if plan.pooled_tokens else None
        return clear_attention(query, key, value, plan, pooled=pooled, backend=name, scale=case.scale)

    return attend


def _in_raster_order(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    attend = raster_attention(case.grid, case.text, case.window, case.down_factor, case.device)

    def joined(x: Tensor) -> Tensor:
        return torch.cat([x, _pooled(x, case)], dim=2) if case.down_factor > 1 else x

    return lambda query, key, value: attend(query, joined(key), joined(value), case.scale)


def _pooled(x: Tensor, case: Case) -> Tensor:
    """Means over cells of keys or values in raster order, without the library's own pooling."""
    image = x[:, :, case.text :].transpose(2, 3).unflatten(3, case.grid)
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
    seen = variant.rule(rows)
    raster = torch.cat([torch.arange(case.text, device=rows.device), case.text + variant.order.argsort()])
    outputs = []
    for heads in zip(*(x.flatten(0, 1) for x in qkv), strict=True):
        query, key, value = (x.double() for x in heads)
        if case.down_factor > 1:
            key, value = (torch.cat([x, _pooled(x[None, None, raster], case)[0, 0]]) for x in (key, value))
        scores = (query[rows] @ key.T * case.scale).masked_fill(~seen, -torch.inf)
        outputs.append(scores.softmax(dim=1) @ value)
    return torch.stack(outputs).unflatten(0, (case.batch, case.heads))


def distance(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((ours.double() - expected).norm() / expected.norm())


def subject(variant: Variant, case: Case, qkv: list[Tensor]) -> Subject:
    """A variant, to be measured forward, and backward where its inputs require gradients."""
    first_row = case.text if variant.name == "dense-pooled" else 0
    subject = _forward_and_backward if qkv[0].requires_grad else _forward
    return subject(variant, case, qkv, first_row)._replace(weights=(1 / variant.share,))


def _forward(variant: Variant, case: Case, qkv: list[Tensor], first_row: int) -> Subject:
    def error(output: Tensor) -> float:
        rows = torch.randperm(output.shape[2], device=case.device)[:SAMPLED_ROWS]
        return distance(output[:, :, rows], _exact(variant, case, qkv, first_row + rows))

    return Subject(variant.name, lambda mark: variant.attend(*qkv), error=error)


def _forward_and_backward(variant: Variant, case: Case, qkv: list[Tensor], first_row: int) -> Subject:
    direction = torch.randn_like(qkv[0])

    def call(mark: Mark) -> list[Tensor]:
        output = variant.attend(*qkv)
        return [output, *torch.autograd.grad(output, qkv, direction[:, :, first_row : first_row + output.shape[2]])]

    def error(result: list[Tensor]) -> float | None:
        if case.batch * case.heads * case.tokens**2 > MOST_SCORES:
            return None
        rows = first_row + torch.arange(result[0].shape[2], device=case.device)
        output = _exact(variant, case, qkv, rows)
        expected = [output, *torch.autograd.grad(output, qkv, direction[:, :, rows].double())]
        return max(distance(ours.detach(), theirs.detach()) for ours, theirs in zip(result, expected, strict=True))

    return Subject(variant.name, call, error=error)

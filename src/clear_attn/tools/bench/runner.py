"""Cases, one after the other: all variants of a case in turn, beside a large matrix product."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from clear_attn.backends.selection import select_backend
from clear_attn.core.coordinates import Grid
from clear_attn.tools.bench import model_level as model
from clear_attn.tools.bench import op_level as operation
from clear_attn.tools.bench.measure import Subject, Timing, measure
from clear_attn.tools.bench.op_level import FORWARD_AND_BACKWARD, Case
from clear_attn.tools.bench.rows import Row, machine, times

# Side of the square matrices, and how many products.
MATMUL = {"cpu": (2048, 5), "cuda": (8192, 50)}
RUNS = {"cpu": 5, "cuda": 20}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure; sizes in tokens."""

    level: str
    device: torch.device
    grids: tuple[Grid, ...]
    windows: tuple[int, ...]
    down_factors: tuple[int, ...]
    text: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    batch: int
    backward: bool
    variants: tuple[str, ...]
    blocks: int
    runs: int
    most_dense_queries: int

    def cases(self) -> Iterator[Case]:
        for grid, window, factor in itertools.product(self.grids, self.windows, self.down_factors):
            yield Case(grid, self.text, self.heads, self.head_dim, window, factor, self.dtype, self.batch, self.device)


def run(settings: Settings, say: Callable[[str], None]) -> Iterator[list[Row]]:
    """The rows of each case; `say` is told what is left out."""
    for case in settings.cases():
        torch.manual_seed(0)
        able = []
        for name in settings.variants:
            if obstacle := _unsupported_reason(settings, name, case):
                say(f"{name} is left out: {obstacle}.")
            else:
                able.append(name)
        if not able:
            continue
        choice = select_backend(case.device, case.dtype, case.head_dim, settings.backward)
        say(f"backend='auto' takes {choice.backend} here: {choice.reason}.")
        rows = (_of_model if settings.level == "model" else _of_operation)(settings, case, tuple(able))
        for name in {*able} - {row.variant for row in rows}:
            say(f"{name} is left out: it is out of memory.")
        if rows:
            yield rows


def _unsupported_reason(settings: Settings, name: str, case: Case) -> str | None:
    if settings.level == "model":
        return model.unsupported_reason(name, case)
    return operation.unsupported_reason(name, case, settings.backward)


def _of_operation(settings: Settings, case: Case, names: tuple[str, ...]) -> list[Row]:
    qkv = operation.inputs(case, settings.backward)
    variants = list(operation.variants(case, names, qkv, settings.most_dense_queries))
    subjects = [operation.subject(variant, case, qkv) for variant in variants]
    with torch.set_grad_enabled(settings.backward):
        timings, matmul_flops_per_s = _beside_products(subjects, settings, case)
    passes = FORWARD_AND_BACKWARD if settings.backward else 1
    return [
        _row(
            settings,
            case,
            variant.name,
            timing,
            flops=int(case.cost.flops(variant.pairs) * case.batch * passes),
            matmul_flops_per_s=matmul_flops_per_s,
            extrapolated=variant.share < 1,
            peak_bytes=timing.peak_bytes if variant.share == 1 else None,
            kernel=variant.kernel,
        )
        for variant, timing in zip(variants, timings, strict=True)
        if timing
    ]


def _of_model(settings: Settings, case: Case, names: tuple[str, ...]) -> list[Row]:
    subjects, kernels = zip(*model.subjects(case, names, settings.blocks, settings.most_dense_queries), strict=True)
    timings, matmul_flops_per_s = _beside_products(subjects, settings, case)
    layers = 3 * model.DOUBLE_BLOCKS
    cost = case.cost
    flops = {"dense": cost.dense_step_flops, "bound": 0}
    return [
        _row(
            settings,
            case,
            subject.name,
            timing,
            flops=layers * flops.get(subject.name, cost.step_flops),
            matmul_flops_per_s=matmul_flops_per_s,
            extrapolated=settings.blocks < model.DOUBLE_BLOCKS,
            peak_bytes=timing.peak_bytes,
            kernel=kernel,
            blocks=3 * settings.blocks,
        )
        for subject, kernel, timing in zip(subjects, kernels, timings, strict=True)
        if timing
    ]


def _beside_products(
    subjects: list[Subject] | tuple[Subject, ...], settings: Settings, case: Case
) -> tuple[list[Timing | None], float]:
    """The timings, and the FLOPs per second of a large matrix product in the same rounds."""
    side, products = MATMUL[case.device.type]
    # Few CPUs have a fast product in half precision; those that have none take minutes for it.
    dtype = torch.float32 if case.device.type == "cpu" else case.dtype
    left, right = (torch.randn(side, side, dtype=dtype, device=case.device) for _ in range(2))
    product = Subject("product", lambda mark: left @ right)
    before_each = -(-products // (settings.runs * len(subjects)))
    # Before each subject, so that on a GPU all are launched behind the same work.
    queue = [each for subject in subjects for each in [*[product] * before_each, subject]]
    timings = measure(queue, case.device, settings.runs)
    own = timings[before_each :: before_each + 1]
    del timings[before_each :: before_each + 1]
    seconds = [each for timing in timings if timing for each in timing.seconds]
    return own, 2 * side**3 / statistics.median(seconds)


def _row(
    settings: Settings,
    case: Case,
    variant: str,
    timing: Timing,
    *,
    kernel: SDPBackend | None,
    flops: int,
    matmul_flops_per_s: float,
    **rest: Any,
) -> Row:
    return Row(
        level=settings.level,
        variant=variant,
        height=case.grid[0],
        width=case.grid[1],
        text=case.text,
        heads=case.heads,
        head_dim=case.head_dim,
        window=case.window,
        down_factor=case.down_factor,
        dtype=str(case.dtype).removeprefix("torch."),
        batch=case.batch,
        backward=settings.backward,
        kernel=kernel.name.lower() if kernel else None,
        visible_flops=flops,
        flops_per_s=flops / timing.median_s,
        matmul_flops_per_s=matmul_flops_per_s,
        **times(timing),
        **machine(case.device),
        **rest,
    )

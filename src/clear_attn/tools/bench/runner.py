"""Time all variants of each case in turn, next to a large matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from clear_attn.backends.selection import select_backend
from clear_attn.tools.bench import model_level, op_level
from clear_attn.tools.bench.case import Case, Level, Row
from clear_attn.tools.bench.measure import Subject, Timing, measure

# The keys are the names that --level takes: a new level is a module here, and a name in bench_command.
LEVELS: dict[str, Level] = {"op": op_level, "model": model_level}
# Side of the square matrices, and how many products.
MATMUL = {"cpu": (2048, 5), "cuda": (8192, 50)}


def run(cases: Iterable[Case], names: Sequence[str], runs: int, report: Callable[[str], None]) -> Iterator[list[Row]]:
    """Return the rows of each case; what is left out, and why, goes to ``report``."""
    for case in cases:
        torch.manual_seed(0)
        level = LEVELS[case.level]
        if case.method.covers(case.grid):
            report(f"{case.method.as_arguments()} covers {case.height} x {case.width} tokens: nothing is saved.")
        reasons = {name: level.unsupported_reason(name, case) for name in names}
        for name, reason in reasons.items():
            if reason:
                report(f"{name} is left out: {reason}.")
        supported = [name for name, reason in reasons.items() if reason is None]
        if not supported:
            continue
        choice = select_backend(case.device, case.dtype, case.head_dim, case.backward)
        report(f"backend='auto' takes {choice.backend} here: {choice.reason}.")
        subjects = list(level.subjects(case, supported))
        with torch.set_grad_enabled(case.backward):
            timings, flops_per_s = _measure_with_matmul(subjects, case, runs)
        rows = []
        for subject, timing in zip(subjects, timings, strict=True):
            if timing:
                rows.append(Row(case, subject, timing, flops_per_s))
            else:
                report(f"{subject.name} is left out: it is out of memory.")
        if rows:
            yield rows


def _measure_with_matmul(subjects: Sequence[Subject], case: Case, runs: int) -> tuple[list[Timing | None], float]:
    """Return the timings, and the FLOPs per second of a large matrix product in the same rounds."""
    side, products = MATMUL[case.device.type]
    # Few CPUs have a fast product in half precision; the others take minutes for it.
    dtype = torch.float32 if case.device.type == "cpu" else case.dtype
    left, right = (torch.randn(side, side, dtype=dtype, device=case.device) for _ in range(2))
    product = Subject("product", lambda mark: left @ right)
    before_each = -(-products // (runs * len(subjects)))
    # Before each subject, so that on a GPU all are launched behind the same work.
    queue = [each for subject in subjects for each in [*[product] * before_each, subject]]
    timings = measure(queue, case.device, runs)
    own = timings[before_each :: before_each + 1]
    del timings[before_each :: before_each + 1]
    seconds = [each for timing in timings if timing for each in timing.seconds]
    return own, 2 * side**3 / statistics.median(seconds)

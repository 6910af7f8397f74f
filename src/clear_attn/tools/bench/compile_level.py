"""Compile the fused kernels without a GPU, and report registers, spills, shared memory and instructions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from clear_attn.backends.triton.ahead_of_time import Compiled, compile_kernel
from clear_attn.backends.triton.configurations import CANDIDATES, CHOSEN, KERNELS, Configuration, configuration
from clear_attn.backends.triton.support import triton_version, unsupported_triton

# Matrix products of one step: scores and output; with gradients also those of weights, scores and values.
PRODUCTS = {"forward": 2, "query_gradient": 3, "key_gradients": 4, "shared_key_gradients": 4}
# Per cycle and multiprocessor of an H100: 989 TFLOP/s by 132 multiprocessors at 1.83 GHz; 4 schedulers; 16 exp2;
# 128 bytes of shared memory.
FLOPS, ISSUES, EXPONENTIALS, SHARED_BYTES = 4096, 4, 16, 128

HEADER = (
    "arch",
    "kernel",
    "head_dim",
    "configuration",
    "registers",
    "spilled",
    "shared KB",
    "matrix",
    "async",
    "instructions",
    "model cycles",
)
WIDTHS = (6, 22, 8, 24, 9, 7, 9, 7, 6, 12, 0)
FOOTNOTE = (
    "* is what calls run with. Asynchronous copies and instructions are those of a warp in a step of each loop: whole "
    "blocks, then single keys. Model cycles are a model, not measured: what a step costs an H100's multiprocessor in "
    "issue, matrix products, exp2 and shared memory, if nothing overlaps."
)


@dataclasses.dataclass(frozen=True)
class CompiledRow:
    """One kernel, compiled with one configuration for one architecture.

    Attributes:
        config: rows and columns of a step, warps and stages.
        registers: registers per thread.
        spilled_bytes: spilled bytes per thread.
        shared_bytes: shared memory per program.
        matrix_instruction: the name in machine code.
        async_copies: copies from global to shared memory that a warp issues in a step of each loop.
        instructions_per_step: instructions that a warp issues in a step of each loop: whole blocks, then single keys.
        model_cycles: modeled, not measured: cycles of a multiprocessor for a step of each loop, by kind of work, if
            nothing overlaps; only for sm_90.
        chosen: whether calls run with this configuration.
        triton: the version of Triton.
    """

    level: str
    kernel: str
    arch: str
    head_dim: int
    config: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str | None
    async_copies: list[int]
    instructions_per_step: list[int]
    model_cycles: list[dict[str, float]] | None
    chosen: bool
    triton: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def compiled_rows(
    architectures: Sequence[str], head_dims: Sequence[int], say: Callable[[str], None]
) -> Iterator[CompiledRow]:
    """Yield a row for each kernel, architecture, head_dim and configuration; `say` gets what cannot be compiled.

    Raises:
        ValueError: an architecture that has no configurations, a head_dim that the kernels do not take, no Triton.
    """
    if reason := unsupported_triton():
        raise ValueError(reason)
    for architecture in architectures:
        if architecture not in CHOSEN:
            raise ValueError(f"there is no configuration for {architecture!r}; choose among {', '.join(CHOSEN)}")
    for head_dim in head_dims:
        if head_dim % 16 or not 16 <= head_dim <= 256:
            raise ValueError(f"the kernels take a head_dim that is a multiple of 16 up to 256, got {head_dim}")
    for architecture in architectures:
        for head_dim in head_dims:
            for kernel in KERNELS:
                chosen = configuration(architecture, kernel, head_dim)
                for each in dict.fromkeys((chosen, *CANDIDATES[kernel])):
                    try:
                        compiled = compile_kernel(kernel, architecture, head_dim, each)
                    except RuntimeError as error:
                        say(f"{kernel} on {architecture} with {each} does not compile: {error}")
                        continue
                    yield _row(kernel, architecture, head_dim, each, compiled, each == chosen)


def _row(
    kernel: str, architecture: str, head_dim: int, each: Configuration, compiled: Compiled, chosen: bool
) -> CompiledRow:
    steps = [len(loop.instructions) for loop in compiled.loops]
    cycles = [model_cycles(kernel, head_dim, each, count) for count in steps] if architecture == "sm_90" else None
    return CompiledRow(
        level="compile",
        kernel=kernel,
        arch=architecture,
        head_dim=head_dim,
        config=str(each),
        registers=compiled.registers,
        spilled_bytes=compiled.spilled_bytes,
        shared_bytes=compiled.shared_bytes,
        matrix_instruction=compiled.matrix_instruction,
        async_copies=[loop.async_copies for loop in compiled.loops],
        instructions_per_step=steps,
        model_cycles=cycles,
        chosen=chosen,
        triton=".".join(map(str, triton_version())),
    )


def model_cycles(kernel: str, head_dim: int, each: Configuration, instructions: int) -> dict[str, float]:
    """Return a model of the cycles of one step on an H100's multiprocessor, by what takes them."""
    products, pairs = PRODUCTS[kernel], each.rows * each.columns
    operands = 2 * each.columns * head_dim * 2  # bytes of both blocks, bfloat16
    groups = max(1, each.rows // 64)  # each reads the blocks again
    return {
        "issue": instructions * each.warps / ISSUES,
        "matrix": 2 * products * pairs * head_dim / FLOPS,
        "exp2": pairs / EXPONENTIALS,
        "shared_memory": operands * (1 + groups * products / 2) / SHARED_BYTES,
    }


def format_row(row: CompiledRow, is_first: bool) -> str:
    """Return a row as a line of a table, below the header if it is the first."""
    cells = (
        row.arch,
        row.kernel + (" *" if row.chosen else ""),
        row.head_dim,
        row.config,
        row.registers,
        row.spilled_bytes,
        f"{row.shared_bytes / 1024:.0f}",
        row.matrix_instruction,
        " ".join(map(str, row.async_copies)),
        " ".join(map(str, row.instructions_per_step)),
        "; ".join(" ".join(f"{cycles:.0f}" for cycles in each.values()) for each in row.model_cycles or ()),
    )
    lines = [HEADER, cells] if is_first else [cells]
    return "\n".join(
        "  ".join(f"{cell!s:<{width}}" for cell, width in zip(line, WIDTHS, strict=True)).rstrip() for line in lines
    )

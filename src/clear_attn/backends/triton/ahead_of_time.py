"""Compile the kernels without a GPU, and read their use of resources from the machine code."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from clear_attn.backends.triton.configurations import Configuration
from clear_attn.backends.triton.operator import constants, load_kernels

# Bytes of shared memory per program, by architecture.
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx90a": 64 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

# Prefixes of the names of matrix instructions.
_MATRIX = ("HGMMA", "UTCHMMA", "HMMA", "v_mfma")
_ASYNC_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP", "global_load_lds", "buffer_load_lds")

_TYPES = {
    **dict.fromkeys(("query", "key", "value", "output", "output_gradient", "gradient"), "*{dtype}"),
    **dict.fromkeys(("key_gradient", "value_gradient"), "*{dtype}"),
    **dict.fromkeys(("bias", "lse", "delta", "key_parts", "value_parts"), "*fp32"),
    **dict.fromkeys(("list_rows", "list_tiles", "list_blocks", "list_keys"), "*i32"),
    "list_bits": "*i16",
    "scale": "fp32",
}
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class Loop(NamedTuple):
    """One iteration of a loop with matrix products: the names of a warp's instructions, in order."""

    instructions: list[str]

    @property
    def async_copies(self) -> int:
        """The number of asynchronous copies from global to shared memory."""
        return sum(name.startswith(_ASYNC_COPIES) for name in self.instructions)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The resources of a compiled kernel.

    Attributes:
        registers: the registers per thread.
        spilled_bytes: the bytes per thread that are spilled to local memory.
        shared_bytes: the shared memory per program.
        matrix_instruction: the name of its matrix instruction, or None.
        loops: the loops with matrix products, in the order of the source.
        atomics: the number of atomic instructions.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str | None
    loops: list[Loop]
    atomics: int


def compile_kernel(
    name: str,
    architecture: str,
    head_dim: int,
    chosen: Configuration,
    dtype: torch.dtype = torch.bfloat16,
    has_bias: bool = False,
) -> Compiled:
    """Compile a kernel, in 4 to 10 seconds.

    Raises:
        ValueError: Triton knows no such architecture.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = _target(architecture, GPUTarget)
    kernel = getattr(load_kernels(), name)
    fixed = constants(chosen, head_dim, has_bias)
    types = {
        argument: "constexpr" if argument in fixed else _TYPES.get(argument, "i32").format(dtype=_DTYPES[dtype])
        for argument in kernel.arg_names
    }
    # As at run time, pointers and strides are multiples of 16, which 16-byte copies need.
    aligned = [
        number
        for number, (argument, type_) in enumerate(types.items())
        if type_.startswith("*") or argument.endswith(("_batch", "_head", "_row")) or argument == "shift"
    ]
    source = ASTSource(
        fn=kernel, signature=types, constexprs=fixed, attrs={(n,): [["tt.divisibility", 16]] for n in aligned}
    )
    found = triton.compile(source, target=target, options=chosen.options)
    read = _read_nvidia if target.backend == "cuda" else _read_amd
    return read(found)


def _target(architecture: str, make: Any) -> Any:
    if found := re.fullmatch(r"sm_(\d+)", architecture):
        return make("cuda", int(found[1]), 32)
    if re.fullmatch(r"gfx9[0-9a-f]+", architecture):
        return make("hip", architecture, 64)
    if re.fullmatch(r"gfx1[0-9a-f]+", architecture):
        return make("hip", architecture, 32)
    raise ValueError(f"unknown architecture {architecture!r}; write it as sm_90 or gfx942")


def _read_nvidia(found: Any) -> Compiled:
    import triton.backends.nvidia

    tool = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder, "kernel.cubin")
        cubin.write_bytes(found.asm["cubin"])

        def dump(option: str) -> str:
            return subprocess.run([tool, option, cubin], check=True, capture_output=True, text=True).stdout

        usage, code = dump("--dump-resource-usage"), dump("-sass")
    numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    instructions = [
        (int(place, 16), name, int(target, 16) if target else None)
        for place, name, target in re.findall(
            r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(?:[^;\n]*?\b0x([0-9a-f]+))?[^;\n]*;", code, re.M
        )
    ]
    jumps = [(place, target) for place, name, target in instructions if name.startswith("BRA") and target is not None]
    listing = [(place, name) for place, name, _ in instructions]
    # The kernels have no local arrays, so the stack holds only spilled registers.
    return _summary(numbers["REG"], numbers["STACK"], found.metadata.shared, listing, jumps, ("ATOM.", "ATOMG", "RED."))


def _read_amd(found: Any) -> Compiled:
    code = found.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", code)[1])  # type: ignore[index]

    listing: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    targets: list[tuple[int, str]] = []
    for line in code.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(listing)
        elif instruction := re.match(r"\s+([sv]_\w+|ds_\w+|global_\w+|buffer_\w+|flat_\w+|scratch_\w+)", line):
            if jump := re.match(r"\s+s_c?branch\w*\s+(\.LBB\w+)", line):
                targets.append((len(listing), jump[1]))
            listing.append((len(listing), instruction[1]))
    jumps = [(place, labels[label]) for place, label in targets]
    registers = number("vgpr_count")
    return _summary(
        registers, 4 * number("vgpr_spill_count"), found.metadata.shared, listing, jumps, ("global_atomic",)
    )


def _summary(
    registers: int,
    spilled: int,
    shared: int,
    listing: list[tuple[int, str]],
    jumps: list[tuple[int, int]],
    atomics: tuple[str, ...],
) -> Compiled:
    matrix = next((start for start in _MATRIX if any(name.startswith(start) for _, name in listing)), None)
    loops = list(_innermost_loops(listing, jumps, matrix)) if matrix else []
    return Compiled(registers, spilled, shared, matrix, loops, sum(name.startswith(atomics) for _, name in listing))


def _innermost_loops(listing: list[tuple[int, str]], jumps: list[tuple[int, int]], matrix: str) -> Iterator[Loop]:
    """Yield the innermost loops with matrix products, found by backward jumps, in their order.

    Compilers place waiting code after the loops, and it jumps back into them. Such a jump overlaps a shorter loop and
    is skipped.
    """
    taken: list[tuple[int, int, list[str]]] = []
    for first, last in sorted(
        {(target, place) for place, target in jumps if target <= place}, key=lambda x: x[1] - x[0]
    ):
        body = [name for place, name in listing if first <= place <= last]
        apart = all(last < other_first or other_last < first for other_first, other_last, _ in taken)
        if apart and any(name.startswith(matrix) for name in body):
            taken.append((first, last, body))
    yield from (Loop(body) for _, _, body in sorted(taken))

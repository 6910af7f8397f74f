"""Check where the fused kernels can run."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
import sys
from typing import Any

import torch

from clear_attn.backends.triton import interpreter
from clear_attn.backends.triton.configurations import CHOSEN, INTERPRETED

# The oldest Triton that is tested, which torch 2.11 requires.
OLDEST_TRITON = (3, 6)
DTYPES = (torch.bfloat16, torch.float16)
MOST_HEAD_DIM = 256


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool) -> str | None:
    """Return why the kernels cannot run a call, or None if they can."""
    if reason := unsupported_device(device):
        return reason
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype not in DTYPES:
        return f"it takes bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    if head_dim % 16 or not 16 <= head_dim <= MOST_HEAD_DIM:
        return f"it takes a head_dim that is a multiple of 16 up to {MOST_HEAD_DIM}, got {head_dim}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def unsupported_device(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device of this machine, or None if they can."""
    return _unsupported_device(device)


@functools.cache
def _unsupported_device(device: torch.device) -> str | None:
    if reason := unsupported_triton():
        return reason
    if device.type == "cpu":
        wanted = f"set {interpreter.VARIABLE}=1 before Python starts to run the kernels in Triton's interpreter"
        return None if interpreter.is_requested() else f"the tensors are on a CPU; {wanted}"
    if device.type != "cuda":
        return f"it is not tested on devices of type {device.type!r}"
    if interpreter.is_requested():
        return f"{interpreter.VARIABLE}=1 asks for the interpreter, which is for tensors on a CPU; unset it"
    found = architecture(device)
    return None if found in CHOSEN else f"it was compiled for {', '.join(CHOSEN)} alone, and this GPU is {found}"


def unsupported_triton() -> str | None:
    """Return why the installed Triton cannot be used, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return (
            f"Triton is not installed (there is none for {sys.platform})"
            if sys.platform != "linux"
            else ("Triton is not installed; pip install triton, in the version that belongs to torch")
        )
    version = triton_version()
    if version < OLDEST_TRITON:
        return f"it needs Triton {'.'.join(map(str, OLDEST_TRITON))} or later, found {'.'.join(map(str, version))}"
    return None


def triton_version() -> tuple[int, ...]:
    """Return the major and minor version of the installed Triton."""
    names = ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm")
    for name in names:
        try:
            found = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
        if found:
            return int(found[1]), int(found[2])
    return OLDEST_TRITON  # installed under an unknown name


def architecture(device: torch.device) -> str:
    """Return a device's architecture, such as sm_90 or gfx942; for a CPU, the one that is interpreted."""
    if device.type == "cpu":
        return INTERPRETED
    if not torch.cuda.is_available():
        return "missing"
    chip: Any = torch.cuda.get_device_properties(device)
    return chip.gcnArchName.partition(":")[0] if torch.version.hip else f"sm_{chip.major}{chip.minor}"

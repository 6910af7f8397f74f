"""Processes started by torchrun."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist


def launched() -> int:
    """Return the number of processes under torchrun; 0 if torchrun has not started this one."""
    return int(os.environ.get("WORLD_SIZE", 0)) if "LOCAL_RANK" in os.environ else 0


def join() -> None:
    """Initialize torch.distributed under torchrun, unless that is done.

    Raises:
        RuntimeError: torchrun has not started this process.
    """
    if dist.is_initialized():
        return
    if not launched():
        raise RuntimeError(
            "this process is not one of several ranks; start the script with torchrun --nproc_per_node N, or call "
            "torch.distributed.init_process_group() before"
        )
    dist.init_process_group()


def is_first() -> bool:
    """Return whether this process is the one that writes files."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return not launched() or int(os.environ.get("RANK", 0)) == 0


def own_device() -> torch.device:
    """Return the GPU of this rank on its machine, made the current one; the CPU if there are no GPUs.

    Raises:
        ValueError: there are fewer GPUs than ranks.
    """
    gpus, rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if not gpus:
        return torch.device("cpu")
    if rank >= gpus:
        raise ValueError(f"there are {gpus} GPUs, and this is rank {rank} here; start torchrun --nproc_per_node {gpus}")
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def interrupt_on_sigterm() -> None:
    """Raise KeyboardInterrupt on SIGTERM, which torchrun sends to the other ranks when one fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def ignore_signals() -> None:
    """Ignore further signals in a process that is ending: torchrun repeats a Ctrl-C that all ranks have received."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

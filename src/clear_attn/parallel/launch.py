"""Processes that torchrun has started."""

from __future__ import annotations

import os
import signal

import torch
import torch.distributed as dist


def launched() -> int:
    """How many processes torchrun has started, this one included; 0 where it has not started this one."""
    return int(os.environ.get("WORLD_SIZE", 0)) if "LOCAL_RANK" in os.environ else 0


def join() -> None:
    """Joins the ranks that torchrun has started, unless that is done.

    Raises:
        RuntimeError: torchrun has not started this process.
    """
    if dist.is_initialized():
        return
    if not launched():
        raise RuntimeError(
            "this process is no rank of several; start the script with torchrun --nproc_per_node N, or call "
            "torch.distributed.init_process_group() before"
        )
    dist.init_process_group()


def is_first() -> bool:
    """Whether this process is the one that writes, for all."""
    return not dist.is_initialized() or dist.get_rank() == 0


def own_device() -> torch.device:
    """The GPU that is this rank's on its machine, made the current one; the CPU where there are none.

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


def stop_as_by_ctrl_c() -> None:
    """Lets SIGTERM, by which torchrun ends the others when one rank fails, raise a KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def finish_what_is_begun() -> None:
    """Lets no further signal interrupt a process that is ending: torchrun hands on the Ctrl-C that all have had."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

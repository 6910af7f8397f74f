"""What goes between ranks: sent now, awaited later, and whoever does not answer is named."""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clear_attn.parallel.handles import remember
from clear_attn.utils._torch import default_store, timeout_of

# Seconds, of those waiting, between two looks whether a rank has raised the alarm.
LOOK = 0.5
# At most how long the others are given to say that they are alive, when one did not answer.
GRACE = datetime.timedelta(seconds=60)

# What may be broadcast.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_DIMENSIONS = 6

Value = TypeVar("Value")
Pending = Callable[[], Value]


class Links:
    """The ranks that share a picture, in a process group.

    Args:
        group: theirs.

    Attributes:
        rank, ranks (`int`): which one this is, of how many, in the group.
        names: by rank in the group, its rank in the whole job, for errors.
        handle: see `clear_attn.parallel.handles`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.handle = remember(self)
        timeout = timeout_of(group)
        self.grace = min(GRACE, timeout / 4)
        self.patience = timeout - self.grace
        # Small things that the host reads go past the devices.
        self.names = dist.get_process_group_ranks(group)
        self._control = dist.new_group(self.names, timeout, "gloo", use_local_synchronization=True)
        self._roll = f"clear_attn/{'-'.join(map(str, self.names))}"
        self._store = default_store()

    def __deepcopy__(self, memo: object) -> Links:
        return self  # a process has one place in a group

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Pending[None]:
        """Starts to send tensors to peers, and to receive into others; what is sent must live until the end."""
        operations = [
            *(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in sends),
            *(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in receives),
        ]
        if not operations:
            return lambda: None
        device = operations[0].tensor.device
        return self._start("tokens at a border", device, lambda: dist.batch_isend_irecv(operations))

    def gather(self, own: Tensor, lengths: Sequence[int], dim: int) -> Pending[list[Tensor]]:
        """Starts to gather a tensor of each rank, whose lengths along a dimension differ."""
        most = max(lengths)
        padded = own.new_zeros(*own.shape[:dim], most, *own.shape[dim + 1 :])
        padded.narrow(dim, 0, own.shape[dim]).copy_(own)
        parts = [torch.empty_like(padded) for _ in range(self.ranks)]
        wait = self._start(
            "tokens of all", own.device, lambda: [dist.all_gather(parts, padded, group=self.group, async_op=True)]
        )

        def finish() -> list[Tensor]:
            wait()
            return [part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)]

        return finish

    def add_up(self, own: Tensor) -> Pending[None]:
        """Starts to add up a tensor over all ranks, in place."""
        return self._start("text tokens", own.device, lambda: [dist.all_reduce(own, group=self.group, async_op=True)])

    def broadcast(self, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """What the first rank makes, for all; its shape and dtype go before it.

        Raises:
            RuntimeError: the first rank could not make it, which is told on all others.
        """
        header = torch.zeros(2 + MOST_DIMENSIONS, dtype=torch.int64, device="cpu")
        tensor = torch.empty(0)
        if self.rank == 0:
            try:
                tensor = make().contiguous()
                header[: 2 + tensor.ndim] = torch.tensor([1 + DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape])
            except Exception:
                self.compare(header)  # so that nobody waits for it
                raise
        dtype, dimensions, *shape = self.compare(header)[0].tolist()
        if not dtype:
            raise RuntimeError(f"rank {self.names[0]} failed at what it makes for all; look at what it last wrote")
        if self.rank:
            tensor = torch.empty(shape[:dimensions], dtype=DTYPES[dtype - 1], device=device)
        wait = self._start(
            "the decoded picture",
            device,
            lambda: [dist.broadcast(tensor, group=self.group, group_src=0, async_op=True)],
        )
        wait()
        return tensor

    def compare(self, own: Tensor) -> Tensor:
        """All ranks' values of a small tensor on the CPU, `[ranks, ...]`."""
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        self._start("a call", own.device, lambda: [dist.all_gather(parts, own, group=self._control, async_op=True)])()
        return torch.stack(parts)

    def _start(self, what: str, device: torch.device, start: Callable[[], list[Any]]) -> Pending[None]:
        with self._naming(what):
            works = start()

        def wait() -> None:
            with self._naming(what):
                if device.type == "cpu":
                    self._wait_on_host(works)
                else:  # the device waits, and the process group's own watch ends the job where it waits in vain
                    for work in works:
                        work.wait()

        return wait

    def _wait_on_host(self, works: Sequence[Any]) -> None:
        """Waits, and gives up also where another rank has."""
        over, failures = threading.Event(), []

        def wait() -> None:
            try:
                for work in works:
                    work.wait(self.patience)
            except RuntimeError as error:
                failures.append(error)
            finally:
                over.set()

        threading.Thread(target=wait, daemon=True).start()
        while not over.wait(LOOK):
            if self._store.check([f"{self._roll}/alarm"]):
                raise RuntimeError("another rank has given up waiting")
        if failures:
            raise failures[0]

    @contextlib.contextmanager
    def _naming(self, what: str) -> Iterator[None]:
        """Raises what went wrong between ranks as an error that names those that are gone."""
        try:
            yield
        except torch.OutOfMemoryError:  # a RuntimeError, too, and no other rank's fault
            raise
        except RuntimeError as error:
            gone = ", ".join(map(str, self._missing())) or "none, so look at the network between them"
            raise RuntimeError(
                f"rank {self.names[self.rank]} waited in vain for {what}; ranks that do not answer: {gone}. Look at "
                "what they last wrote, and start all ranks again"
            ) from error

    def _missing(self) -> list[int]:
        """The names of those that do not come to a roll call: all that wait come, when one has given up."""
        silent, end = set(range(self.ranks)), time.monotonic() + self.grace.total_seconds()
        try:
            self._store.set(f"{self._roll}/alarm", "")
            self._store.set(f"{self._roll}/{self.rank}", "")
            while silent and time.monotonic() < end:
                time.sleep(LOOK / 10)
                silent = {rank for rank in silent if not self._store.check([f"{self._roll}/{rank}"])}
        except RuntimeError:
            return [0]  # of the job, where the store is
        return [self.names[rank] for rank in sorted(silent)]

"""Asynchronous communication between ranks. Errors name the ranks that do not answer."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from clear_attn.parallel.handles import remember
from clear_attn.utils._torch import default_store, timeout_of

# Seconds between two checks of the alarm, a key in the store that a rank sets when it times out.
POLL_S = 0.5
# The longest time that the other ranks have to report after the alarm.
GRACE = datetime.timedelta(seconds=60)

# Dtypes that may be broadcast.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_DIMENSIONS = 6

Value = TypeVar("Value")
# A function that waits for a result and returns it.
Future = Callable[[], Value]

# The next number of a communicator among the same ranks; all ranks make them in the same order.
_made: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


class Communicator:
    """The ranks of a process group that share an image.

    Args:
        group: the process group.

    Attributes:
        rank, ranks (`int`): this rank and the number of ranks, in the group.
        names: the global rank of each rank in the group, for errors.
        handle: see `clear_attn.parallel.handles`.

    Raises:
        RuntimeError: a rank of the group does not make its communicator in time.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.handle = remember(self)
        timeout = timeout_of(group)
        self.grace = min(GRACE, timeout / 4)
        self.patience = timeout - self.grace
        self.names = dist.get_process_group_ranks(group)
        members = "-".join(map(str, self.names))
        self._prefix = f"clear_attn/{members}/{next(_made[members])}"
        self._store = default_store()
        self._meet()
        # A second group, for small tensors on the CPU.
        self._control = dist.new_group(self.names, timeout, "gloo", use_local_synchronization=True)

    def __deepcopy__(self, memo: object) -> Communicator:
        return self  # the ranks of a group have one communicator

    def _meet(self) -> None:
        """Wait for all ranks. Later operations would hang without one of them, and could not name it."""
        absent = self._wait_for("meeting", self.patience, range(self.ranks))
        if absent:
            raise RuntimeError(
                f"rank {self.names[self.rank]} timed out waiting for clear_attn.parallelize(); ranks that do not call "
                f"it: {self._name(absent)}. Call it on every rank of the group, and look at their last output"
            )

    def exchange(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[tuple[int, Tensor]]) -> Future[None]:
        """Start to send tensors to peers and to receive tensors in place. The future keeps the sent tensors alive."""
        operations = [
            *(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in sends),
            *(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in receives),
        ]
        if not operations:
            return lambda: None
        device = operations[0].tensor.device
        return self._start("halo tokens", device, lambda: dist.batch_isend_irecv(operations))

    def all_gather(self, own: Tensor, lengths: Sequence[int], dim: int) -> Future[list[Tensor]]:
        """Start to gather a tensor from each rank; their lengths along one dimension may differ."""
        most = max(lengths)
        padded = own.new_zeros(*own.shape[:dim], most, *own.shape[dim + 1 :])
        padded.narrow(dim, 0, own.shape[dim]).copy_(own)
        parts = [torch.empty_like(padded) for _ in range(self.ranks)]
        wait = self._start(
            "all tokens", own.device, lambda: [dist.all_gather(parts, padded, group=self.group, async_op=True)]
        )

        def finish() -> list[Tensor]:
            wait()
            return [part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)]

        return finish

    def all_reduce(self, own: Tensor) -> Future[None]:
        """Start to sum a tensor over all ranks, in place."""
        return self._start("text tokens", own.device, lambda: [dist.all_reduce(own, group=self.group, async_op=True)])

    def broadcast(self, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Return on all ranks the tensor that `make` returns on the first one; its shape and dtype are sent first.

        Raises:
            RuntimeError: on all other ranks, if `make` failed on the first one.
        """
        header = torch.zeros(2 + MAX_DIMENSIONS, dtype=torch.int64, device="cpu")
        tensor = torch.empty(0)
        if self.rank == 0:
            try:
                tensor = make().contiguous()
                header[: 2 + tensor.ndim] = torch.tensor([1 + DTYPES.index(tensor.dtype), tensor.ndim, *tensor.shape])
            except Exception:
                self.compare(header)  # zeros, so that the other ranks do not wait for the tensor
                raise
        dtype, dimensions, *shape = self.compare(header)[0].tolist()
        if not dtype:
            raise RuntimeError(f"rank {self.names[0]} failed to compute what it sends to all; see its own error")
        if self.rank:
            tensor = torch.empty(shape[:dimensions], dtype=DTYPES[dtype - 1], device=device)
        wait = self._start(
            "the decoded image",
            device,
            lambda: [dist.broadcast(tensor, group=self.group, group_src=0, async_op=True)],
        )
        wait()
        return tensor

    def compare(self, own: Tensor) -> Tensor:
        """Return the values of a small CPU tensor on all ranks, `[ranks, ...]`."""
        parts = [torch.empty_like(own) for _ in range(self.ranks)]
        self._start("a call", own.device, lambda: [dist.all_gather(parts, own, group=self._control, async_op=True)])()
        return torch.stack(parts)

    def _start(self, what: str, device: torch.device, start: Callable[[], list[Any]]) -> Future[None]:
        with self._naming_absent(what):
            works = start()

        def wait() -> None:
            with self._naming_absent(what):
                if device.type == "cpu":
                    self._wait_on_host(works)
                else:  # only the device waits; after the timeout, the watchdog of the process group ends the job
                    for work in works:
                        work.wait()

        return wait

    def _wait_on_host(self, works: Sequence[Any]) -> None:
        """Wait on the CPU, until another rank raises the alarm."""
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
        while not over.wait(POLL_S):
            if self._store.check([f"{self._prefix}/alarm"]):
                raise RuntimeError("another rank timed out")
        if failures:
            raise failures[0]

    @contextlib.contextmanager
    def _naming_absent(self, what: str) -> Iterator[None]:
        """Convert a communication error to one that names the ranks that do not answer."""
        try:
            yield
        except torch.OutOfMemoryError:  # a RuntimeError, but not of communication
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.names[self.rank]} timed out waiting for {what}; {self._diagnose()}"
            ) from error

    def _diagnose(self) -> str:
        """Return which ranks do not answer, and what to do.

        Every waiting rank sets the alarm and reports in the store. Ranks without a report do not answer. The first rank
        to find out writes the result into the store, for ranks that come late. It then waits until the others have read
        it, because the store may end with this process.
        """
        again = "Look at their last output, and start all ranks again"
        found, absent = f"{self._prefix}/found", list(range(self.ranks))
        end = time.monotonic() + self.grace.total_seconds()
        try:
            for key in ("alarm", f"report/{self.rank}"):
                self._store.set(f"{self._prefix}/{key}", "")
            while absent and time.monotonic() < end and not self._store.check([found]):
                time.sleep(POLL_S / 10)
                absent = self._unset("report", absent)
            if not self._store.check([found]):
                self._store.set(found, ",".join(map(str, absent)))
            absent = [int(rank) for rank in self._store.get(found).decode().split(",") if rank]
            others = [rank for rank in range(self.ranks) if rank not in absent]
            self._wait_for("end", datetime.timedelta(seconds=4 * POLL_S), others)
        except RuntimeError:  # the store has ended
            if self.rank in absent:
                return f"the store ended with rank 0, which failed or has stopped waiting for this rank. {again}"
        if self.rank in absent:
            return f"this rank came late, and the others have stopped waiting for it. {again}, with a longer timeout"
        if not absent:
            return f"all ranks answer, so check the network between them. {again}"
        return f"ranks that do not answer: {self._name(absent)}. {again}"

    def _name(self, ranks: Sequence[int]) -> str:
        return ", ".join(str(self.names[rank]) for rank in ranks)

    def _unset(self, key: str, ranks: Sequence[int]) -> list[int]:
        return [rank for rank in ranks if not self._store.check([f"{self._prefix}/{key}/{rank}"])]

    def _wait_for(self, key: str, patience: datetime.timedelta, ranks: Sequence[int]) -> list[int]:
        """Set a key in the store for this rank, and return the ranks that do not set theirs in time."""
        self._store.set(f"{self._prefix}/{key}/{self.rank}", "")
        absent, end = list(ranks), time.monotonic() + patience.total_seconds()
        with contextlib.suppress(RuntimeError):  # the store ends with a rank that has stopped waiting
            while (absent := self._unset(key, absent)) and time.monotonic() < end:
                time.sleep(POLL_S / 10)
        return absent

"""Time and memory of several subjects, measured in turn in one process."""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Mark = Callable[[], None]


class Subject(NamedTuple):
    """Something to time.

    Attributes:
        name: the name in a row.
        call: a function that runs it once and returns a result. It may call its argument to end a part of the time.
        weights: factors of the parts; not 1 if only a share of the work is done.
        error: a function that returns the error of a result, or None if it cannot be computed.
        around: a context manager around the run, outside the time.
        flops: the FLOPs of the whole work, for the rate.
        kernel: which of torch's kernels computes it, if torch has several.
        peak_scales: whether memory grows with the share of the work; the peak of a share is then not reported.
    """

    name: str
    call: Callable[[Mark], Any]
    weights: tuple[float, ...] = (1.0,)
    error: Callable[[Any], float | None] = lambda result: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    flops: int = 0
    kernel: str | None = None
    peak_scales: bool = True

    @property
    def extrapolated(self) -> bool:
        """Whether only a share of the work is done, and the time is scaled."""
        return any(weight != 1 for weight in self.weights)


class Timing(NamedTuple):
    """The measurements of one subject: times in seconds, memory in bytes.

    Attributes:
        seconds: the time of each run.
        compile_s: the extra time of the first run, which compiles.
        peak_bytes: the peak memory above that before the run; None if unknown.
        error: the error of a result.
    """

    seconds: list[float]
    compile_s: float
    peak_bytes: int | None
    error: float | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(subjects: Sequence[Subject], device: torch.device, runs: int) -> list[Timing | None]:
    """Run each subject twice, for compilation and for memory, and then all in turn, ``runs`` times.

    Returns:
        The timings, None for a subject that runs out of memory.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return _measure(subjects, device, runs)


def _measure(subjects: Sequence[Subject], device: torch.device, runs: int) -> list[Timing | None]:
    warm: dict[int, tuple[float, int, float | None]] = {}
    for number, subject in enumerate(subjects):
        with contextlib.suppress(torch.OutOfMemoryError):
            warm[number] = _warm_up(subject, device)
    rounds = []
    for _ in range(runs):
        marks = {}
        for number in warm:
            with subjects[number].around():
                marks[number] = _marks(subjects[number], device)
        # Read after the round: waiting within it would show the time it takes to launch small kernels.
        rounds.append({number: _parts(each, device) for number, each in marks.items()})
    timings: list[Timing | None] = [None] * len(subjects)
    for number, (first_s, peak, error) in warm.items():
        subject, parts = subjects[number], [parts[number] for parts in rounds]
        seconds = [sum(p * w for p, w in zip(run, subject.weights, strict=True)) for run in parts]
        compile_s = max(0.0, first_s - statistics.median(map(sum, parts)))
        known = peak if not (subject.extrapolated and subject.peak_scales) else None
        timings[number] = Timing(seconds, compile_s, known, error)
    return timings


def _warm_up(subject: Subject, device: torch.device) -> tuple[float, int, float | None]:
    with subject.around():
        first_s = sum(_parts(_marks(subject, device), device))
        peak, result = _peak_bytes(subject, device)
    return first_s, peak, subject.error(result)


def _marks(subject: Subject, device: torch.device) -> list[Any]:
    marks: list[Any] = []

    def mark() -> None:
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    mark()
    subject.call(mark)
    mark()
    return marks


def _parts(marks: Sequence[Any], device: torch.device) -> list[float]:
    """Return the seconds between each mark and the next."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]
    return [end - start for start, end in itertools.pairwise(marks)]


def _peak_bytes(subject: Subject, device: torch.device) -> tuple[int, Any]:
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = subject.call(lambda: None)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - held, result
    # torch counts memory on a CPU only in the records of its profiler.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = subject.call(lambda: None)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        records = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for record in sorted((each for each in records if each["name"] == "[memory]"), key=lambda each: each["ts"]):
        held += record["args"]["Bytes"]
        peak = max(peak, held)
    return peak, result

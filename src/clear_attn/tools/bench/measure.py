"""Times and memory of several subjects, run in turn in one process."""

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
        name: for people.
        call: does it once, and returns a result; may call what it is given at points that cut the time into parts.
        weights: by which the parts are multiplied; other than 1 where only a share of the work is done.
        error: how far a result is off, or None where that cannot be told.
        around: a context in which it runs, entered and left outside the time.
    """

    name: str
    call: Callable[[Mark], Any]
    weights: tuple[float, ...] = (1.0,)
    error: Callable[[Any], float | None] = lambda result: None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


class Timing(NamedTuple):
    """What was seen of one subject; times in seconds, memory in bytes.

    Attributes:
        seconds: of each run.
        compile_s: how much longer the first run took, which compiles, without the weights.
        peak_bytes: most memory held at once beyond what was held before the run.
        error: of a result.
    """

    seconds: list[float]
    compile_s: float
    peak_bytes: int
    error: float | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def measure(subjects: Sequence[Subject], device: torch.device, runs: int) -> list[Timing | None]:
    """Runs each subject once to warm up, once to weigh it, and then all in turn, so many times.

    Returns None for a subject for which memory is too small.
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
        marks = []
        for number in warm:
            with subjects[number].around():
                marks.append(_marks(subjects[number], device))
        # Read when all is done: waiting in between would show the time it takes to launch small kernels.
        rounds.append([_parts(each, device) for each in marks])
    timings: list[Timing | None] = [None] * len(subjects)
    for (number, (first_s, peak, error)), parts in zip(warm.items(), zip(*rounds, strict=True), strict=True):
        seconds = [sum(p * w for p, w in zip(run, subjects[number].weights, strict=True)) for run in parts]
        timings[number] = Timing(seconds, max(0.0, first_s - statistics.median(map(sum, parts))), peak, error)
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
    """Seconds between each mark and the next."""
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
    # torch counts a CPU's memory only in its profiler's records.
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

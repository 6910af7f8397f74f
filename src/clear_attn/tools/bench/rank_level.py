"""What ranks send to each other in one step, and how a step's time scales: counted and computed, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clear_attn.parallel.communication_volume import CommunicationVolume, count_volume
from clear_attn.tools.bench.case import Case
from clear_attn.utils.tables import format_table


class Network(NamedTuple):
    """Bytes per second that a rank sends, and the latency of a message in seconds."""

    bytes_per_s: float
    latency_s: float


# One direction of an H100's NVLink, and a port of 100 Gbit/s for each GPU; the latencies are round guesses.
NETWORKS = {"NVLink, 450 GB/s": Network(450e9, 10e-6), "Ethernet, 12.5 GB/s": Network(12.5e9, 50e-6)}
# Attention layers of FLUX.1, and channels of its output.
LAYERS, CHANNELS = 57, 64


@dataclass(frozen=True)
class Times:
    """Seconds of a step on one rank: attention, and all else."""

    attention_s: float
    rest_s: float


class Scaling(NamedTuple):
    """One image on several ranks; bytes are those of the rank that sends most in a layer.

    Attributes:
        times: of one rank, as measured; None if they are not known.
    """

    case: Case
    ranks: int
    traffic: CommunicationVolume
    times: Times | None

    @property
    def step_bytes(self) -> int:
        return LAYERS * self.traffic.layer + self.traffic.output(CHANNELS)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a step by network; empty without times."""
        times = self.times
        return {name: self._step_seconds(times, network) for name, network in NETWORKS.items()} if times else {}

    def _step_seconds(self, times: Times, network: Network) -> float:
        """Return the seconds of the rank with the largest share, if nothing that is sent is hidden behind work.

        Attention shrinks with the share of the image tokens, all else with that of all tokens: every rank has the text.
        A halo is one message; a gathering of n ranks is n - 1 in turn, and a sum 2 (n - 1).
        """
        sent, case, others = self.traffic, self.case, self.ranks - 1
        messages = bool(sent.halo) + others * (bool(sent.pooled) + 3 * bool(sent.text_sum))
        layer = sent.layer / network.bytes_per_s + messages * network.latency_s
        output = sent.output(CHANNELS) / network.bytes_per_s + others * network.latency_s
        attention_s = sent.tokens / (case.height * case.width) * times.attention_s
        return attention_s + (sent.tokens + case.text) / case.tokens * times.rest_s + LAYERS * layer + output

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of a result file."""
        return {
            **{name: getattr(self.case, name) for name in ("height", "width", "window", "down_factor")},
            "ranks": self.ranks,
            "traffic": dataclasses.asdict(self.traffic),
            "step_bytes": self.step_bytes,
            "times": dataclasses.asdict(self.times) if self.times else None,
            "seconds": self.seconds,
            "layer_bytes": self.traffic.layer,
        }


def scale(case: Case, ranks: int, times: Times | None) -> Scaling:
    """Count what is sent for a case on a number of ranks.

    Raises:
        ValueError: more ranks than the image has tile rows.
    """
    size = {"heads": case.heads, "head_dim": case.head_dim, "element": case.dtype.itemsize, "batch": case.batch}
    sent = [count_volume(case.layout, case.method, rank, ranks, **size) for rank in range(ranks)]
    return Scaling(case, ranks, max(sent, key=lambda each: each.layer), times)


def format_scalings(scalings: Sequence[Scaling]) -> str:
    """Return one case on several numbers of ranks as a table."""
    first = scalings[0]
    computed = "; seconds of a step are computed, not measured" if first.times else ""
    header = ["ranks", "halo", "pooled", "text", "MB a layer", "ring", "all-to-all", "GB a step"]
    for name in first.seconds:
        header += [name.split(",")[0], "times faster"]
    return (
        f"{first.case.sizes}: MB that the busiest rank sends in a layer, and GB in a step of {LAYERS}{computed}\n"
        f"{format_table(header, map(_cells, scalings))}"
    )


def _cells(row: Scaling) -> list[str]:
    sent = row.traffic
    sizes = sent.halo, sent.pooled, sent.text_lse + sent.text_sum, sent.layer, sent.ring, sent.all_to_all
    cells = [str(row.ranks), *("no" if size is None else f"{size / 1e6:,.1f}" for size in sizes)]
    cells.append(f"{row.step_bytes / 1e9:,.2f}")
    for seconds in row.seconds.values():
        assert row.times
        cells += [f"{seconds:.3g} s", f"{(row.times.attention_s + row.times.rest_s) / seconds:.1f}"]
    return cells

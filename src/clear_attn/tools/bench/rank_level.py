"""What ranks send to each other for one step, and how a step's time would scale: counted and computed, not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from clear_attn.core.layout import TokenLayout
from clear_attn.parallel.communication_volume import CommunicationVolume, count_volume
from clear_attn.tools.bench.op_level import Case
from clear_attn.tools.bench.rows import TOKEN


@dataclass(frozen=True)
class Network:
    """Attributes: bytes a second that a rank sends, and seconds that a message takes besides."""

    name: str
    bytes_per_s: float
    latency_s: float


# One direction of an H100's NVLink, and a port of 100 Gbit/s for each GPU; the latencies are round guesses.
NETWORKS = (Network("NVLink, 450 GB/s", 450e9, 10e-6), Network("Ethernet, 12.5 GB/s", 12.5e9, 50e-6))
# Of FLUX.1: attention layers, and channels of the output.
LAYERS, CHANNELS = 57, 64


@dataclass(frozen=True)
class Times:
    """Seconds of a step on one rank: in attention, and in all else."""

    attention_s: float
    rest_s: float

    @property
    def step_s(self) -> float:
        return self.attention_s + self.rest_s


@dataclass(frozen=True)
class Scaling:
    """Of one picture on so many ranks; bytes are those of the rank that sends most in a layer.

    Attributes:
        times: of one rank, as measured; None where not known.
        seconds: of a step, by network; empty without times.
    """

    height: int
    width: int
    window: int
    down_factor: int
    ranks: int
    traffic: CommunicationVolume
    step_bytes: int
    times: Times | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "layer_bytes": self.traffic.layer}


def scalings(cases: Sequence[Case], ranks: Sequence[int], times: Times | None) -> Iterator[Scaling]:
    """Counts each case on each number of ranks.

    Raises:
        ValueError: more ranks than a picture has tile rows.
    """
    for case in cases:
        layout = case.layout
        for number in ranks:
            sent = [
                count_volume(
                    layout,
                    case.method,
                    rank,
                    number,
                    heads=case.heads,
                    head_dim=case.head_dim,
                    element=case.dtype.itemsize,
                    batch=case.batch,
                )
                for rank in range(number)
            ]
            most = max(sent, key=lambda each: each.layer)
            step = LAYERS * most.layer + most.output(CHANNELS)
            seconds = {each.name: step_seconds(layout, most, times, each) for each in NETWORKS} if times else {}
            yield Scaling(*case.grid, case.window, case.down_factor, number, most, step, times, seconds)


def step_seconds(layout: TokenLayout, sent: CommunicationVolume, times: Times, network: Network) -> float:
    """Of the rank with the largest share; nothing that is sent is taken to be hidden behind work.

    Attention shrinks with the share of the image tokens, and all else with that of all tokens, of which every rank has
    those of the text. A halo is one message; a gathering of n ranks is n - 1 in turn, and a sum 2 (n - 1).
    """
    share = sent.tokens / layout.image_tokens
    tokens = (sent.tokens + layout.text_tokens) / (layout.image_tokens + layout.text_tokens)
    others = sent.ranks - 1
    messages = bool(sent.halo) + others * (bool(sent.pooled) + 3 * bool(sent.text_sum))
    layer = sent.layer / network.bytes_per_s + messages * network.latency_s
    output = sent.output(CHANNELS) / network.bytes_per_s + others * network.latency_s
    return share * times.attention_s + tokens * times.rest_s + LAYERS * layer + output


HEADER = ("ranks", "halo", "pooled", "text", "MB a layer", "ring", "all-to-all", "GB a step")


def cells(rows: Sequence[Scaling]) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of one case's table, in MB a layer and GB a step."""
    first, lines = rows[0], []
    header = [*HEADER, *(text for name in first.seconds for text in (name.split(",")[0], "times faster"))]
    for row in rows:
        sent = row.traffic
        text = sent.text_lse + sent.text_sum
        sizes = sent.halo, sent.pooled, text, sent.layer, sent.ring, sent.all_to_all
        megabytes = ["no" if size is None else f"{size / 1e6:,.1f}" for size in sizes]
        line = [str(row.ranks), *megabytes, f"{row.step_bytes / 1e9:,.2f}"]
        for seconds in row.seconds.values():
            assert row.times
            line += [f"{seconds:.3g} s", f"{row.times.step_s / seconds:.1f}"]
        lines.append(line)
    return header, lines


def title(row: Scaling) -> str:
    computed = "; seconds of a step are computed, not measured" if row.seconds else ""
    return (
        f"{row.height} x {row.width} tokens ({row.height * TOKEN} x {row.width * TOKEN} px), window {row.window}, "
        f"down_factor {row.down_factor}: MB that the busiest rank sends in a layer, and GB in a step of {LAYERS}"
        f"{computed}"
    )

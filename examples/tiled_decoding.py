"""Measure whether the borders of tiles show in a decoded image, and the memory that decoding takes.

    python examples/tiled_decoding.py --output benchmarks/results/tiled_decoding.json

Latents of drawn scenes, with and without noise, are decoded by the small FLUX's autoencoder at once and in tiles:
diffusers' own with and without overlap, and those of `clear.highres`. The difference from decoding at once is compared
along the tiles' borders and elsewhere.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clear_attn import demo
from clear_attn.cascade import tiling
from clear_attn.cascade.tiling import scale_of, spans, tile_side, tiled_vae
from clear_attn.demo.scenes import draw, has_no_texture, training_scenes

# Borders count to this many pixels from them.
NEAR = 4
# The side of small scenes in pixels. Tiles do not begin at its multiples, so their edges are not on borders.
SMALL = 112
AT_ONCE, NO_OVERLAP, THEIRS, OURS = "at once", "diffusers, no overlap", "diffusers", "highres"
WAYS = AT_ONCE, THEIRS, OURS  # of which memory is measured


class Seams(NamedTuple):
    """The difference of an image decoded in tiles from one decoded at once, in levels of 255.

    Attributes:
        near: the mean absolute difference within `NEAR` pixels of a border.
        elsewhere: the mean absolute difference elsewhere.
        jump: the mean absolute change of the difference across a border, from one pixel to the next.
        change: the same elsewhere.
        most: the largest absolute difference.
    """

    near: float
    elsewhere: float
    jump: float
    change: float
    most: float


def seams(tiled: Tensor, whole: Tensor, borders: list[int]) -> Seams:
    """Compare two square images, `[1, 3, side, side]` in -1..1, of which one has tiles beginning at these pixels."""
    difference = 127.5 * (tiled - whole)[0].mean(0)
    close = torch.zeros(len(difference), dtype=torch.bool)
    for border in borders:
        close[border - NEAR : border + NEAR] = True
    close = close | close[:, None]
    across = torch.zeros(len(difference) - 1, dtype=torch.bool)
    across[[border - 1 for border in borders]] = True
    changes = torch.stack([difference.diff(dim=0), difference.diff(dim=1).T]).abs()
    size = difference.abs()
    parts = size[close].mean(), size[~close].mean(), changes[:, across].mean(), changes[:, ~across].mean(), size.max()
    return Seams(*map(float, parts))


def drawn(side: int) -> Tensor:
    """Return one large scene with many small ones in a quarter, `[1, 3, side, side]` in -1..1."""
    half = side // 2
    count = half // SMALL + 2
    # Rounding depends on what is drawn, and textures would be in some places alone.
    scene, *others = itertools.islice(filter(has_no_texture, training_scenes(20 * (1 + count**2))), 1 + count**2)
    image, small = draw(scene, side), [draw(each, SMALL) for each in others]
    rows = [np.concatenate(small[row * count : (row + 1) * count], axis=1) for row in range(count)]
    image[:half, :half] = np.concatenate(rows)[37 : 37 + half, 53 : 53 + half]
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1


def latents_of(vae: Any, side: int, noise: float) -> Tensor:
    """Return the latents of a drawn image, with noise of this share of their deviation."""
    latents: Tensor = vae.encode(drawn(side)).latent_dist.mean
    return latents + noise * latents.std() * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def tiled(vae: Any, way: str) -> Iterator[None]:
    """Decode in one of the ways, for a `with` block."""
    if way == OURS:
        with tiled_vae(vae):
            yield
        return
    overlap = vae.tile_overlap_factor
    vae.use_tiling, vae.tile_overlap_factor = way != AT_ONCE, 0.0 if way == NO_OVERLAP else overlap
    try:
        yield
    finally:
        vae.use_tiling, vae.tile_overlap_factor = False, overlap


def borders_of(vae: Any, way: str, side: int) -> list[int]:
    """Return the pixels at which tiles begin, without the first."""
    scale = scale_of(vae)
    if way == OURS:
        return [scale * span.start for span in spans(side // scale, tile_side(vae) // scale)[1:]]
    overlap = 0.0 if way == NO_OVERLAP else vae.tile_overlap_factor
    stride = int(vae.tile_latent_min_size * (1 - overlap)) * scale
    return list(range(stride, side, stride))


@torch.no_grad()
def compare(vae: Any, side: int, noise: float) -> dict[str, Seams]:
    """Return the seams of each way to tile."""
    latents = latents_of(vae, side, noise)
    whole, found = vae.decode(latents).sample, {}
    for way in (NO_OVERLAP, THEIRS, OURS):
        with tiled(vae, way):
            found[way] = seams(vae.decode(latents).sample, whole, borders_of(vae, way, side))
    return found


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that exist at a time, on any device; on "meta" nothing is computed.

    Attributes:
        peak: the most bytes at a time, of the tensors made in the `with` block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known: Any = weakref.WeakSet()

    def _free(self, size: int) -> None:
        self.held -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in given and storage not in self.known:
                self.known.add(storage)
                weakref.finalize(storage, self._free, storage.nbytes())
                self.held += storage.nbytes()
                self.peak = max(self.peak, self.held)
        return result


@torch.no_grad()
def live_bytes(side: int, way: str, device: str = "meta") -> int:
    """Return the most bytes of live tensors while an image of this side is decoded, without computing it."""
    vae = demo.pipeline().vae.to(device)
    scale = scale_of(vae)
    latents = torch.zeros(1, vae.config.latent_channels, side // scale, side // scale, device=device)
    # Statistics of tiles go to the CPU, and "meta" has no values. Nor does it mean here that weights are offloaded.
    kept, shared = mock.patch.object(Tensor, "cpu", lambda x: x), mock.patch.object(tiling, "has_shared_norms")
    with kept, shared, tiled(vae, way), LiveBytes() as live:
        vae.decode(latents)
    return live.peak


@torch.no_grad()
def peak_rss(side: int, way: str) -> int:
    """Return by how many bytes decoding raises the peak of this process; call it in a fresh one."""
    vae = demo.pipeline().vae
    scale = scale_of(vae)
    latents = torch.randn(1, vae.config.latent_channels, side // scale, side // scale)
    before = peak_of_process()
    with tiled(vae, way):
        vae.decode(latents)
    return peak_of_process() - before


def peak_of_process() -> int:
    """Return the most bytes that this process has had in main memory, from Linux.

    `resource.getrusage` would say the peak of the process that started this one, if that is larger.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def in_fresh_process(side: int, way: str) -> int:
    """Return `peak_rss` of a new process."""
    code = f"import tiled_decoding as each; print(each.peak_rss({side}, {way!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True)
    return int(run.stdout.split()[-1])


def main(
    side: Annotated[int, typer.Option(help="Side in pixels.")] = 2048,
    noise: Annotated[
        list[float] | None, typer.Option(help="Noise on the latents; repeatable.", show_default="0, 0.3")
    ] = None,
    large: Annotated[int, typer.Option(help="Side in pixels at which live tensors are counted.")] = 8192,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
) -> None:
    memory = {way: {f"live_bytes_{pixels}": live_bytes(pixels, way) for pixels in (side, large)} for way in WAYS}
    print(json.dumps(memory), flush=True)
    vae, rows = demo.pipeline().vae, []
    for share in [0.0, 0.3] if noise is None else noise:
        for way, found in compare(vae, side, share).items():
            rows.append({"side": side, "noise": share, "tiles": way, **found._asdict()})
            print(json.dumps(rows[-1]), flush=True)
    for way, numbers in memory.items():
        numbers[f"peak_rss_{side}"] = in_fresh_process(side, way)
        print(json.dumps({way: numbers}), flush=True)
    if output:
        output.write_text(json.dumps({"seams": rows, "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

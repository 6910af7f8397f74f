"""Encode and decode large images in tiles whose borders cannot be seen.

diffusers' tiles overlap, and are blended. Two things still differ from one tile to the next: each group norm has the
mean and variance of its tile alone, and convolutions get zeros past the tile's edge. Here a norm has the mean and
variance of the whole image, and a tile's edge is cut off. What is left is attention, which stays within a tile.

The statistics of a norm depend on the norms before it, so each is measured in a pass of its own over the tiles, which
ends at this norm. Together they take about ten times the work of the last pass, which makes the image.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_attn.models._diffusers import innermost_forward, set_innermost_forward
from clear_attn.models.class_names import is_instance

# Classes whose encoder and decoder take an image of any size, without state, and have group norms.
CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2")
# Latents on each side of a tile that other tiles decode too. Half of them are blended, half are cut off.
HALO = 16
# The least side of a tile in pixels, its halo included.
LEAST_SIDE = 1024


def scale_of(vae: Any) -> int:
    """Return the side of a latent in pixels."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def tile_side(vae: Any) -> int | None:
    """Return the side in pixels of the tiles that `tiled_vae` makes, None if the autoencoder never tiles."""
    if not has_shared_norms(vae):
        side: int | None = getattr(vae, "tile_sample_min_size", None)
        return side
    scale = scale_of(vae)
    return max(vae.tile_latent_min_size, LEAST_SIDE // scale, 4 * HALO) * scale


def has_shared_norms(vae: Any) -> bool:
    """Return whether tiles of this autoencoder can share the statistics of its group norms.

    Not if accelerate loads each module's weights as it runs (`enable_sequential_cpu_offload`), nor for autoencoders of
    videos. These have no group norms: each pixel is normalized alone.
    """
    return is_instance(vae, CLASSES) and not any(each.is_meta for each in vae.parameters())


@contextlib.contextmanager
def tiled_vae(vae: Any) -> Iterator[None]:
    """Encode and decode images larger than the autoencoder's tile by tiles, for the length of a `with` block."""
    before = vae.use_tiling
    try:
        with contextlib.ExitStack() as stack:
            if has_shared_norms(vae):
                vae.use_tiling = False
                scale = scale_of(vae)
                side = (tile_side(vae) or 0) // scale
                stack.enter_context(_in_tiles(vae.encoder, side, scale, 1))
                stack.enter_context(_in_tiles(vae.decoder, side, 1, scale))
            else:
                vae.enable_tiling()
            yield
    finally:
        vae.use_tiling = before


@contextlib.contextmanager
def _in_tiles(module: nn.Module, side: int, before: int, after: int) -> Iterator[None]:
    """Run an encoder or decoder by tiles.

    Args:
        module: the encoder or decoder.
        side: the side of a tile in latents.
        before, after: the side of a latent in its input, and in its output.
    """
    whole = innermost_forward(module)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        def run(inputs: Tensor) -> Tensor:
            output: Tensor = whole(inputs, *args, **kwargs)
            return output

        if max(images.shape[2:]) <= side * before:
            return run(images)
        return torch.cat([run_in_tiles(module, run, image, side, before, after) for image in images.split(1)])

    try:
        set_innermost_forward(module, forward)
        yield
    finally:
        set_innermost_forward(module, whole)


class Span(NamedTuple):
    """A tile along one axis in latents: `start` to `stop` are its own, `first` to `last` include its halo."""

    first: int
    start: int
    stop: int
    last: int

    @property
    def size(self) -> int:
        return self.last - self.first

    def inside(self, length: int) -> slice:
        """Return its own part of a tensor of this length that has the halo."""
        return slice((self.start - self.first) * length // self.size, (self.stop - self.first) * length // self.size)


def spans(length: int, side: int) -> list[Span]:
    """Return the tiles along an axis of a length in latents.

    Examples:
        >>> spans(96, 96)
        [Span(first=0, start=0, stop=96, last=96)]
        >>> spans(100, 96)
        [Span(first=0, start=0, stop=50, last=66), Span(first=34, start=50, stop=100, last=100)]
    """
    count = 1 if length <= side else -(-length // (side - 2 * HALO))
    edges = [length * number // count for number in range(count + 1)]
    return [
        Span(max(0, start - HALO), start, stop, min(length, stop + HALO)) for start, stop in itertools.pairwise(edges)
    ]


def weights(span: Span, length: int, unit: int, like: Tensor) -> Tensor:
    """Return the weight of each row of a tile's output: from 0 to 1 over `HALO` latents around each inner border.

    The weights of neighboring tiles add up to 1.

    Args:
        span: the tile.
        length: the length of the axis in latents.
        unit: the side of a latent in the output.
        like: gives dtype and device.
    """
    place = (torch.arange(span.first * unit, span.last * unit, device=like.device) + 0.5) / unit
    weight = torch.ones_like(place)
    if span.start > 0:
        weight = weight * ((place - span.start) / HALO + 0.5).clamp(0, 1)
    if span.stop < length:
        weight = weight * ((span.stop - place) / HALO + 0.5).clamp(0, 1)
    return weight.to(like.dtype)


def run_in_tiles(
    module: nn.Module, forward: Callable[[Tensor], Tensor], image: Tensor, side: int, before: int, after: int
) -> Tensor:
    """Return the output for one image, `[1, channels, height, width]`, computed by tiles, without gradients.

    Args:
        module: the encoder or decoder, for its group norms.
        forward: computes a tile.
        image: the input.
        side: the side of a tile in latents.
        before, after: the side of a latent in the input, and in the output.
    """
    height, width = (length // before for length in image.shape[2:])
    tiles = list(itertools.product(spans(height, side), spans(width, side)))

    def tile(rows: Span, columns: Span) -> Tensor:
        y, x = (slice(span.first * before, span.last * before) for span in (rows, columns))
        return forward(image[:, :, y, x])

    with torch.no_grad(), SharedNorms(module) as norms:
        for _ in norms.norms:
            for each in tiles:
                norms.measure(*each)
                with contextlib.suppress(Measured):
                    tile(*each)
            norms.share()
        output = None
        for rows, columns in tiles:
            part = tile(rows, columns)
            part = part * weights(rows, height, after, part)[:, None] * weights(columns, width, after, part)
            if output is None:
                output = part.new_zeros(1, part.shape[1], height * after, width * after)
            y, x = (slice(span.first * after, span.last * after) for span in (rows, columns))
            output[:, :, y, x] += part
    assert output is not None
    return output


class Measured(Exception):  # noqa: N818, it is not an error
    """The norm of this pass was measured in this tile; the rest of it is not needed."""


class SharedNorms:
    """The group norms of a module, which measure the tiles of an image and then normalize each tile by all of them.

    A pass over the tiles measures the first norm that is unknown, in the order in which they run.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms: list[Any] = [each for each in module.modules() if isinstance(each, nn.GroupNorm)]
        self.known: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.measured: nn.Module | None = None
        self.moments = Moments()

    def __enter__(self) -> SharedNorms:
        self.before = [vars(norm).get("forward") for norm in self.norms]
        for norm in self.norms:
            norm.forward = functools.partial(self._forward, norm)
        return self

    def __exit__(self, *error: object) -> None:
        for norm, before in zip(self.norms, self.before, strict=True):
            vars(norm).pop("forward")
            if before is not None:
                norm.forward = before

    def measure(self, rows: Span, columns: Span) -> None:
        """Measure the next tile, without its halo."""
        self.tile = rows, columns

    def share(self) -> None:
        """Use the mean and variance of the norm that was measured."""
        if self.measured:
            self.known[self.measured] = self.moments.mean_and_variance()
        self.measured, self.moments = None, Moments()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _forward(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        if norm in self.known:
            return normalize(norm, x, *self.known[norm])
        rows, columns = self.tile
        if x.dim() == 3:  # an attention layer flattens its grid, which is that of the latents or a finer one
            finer = math.isqrt(x.shape[2] // (rows.size * columns.size))
            image = x.unflatten(2, (rows.size * finer, columns.size * finer))
        else:
            image = x
        own = image[:, :, rows.inside(image.shape[2]), columns.inside(image.shape[3])]
        self.moments.add(own.reshape(norm.num_groups, -1))
        self.measured = norm
        raise Measured


class Moments:
    """The sums of the elements of each group of a norm, of their squares, and their number."""

    def __init__(self) -> None:
        self.elements, self.sums = 0, torch.zeros(())

    def add(self, groups: Tensor) -> None:
        """Add elements `[groups, elements]`."""
        variance, mean = torch.var_mean(groups.float(), 1, correction=0)
        mean, variance = mean.cpu().double(), variance.cpu().double()
        self.sums = self.sums + groups.shape[1] * torch.stack([mean, variance + mean**2])
        self.elements += groups.shape[1]

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Return float32 `[groups]` each."""
        mean, square = self.sums / self.elements
        return mean.float(), (square - mean**2).clamp(min=0).float()


def normalize(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return a group norm's output with this mean and variance of each group."""
    # With statistics of its own for each channel, this is a batch norm in inference.
    each = x.shape[1] // norm.num_groups
    mean, variance = (part.to(x.device).repeat_interleave(each) for part in (mean, variance))
    weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
    return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=norm.eps)

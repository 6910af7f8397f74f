"""Position ids: the grids that they number, and exact ids where the dtype given is too coarse for them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from clear_attn.core.coordinates import Grid
from clear_attn.models.parsing.tensor_cache import ReadOnce

# The largest integer up to which bfloat16 represents all integers.
EXACT_INTEGERS = 256


class IdFormat(NamedTuple):
    """How a model numbers its image tokens.

    Attributes:
        name: the argument of a call, for errors.
        image_axis: the column that numbers the images.
        step: the distance of neighboring rows, and of neighboring columns.
        text_tokens: the number of ids before the first image token's.
    """

    name: str = "img_ids"
    image_axis: int = 0
    step: float = 1.0
    text_tokens: int = 0


IMG_IDS = IdFormat()


class Positions(NamedTuple):
    """The grids that position ids number, and the ids in float32 if their dtype is too coarse for them."""

    grids: tuple[Grid, ...]
    exact: Tensor | None


def _parse_ids(ids: Tensor, id_format: IdFormat = IMG_IDS) -> Positions:
    name, image_axis, step, text_tokens = id_format
    if ids.ndim not in (2, 3) or ids.shape[-1] < 3 or ids.numel() == 0 or ids.shape[-2] <= text_tokens:
        raise ValueError(
            f"{name} must be [{'text and ' * bool(text_tokens)}image tokens, 3 or more], the image's number, row, "
            f"column, got {list(ids.shape)}; pass them as diffusers' pipeline does"
        )
    values = (ids[0] if ids.ndim == 3 else ids).detach().to("cpu", torch.float32)
    text, values = values[:text_tokens], values[text_tokens:]
    coarse = ids.dtype in (torch.bfloat16, torch.float16)
    _, lengths = torch.unique_consecutive(values[:, image_axis], return_counts=True)
    grids, regular = [], []
    for part, width in (
        found for image in values.split(lengths.tolist()) for found in _find_grids(image, coarse, id_format)
    ):
        height = len(part) // width
        grids.append((height, width))
        rows, columns = (
            torch.arange(n, device="cpu") * step + first for n, first in zip((height, width), part[0, 1:3], strict=True)
        )
        regular.append(torch.cat([part[:, :1], torch.cartesian_prod(rows, columns), part[:, 3:]], dim=1))
    exact = torch.cat([text, *regular])
    # Replace the ids only if rounding the exact ones gives them; leave other positions as they are.
    rounded = coarse and torch.equal(exact.to(ids.dtype).float(), torch.cat([text, values]))
    return Positions(tuple(grids), exact.to(ids.device) if rounded else None)


read_ids = ReadOnce(_parse_ids)


def _find_grids(ids: Tensor, coarse: bool, id_format: IdFormat) -> list[tuple[Tensor, int]]:
    """Return the ids and the number of columns of each image among ids with the same image number.

    Several reference images may share a number, at different positions or at the same one.
    """
    # The first row has a unique number, even where bfloat16 rounds others to the same value.
    width = int((ids[:, 1] == ids[0, 1]).sum())
    grid = torch.cartesian_prod(ids[::width, 1], ids[:width, 2])
    if torch.equal(ids[:, 1:3], grid) and (ids[:, 3:] == ids[0, 3:]).all():
        return [(ids, width)]
    ends = (ids[1:, 1] != ids[:-1, 1]) | (ids[1:, 2] < ids[:-1, 2])
    rows = ids.tensor_split((ends.nonzero().flatten() + 1).tolist())
    images: list[list[Tensor]] = []
    for row in rows:
        if images and _continues(images[-1][-1], row, coarse, id_format.step):
            images[-1].append(row)
        else:
            images.append([row])
    if any(len(image) < 2 or len(image[0]) < 2 for image in images):  # single rows would match any order of tokens
        raise ValueError(
            f"{id_format.name} must number the tokens of each image row by row; {len(ids)} of them with the first "
            f"number {ids[0, 0].item():g} are no grid of {len(rows[0])} columns; pass them as diffusers' pipeline does"
        )
    return [(torch.cat(image), len(image[0])) for image in images]


def _continues(above: Tensor, row: Tensor, coarse: bool, step: float) -> bool:
    """Return whether a row of ids is the next one of the same image."""
    collides = coarse and bool(row[0, 1] == above[0, 1] >= EXACT_INTEGERS * step)
    return torch.equal(row[:, 2:], above[:, 2:]) and (collides or bool(row[0, 1] > above[0, 1]))

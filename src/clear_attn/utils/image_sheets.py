"""Contact sheets: rows of images with labels, and the window drawn into an image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL_WIDTH, CAPTION_HEIGHT = 192, 12, 132, 58
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """Return a sheet with one row for each label and one column for each caption.

    Args:
        rows: by label, an image for each caption; all of the same size.
        captions: the texts above the columns.

    Examples:
        >>> image = Image.new("RGB", (64, 64))
        >>> contact_sheet({"dense": [image], "CLEAR": [image]}, ["a red circle"]).size
        (348, 466)
    """
    first = next(iter(rows.values()))[0]
    height = round(CELL * first.height / first.width)
    width = LABEL_WIDTH + len(captions) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, CAPTION_HEIGHT + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        _write(draw, LABEL_WIDTH + GAP + column * (CELL + GAP), CAPTION_HEIGHT // 2, caption, characters=29, size=13)
    for row, (label, images) in enumerate(rows.items()):
        top = CAPTION_HEIGHT + row * (height + GAP)
        _write(draw, GAP, top + height // 2, label, characters=15, size=15)
        for column, image in enumerate(images):
            cell = image.resize((CELL, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (LABEL_WIDTH + GAP + column * (CELL + GAP), top))
    return sheet


def draw_window(image: Image.Image, window: int, pixels_per_token: int) -> Image.Image:
    """Return an image with the token in the middle marked, and the circle of the tokens that it attends to.

    Args:
        image: a square image.
        window: the radius in tokens.
        pixels_per_token: the side of a token in pixels.
    """
    marked = image.resize((CELL, CELL), Image.Resampling.LANCZOS).convert("RGB")
    token = pixels_per_token * CELL / image.width
    middle = CELL / 2 + token / 2
    draw = ImageDraw.Draw(marked)
    for radius, color, line in ((window * token, INK, 3), (window * token, PAPER, 1)):
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], outline=color, width=line)
    draw.rectangle([middle - token / 2, middle - token / 2, middle + token / 2, middle + token / 2], PAPER, INK)
    return marked


def _write(draw: ImageDraw.ImageDraw, left: int, middle: int, text: str, characters: int, size: int) -> None:
    lines = [
        line for part in text.split("\n") for line in textwrap.wrap(part, characters, max_lines=3, placeholder=" ...")
    ]
    draw.text((left, middle), "\n".join(lines), INK, ImageFont.load_default(size), anchor="lm")

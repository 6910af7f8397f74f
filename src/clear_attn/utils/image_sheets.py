"""Contact sheets: rows of images with labels, and the window drawn into an image."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL_WIDTH = 192, 12, 132
CHARACTER, LINE = 6.7, 17  # pixels: usual width of a caption's characters, and height of its lines
MOST_LINES = 6
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], cell: int = CELL) -> Image.Image:
    """Return a sheet with one row for each label and one column for each caption.

    Args:
        rows: by label, an image for each caption; all of the same size.
        captions: the texts above the columns. Very long ones are cut.
        cell: width of each image on the sheet in pixels.

    Examples:
        >>> image = Image.new("RGB", (64, 64))
        >>> contact_sheet({"dense": [image], "CLEAR": [image]}, ["a red circle"]).size
        (348, 437)
    """
    first = next(iter(rows.values()))[0]
    height = round(cell * first.height / first.width)
    width = LABEL_WIDTH + len(captions) * (cell + GAP) + GAP
    wrapped = [_wrap(caption, round(cell / CHARACTER), MOST_LINES) for caption in captions]
    top_of_rows = GAP + max((len(lines) for lines in wrapped), default=0) * LINE
    sheet = Image.new("RGB", (width, top_of_rows + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        _write(draw, LABEL_WIDTH + GAP + column * (cell + GAP), top_of_rows // 2, lines, size=13)
    for row, (label, images) in enumerate(rows.items()):
        top = top_of_rows + row * (height + GAP)
        _write(draw, GAP, top + height // 2, _wrap(label, characters=15, most=3), size=15)
        for column, image in enumerate(images):
            shown = image.resize((cell, height), Image.Resampling.LANCZOS)
            sheet.paste(shown, (LABEL_WIDTH + GAP + column * (cell + GAP), top))
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


def _wrap(text: str, characters: int, most: int) -> list[str]:
    """Wrap each line of a text, to at most `most` lines."""
    return [
        line
        for part in text.split("\n")
        for line in textwrap.wrap(part, characters, max_lines=most, placeholder=" ...")
    ]


def _write(draw: ImageDraw.ImageDraw, left: int, middle: int, lines: Sequence[str], size: int) -> None:
    draw.text((left, middle), "\n".join(lines), INK, ImageFont.load_default(size), anchor="lm")

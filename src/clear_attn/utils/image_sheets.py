"""Rows of pictures with labels, and the window drawn into one of them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, LABEL_WIDTH, CAPTION_HEIGHT = 192, 12, 132, 58
INK, PAPER = (40, 40, 40), (255, 255, 255)


def contact_sheet(rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str]) -> Image.Image:
    """One row for each label, one column for each caption; the pictures are of one size."""
    first = next(iter(rows.values()))[0]
    height = round(CELL * first.height / first.width)
    width = LABEL_WIDTH + len(captions) * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, CAPTION_HEIGHT + len(rows) * (height + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        _write(draw, LABEL_WIDTH + GAP + column * (CELL + GAP), CAPTION_HEIGHT // 2, caption, characters=29, size=13)
    for row, (label, pictures) in enumerate(rows.items()):
        top = CAPTION_HEIGHT + row * (height + GAP)
        _write(draw, GAP, top + height // 2, label, characters=15, size=15)
        for column, picture in enumerate(pictures):
            cell = picture.resize((CELL, height), Image.Resampling.LANCZOS)
            sheet.paste(cell, (LABEL_WIDTH + GAP + column * (CELL + GAP), top))
    return sheet


def draw_window(picture: Image.Image, window: int, pixels_per_token: int) -> Image.Image:
    """Marks the token in the middle of a picture and the circle of what it sees."""
    marked = picture.resize((CELL, CELL), Image.Resampling.LANCZOS).convert("RGB")
    token = pixels_per_token * CELL / picture.width
    middle = CELL / 2 + token / 2
    draw = ImageDraw.Draw(marked)
    for radius, colour, line in ((window * token, INK, 3), (window * token, PAPER, 1)):
        draw.ellipse([middle - radius, middle - radius, middle + radius, middle + radius], outline=colour, width=line)
    draw.rectangle([middle - token / 2, middle - token / 2, middle + token / 2, middle + token / 2], PAPER, INK)
    return marked


def _write(draw: ImageDraw.ImageDraw, left: int, middle: int, text: str, characters: int, size: int) -> None:
    lines = [
        line for part in text.split("\n") for line in textwrap.wrap(part, characters, max_lines=3, placeholder=" ...")
    ]
    draw.text((left, middle), "\n".join(lines), INK, ImageFont.load_default(size), anchor="lm")

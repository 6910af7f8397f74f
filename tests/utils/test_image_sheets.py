"""Sheets of images with labels, and the window drawn into one image."""

import numpy as np
from PIL import Image

from clear_attn.utils.image_sheets import CELL, GAP, LABEL_WIDTH, LINE, contact_sheet, draw_window

TOP = GAP + LINE  # of the rows, below captions of one line
RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(color, size=(40, 20)):
    return Image.new("RGB", size, color)


def test_one_row_per_label_and_one_column_per_caption():
    sheet = contact_sheet({"first": [plain(RED), plain(BLUE)], "second": [plain(BLUE), plain(RED)]}, ["one", "two"])
    height = CELL // 2
    assert sheet.size == (LABEL_WIDTH + 2 * (CELL + GAP) + GAP, TOP + 2 * (height + GAP))
    colors = [
        [sheet.getpixel((LABEL_WIDTH + GAP + c * (CELL + GAP) + 5, TOP + r * (height + GAP) + 5)) for c in (0, 1)]
        for r in (0, 1)
    ]
    assert colors == [[RED, BLUE], [BLUE, RED]]


def test_labels_and_captions_are_written():
    sheet = np.asarray(contact_sheet({"label": [plain(RED)]}, ["caption"]).convert("L"))
    assert sheet[TOP:, :LABEL_WIDTH].min() < 128
    assert sheet[:TOP, LABEL_WIDTH:].min() < 128


def test_long_captions_make_room_up_to_a_limit():
    heights = [
        contact_sheet({"label": [plain(RED)]}, [" ".join(["word"] * words)], cell=100).height - 100 // 2
        for words in (1, 12, 1000)
    ]
    assert heights == [GAP + lines * LINE + GAP for lines in (1, 4, 6)]


def test_the_circle_has_the_radius_of_the_window():
    marked = np.asarray(draw_window(plain((128, 128, 128), (192, 192)), window=4, pixels_per_token=16).convert("L"))
    row = marked[CELL // 2 + 8].astype(int)
    changed = np.flatnonzero(row != 128)
    assert abs((changed[-1] - changed[0]) - 2 * 4 * 16) <= 4

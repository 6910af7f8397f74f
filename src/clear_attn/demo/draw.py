"""What `clear-attn demo` does: the same captions and seeds, dense and linearized, in one picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import clear_attn as clear
from clear_attn import demo
from clear_attn.pictures import contact_sheet, draw_window


def dense_and_local(captions: Sequence[str], window: int, down_factor: int, seed: int, output: Path) -> str:
    """Draws the captions twice, saves one labelled picture, and returns what to tell the user."""
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(leave=False)

    def draw() -> tuple[list[Image.Image], float]:
        started = time.perf_counter()
        pictures = pipe(
            list(captions),
            max_sequence_length=demo.TEXT_TOKENS,
            generator=torch.Generator().manual_seed(seed),
        ).images
        return pictures, time.perf_counter() - started

    dense, dense_seconds = draw()
    with clear.linearized(pipe, window, down_factor, weights=None):
        local, local_seconds = draw()
        cost = clear.cost(pipe, demo.SIZE, demo.SIZE, text_tokens=demo.TEXT_TOKENS, batch=len(captions))
    pixels_per_token = demo.SIZE // cost.width
    pooled = f"\npooled {down_factor} x {down_factor}" if down_factor > 1 else ""
    local[0] = draw_window(local[0], window, pixels_per_token)
    rows = {"dense attention": dense, f"CLEAR, window {window}{pooled}\n(training-free)": local}
    contact_sheet(rows, captions).save(output)
    return (
        f"{cost}\n\nDrawn in {dense_seconds:.1f} s dense and {local_seconds:.1f} s linearized: at 16 x 16 tokens "
        "there is little to save; the larger the picture, the more."
    )

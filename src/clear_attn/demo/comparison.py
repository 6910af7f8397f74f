"""What `clear-attn demo` does: draw the same captions and seeds dense, linearized and distilled, on one sheet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import clear_attn as clear
from clear_attn import demo
from clear_attn.methods import Clear
from clear_attn.utils.image_sheets import contact_sheet, draw_window
from clear_attn.weights.metadata import CONFIG_FILE, read_record


def compare(captions: Sequence[str], method: Clear, seed: int, output: Path) -> str:
    """Draw captions dense, linearized and, if the method is theirs, with the distilled weights; save one sheet.

    Args:
        captions: what to draw, one column each.
        method: of the linearized rows.
        seed: of the noise.
        output: where the sheet is saved; its ending is the format.

    Returns:
        A report for the user: the cost of attention, and the seconds of each row.

    Examples:
        >>> import tempfile
        >>> caption = "a red circle on a blue ground, in the middle"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = compare([caption], Clear(4), 0, Path(folder, "sheet.png"))
        >>> "16 x 16 image tokens" in report
        True
    """
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(leave=False)

    def local(weights: Path | None) -> Any:
        return clear.linearized(pipe, method=method, weights=weights)

    pooled = f"\npooled {method.down_factor} x {method.down_factor}" if method.down_factor > 1 else ""
    label = f"CLEAR, window {method.window}{pooled}"
    variants = {"dense attention": contextlib.nullcontext(), f"{label}\n(training-free)": local(None)}
    trained = read_record(demo.distilled() / CONFIG_FILE).method
    if trained == method:
        variants[f"{label}\n(distilled)"] = local(demo.distilled())
    rows, seconds = {}, {}
    for name, variant in variants.items():
        with variant:
            started = time.perf_counter()
            rows[name] = pipe(
                list(captions), max_sequence_length=demo.TEXT_TOKENS, generator=torch.Generator().manual_seed(seed)
            ).images
            seconds[name] = time.perf_counter() - started
    cost = clear.cost(
        pipe,
        demo.SIZE,
        demo.SIZE,
        method=method,
        text_tokens=demo.TEXT_TOKENS,
        batch=len(captions),
    )
    last = rows[name]
    last[0] = draw_window(last[0], method.window, demo.SIZE // cost.width)
    contact_sheet(rows, captions).save(output)
    times = ", ".join(f"{name.replace(chr(10), ' ')} {each:.1f} s" for name, each in seconds.items())
    report = f"{cost}\n\nSeconds: {times}. At 16 x 16 tokens there is little to save; the larger the image, the more."
    if trained != method:
        report += f"\n\nThe distilled weights in the package are for {trained.as_arguments()}, so they are not shown."
    return report

"""What `clear-attn demo` does: compare images and seconds, dense and linearized, at two sizes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import clear_attn as clear
from clear_attn import demo
from clear_attn.methods import Clear
from clear_attn.utils.atomic import atomic_file
from clear_attn.utils.image_sheets import contact_sheet, draw_window
from clear_attn.utils.tables import format_table
from clear_attn.weights import packaged

# The larger image is not decoded: it shows the time of its steps, and is too large for this model to draw well.
GROWTH = 2
SMALL_STEPS, LARGE_STEPS = 28, 2
DENSE = "dense attention"
# A ratio of seconds up to this one is noise.
SAME = 1.05
NEXT = (
    "Next: call clear_attn.linearize(pipe) on a diffusers pipeline of your own. clear-attn cost --height 2048 --width "
    "2048 counts what that saves in FLUX.1."
)


def compare(captions: Sequence[str], method: Clear, seed: int, output: Path) -> str:
    """Draw captions dense, linearized and, if they fit the method, with distilled weights; save one sheet.

    Afterwards time a few steps at twice the side, dense and linearized.

    Args:
        captions: the prompts, one for each column.
        method: the method of the linearized rows.
        seed: the seed of the noise.
        output: the file of the sheet; its ending is the format.

    Returns:
        A report for the user: the cost of attention, the seconds of each row at both sizes, and what to do next.

    Examples:
        >>> caption = "a red circle on a blue ground, in the middle"
        >>> report = compare([caption], Clear(4), 0, Path("sheet.png"))  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    pipe = demo.pipeline()
    pooled = f"\npooled {method.down_factor} x {method.down_factor}" if method.down_factor > 1 else ""
    label = f"CLEAR, window {method.window}{pooled}"
    trained = (method.window, method.down_factor) in packaged.FOLDERS
    distilled = {f"{label}\n(distilled)": "auto"} if trained else {}
    small = _draw(
        pipe,
        {f"{label}\n(training-free)": None, **distilled},
        method,
        prompt=list(captions),
        seed=seed,
        side=demo.SIZE,
        steps=SMALL_STEPS,
    )
    cost = clear.cost(pipe, demo.SIZE, demo.SIZE, method=method, batch=len(captions))
    last = small.images[list(small.images)[-1]]
    last[0] = draw_window(last[0], method.window, demo.SIZE // cost.width)
    with atomic_file(output) as unfinished:
        contact_sheet(small.images, captions).save(unfinished)
    large = _draw(
        pipe,
        {label: None},
        method,
        prompt=captions[0],
        seed=seed,
        side=GROWTH * demo.SIZE,
        steps=LARGE_STEPS,
        output_type="latent",
    )
    report = [
        str(cost),
        describe_seconds(small.seconds, len(captions), demo.SIZE, cost.width, SMALL_STEPS),
        describe_seconds(large.seconds, 1, GROWTH * demo.SIZE, GROWTH * cost.width, LARGE_STEPS),
    ]
    if not trained:
        report.append(f"The distilled weights in the package are for {demo.variants()}, so they are not shown.")
    return "\n\n".join([*report, NEXT])


class Drawn(NamedTuple):
    """The images and the seconds of each row, by label."""

    images: dict[str, list[Image.Image]]
    seconds: dict[str, float]


def _draw(
    pipe: Any, weights: Mapping[str, str | None], method: Clear, *, seed: int, side: int, steps: int, **options: Any
) -> Drawn:
    """Draw with dense attention, and linearized with each of the weights, by label."""
    variants: dict[str, contextlib.AbstractContextManager[Any]] = {DENSE: contextlib.nullcontext()}
    variants |= {label: clear.linearized(pipe, method=method, weights=each) for label, each in weights.items()}
    drawn = Drawn({}, {})
    for label, variant in variants.items():
        pipe.set_progress_bar_config(leave=False, desc=f"{_one_line(label)}, {side} px")
        with variant:
            generator = torch.Generator().manual_seed(seed)
            started = time.perf_counter()
            drawn.images[label] = pipe(
                height=side, width=side, num_inference_steps=steps, generator=generator, **options
            ).images
            drawn.seconds[label] = time.perf_counter() - started
    return drawn


def describe_seconds(seconds: Mapping[str, float], images: int, side: int, tokens: int, steps: int) -> str:
    """Return the seconds of each row, and how they compare with the first row's.

    Examples:
        >>> print(describe_seconds({"dense": 3.0, "CLEAR": 1.5}, 1, 512, 64, 2))
        1 image of 512 x 512 px (64 x 64 tokens), 2 steps  seconds
        dense                                                  3.0
        CLEAR                                                  1.5  2.0 times faster
    """
    dense = next(iter(seconds.values()))
    rows = [[_one_line(label), f"{each:.1f}", _compare(dense, each)] for label, each in seconds.items()]
    title = f"{images} image{'s' * (images > 1)} of {side} x {side} px ({tokens} x {tokens} tokens), {steps} steps"
    slower = any(each / dense > SAME for each in seconds.values())
    remark = "\nCLEAR is slower here, because so few tokens leave little to save." if slower else ""
    return format_table([title, "seconds", ""], rows) + remark


def _compare(dense: float, own: float) -> str:
    if own == dense:
        return ""
    if max(dense / own, own / dense) <= SAME:
        return "about as fast"
    return f"{dense / own:.1f} times faster" if own < dense else f"{own / dense:.1f} times slower"


def _one_line(label: str) -> str:
    return label.replace("\n", " ")

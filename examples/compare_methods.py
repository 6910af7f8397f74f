"""Compare efficient attention methods, as table 2 of CLEAR's paper does, at small scale.

    python examples/compare_methods.py --output compared

The small FLUX is the teacher. For each method a student is distilled with the images and losses of
`distill_small_flux.py`. Each student draws the held-out captions with the teacher's seeds. The table shows the mean
squared error against the teacher's images, the number of captions drawn right, the FLOPs of attention in a layer, and
the seconds of drawing. As in the paper, methods that leave out most keys attend to about one in sixteen, here 64 of
1024.

An interrupted run continues where it stopped. Once the latents are cached, several processes can share the
work (`--only Swin`). A last run without `--only` writes table, contact sheet and plot.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxPipeline
from matplotlib.figure import Figure
from PIL import Image
from rich import print
from rich.table import Table

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo.scenes import held_out_scenes
from clear_attn.distill import train
from clear_attn.utils.image_sheets import contact_sheet
from distill_small_flux import ALL, LOSSES, TRAINING_IMAGES, cached_images, draw_training_set, settings, squared_error
from evaluate_small_flux import captions_of, score

# Arguments of `Settings`.
METHODS: dict[str, dict[str, Any]] = {
    "sigmoid": {"method": "Sigmoid"},
    "linear": {"method": "LiT(heads=None, kernel_size=0)"},
    "LiT": {"method": "LiT"},
    "KV compression": {"method": "KVCompression(factor=4)"},
    "agent": {"method": "Agent(factor=4)"},
    "strided": {"method": "Strided(stride=4)"},
    "Swin": {"method": "Swin(side=8)"},
    "CLEAR, window 4": {"window": 4},
    "CLEAR, window 8": {"window": 8},
    "CLEAR, window 16": {"window": 16},
}
LOSS_WEIGHTS = dict(zip(("prediction_weight", "attention_weight"), LOSSES[ALL], strict=True))
SHOWN = 6
# Offsets in points for labels that would overlap.
LABELS = {
    "linear": (-36, -3),
    "strided": (7, -6),
    "Swin": (8, -2),
    "CLEAR, window 4": (-52, -15),
    "CLEAR, window 8": (8, -3),
}
TIMES = 3


def seconds_of(pipe: FluxPipeline, weights: Path) -> dict[str, float]:
    """Return the seconds of drawing 8 images, dense and with these weights: the best of several runs each, in turn."""
    best = {"dense_seconds": float("inf"), "seconds": float("inf")}
    for _ in range(TIMES):
        for name, state in (
            ("dense_seconds", contextlib.nullcontext()),
            ("seconds", clear.linearized(pipe, weights=weights)),
        ):
            with state:
                _draw_eight(pipe)  # warm up
                start = time.perf_counter()
                _draw_eight(pipe)
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def _draw_eight(pipe: FluxPipeline) -> None:
    pipe(
        captions_of(held_out_scenes(8)),
        num_inference_steps=4,
        output_type="latent",
    )


def table(rows: list[dict[str, Any]], teacher: dict[str, Any]) -> Table:
    shown = Table("method", "error against the teacher", "captions right", "MFLOPs per layer", "seconds / dense")
    for row in [teacher, *rows]:
        shown.add_row(
            row["method"],
            f"{row['error']:.5f}",
            f"{row['right']} of {row['captions']}",
            f"{row['mflops']:.2f}",
            f"{row['seconds'] / row['dense_seconds']:.2f}" if row in rows else "1",
        )
    return shown


def plot(rows: list[dict[str, Any]], teacher: dict[str, Any]) -> Figure:
    """Return a plot of error and FLOPs of each method."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        ours = row["method"].startswith("CLEAR")
        axes.scatter(row["mflops"], row["error"], color="#24508f" if ours else "#e2572b", zorder=2)
        place = LABELS.get(row["method"], (7, 4))
        axes.annotate(row["method"], (row["mflops"], row["error"]), place, textcoords="offset points", fontsize=9)
    axes.axvline(teacher["mflops"], color="gray", linewidth=1, linestyle=":")
    axes.annotate(
        "dense ",
        (teacher["mflops"], 0.98),
        xycoords=("data", "axes fraction"),
        ha="right",
        va="top",
        fontsize=9,
        color="gray",
    )
    axes.set(xlabel="MFLOPs of attention per layer", ylabel="error against the teacher", yscale="log")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    return figure


def main(
    output: Annotated[Path, typer.Option(help="Folder for images, weights and results.")] = Path("compared"),
    steps: Annotated[int, typer.Option(help="Training steps of each student.")] = 400,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="Names of methods; default: all.")] = None,
) -> None:
    if unknown := set(only or ()) - METHODS.keys():
        raise typer.BadParameter(f"{unknown.pop()!r} is none of {', '.join(METHODS)}", param_hint="--only")
    draw_training_set(output / "images")
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(captions)
    drawn = {"dense": cached_images(output / f"teacher-{captions}.npy", pipe, captions)}
    dense = clear.cost(pipe, demo.SIZE, demo.SIZE)
    teacher = {
        "method": "dense",
        "error": 0.0,
        **score(scenes, list(drawn["dense"])),
        "mflops": dense.dense_layer_gflops * 1e3,
    }
    rows: list[dict[str, Any]] = []
    for name in only or METHODS:
        folder = output / f"{name.replace(', ', '-').replace(' ', '-')}-{steps}-steps"
        if not (folder / "clear_config.json").exists():
            train(settings(output, folder, demo.path(), steps, **LOSS_WEIGHTS, **METHODS[name]))
        with clear.linearized(pipe, weights=folder):
            drawn[name] = cached_images(folder / f"images-{captions}.npy", pipe, captions)
            cost = clear.cost(pipe, demo.SIZE, demo.SIZE)
        rows.append(
            {
                "method": name,
                "error": squared_error(drawn[name], drawn["dense"]),
                **score(scenes, list(drawn[name])),
                "mflops": cost.layer_gflops * 1e3,
                **seconds_of(pipe, folder),
            }
        )
        print(table(rows, teacher))
    if only:
        return
    result = {"teacher": teacher, "steps": steps, "images": TRAINING_IMAGES, "torch": torch.__version__, "rows": rows}
    (output / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    sheet = {label: [Image.fromarray(image) for image in each[:SHOWN]] for label, each in drawn.items()}
    contact_sheet(sheet, captions_of(scenes[:SHOWN])).save(output / "table.png")
    plot(rows, teacher).savefig(output / "plot.png", dpi=150)


if __name__ == "__main__":
    typer.run(main)

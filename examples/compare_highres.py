"""Compare ways to draw at two and four times the size that the small FLUX was trained at.

    python examples/compare_highres.py --output compared
    python examples/compare_highres.py --output compared --side 1024 --captions 10 --only "direct, dense"

Every way draws the same held-out captions with the same seeds. The table shows:

- the captions drawn right, and the figures that nobody asked for;
- of the right ones, the median overlap of the shapes with ideal ones, and how steep the edges are, as a share of those
  of the same scenes drawn with exact edges at this size;
- the distance to the enlarged base image (root mean square, colors in 0..1);
- FLOPs of attention and seconds of all runs, the base image included; seconds of those on the base image's device, as a
  folder may be continued on another.

Images and measurements are kept in the output folder, and an interrupted run goes on from them; what was drawn with
other settings is drawn again. Several processes can share the work (`--only`) once the base images are drawn. Each
writes the table and the sheets of what is there. A folder is for one model and its weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from PIL import Image
from rich import print
from rich.table import Table

import highres_ways
from clear_attn.demo import scenes as demo_scenes
from clear_attn.demo.scene_reader import Reading, count_figures, read
from clear_attn.demo.scenes import SIZE, held_out_scenes, poses
from clear_attn.utils.atomic import atomic_file
from clear_attn.utils.image_sheets import contact_sheet
from evaluate_small_flux import captions_of, load
from highres_ways import WAYS, WINDOW, Direct, Drawn, Task

CELL = 320  # pixels of each image on the sheets
BASE = "base image"
ON_SHEETS = (
    "enlarged",
    "direct, local",
    "published",
    "close, low resolution",
    "close, low resolution, in two stages",
    "close, stepwise",
)


def edge_steepness(pixels: np.ndarray, reading: Reading) -> float:
    """Return how steep the edges of an image are, as a share of those of its scene drawn with exact edges.

    That is the mean change of color between neighboring pixels over the steepest pixels, as many as the exact image has
    on its edges.

    Args:
        pixels: uint8 `[side, side, 3]`.
        reading: what it shows.
    """
    exact, drawn = (
        np.sort(color_changes(image), axis=None)
        for image in (demo_scenes.draw(reading.scene, len(pixels), list(reading.poses)), pixels)
    )
    edges = (exact > exact[-1] / 2).sum()
    return float(drawn[-edges:].mean() / exact[-edges:].mean())


def color_changes(image: np.ndarray) -> np.ndarray:
    """Return the larger change of color from each pixel to its neighbors below and to the right."""
    down, right = (np.linalg.norm(np.diff(image.astype(np.float32), axis=axis), axis=-1) for axis in (0, 1))
    return np.maximum(down[:, :-1], right[:-1])


def measure(task: Task, drawn: Drawn, base: Image.Image) -> dict[str, Any]:
    """Return what the table is made from."""
    pixels = np.asarray(drawn.image)
    enlarged = np.asarray(base.resize(drawn.image.size, Image.Resampling.LANCZOS))
    reading = read(pixels)
    right = reading is not None and reading.scene == task.scene
    return {
        "caption": task.number,
        "seed": task.seed,
        "right": right,
        "overlaps": [round(overlap, 4) for overlap in reading.overlaps] if right else [],
        "edge_steepness": edge_steepness(pixels, reading) if right else None,
        "distance": float(np.sqrt(np.mean((pixels / 255 - enlarged / 255) ** 2))),
        "extra": max(0, count_figures(pixels, task.scene.ground) - len(task.scene.figures)),
        "device": drawn.device,
        "seconds": drawn.seconds,
        "flops": drawn.flops,
    }


class Folder(NamedTuple):
    """The images and the measurements of one way at one size."""

    path: Path
    settings: str

    def file(self, task: Task) -> Path:
        return self.path / f"{task.seed}-{task.number}.png"

    def load(self, task: Task) -> Drawn | None:
        """Return what was drawn for a task with these settings, if anything was."""
        file, record = self.file(task), self.file(task).with_suffix(".json")
        if not record.exists():
            return None
        values = json.loads(record.read_text())
        if values["settings"] != self.settings:
            return None
        with Image.open(file) as image:
            return Drawn(image.convert("RGB"), values["seconds"], values["flops"], values["device"])

    def save(self, task: Task, drawn: Drawn, base: Image.Image) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.file(task)) as unfinished:
            drawn.image.save(unfinished)
        record = {"settings": self.settings, **measure(task, drawn, base)}
        with atomic_file(self.file(task).with_suffix(".json")) as unfinished:
            unfinished.write_text(json.dumps(record) + "\n")

    def measurements(self) -> list[dict[str, Any]]:
        records = [json.loads(file.read_text()) for file in sorted(self.path.glob("[0-9]*.json"))]
        return [record for record in records if record["settings"] == self.settings]


def folder_of(output: Path, side: int, name: str) -> Folder:
    """Return the folder of a way at a size, or of the base images."""
    if name == BASE:
        return Folder(output / BASE, f"{highres_ways.STEPS} steps")
    return Folder(output / str(side) / name, f"{highres_ways.STEPS} steps, {WAYS[name]}")


def summarize(measured: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a row of the table."""
    measured = list(measured)
    right = [each for each in measured if each["right"]]
    overlaps = [overlap for each in right for overlap in each["overlaps"]]
    seconds = [each["seconds"] for each in measured if each["seconds"] is not None]
    return {
        "images": len(measured),
        "right": len(right),
        "extra_figures": sum(each["extra"] for each in measured),
        "median_overlap": round(float(np.median(overlaps)), 4) if right else None,
        "edge_steepness": round(float(np.median([each["edge_steepness"] for each in right])), 2) if right else None,
        "distance": round(float(np.mean([each["distance"] for each in measured])), 4),
        "flops": round(float(np.mean([each["flops"] for each in measured]))),
        "seconds": round(float(np.median(seconds)), 2) if seconds else None,
    }


def main(
    output: Annotated[Path, typer.Option(help="Folder for images, measurements and the table; goes on from them.")],
    model: Annotated[Path | None, typer.Option(help="Folder of the pipeline; default: the one in the package.")] = None,
    weights: Annotated[str, typer.Option(help="Distilled weights.")] = "auto",
    side: Annotated[list[int] | None, typer.Option(help="Side in pixels; repeatable.", show_default="512")] = None,
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 50,
    seeds: Annotated[int, typer.Option(help="Number of images of each caption.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Draw this way alone; repeatable.")] = None,
    shown: Annotated[int, typer.Option(help="How many captions the contact sheets show.")] = 4,
) -> None:
    if unknown := sorted(set(only or ()) - set(WAYS)):
        raise typer.BadParameter(f"no such way: {', '.join(unknown)}; there are {', '.join(WAYS)}")
    pipe = load(model)
    scenes = held_out_scenes(captions)
    tasks = [
        Task(number, scene, caption, seed)
        for seed in range(seeds)
        for number, (scene, caption) in enumerate(zip(scenes, captions_of(scenes), strict=True))
    ]
    bases = folder_of(output, SIZE, BASE)
    for pixels in side or [2 * SIZE]:
        for name in only or WAYS:
            folder = folder_of(output, pixels, name)
            for task in tasks:
                base = bases.load(task)
                if base is None:
                    base = Direct(None).draw(pipe, weights, task, SIZE, None)
                    bases.save(task, base, base.image)
                if folder.load(task) is None:
                    folder.save(task, WAYS[name].draw(pipe, weights, task, pixels, base), base.image)
            print(pixels, name, summarize(folder.measurements()))
        write_sheets(output, pixels, tasks[:shown])
    write_table(output)


def write_sheets(output: Path, side: int, tasks: list[Task]) -> None:
    """Save a sheet of whole images, and one of crops at 1:1 around the right edge of each scene's first figure."""
    drawn = {name: [folder_of(output, side, name).load(task) for task in tasks] for name in ON_SHEETS}
    rows = {name: [each.image for each in images if each] for name, images in drawn.items() if all(images)}
    if not rows:
        return
    crops = {
        name: [crop(image, task) for image, task in zip(images, tasks, strict=True)] for name, images in rows.items()
    }
    captions = [task.caption for task in tasks]
    for name, shown in ((f"{side}.png", rows), (f"{side}-crops.png", crops)):
        with atomic_file(output / name) as unfinished:
            contact_sheet(shown, captions, CELL).save(unfinished)


def crop(image: Image.Image, task: Task) -> Image.Image:
    first = poses(task.scene)[0]
    left, top = (
        min(max(round(center * image.width - CELL / 2), 0), image.width - CELL)
        for center in (first.x + first.half, first.y)
    )
    return image.crop((left, top, left + CELL, top + CELL))


def write_table(output: Path) -> None:
    """Write the numbers of all ways that were drawn so far, and print them."""
    sizes = sorted((each for each in output.iterdir() if each.name.isdecimal()), key=lambda each: int(each.name))
    places = [(SIZE, BASE), *((int(size.name), name) for size in sizes for name in WAYS)]
    measured = {place: folder_of(output, *place).measurements() for place in places}
    rows = [{"side": side, "way": name, **summarize(each)} for (side, name), each in measured.items() if each]
    with atomic_file(output / "highres.json") as unfinished:
        unfinished.write_text(
            json.dumps({"window": WINDOW, "steps": highres_ways.STEPS, "rows": rows}, indent=1) + "\n"
        )
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    print(table)


if __name__ == "__main__":
    typer.run(main)

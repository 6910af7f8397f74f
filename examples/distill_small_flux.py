"""Distill the FLUX of 32 x 32 tokens for several windows, in as many sittings as needed.

    python examples/distill_composition_flux.py --model composition-flux/phase-2 --output distilled

The training set is drawn scenes; the losses are flow matching and the errors against the teacher's prediction and
attention. An interrupted run continues where it stopped, and `--only 8x1` trains one variant (window, down_factor).
`examples/evaluate_composition_flux.py` counts the captions that each draws right.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from clear_attn.demo.compositions import SIZE, draw, poses, training_scenes
from clear_attn.distill import Settings, train
from clear_attn.utils.atomic import atomic_file

VARIANTS = ((4, 1), (8, 1), (16, 1), (8, 4))  # window, down_factor
TRAINING_IMAGES = 1000
CAPTION_LENGTH = 32


def draw_training_set(folder: Path, count: int, seed: int) -> None:
    """Write drawn scenes and their captions, in the layout of an image folder of the datasets library."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "metadata.jsonl").exists():
        return
    rng = np.random.default_rng(seed)
    lines = []
    for number, scene in enumerate(training_scenes(count, seed)):
        name = f"{number:05d}.png"
        Image.fromarray(draw(scene, SIZE, poses(scene, rng))).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": scene.captions[number % len(scene.captions)]}))
    with atomic_file(folder / "metadata.jsonl") as unfinished:
        unfinished.write_text("\n".join(lines) + "\n")


def main(
    model: Annotated[Path, typer.Option(help="Folder of the pipeline.")],
    output: Annotated[Path, typer.Option(help="Folder for images and weights.")],
    steps: Annotated[int, typer.Option(help="Training steps of each variant.")] = 400,
    images: Annotated[int, typer.Option(help="Number of training images.")] = TRAINING_IMAGES,
    only: Annotated[list[str] | None, typer.Option(help="Variants such as 4x1; default: all.")] = None,
) -> None:
    draw_training_set(output / "images", images, seed=100)
    for window, down_factor in VARIANTS:
        name = f"{window}x{down_factor}"
        if (only and name not in only) or (output / name / "clear_config.json").exists():
            continue
        train(
            Settings(
                pretrained_model_name_or_path=str(model),
                train_data_dir=str(output / "images"),
                latents_dir=str(output / "cache"),
                output_dir=str(output / name),
                max_sequence_length=CAPTION_LENGTH,
                gradient_checkpointing=False,
                window=window,
                down_factor=down_factor,
                train_batch_size=4,
                max_train_steps=steps,
                lr_scheduler="cosine",
                prediction_weight=0.5,
                attention_weight=0.5,
                checkpointing_steps=20,
                checkpoints_total_limit=1,
                resume_from_checkpoint="latest",
                report_to="none",
            )
        )


if __name__ == "__main__":
    typer.run(main)

"""What rotary positions do that bfloat16 cannot tell apart, as pipelines pass them above 4096 px.

    python examples/colliding_positions.py --output benchmarks/results/colliding_positions.json

A rotary embedding knows only how far tokens are from each other. So a picture whose positions, text and image, are all
moved by the same number of tokens is drawn the same, and the small FLUX can stand where a large picture's far corner
would be: at 256 tokens (4096 px of FLUX.1) and beyond, bfloat16 makes pairs of neighbours one, beyond 512 it makes four
one. All is drawn dense, by diffusers alone; a linearized transformer counts a picture's positions anew.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image

from clear_attn import demo
from clear_attn.demo.scenes import held_out_scenes, read
from clear_attn.utils.image_sheets import contact_sheet


def moved(tokens: int, dtype: torch.dtype) -> Any:
    """A forward pre-hook: all positions further down and to the right, passed in a dtype."""

    def hook(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        step = torch.tensor([0, tokens, tokens])
        return args, {**kwargs, **{name: (kwargs[name] + step).to(dtype) for name in ("img_ids", "txt_ids")}}

    return hook


def main(
    captions: Annotated[int, typer.Option(help="How many of the held-out captions.")] = 20,
    shown: Annotated[int, typer.Option(help="How many of them the picture shows.")] = 4,
    output: Annotated[Path | None, typer.Option(help="Where the numbers go as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where a picture goes.")] = None,
) -> None:
    pipe = demo.pipeline()
    scenes = held_out_scenes()[:captions]
    rows, sheet = [], {}
    for tokens, dtype in ((0, torch.float32), (256, torch.float32), (256, torch.bfloat16), (512, torch.bfloat16)):
        handle = pipe.transformer.register_forward_pre_hook(moved(tokens, dtype), with_kwargs=True)
        try:
            images: list[Image.Image] = pipe(
                [scene.caption for scene in scenes],
                max_sequence_length=demo.TEXT_TOKENS,
                generator=[torch.Generator().manual_seed(number) for number in range(captions)],
            ).images
        finally:
            handle.remove()
        right = sum(read(np.asarray(image)) == scene for scene, image in zip(scenes, images, strict=True))
        kind = str(dtype).removeprefix("torch.")
        rows.append({"moved": tokens, "dtype": kind, "captions": captions, "right": right})
        print(json.dumps(rows[-1]), flush=True)
        sheet[f"moved {tokens}, {kind}"] = images[:shown]
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")
    if picture:
        contact_sheet(sheet, [scene.caption for scene in scenes[:shown]]).save(picture)


if __name__ == "__main__":
    typer.run(main)

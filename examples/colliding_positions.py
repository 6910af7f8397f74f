"""The effect of positions that collide in bfloat16, as pipelines pass them above 4096 px.

    python examples/colliding_positions.py --output benchmarks/results/colliding_positions.json

A rotary embedding depends only on the distance between tokens. Shifting all positions, of text and image, by the same
number of tokens gives the same image. So the small FLUX can draw at the positions of a large image's far corner. From
256 tokens on (4096 px of FLUX.1), bfloat16 merges neighbors in pairs, and from 512 on in fours. Everything here is
dense, by diffusers alone; a linearized transformer computes exact positions.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from clear_attn import demo
from clear_attn.demo.scenes import held_out_scenes
from clear_attn.utils.image_sheets import contact_sheet
from evaluate_small_flux import captions_of, draw, score


def shift_positions(tokens: int, dtype: torch.dtype) -> Any:
    """Return a forward pre-hook that shifts all positions down and to the right, and casts them to a dtype."""

    def hook(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        step = torch.tensor([0, tokens, tokens])
        return args, {**kwargs, **{name: (kwargs[name] + step).to(dtype) for name in ("img_ids", "txt_ids")}}

    return hook


def main(
    captions: Annotated[int, typer.Option(help="Number of held-out captions.")] = 20,
    shown: Annotated[int, typer.Option(help="How many of them the contact sheet shows.")] = 4,
    output: Annotated[Path | None, typer.Option(help="JSON file for the numbers.")] = None,
    sheet_file: Annotated[Path | None, typer.Option("--sheet", help="Where the contact sheet goes.")] = None,
) -> None:
    pipe = demo.pipeline()
    scenes = held_out_scenes(captions)
    rows, sheet = [], {}
    for tokens, dtype in ((0, torch.float32), (256, torch.float32), (256, torch.bfloat16), (512, torch.bfloat16)):
        handle = pipe.transformer.register_forward_pre_hook(shift_positions(tokens, dtype), with_kwargs=True)
        try:
            images = draw(pipe, scenes, demo.TEXT_TOKENS, batch=10)
        finally:
            handle.remove()
        kind = str(dtype).removeprefix("torch.")
        rows.append({"moved": tokens, "dtype": kind, "captions": captions, "right": score(scenes, images)["right"]})
        print(json.dumps(rows[-1]), flush=True)
        sheet[f"moved {tokens}, {kind}"] = list(map(Image.fromarray, images[:shown]))
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n")
    if sheet_file:
        contact_sheet(sheet, captions_of(scenes[:shown])).save(sheet_file)


if __name__ == "__main__":
    typer.run(main)

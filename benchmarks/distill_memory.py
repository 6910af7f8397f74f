r"""Count and measure the memory of a training step, and measure its time.

    python benchmarks/distill_memory.py --output benchmarks/results/distill-memory-cpu.json
    python benchmarks/distill_memory.py --heads 24 --layers 19 --single-layers 38 --pixels 1024 --text-tokens 512 \
        --window 16 --down-factor 4

The second line is FLUX.1 itself, on a GPU. A FLUX of the given size with random weights: the trunk in bfloat16, the
student in float32 under autocast, gradient checkpointing, batch 1. Counted is what follows from the numbers of
parameters; what is measured above it are activations and what the optimizer's step needs for a moment.
"""

import json
import platform
import threading
import time
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer
from accelerate.utils import DistributedType
from diffusers import FluxTransformer2DModel
from rich import print
from rich.table import Table

import clear_attn as clear
from clear_attn.distill.optimizers import counted, make_optimizer
from clear_attn.distill.settings import Settings
from clear_attn.distill.step import Batch, Weights, distillation_losses
from clear_attn.distill.student import add_student
from clear_attn.models import training_adapter_for

STEPS = 3
PIXELS_PER_LATENT = 8


class Peak:
    """The most memory held in a `with` block, in bytes, of a GPU or of this process."""

    def __init__(self, device: str) -> None:
        self.cuda, self.bytes, self._done = device != "cpu", 0, threading.Event()

    def __enter__(self) -> "Peak":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._watch = threading.Thread(target=self._sample, daemon=True)
            self._watch.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self.cuda:
            self.bytes = torch.cuda.max_memory_allocated()
        else:
            self._done.set()
            self._watch.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, process.memory_info().rss)


def held(device: str) -> int:
    return torch.cuda.memory_allocated() if device != "cpu" else psutil.Process().memory_info().rss


def main(
    heads: Annotated[int, typer.Option(help="Of 128 channels each; FLUX.1 has 24.")] = 8,
    layers: Annotated[int, typer.Option(help="Blocks of two streams; FLUX.1 has 19.")] = 1,
    single_layers: Annotated[int, typer.Option(help="Blocks of one stream; FLUX.1 has 38.")] = 2,
    pixels: Annotated[int, typer.Option(help="Side of the image.")] = 64,
    text_tokens: int = 16,
    window: int = 2,
    down_factor: int = 1,
    optimizer: str = "prodigy",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    output: Annotated[Path | None, typer.Option(help="Where the numbers go as JSON.")] = None,
) -> None:
    torch.manual_seed(0)
    before = held(device)
    with torch.device(device):
        transformer = FluxTransformer2DModel(
            num_layers=layers, num_single_layers=single_layers, num_attention_heads=heads, guidance_embeds=True
        ).to(torch.bfloat16)
    clear.linearize(transformer, window, down_factor, weights=None)
    trunk = sum(parameter.numel() for parameter in transformer.parameters())
    parameters = add_student(transformer)
    student = sum(parameter.numel() for parameter in parameters)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    stepper = make_optimizer(Settings(optimizer=optimizer, learning_rate=1e-4), parameters, DistributedType.NO)
    layers_compared = [name.removesuffix(".processor") for name in transformer.attn_processors]
    training, size = training_adapter_for(transformer), pixels // PIXELS_PER_LATENT
    config = transformer.config
    shapes = (
        (1, config.in_channels // 4, size, size),
        (1, text_tokens, config.joint_attention_dim),
        (1, config.pooled_projection_dim),
    )
    seconds = []
    with Peak(device) as peak:
        for _ in range(STEPS):
            made = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
            latents, text, pooled = made
            batch = Batch(latents, {"text": text, "pooled": pooled})
            started = time.perf_counter()
            with torch.autocast(device, torch.bfloat16):
                losses = distillation_losses(
                    transformer,
                    training,
                    batch,
                    torch.randn_like(batch.latents),
                    torch.rand(1, device=device),
                    weights=Weights(),
                    matched=training.matched_layers(layers_compared),
                    guidance=3.5,
                )
            losses.total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            stepper.step()
            stepper.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    parts = counted(trunk, student, optimizer)
    measured = peak.bytes - before
    parts_held = sum(parts.values())
    rows = {
        **parts,
        "all that is counted": parts_held,
        "measured at the most": measured,
        "beyond": measured - parts_held,
    }
    table = Table("part", "GB", title=f"{trunk / 1e6:.0f} M parameters, {student / 1e6:.0f} M of them trained")
    for name, value in rows.items():
        table.add_row(name, f"{value / 1e9:.2f}")
    print(table, f"seconds a step: {', '.join(f'{each:.2f}' for each in seconds)}")
    if output:
        options = {
            "heads": heads,
            "layers": layers,
            "single_layers": single_layers,
            "pixels": pixels,
            "text_tokens": text_tokens,
            "window": window,
            "down_factor": down_factor,
            "optimizer": optimizer,
        }
        machine = torch.cuda.get_device_name() if device != "cpu" else platform.machine()
        about = {"device": machine, "torch": torch.__version__, "trunk": trunk, "student": student, "steps": seconds}
        output.write_text(json.dumps({**options, **about, "bytes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

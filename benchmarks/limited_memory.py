"""Draw with a FLUX.1-dev of random weights on a GPU whose memory is limited to that of a smaller card.

    python benchmarks/limited_memory.py group-offload --output benchmarks/results/memory-group-offload-h200.json
    python benchmarks/limited_memory.py int8 --output benchmarks/results/memory-int8-h200.json

The ways are those of docs/highres.md, "On 24 GB", and of examples/low_memory.ipynb. Torch's allocator refuses more than
the limit. Sizes of all models are FLUX.1-dev's, but the tokenizers are those of the small FLUX. Needs 48 GB of RAM.
"""

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from rich import print
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import clear_attn as clear
from clear_attn import demo

PROMPT = "a red circle on a blue ground"
STEPS = 3


class Way(StrEnum):
    group_offload = "group-offload"
    int8 = "int8"


def filled(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Give a model without memory random weights, in RAM."""
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02)
    return model


def pipeline(device: torch.device, layers: int, text_layers: int) -> FluxPipeline:
    """Return FLUX.1-dev with random weights on the CPU, in bfloat16."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=layers, num_single_layers=2 * layers, guidance_embeds=True)
        t5 = T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=text_layers,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
        text_encoder_2 = T5EncoderModel(t5)
    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    small = demo.pipeline()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.to(torch.bfloat16).eval(),
        text_encoder=CLIPTextModel(clip).to(torch.bfloat16).eval(),
        tokenizer=small.tokenizer,
        text_encoder_2=filled(text_encoder_2, device),
        tokenizer_2=small.tokenizer_2,
        transformer=filled(transformer, device),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Clock:
    """The seconds since the last call, and the pipelines' callback that notes them after each step."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps, self.last = device, [], time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return round(seconds, 2)

    def after_step(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        self.steps.append(self.lap())
        return {}


def draw_with_group_offload(pipe: FluxPipeline, device: torch.device, pixels: int, clock: Clock) -> None:
    pipe.transformer.enable_group_offload(onload_device=device, num_blocks_per_group=1)
    pipe.to(device)
    clear.highres(
        pipe,
        PROMPT,
        height=pixels,
        width=pixels,
        window=16,
        down_factor=4,
        weights=None,
        base=clear.Base(pixels // 4, pixels // 4, steps=STEPS),
        stages=clear.Stage(steps=STEPS + 1),
        seed=0,
        max_sequence_length=512,
        callback_on_step_end=clock.after_step,
    )


def draw_in_int8(pipe: FluxPipeline, device: torch.device, pixels: int, clock: Clock) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    clear.linearize(pipe, window=16, down_factor=4, weights=None)
    quantize_(pipe.transformer, Int8WeightOnlyConfig())
    pipe.enable_model_cpu_offload(device=device)
    pipe.vae.enable_tiling()
    clock.lap()
    pipe(PROMPT, height=pixels, width=pixels, num_inference_steps=STEPS, callback_on_step_end=clock.after_step)


def main(
    way: Way,
    pixels: Annotated[int, typer.Option(help="Side of the image.")] = 4096,
    limit: Annotated[float, typer.Option(help="Memory that torch may take, in GiB.")] = 23.0,
    layers: Annotated[int, typer.Option(help="Blocks of two streams; FLUX.1-dev has 19.")] = 19,
    text_layers: Annotated[int, typer.Option(help="Layers of the T5 encoder; FLUX.1-dev has 24.")] = 24,
    output: Annotated[Path | None, typer.Option(help="Where the numbers go as JSON.")] = None,
) -> None:
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    pipe = pipeline(device, layers, text_layers)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit * 2**30 / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    {Way.group_offload: draw_with_group_offload, Way.int8: draw_in_int8}[way](pipe, device, pixels, clock)
    result = {
        "way": way,
        "pixels": pixels,
        "limit_gib": limit,
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_gpu else None,
        "seconds_of_steps": clock.steps,
        "seconds_after_the_last_step": clock.lap(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    print(result)
    if output:
        output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)

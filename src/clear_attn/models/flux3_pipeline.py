"""FLUX.3 in ordinary pipelines. diffusers has modular ones alone, whose loop calls nothing back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, Flux3AutoBlocks, Flux3DistilledAutoBlocks, Flux3ModularPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import Flux3LoraLoaderMixin
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks, PipelineState
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from clear_attn.models._diffusers import is_interrupted, reset_interrupt

StepCallback = Callable[..., dict[str, Any]]


class ImageProcessor(Flux3ImageProcessor):
    """Take images of any size as they are; the base class resizes them, because it takes references."""

    preprocess = VaeImageProcessor.preprocess


class _Flux3(DiffusionPipeline, Flux3LoraLoaderMixin):
    """Run the blocks of a modular pipeline, and call back after each step.

    Args:
        scheduler, vae, text_encoder, tokenizer, transformer: components of the modular pipeline.
        guider (*optional*): one of diffusers' guiders with a `guidance_scale`, which each call sets.
        prompt_upsampler, prompt_upsampler_processor (*optional*): rewrite each prompt, as in the modular pipeline.

    Attributes:
        modular: the name of the modular pipeline.
        blocks: its blocks.
        flow_map: whether its transformer predicts jumps between two timesteps.
    """

    modular: str
    blocks: Any
    flow_map: bool
    guider: Any
    model_cpu_offload_seq = "prompt_upsampler->text_encoder->transformer->vae"
    _optional_components = ("guider", "prompt_upsampler", "prompt_upsampler_processor")
    # Read by the blocks.
    vae_scale_factor = Flux3ModularPipeline.vae_scale_factor
    num_channels_latents = Flux3ModularPipeline.num_channels_latents
    requires_unconditional_embeds = Flux3ModularPipeline.requires_unconditional_embeds

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        guider: Any = None,
        prompt_upsampler: Any = None,
        prompt_upsampler_processor: Any = None,
    ) -> None:
        super().__init__()
        if transformer.config.flow_map != self.flow_map:
            other = Flux3Pipeline if self.flow_map else Flux3DistilledPipeline
            raise TypeError(
                f"a {self.modular} draws with a transformer with flow_map={self.flow_map}, and this one has "
                f"flow_map={other.flow_map}; give a {other.modular}"
            )
        if guider is not None and "guidance_scale" not in guider.config:
            raise TypeError(
                f"each call sets a guidance_scale, and a {type(guider).__name__} has none; give the pipeline a "
                "ClassifierFreeGuidance"
            )
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            guider=guider,
            prompt_upsampler=prompt_upsampler,
            prompt_upsampler_processor=prompt_upsampler_processor,
        )
        self.image_processor = ImageProcessor(vae_scale_factor=2 * self.vae_scale_factor)

    @property
    def interrupt(self) -> bool:
        return is_interrupted(self)

    def check_inputs(self, prompt: str | Sequence[str], callback_on_step_end_tensor_inputs: Sequence[str]) -> None:
        """Raise ValueError for several prompts, and for tensors that a callback cannot get."""
        if not isinstance(prompt, str) and len(prompt) != 1:
            raise ValueError(f"FLUX.3 draws one prompt in a call, got {len(prompt)}; give them one by one")
        unknown = sorted({*callback_on_step_end_tensor_inputs} - {"latents"})
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(unknown)}, but FLUX.3 gives a callback latents "
                "alone; leave the others out"
            )

    @torch.no_grad()
    def _draw(
        self,
        prompt: str | Sequence[str],
        on_step_end: StepCallback | None,
        tensor_inputs: Sequence[str],
        **inputs: Any,
    ) -> Any:
        """Run the blocks of text to image, which read the inputs by name."""
        self.check_inputs(prompt, tensor_inputs)
        reset_interrupt(self)
        blocks = self.blocks().get_workflow("text2image").sub_blocks
        if self.prompt_upsampler is None:
            del blocks["prompt_upsampler"]
        state = PipelineState()
        state.set("prompt", prompt if isinstance(prompt, str) else prompt[0])
        for name, value in inputs.items():
            state.set(name, value, "denoiser_input_fields" if name == "attention_kwargs" else None)
        for block in blocks.values():
            if isinstance(block, LoopSequentialPipelineBlocks):
                self._denoise(block, state, on_step_end, tensor_inputs)
            else:
                block(self, state)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=state.get("images"))

    def _denoise(
        self, loop: Any, state: PipelineState, on_step_end: StepCallback | None, tensor_inputs: Sequence[str]
    ) -> None:
        """Run the blocks of a loop for each timestep, as the loop does, and call back after each."""
        values = loop.get_block_state(state)
        with self.progress_bar(total=len(values.timesteps)) as progress:
            for step, timestep in enumerate(values.timesteps):
                if self.interrupt:
                    continue
                for block in loop.sub_blocks.values():
                    block(self, values, i=step, t=timestep)
                if on_step_end:
                    tensors = {name: values[name] for name in tensor_inputs}
                    values.latents = on_step_end(self, step, timestep, tensors).pop("latents", values.latents)
                progress.update()
        loop.set_block_state(state, values)


class Flux3Pipeline(_Flux3):
    """Draw images as `Flux3ModularPipeline` does without references."""

    modular = "Flux3ModularPipeline"
    blocks = Flux3AutoBlocks
    flow_map = False

    def _guider_at(self, guidance_scale: float) -> Any:
        guider = self.guider or ClassifierFreeGuidance(guidance_scale=guidance_scale)
        # diffusers warns of each new guider.
        changes = guider.config["guidance_scale"] != guidance_scale
        return guider.new(guidance_scale=guidance_scale) if changes else guider

    def predictions(self, guidance_scale: float) -> int:
        """Return how many predictions a step computes at a guidance scale."""
        return int(self._guider_at(guidance_scale).num_conditions)

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 3.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 8192,
    ) -> Any:
        self.guider = self._guider_at(guidance_scale)
        return self._draw(
            prompt,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            generator=generator,
            latents=latents,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            max_sequence_length=max_sequence_length,
        )


class Flux3DistilledPipeline(_Flux3):
    """Draw images as `Flux3DistilledModularPipeline` does without references."""

    modular = "Flux3DistilledModularPipeline"
    blocks = Flux3DistilledAutoBlocks
    flow_map = True

    def predictions(self, guidance_scale: float) -> int:
        """Return how many predictions a step computes, for which the scale has no effect."""
        return 1

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 16,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 8192,
    ) -> Any:
        """Draw an image. A flow map has no guidance, so the scale has no effect."""
        return self._draw(
            prompt,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            generator=generator,
            latents=latents,
            output_type=output_type,
            attention_kwargs=attention_kwargs,
            max_sequence_length=max_sequence_length,
        )

"""Modular pipelines of diffusers, tiny and offline, made of the components of an ordinary one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest
import torch

from clear_attn.models._diffusers import diffusers_version
from tests.helpers import dummy_pipelines
from tests.matrix import rows

# Earlier versions do not take components that were not loaded from a folder or the Hub.
FIRST_VERSION = (0, 42)
needs_modular_pipelines = pytest.mark.skipif(
    diffusers_version() < FIRST_VERSION, reason="diffusers has no such modular pipelines"
)
PROMPT = {"prompt": "a red circle", "height": rows.HEIGHT, "width": rows.WIDTH, "max_sequence_length": 20}
ROUND = {"height": 80, "width": 96}  # Z-Image's blocks take multiples of 16 pixels
KONTEXT_REFERENCE = 48, 64  # in multiples of 16 pixels, which the blocks round to
FLUX3_REFERENCES = (48, 64), (64, 64)  # in multiples of 16 pixels, to which the blocks crop
FLUX2_TEXT = "prompt_embeds", "negative_prompt_embeds"
QWEN_TEXT = "prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds", "negative_prompt_embeds_mask"


class Modular(NamedTuple):
    """A kind of modular pipeline.

    Attributes:
        name: of its class.
        ordinary: makes the ordinary pipeline of which it takes the components.
        call: makes the keywords of its call.
        grids: the image tokens of that call.
        encodes_text: whether its call takes a prompt; else embeddings, and it has no block that encodes text.
    """

    name: str
    ordinary: Callable[[], Any]
    call: Callable[[], dict[str, Any]]
    grids: tuple[tuple[int, int], ...] = (rows.GRID,)
    encodes_text: bool = True

    def empty(self) -> Any:
        """Return the pipeline before its components are loaded."""
        kind = getattr(diffusers, self.name)
        blocks = getattr(diffusers, kind.default_blocks_name)()
        if not self.encodes_text:
            for name in ("prompt_upsampler", "text_encoder"):
                blocks.sub_blocks.pop(name, None)
        pipe = kind(blocks=blocks)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def pipeline(self) -> Any:
        pipe = self.empty()
        components = self.ordinary().components
        names = pipe.null_component_names
        pipe.update_components(**{name: components[name] for name in names if components.get(name) is not None})
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae", "transformer"):
            assert name not in pipe.null_component_names
        return pipe

    def draw(self, pipe: Any) -> torch.Tensor:
        """Return the pixels of an image."""
        settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
        return pipe(**self.call(), **settings, output="images", output_type="pt")


def _of(text: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: text[name] for name in names}


def _flux3_call() -> dict[str, Any]:
    return {"height": 4 * rows.GRID[0], "width": 4 * rows.GRID[1], **dummy_pipelines.flux3_text()}


MODULAR = {
    "FLUX.1": Modular("FluxModularPipeline", lambda: rows.flux("FluxPipeline"), lambda: PROMPT),
    "FLUX.1 Kontext": Modular(
        "FluxKontextModularPipeline",
        lambda: rows.flux("FluxKontextPipeline"),
        lambda: {
            **PROMPT,
            "image": rows.random_image(*KONTEXT_REFERENCE),
            "max_area": rows.HEIGHT * rows.WIDTH,
            "_auto_resize": False,
        },
        (rows.GRID, (KONTEXT_REFERENCE[0] // rows.TOKEN, KONTEXT_REFERENCE[1] // rows.TOKEN)),
    ),
    "FLUX.2 klein": Modular(
        "Flux2KleinModularPipeline",
        dummy_pipelines.flux2,
        lambda: {
            "height": 4 * rows.GRID[0],
            "width": 4 * rows.GRID[1],
            **_of(dummy_pipelines.flux2_text(), FLUX2_TEXT[:1]),
        },
        encodes_text=False,
    ),
    "FLUX.2 klein base, a reference image": Modular(
        "Flux2KleinBaseModularPipeline",
        dummy_pipelines.flux2,
        lambda: {
            "height": 4 * rows.GRID[0],
            "width": 4 * rows.GRID[1],
            "image": [rows.random_image(*rows.FLUX2_REFERENCE)],
            **_of(dummy_pipelines.flux2_text(), FLUX2_TEXT),
        },
        (rows.GRID, (rows.FLUX2_REFERENCE[0] // 4, rows.FLUX2_REFERENCE[1] // 4)),
        encodes_text=False,
    ),
    "FLUX.3": Modular("Flux3ModularPipeline", dummy_pipelines.flux3, _flux3_call, encodes_text=False),
    "FLUX.3, two reference images": Modular(
        "Flux3ModularPipeline",
        dummy_pipelines.flux3,
        lambda: {**_flux3_call(), "image": [rows.random_image(*size) for size in FLUX3_REFERENCES]},
        (rows.GRID, *((height // 4, width // 4) for height, width in FLUX3_REFERENCES)),
        encodes_text=False,
    ),
    "FLUX.3 distilled": Modular(
        "Flux3DistilledModularPipeline",
        lambda: dummy_pipelines.flux3("Flux3DistilledModularPipeline"),
        lambda: {name: value for name, value in _flux3_call().items() if "negative" not in name},
        encodes_text=False,
    ),
    "Qwen-Image": Modular(
        "QwenImageModularPipeline",
        lambda: dummy_pipelines.qwen(diffusers.QwenImagePipeline),
        lambda: {
            "height": 16 * rows.GRID[0],
            "width": 16 * rows.GRID[1],
            **_of(dummy_pipelines.qwen_text(padded=4), QWEN_TEXT),
        },
        encodes_text=False,
    ),
    "Krea 2": Modular(
        "Krea2ModularPipeline",
        dummy_pipelines.krea2,
        lambda: {
            "height": 16 * rows.GRID[0],
            "width": 16 * rows.GRID[1],
            **_of(dummy_pipelines.krea2_text(), QWEN_TEXT),
        },
        encodes_text=False,
    ),
    "Qwen-Image 2.1": Modular(
        "QwenImage21ModularPipeline",
        dummy_pipelines.qwen21,
        lambda: {
            "height": 16 * rows.QWEN21_GRID[0],
            "width": 16 * rows.QWEN21_GRID[1],
            **_of(dummy_pipelines.qwen21_text(), QWEN_TEXT),
            "image_pad_mask": torch.zeros(1, 9, dtype=torch.bool),
            "negative_image_pad_mask": torch.zeros(1, 5, dtype=torch.bool),
        },
        (rows.QWEN21_GRID,),
        encodes_text=False,
    ),
    "Z-Image": Modular(
        "ZImageModularPipeline",
        dummy_pipelines.z_image,
        lambda: {**ROUND, **_of(dummy_pipelines.z_image_captions(batch=1), FLUX2_TEXT)},
        ((ROUND["height"] // rows.TOKEN, ROUND["width"] // rows.TOKEN),),
        encodes_text=False,
    ),
    "Stable Diffusion 3": Modular(
        "StableDiffusion3ModularPipeline", lambda: rows.sd3("StableDiffusion3Pipeline"), lambda: PROMPT
    ),
}


def each_modular_pipeline(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test for each kind of modular pipeline."""
    return needs_modular_pipelines(pytest.mark.parametrize("kind", MODULAR.values(), ids=list(MODULAR))(test))

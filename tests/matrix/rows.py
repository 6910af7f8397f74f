"""The pipelines of the matrix: how each is built, small and offline, and called."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import diffusers
import torch
from diffusers import FluxControlNetModel, FluxMultiControlNetModel, ReduxImageEncoder
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import SiglipVisionConfig, SiglipVisionModel

from clear_attn.models._diffusers import diffusers_version
from tests.helpers import dummy_models, dummy_pipelines, families
from tests.helpers.dummy_controlnets import fill_zeros, sd3_controlnet, z_image_controlnet
from tests.helpers.flux3_loop import Flux3Loop
from tests.helpers.image_processors import pillow_processor

HEIGHT, WIDTH, TOKEN = 72, 96, 8  # pixels; the small autoencoder's tokens have a side of 8
GRID = HEIGHT // TOKEN, WIDTH // TOKEN
REFERENCE = 56, 64  # pixels of a reference image
FLUX2_REFERENCE = 64, 80
FLUX3_REFERENCE = 12, 16  # in tokens
EDITED = 96, 128  # pixels of the reference image of Qwen-Image, which rounds to 32
QWEN21_GRID = 12, 8  # two rows of tiles, for two ranks
QWEN21_CONDITIONS = 4 * 4, 4 * 4  # tokens of condition images, which are resized to an area of 64 x 64 pixels
IP_TOKENS, IP_DIM = 4, 20


# Parts of the random FLUX that all pipelines share.
FLUX_PARTS = "scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"


# The first version of diffusers in which the pipelines of a family work here; the oldest supported is 0.36.
FIRST_VERSIONS = {
    "FLUX.1": (0, 36),
    "SD3": (0, 36),
    "FLUX.2": (0, 37),
    "Qwen-Image": families.QWEN.first_version,
    "FLUX.3": families.FLUX3.first_version,
    "Krea 2": families.KREA2.first_version,
    "Qwen-Image 2.1": families.QWEN21.first_version,
    "Z-Image": families.Z_IMAGE.first_version,
    "Chroma": families.CHROMA.first_version,
}


class Row(NamedTuple):
    """A kind of pipeline.

    Attributes:
        family: the family of its transformer; each has a table on the page.
        build: makes the pipeline, with the same random weights each time.
        call: makes the arguments of its call, in addition to the usual ones.
        grids: grids of the image tokens that its transformer gets.
        set_up: adds what diffusers neither saves nor loads with the pipeline.
        keywords: the argument of its call for attention keywords.
        around: makes a context manager around its call.
    """

    family: str
    build: Callable[[], Any]
    call: Callable[[Any], dict[str, Any]]
    grids: tuple[tuple[int, int], ...] = (GRID,)
    set_up: Callable[[Any], None] = lambda pipe: None
    keywords: str = "joint_attention_kwargs"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def pipeline(self) -> Any:
        pipe = self.build()
        self.set_up(pipe)
        return pipe

    def draw(self, pipe: Any, attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
        """Return the latents of an image."""
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(0)  # some pipelines do not use the generator everywhere
        usual = {
            "prompt": "a red circle",
            "height": HEIGHT,
            "width": WIDTH,
            "num_inference_steps": 2,
            "max_sequence_length": 20,
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
        }
        kwargs = {self.keywords: attention_kwargs, **kwargs}
        call = {**usual, **self.call(pipe), **copy.deepcopy(kwargs)}  # pipelines write into their arguments
        with self.around():
            return pipe(**{name: value for name, value in call.items() if value is not None}).images.float()


@functools.cache
def random_image(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    noise = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((noise * 255).byte().numpy())


def _values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def flux(name: str, *, channels: int = 16, **parts: Any) -> Any:
    """Return a FLUX pipeline of a class, with a transformer of its own and the other parts of the random FLUX."""
    others = {part: dummy_models.random_flux().components[part] for part in FLUX_PARTS}
    sizes = {**dummy_models.FLUX_PIPELINE_SIZES, "in_channels": channels, "out_channels": 16}
    transformer = dummy_models.flux_transformer(guidance=True, **sizes)
    return getattr(diffusers, name)(**others, transformer=transformer, **parts)


def flux_controlnet() -> FluxControlNetModel:
    torch.manual_seed(5)
    sizes = {**dummy_models.FLUX_PIPELINE_SIZES, "guidance_embeds": True}
    return fill_zeros(
        FluxControlNetModel(**{**dummy_models.FLUX_CONFIG, "num_layers": 1, "num_single_layers": 1, **sizes})
    )


def sd3(name: str, *, dual: bool = False, **parts: Any) -> Any:
    """Return an SD3 pipeline, or with dual attention an SD3.5 pipeline."""
    sizes = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "num_layers": 4}
    components = {
        **dummy_models.small_sd3().components,
        "transformer": dummy_models.sd3_transformer(dual=dual, **sizes),
        **parts,
    }
    return getattr(diffusers, name)(**components)


def shorten_prompts(pipe: Any) -> None:
    pipe.tokenizer_max_length = pipe.tokenizer.model_max_length


def sd3_control() -> Any:
    torch.manual_seed(5)
    sizes = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "num_layers": 2, "qk_norm": None}
    return sd3_controlnet(**sizes, dual_attention_layers=())


def load_ip_adapter(pipe: Any) -> None:
    inner, text = pipe.transformer.inner_dim, pipe.transformer.config.joint_attention_dim
    values = {}
    for block in range(pipe.transformer.config.num_layers):
        for place, name in enumerate(("to_k_ip", "to_v_ip")):
            values[f"{block}.{name}.weight"] = _values(10 * block + place, inner, text)
            values[f"{block}.{name}.bias"] = _values(10 * block + place + 5, inner)
    projection = {
        "proj.weight": _values(100, IP_TOKENS * text, IP_DIM),
        "proj.bias": _values(101, IP_TOKENS * text),
        "norm.weight": 1 + _values(102, text),
        "norm.bias": _values(103, text),
    }
    weights = {"image_proj": projection, "ip_adapter": values}
    pipe.load_ip_adapter(weights, weight_name=None, image_encoder_pretrained_model_name_or_path=None)
    pipe.set_ip_adapter_scale(0.7)


@functools.cache
def _redux_prior() -> Any:
    """Return a pipeline that makes embeddings of a text, followed by those of an image."""
    parts = dummy_models.random_flux().components
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=8))
    return diffusers.FluxPriorReduxPipeline(
        image_encoder=encoder.eval(),
        feature_extractor=pillow_processor("Siglip")(size={"height": 16, "width": 16}),
        image_embedder=ReduxImageEncoder(
            redux_dim=16, txt_in_features=dummy_models.FLUX_PIPELINE_SIZES["joint_attention_dim"]
        ).eval(),
        **{name: parts[name] for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")},
    )


def _redux_call(pipe: Any) -> dict[str, Any]:
    made = _redux_prior()(random_image(), prompt="a red circle")
    embeddings = made.prompt_embeds[:, -24:], made.pooled_prompt_embeds
    first, pooled = (x.to(pipe.transformer.dtype) for x in embeddings)
    return {"prompt": None, "prompt_embeds": first, "pooled_prompt_embeds": pooled}


def ip_call(pipe: Any) -> dict[str, Any]:
    embeddings = (_values(seed, 1, 1, IP_DIM).to(pipe.transformer.dtype) for seed in (7, 8))
    return {f"{kind}ip_adapter_image_embeds": [each] for kind, each in zip(("", "negative_"), embeddings, strict=True)}


def _mask() -> Image.Image:
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (16, 16, 64, 56))
    return mask


def controlled(pipe: Any) -> dict[str, Any]:
    return {"control_image": random_image(), "controlnet_conditioning_scale": 0.8}


def _embedded(pipe: Any, text: dict[str, Any], token: int, **others: Any) -> dict[str, Any]:
    """Return arguments for a pipeline without a text encoder, with tokens of `token` pixels a side."""
    dtype = pipe.transformer.dtype
    text = tree_map(lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x, text)
    return {"prompt": None, "height": GRID[0] * token, "width": GRID[1] * token, **text, **others}


def _flux2_call(pipe: Any, **others: Any) -> dict[str, Any]:
    text = dummy_pipelines.flux2_text(negative=9)  # as long as the prompt: the pipeline's encoder pads both
    return _embedded(pipe, text, 4, guidance_scale=3.0, **others)


def flux3() -> Any:
    """Return a FLUX.3 transformer in a loop, since diffusers has modular pipelines only."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return Flux3Loop(dummy_models.flux3_transformer(), scheduler)


def _flux3_call(pipe: Any, *grids: tuple[int, int]) -> dict[str, Any]:
    return _embedded(pipe, dummy_pipelines.flux3_text(), 4, grids=grids)


def _z_image_call(pipe: Any, **others: Any) -> dict[str, Any]:
    batch = 1 if "image" in others else 2
    return _embedded(pipe, dummy_pipelines.z_image_captions(batch), TOKEN, **others)


def _small_references() -> AbstractContextManager[Any]:
    """Make diffusers resize reference images to the area of `EDITED` instead of 1024 x 1024."""
    return mock.patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", math.prod(EDITED))


def _qwen21_call(pipe: Any, **others: Any) -> dict[str, Any]:
    # Its pipeline takes no length of texts, and multiples of 32 pixels.
    sizes = {"height": 16 * QWEN21_GRID[0], "width": 16 * QWEN21_GRID[1], "max_sequence_length": None}
    return {**_embedded(pipe, dummy_pipelines.qwen21_text(batch=2), 16), **sizes, **others}


def _qwen21_edit(pipe: Any) -> dict[str, Any]:
    edited = {"image": [random_image(), random_image(48, 48)], "output_resolution": 64, "true_cfg_scale": 3.0}
    text = dict.fromkeys(dummy_pipelines.qwen21_text()) | {"prompt": "red", "negative_prompt": "blue ground"}
    return _qwen21_call(pipe, **{**text, **edited})


GUIDED = {"negative_prompt": "blue", "guidance_scale": 4.0}
SKIPPING = {"skip_guidance_layers": [0, 2], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}

ROWS = {
    "FLUX text-to-image": Row("FLUX.1", lambda: flux("FluxPipeline"), lambda _: {}),
    "FLUX true CFG": Row(
        "FLUX.1", lambda: flux("FluxPipeline"), lambda _: {"negative_prompt": "blue ground", "true_cfg_scale": 3.0}
    ),
    "FLUX image-to-image": Row(
        "FLUX.1", lambda: flux("FluxImg2ImgPipeline"), lambda _: {"image": random_image(), "strength": 0.9}
    ),
    "FLUX inpaint": Row(
        "FLUX.1",
        lambda: flux("FluxInpaintPipeline"),
        lambda _: {"image": random_image(), "mask_image": _mask(), "strength": 0.9},
    ),
    "FLUX Fill": Row(
        "FLUX.1",
        lambda: flux("FluxFillPipeline", channels=96),  # latents, those of the masked image, and 64 of the mask
        lambda _: {"image": random_image(), "mask_image": _mask()},
    ),
    "FLUX Control": Row(
        "FLUX.1", lambda: flux("FluxControlPipeline", channels=32), lambda _: {"control_image": random_image()}
    ),
    "FLUX ControlNet": Row("FLUX.1", lambda: flux("FluxControlNetPipeline", controlnet=flux_controlnet()), controlled),
    "FLUX two ControlNets": Row(
        "FLUX.1",
        lambda: flux(
            "FluxControlNetPipeline", controlnet=FluxMultiControlNetModel([flux_controlnet(), flux_controlnet()])
        ),
        lambda _: {
            "control_image": [random_image(), random_image(seed=1)],
            "control_mode": [None, None],
            "controlnet_conditioning_scale": [0.8, 0.5],
        },
    ),
    "FLUX Kontext": Row(
        "FLUX.1",
        lambda: flux("FluxKontextPipeline"),
        lambda _: {"image": random_image(*REFERENCE), "max_area": HEIGHT * WIDTH, "_auto_resize": False},
        (GRID, (REFERENCE[0] // TOKEN, REFERENCE[1] // TOKEN)),
    ),
    "FLUX Redux": Row("FLUX.1", lambda: flux("FluxPipeline"), _redux_call),
    "FLUX IP-Adapter": Row("FLUX.1", lambda: flux("FluxPipeline"), ip_call, set_up=load_ip_adapter),
    "SD3 text-to-image": Row("SD3", lambda: sd3("StableDiffusion3Pipeline"), lambda _: GUIDED, set_up=shorten_prompts),
    "SD3 image-to-image": Row(
        "SD3",
        lambda: sd3("StableDiffusion3Img2ImgPipeline"),
        lambda _: {**GUIDED, "image": random_image(), "strength": 0.9},
        set_up=shorten_prompts,
    ),
    "SD3 ControlNet": Row(
        "SD3",
        lambda: sd3("StableDiffusion3ControlNetPipeline", controlnet=sd3_control()),
        lambda _: {**GUIDED, "control_image": random_image(), "controlnet_conditioning_scale": 0.8},
        set_up=shorten_prompts,
    ),
    "SD3.5, skipped layers": Row(
        "SD3",
        lambda: sd3("StableDiffusion3Pipeline", dual=True),
        lambda _: {**GUIDED, **SKIPPING},
        set_up=shorten_prompts,
    ),
    "FLUX.2 text-to-image": Row("FLUX.2", dummy_pipelines.flux2, _flux2_call, keywords="attention_kwargs"),
    "FLUX.2 a reference image": Row(
        "FLUX.2",
        dummy_pipelines.flux2,
        lambda pipe: _flux2_call(pipe, image=[random_image(*FLUX2_REFERENCE)]),
        (GRID, (FLUX2_REFERENCE[0] // 4, FLUX2_REFERENCE[1] // 4)),
        keywords="attention_kwargs",
    ),
    "Qwen-Image text-to-image": Row(
        "Qwen-Image",
        lambda: dummy_pipelines.qwen(diffusers.QwenImagePipeline),
        lambda pipe: _embedded(pipe, dummy_pipelines.qwen_text(batch=2, padded=4), 16),
        keywords="attention_kwargs",
    ),
    "Qwen-Image Edit": Row(
        "Qwen-Image",
        lambda: dummy_pipelines.qwen(diffusers.QwenImageEditPlusPipeline, processor=None),
        lambda pipe: _embedded(pipe, dummy_pipelines.qwen_text(), 16, image=[random_image(*EDITED)]),
        (GRID, (EDITED[0] // 16, EDITED[1] // 16)),
        keywords="attention_kwargs",
        around=_small_references,
    ),
    "FLUX.3 text-to-image": Row("FLUX.3", flux3, lambda pipe: _flux3_call(pipe, GRID), keywords="attention_kwargs"),
    "FLUX.3 a reference image": Row(
        "FLUX.3",
        flux3,
        lambda pipe: _flux3_call(pipe, GRID, FLUX3_REFERENCE),
        (GRID, FLUX3_REFERENCE),
        keywords="attention_kwargs",
    ),
    "Krea 2 text-to-image": Row(
        "Krea 2",
        dummy_pipelines.krea2,
        lambda pipe: _embedded(pipe, dummy_pipelines.krea2_text(batch=2), 16),
        keywords="attention_kwargs",
    ),
    "Qwen-Image 2.1 text-to-image": Row(
        "Qwen-Image 2.1", dummy_pipelines.qwen21, _qwen21_call, (QWEN21_GRID,), keywords="attention_kwargs"
    ),
    "Qwen-Image 2.1 without a cache of keys": Row(
        "Qwen-Image 2.1",
        dummy_pipelines.qwen21,
        lambda pipe: _qwen21_call(pipe, use_kv_cache=False),
        (QWEN21_GRID,),
        keywords="attention_kwargs",
    ),
    "Qwen-Image 2.1 condition images": Row(
        "Qwen-Image 2.1",
        dummy_pipelines.qwen21,
        _qwen21_edit,
        (QWEN21_GRID,),
        keywords="attention_kwargs",
        around=lambda: dummy_pipelines.qwen21_encoder(QWEN21_CONDITIONS),
    ),
    "Z-Image text-to-image": Row("Z-Image", dummy_pipelines.z_image, _z_image_call),
    "Z-Image image-to-image": Row(
        "Z-Image",
        lambda: dummy_pipelines.z_image("ZImageImg2ImgPipeline"),
        lambda pipe: _z_image_call(pipe, image=random_image(), strength=0.9),
    ),
    "Z-Image inpaint": Row(
        "Z-Image",
        lambda: dummy_pipelines.z_image("ZImageInpaintPipeline"),
        lambda pipe: _z_image_call(pipe, image=random_image(), mask_image=_mask(), strength=0.9),
    ),
    "Z-Image ControlNet": Row(
        "Z-Image",
        lambda: dummy_pipelines.z_image("ZImageControlNetPipeline", controlnet=z_image_controlnet()),
        lambda pipe: {**_z_image_call(pipe), **controlled(pipe)},
    ),
    "Chroma text-to-image": Row(
        "Chroma",
        lambda: dummy_pipelines.chroma(diffusers.ChromaPipeline),
        lambda _: {"negative_prompt": "blue", "guidance_scale": 3.0},
    ),
}
# The rows that the installed diffusers has.
PRESENT = {name: row for name, row in ROWS.items() if FIRST_VERSIONS[row.family] <= diffusers_version()}

"""The table of models that the tests run with: one entry for each transformer class.

A test of what differs by model is decorated with `each_family`. Others use the fixture `family`, two of the models.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from clear_attn.models._diffusers import diffusers_version
from tests.helpers import dummy_models

PADDING_MASKS = "encoder_hidden_states_mask", "encoder_attention_mask", "attention_mask"


class Family(NamedTuple):
    """How to make a small model, its variants and calls, and what the model supports.

    Attributes:
        transformer: makes a small random one.
        variants: keywords for `transformer` that make other kinds of it.
        call: makes the keywords of a forward call, from grids, text, batch, seed and controlnet.
        layers: the number of its attention layers.
        text_tokens: the default length of the text; 0 for a model without text.
        most_grids: the most images in one sequence: the image and its references.
        square: whether images must be square.
        columns: the number of which an image's columns of tokens must be a multiple.
        residuals: whether a call takes the residuals of a ControlNet.
        padding: whether a call takes a mask for padded text; `call` then takes `padded`, a length per text.
        fused: whether its layers can fuse their projections.
        default_device: whether diffusers creates all tensors of a call on the device of its inputs.
        lora: whether diffusers can load a LoRA into it.
        training: whether it can be distilled.
        reentrant: whether diffusers supports reentrant gradient checkpointing of it.
        first_version: of diffusers, the first in which the model works here.
        timestep_of_sigma_1: the timestep of a call at sigma 1; None if its timestep is not a sigma.
        image: the keyword of the image in a call, a tensor or a list of them.
        blocks: the name of a list of its blocks.
        reference_layers: the number of its layers that attend among references alone.
    """

    transformer: Callable
    variants: list[dict]
    call: Callable
    layers: int
    text_tokens: int = 512
    most_grids: int = 1
    square: bool = False
    columns: int = 1
    residuals: bool = False
    padding: bool = False
    fused: bool = True
    default_device: bool = True
    lora: bool = True
    training: bool = False
    timestep_of_sigma_1: float | None = 1.0
    reentrant: bool = True
    first_version: tuple = (0, 36)
    blocks: str = "transformer_blocks"
    reference_layers: int = 0
    image: str = "hidden_states"

    def images(self, call):
        """Return the tensors of the image in a call."""
        return tree_leaves(call[self.image])

    def without_tokens(self, call):
        """Return a call with an image that has no tokens."""
        return {**call, self.image: tree_map(lambda x: x[:, :0], call[self.image])}

    def grid(self, height, width):
        """Return a grid of this size: square if images must be, with as many more columns as they must have."""
        return (height, height) if self.square else (height, width + -width % self.columns)

    def at_sigma(self, call, sigma):
        """Return the call at this sigma."""
        return {**call, "timestep": torch.full_like(call["timestep"], sigma * self.timestep_of_sigma_1)}

    def call_without_mask(self, *args, **kwargs):
        """Make a call without a mask for padded text."""
        call = self.call(*args, **kwargs)
        return {name: value for name, value in call.items() if name not in PADDING_MASKS}

    def padding_mask(self, call):
        """Return the name of the mask for padded text in a call that has one."""
        return next(name for name in PADDING_MASKS if call.get(name) is not None)


FLUX = Family(
    dummy_models.flux_transformer,
    [{"guidance": False}, {"guidance": True}],
    dummy_models.flux_call,
    layers=4,
    most_grids=2,
    residuals=True,
    training=True,
)
SD3 = Family(
    dummy_models.sd3_transformer,
    [{"dual": False}, {"dual": True}],
    dummy_models.sd3_call,
    layers=4,
    text_tokens=333,
    residuals=True,
    training=True,
    timestep_of_sigma_1=1000.0,
)
FLUX2 = Family(
    dummy_models.flux2_transformer,
    [{"guidance": False}, {"guidance": True}],
    dummy_models.flux2_call,
    layers=4,
    most_grids=3,
    training=True,
    reentrant=diffusers_version() >= (0, 37),
)
QWEN = Family(
    dummy_models.qwen_transformer,
    [{}, {"zero_cond_t": True}],
    dummy_models.qwen_call,
    layers=3,
    most_grids=3,
    residuals=True,
    padding=True,
    fused=False,
    training=True,
    first_version=(0, 39),
)
CHROMA = Family(
    dummy_models.chroma_transformer,
    [{}],
    dummy_models.chroma_call,
    layers=4,
    most_grids=2,
    residuals=True,
    padding=True,
    default_device=False,
    training=True,
)
DIT = Family(
    dummy_models.dit_transformer,
    [{}, {"patch_size": 1, "out_channels": 4}],
    dummy_models.dit_call,
    layers=3,
    text_tokens=0,
    square=True,
    fused=False,
    lora=False,
    timestep_of_sigma_1=None,
)
KREA2 = Family(
    dummy_models.krea2_transformer,
    [{}, {"num_key_value_heads": 1}],
    dummy_models.krea2_call,
    layers=3,
    padding=True,
    fused=False,
    training=True,
    first_version=(0, 39),
)
FLUX3 = Family(
    dummy_models.flux3_transformer,
    [{}, {"flow_map": True}],
    dummy_models.flux3_call,
    layers=6,
    reference_layers=2,
    text_tokens=80,
    most_grids=3,
    training=True,
    blocks="single_transformer_blocks",
    first_version=(0, 42),
)
Z_IMAGE = Family(
    dummy_models.z_image_transformer,
    [{}, {"n_refiner_layers": 2}],
    dummy_models.z_image_call,
    layers=3,
    residuals=True,
    fused=False,
    training=True,
    timestep_of_sigma_1=None,
    first_version=(0, 42),
    image="x",
    blocks="layers",
)
QWEN21 = Family(
    dummy_models.qwen21_transformer,
    [{}, {"causal_condition": False}],
    dummy_models.qwen21_call,
    layers=3,
    columns=4,
    padding=True,
    fused=False,
    training=True,
    first_version=(0, 42),
)
ALL = {
    "flux": FLUX,
    "sd3": SD3,
    "flux2": FLUX2,
    "qwen": QWEN,
    "chroma": CHROMA,
    "dit": DIT,
    "krea2": KREA2,
    "flux3": FLUX3,
    "z_image": Z_IMAGE,
    "qwen21": QWEN21,
}
FAMILIES = {name: family for name, family in ALL.items() if family.first_version <= diffusers_version()}
# Text first and text last, reference images, two-dimensional latents: enough if the model makes no difference.
USUAL = ("flux", "sd3")


def needs(name):
    """Skip a test, or a file by its `pytestmark`, where the installed diffusers is older than a family."""
    first = ".".join(map(str, ALL[name].first_version))
    return pytest.mark.skipif(name not in FAMILIES, reason=f"{name} is supported with diffusers {first} and later")


def each_family(quick=tuple(ALL), **properties):
    """Run a test for every family, or for those with these properties; slow are those that are not in `quick`."""
    return pytest.mark.parametrize(
        "family",
        [pytest.param(family, id=name, marks=_slow_unless(name in quick)) for name, family in _with(properties)],
    )


def each_family_with_each(name, values, **properties):
    """Run a test for every family with every value.

    Slow are all but every value for the first family, and one value for each of the others.
    """
    return pytest.mark.parametrize(
        ("family", name),
        [
            pytest.param(
                family,
                value,
                id=f"{each}-{getattr(value, '__name__', value)}",
                marks=_slow_unless(i == 0 or i % len(values) == j),
            )
            for i, (each, family) in enumerate(_with(properties))
            for j, value in enumerate(values)
        ],
    )


def _with(properties):
    return [
        (name, family)
        for name, family in FAMILIES.items()
        if all(getattr(family, field) == value for field, value in properties.items())
    ]


def _slow_unless(quick):
    return () if quick else pytest.mark.slow

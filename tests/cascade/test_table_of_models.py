"""Each cell on large images in the table of `docs/models.md`, which is read here."""

from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import QwenImageControlNetModel, QwenImagePipeline

import clear_attn as clear
from clear_attn.cascade.pipelines import find_cascade_target
from clear_attn.models import ADAPTERS, adapter_for
from clear_attn.models._diffusers import diffusers_version
from tests.helpers import dummy_models, dummy_pipelines, families
from tests.helpers.dummy_controlnets import fill_zeros, flux_controlnet, sd3_controlnet
from tests.helpers.reference_model import run

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
# In bfloat16, columns past 256 collide; FLUX.3 counts half steps.
WIDE, SQUARE = (2, 300), (8, 8)


class Row(NamedTuple):
    """How to make the model of a row of the table.

    Attributes:
        transformer, call: make it and a call, from a grid.
        pipeline: makes a pipeline that `highres` takes.
        first_version: of diffusers.
    """

    transformer: Any
    call: Any
    pipeline: Any = None
    first_version: tuple[int, int] = (0, 36)


def of(name, pipeline=None):
    family = families.ALL[name]
    return Row(family.transformer, family.call, pipeline, family.first_version)


def qwen_controlnet():
    return fill_zeros(QwenImageControlNetModel(**{**dummy_models.QWEN_CONFIG, "num_layers": 2}))


def with_condition(call):
    """Return a function that makes a call of a model's ControlNet."""

    def controlnet_call(transformer, grid):
        made = call(transformer, grid)
        return {**made, "controlnet_cond": made["hidden_states"].flip(-1)}

    return controlnet_call


ROWS = {
    "FLUX.1": of("flux", dummy_models.flux_pipeline),
    "FLUX.2, FLUX.2 klein": of("flux2", dummy_pipelines.flux2_dev),
    "FLUX.3": of("flux3", lambda: dummy_pipelines.flux3(text_blocks=["text_encoder"])),
    "Qwen-Image": of("qwen", lambda: dummy_pipelines.qwen(QwenImagePipeline)),
    "Qwen-Image 2.1": of("qwen21"),
    "Chroma": of("chroma", lambda: dummy_pipelines.chroma(dummy_pipelines.diffusers.ChromaPipeline)),
    "Krea 2": of("krea2", dummy_pipelines.krea2),
    "Z-Image": of("z_image", dummy_pipelines.z_image),
    "Stable Diffusion 3, 3.5": of("sd3", dummy_models.sd3_pipeline),
    "DiT": of("dit"),
    "ControlNets of FLUX.1": Row(flux_controlnet, with_condition(dummy_models.flux_call)),
    "ControlNet of Qwen-Image": Row(
        qwen_controlnet, with_condition(dummy_models.qwen_call), first_version=families.QWEN.first_version
    ),
    "ControlNets of Stable Diffusion 3": Row(sd3_controlnet, with_condition(dummy_models.sd3_call)),
}


def read_table():
    """Return the cells of each row, by title and column."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    columns, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {title: dict(zip(columns[1:], cells, strict=True)) for title, *cells in rows}


TABLE = read_table()


def each_row(test):
    present = {title: row for title, row in ROWS.items() if row.first_version <= diffusers_version()}
    arguments = [pytest.param(MappingProxyType(TABLE[title]), row, id=title) for title, row in present.items()]
    return pytest.mark.parametrize(("cells", "row"), arguments)(test)


def test_every_model_has_a_row():
    assert TABLE.keys() == ROWS.keys()
    present = [row for row in ROWS.values() if row.first_version <= diffusers_version()]
    classes = {adapter_for(row.transformer()).transformer_class for row in present}
    assert classes == {each.transformer_class for each in ADAPTERS if each.first_version <= diffusers_version()}


@each_row
def test_highres(cells, row):
    if row.pipeline is None:
        assert cells["`highres`"] == "no"
        with pytest.raises(TypeError, match=r"highres does not support a \w+; give one of: FluxPipeline, "):
            clear.highres(row.transformer(), "a red circle", height=64, width=64)
        return
    target = find_cascade_target(row.pipeline())
    assert isinstance(target.transformer, type(row.transformer()))
    from_image = "Img2Img" in target.image_to_image.__name__
    assert cells["`highres`"] == ("image to image" if from_image else "noised latents")


@each_row
def test_ntk_scaling(cells, row):
    transformer = row.transformer()
    call = row.call(transformer, SQUARE)
    before = run(transformer, call)
    if cells["`ntk_scaling`"] == "no":
        with pytest.raises(ValueError, match=r"needs a rotary embedding, .* leave it out"):
            clear.ntk_scaling(transformer, 10).__enter__()
        return
    assert cells["`ntk_scaling`"] == "yes"
    with clear.ntk_scaling(transformer, 10):
        assert (run(transformer, call) - before).abs().max() > 1e-4
    assert torch.equal(run(transformer, call), before)


@each_row
def test_exact_positions(cells, row):
    transformer = row.transformer()
    given = [name for name in ("img_ids", "position_ids") if name in row.call(transformer, SQUARE)]
    limit = adapter_for(transformer).max_grid_side(transformer)
    assert cells["exact positions"] == ("restored" if given else "yes" if limit is None else "up to a limit")
    if given:
        call = row.call(transformer, WIDE)
        coarse = {**call, **{name: call[name].bfloat16() for name in given}}
        assert not torch.equal(run(transformer, coarse), run(transformer, call))
        clear.linearize(transformer, 5, weights=None)
        assert torch.equal(run(transformer, coarse), run(transformer, call))


@each_row
def test_proportional_attention(cells, row):
    transformer = row.transformer()
    call = row.call(transformer, SQUARE)
    if cells["`proportional_attention`"] == "once linearized":
        with pytest.raises(RuntimeError, match=r"call clear_attn\.linearize\(\) first"):
            clear.proportional_attention(transformer).__enter__()
    else:
        assert cells["`proportional_attention`"] == "yes"
        assert is_scaled(transformer, call)
    clear.linearize(transformer, 4, weights=None)
    assert is_scaled(transformer, call)


def is_scaled(transformer, call):
    """Return whether proportional attention changes the output of a model."""
    before = run(transformer, call)
    with clear.proportional_attention(transformer):
        return (run(transformer, call) - before).abs().max() > 1e-5

"""Modular pipelines of diffusers: components come one by one, and the public functions take a loaded one."""

import dataclasses
import re

import diffusers
import pytest
import torch
from diffusers import ComponentsManager
from safetensors.torch import save_file

import clear_attn as clear
from clear_attn.weights.metadata import CONFIG_FILE, read_record
from tests.helpers.modular_pipelines import MODULAR, each_modular_pipeline, needs_modular_pipelines
from tests.helpers.placement import align
from tests.helpers.reference_model import check_pipeline
from tests.helpers.snapshots import assert_same, checkpoint_for, snapshot

pytestmark = needs_modular_pipelines
FLUX = MODULAR["FLUX.1"]
FUNCTIONS = [
    clear.linearize,
    clear.restore,
    clear.is_linearized,
    clear.deparallelize,
    lambda pipe: clear.cost(pipe, 1024, 1024),
    lambda pipe: clear.save_pretrained(pipe, "never-written"),
    lambda pipe: clear.highres(pipe, "a red circle", height=2048, width=2048),
]


@each_modular_pipeline
def test_images_are_those_of_the_rule(kind):
    pipe = kind.pipeline()
    check_pipeline(pipe, kind.grids, lambda: kind.draw(pipe))


@each_modular_pipeline
def test_from_linearizing_to_restoring(kind, tmp_path):
    pipe, other = kind.pipeline(), kind.pipeline()
    before, dense = snapshot(pipe.transformer), kind.draw(pipe)
    save_file(checkpoint_for(pipe.transformer, 2), tmp_path / "weights.safetensors")
    assert clear.linearize(pipe, 3, weights=tmp_path / "weights.safetensors") is pipe
    assert clear.is_linearized(pipe)
    expected = kind.draw(pipe)
    assert not torch.allclose(expected, dense, atol=1e-3)
    clear.save_pretrained(pipe, tmp_path / "saved")
    clear.linearize(other, weights=tmp_path / "saved")
    assert torch.equal(kind.draw(other), expected)
    clear.restore(pipe)
    assert not clear.is_linearized(pipe)
    assert_same(pipe.transformer, before)


@each_modular_pipeline
def test_its_cost_is_that_of_an_ordinary_pipeline(kind):
    costs = [clear.cost(pipe, 1024, 768, window=8) for pipe in (kind.pipeline(), kind.ordinary())]
    modular, ordinary = (dataclasses.replace(cost, memory=None) for cost in costs)
    assert modular == ordinary
    modular, ordinary = (dataclasses.replace(cost.memory, weights={}) for cost in costs)
    assert modular == ordinary


@pytest.mark.parametrize("function", FUNCTIONS)
def test_before_its_transformer_is_loaded(function):
    pipe = FLUX.empty()
    with pytest.raises(RuntimeError, match=r'no transformer yet; call pipe\.load_components\("transformer"\) first'):
        function(pipe)


def test_the_remedies_help(tmp_path):
    FLUX.ordinary().save_pretrained(tmp_path / "model")
    pipe = diffusers.ModularPipeline.from_pretrained(str(tmp_path / "model"))
    with pytest.raises(RuntimeError, match="load_components") as error:
        clear.linearize(pipe, 3, weights=None)
    exec(re.search(r"pipe\.load_components\(.*?\)", str(error.value))[0], {"pipe": pipe})
    assert clear.is_linearized(clear.linearize(pipe, 3, weights=None))
    pipe = FLUX.empty()
    pipe.update_components(transformer=FLUX.ordinary().transformer)
    assert clear.is_linearized(clear.linearize(pipe, 3, weights=None))


def test_blocks_without_a_transformer():
    blocks = diffusers.FluxAutoBlocks().sub_blocks["text_encoder"]
    with pytest.raises(TypeError, match=r"a FluxModularPipeline is not supported"):
        clear.linearize(blocks.init_pipeline())


def test_components_that_are_loaded_later_leave_it_linearized(tmp_path):
    FLUX.ordinary().save_pretrained(tmp_path / "model")
    pipe = diffusers.ModularPipeline.from_pretrained(str(tmp_path / "model"))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_components("transformer")
    align(pipe.transformer)
    clear.linearize(pipe, 3, weights=None)
    pipe.load_components()
    assert clear.is_linearized(pipe)
    ordinary = FLUX.pipeline()
    clear.linearize(ordinary, 3, weights=None)
    assert torch.equal(FLUX.draw(pipe), FLUX.draw(ordinary))
    pipe.unload_components("transformer")
    with pytest.raises(RuntimeError, match="load_components"):
        clear.is_linearized(pipe)
    pipe.load_components("transformer")
    assert not clear.is_linearized(pipe)


def test_one_that_was_saved_while_it_was_linearized(tmp_path):
    pipe = FLUX.pipeline()
    clear.linearize(pipe, 3, weights=None)
    expected = FLUX.draw(pipe)
    pipe.save_pretrained(str(tmp_path / "model"), overwrite_modular_index=True)
    again = diffusers.ModularPipeline.from_pretrained(str(tmp_path / "model"))
    again.load_components()
    align(again.transformer)
    again.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match="now runs with dense attention"):
        assert not clear.is_linearized(again)
    clear.linearize(again)
    assert torch.equal(FLUX.draw(again), expected)


def test_saved_weights_name_the_model_on_the_hub(tmp_path, monkeypatch):
    """Each component knows where it is from; the pipeline's own config does not."""
    pipe = FLUX.pipeline()
    pipe.transformer.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    save_file(checkpoint_for(pipe.transformer), tmp_path / "weights.safetensors")
    clear.linearize(pipe, 3, weights=tmp_path / "weights.safetensors")
    clear.save_pretrained(pipe, tmp_path / "saved")
    assert read_record(tmp_path / "saved" / CONFIG_FILE).base_model == "black-forest-labs/FLUX.1-dev"


def test_kontext_has_no_published_weights():
    pipe = MODULAR["FLUX.1 Kontext"].pipeline()
    with pytest.raises(
        ValueError, match="finds none for this model, a FluxTransformer2DModel in a FluxKontextModularPipeline"
    ):
        clear.linearize(pipe)


def test_offloading_by_a_components_manager(monkeypatch):
    monkeypatch.setattr(torch.cpu, "mem_get_info", lambda device: (2**40, 2**40), raising=False)
    pipe = FLUX.pipeline()
    expected = FLUX.draw(clear.linearize(pipe, 3, weights=None))
    clear.restore(pipe)
    manager = ComponentsManager()
    for name, component in pipe.components.items():
        manager.add(name, component)
    manager.enable_auto_cpu_offload(device="cpu")
    clear.linearize(pipe, 3, weights=None)
    assert torch.equal(FLUX.draw(pipe), expected)
    manager.disable_auto_cpu_offload()
    assert torch.equal(FLUX.draw(pipe), expected)


def test_an_ordinary_pipeline_without_a_transformer():
    components = {**FLUX.ordinary().components, "transformer": None}
    with pytest.raises(RuntimeError, match="has no transformer yet; load it without transformer=None"):
        clear.linearize(diffusers.FluxPipeline(**components))

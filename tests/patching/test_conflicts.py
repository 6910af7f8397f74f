"""Guidance inside attention layers is refused, also if it is added later."""

import pytest
from diffusers import SmoothedEnergyGuidanceConfig, StableDiffusion3PAGPipeline
from diffusers.hooks import HookRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceHook,
    _apply_smoothed_energy_guidance_hook,
)

import clear_attn as clear
from tests.helpers import dummy_models, families
from tests.helpers.reference_model import run
from tests.helpers.snapshots import assert_same, snapshot

# Hooks of diffusers' guiders, by submodule. Added by hand, because diffusers 0.42 finds only some of these layers.
HOOKS = {
    "to_q": SmoothedEnergyGuidanceHook(),
    "": AttentionProcessorSkipHook(lambda module, *args, **kwargs: args, skip_attention_scores=True),
}


@pytest.mark.parametrize("where", HOOKS)
def test_hooks_inside_attention(family, transformer, where):
    call, hook = family.call(transformer, (5, 7)), HOOKS[where]
    words = rf"transformer_blocks\.1\.attn has a {type(hook).__name__}, which .* does not go with CLEAR; take it off"
    later = clear.linearize(family.transformer(), 3, weights=None)
    for model in (transformer, later):
        registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1].attn.get_submodule(where))
        registry.register_hook(hook, "guidance")
    before = snapshot(transformer)
    with pytest.raises(RuntimeError, match=words):
        clear.linearize(transformer, 3, weights=None)
    assert_same(transformer, before)
    with pytest.raises(RuntimeError, match=words):
        run(later, call)
    registry.remove_hook("guidance")
    assert run(later, call).isfinite().all()


def test_smoothed_energy_guidance_of_diffusers():
    transformer = clear.linearize(families.SD3.transformer(), 3, weights=None)
    config = SmoothedEnergyGuidanceConfig(indices=[1], fqn="transformer_blocks")
    _apply_smoothed_energy_guidance_hook(transformer, config, blur_sigma=1.0)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.1\.attn has a SmoothedEnergyGuidanceHook"):
        run(transformer, families.SD3.call(transformer, (5, 7)))


def test_pipelines_of_perturbed_attention_guidance():
    parts = {name: part for name, part in dummy_models.sd3_pipeline().components.items() if name != "image_encoder"}
    parts.pop("feature_extractor")
    pipe = StableDiffusion3PAGPipeline(**parts)
    before = snapshot(pipe.transformer)
    with pytest.raises(RuntimeError, match=r"a StableDiffusion3PAGPipeline puts processors .* pipe\.components"):
        clear.linearize(pipe, 3, weights=None)
    assert_same(pipe.transformer, before)

"""Settings of stages by name, and the model that has other ones than the published."""

import torch

import clear_attn as clear
from clear_attn import Stage, demo
from clear_attn.cascade.presets import default_preset
from clear_attn.cascade.stage_runner import Cascade
from clear_attn.patching.target import find_target
from tests.helpers import dummy_models
from tests.helpers.large_images import draw


def preset_of(pipe):
    return default_preset(find_target(pipe))


def test_the_small_flux_has_the_refined_preset_however_it_is_linearized(tmp_path):
    pipe = demo.pipeline()
    assert preset_of(pipe) == "refined"
    with clear.linearized(pipe, window=8):  # with distilled weights
        assert preset_of(pipe) == "refined"
        pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    assert not torch.equal(*(each.transformer.transformer_blocks[0].attn.to_q.weight for each in (pipe, loaded))), (
        "it was saved after it was restored"
    )
    assert preset_of(loaded) == "refined"
    clear.linearize(pipe, window=8, keep_original=False)
    assert preset_of(pipe) == "refined"


def test_other_models_have_the_published_one():
    assert preset_of(dummy_models.sd3_pipeline()) == "published"
    pipe = demo.pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.bias += 1
    assert preset_of(pipe) == "published"


def test_highres_takes_the_models_preset_or_the_one_given(monkeypatch):
    monkeypatch.setattr(Cascade, "draw", lambda *args: None)
    pipe = demo.pipeline()

    def planned(**settings):
        stage = draw(pipe, stages=None, **settings).plan.stages[0]
        return stage.strength, stage.ntk_factor, stage.proportional, stage.shift, stage.low_resolution_guidance

    assert planned() == planned(preset="refined") == (0.4, 1, False, 1, 1)
    assert planned(preset="published") == (0.7, 10, True, 3, None)


def test_presets_differ_and_the_published_one_is_the_default_of_a_stage():
    assert Stage.preset("published") == Stage()
    assert Stage.preset("refined") != Stage()

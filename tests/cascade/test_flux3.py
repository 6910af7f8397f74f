"""FLUX.3 in a cascade: its images are those of diffusers' modular pipelines, which stop after no step."""

import copy
import itertools
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

import clear_attn as clear
from clear_attn.cascade.latents import unpack
from clear_attn.cascade.pipelines import find_cascade_target
from tests.helpers import dummy_pipelines
from tests.helpers.large_images import PROMPT, assert_work_is_of_the_run, draw, noise, same
from tests.helpers.modular_pipelines import needs_modular_pipelines
from tests.helpers.snapshots import assert_same, snapshot

pytestmark = needs_modular_pipelines
BASE = clear.Base(height=32, width=32, steps=2, guidance=3.0)
STAGE = clear.Stage(steps=4, strength=0.5, ntk_factor=1, proportional=False, shift=None, guidance=2.0)
SETTINGS = {"height": 64, "width": 64, "base": BASE, "stages": STAGE}
FLUX3, FLOW_MAP = "Flux3ModularPipeline", "Flux3DistilledModularPipeline"
each_kind = pytest.mark.parametrize("name", [FLUX3, FLOW_MAP])


@pytest.fixture
def make(monkeypatch):
    dummy_pipelines.fake_flux3_text(monkeypatch.setattr)

    def made(name=FLUX3, text_blocks=("text_encoder",)):
        pipe = dummy_pipelines.flux3(name, text_blocks)
        torch.manual_seed(3)
        pipe.vae.bn.running_mean.uniform_(-0.5, 0.5)
        pipe.vae.bn.running_var.uniform_(0.5, 2)
        return pipe

    return made


def draw_modular(pipe, guidance, side, **settings):
    """Return an image that diffusers' own loop draws."""
    if "guider" in pipe.components:
        pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=guidance))
    return pipe(prompt=PROMPT, height=side, width=side, output="images", **settings)[0]


def noised(pipe, image, sigmas, seed):
    """Return an image's latents with noise, written again, with diffusers' own encoder."""
    from diffusers.modular_pipelines.flux3.encoders import Flux3VaeEncoderStep

    encoder = Flux3VaeEncoderStep().init_pipeline()
    encoder.update_components(vae=pipe.vae)
    pixels = VaeImageProcessor(vae_scale_factor=4).preprocess(image)
    (clean,) = encoder(condition_images=[pixels], output="image_cond_latents")
    channels, height, width = clean.shape[1:]
    random = torch.randn((1, channels // 4, 2 * height, 2 * width), generator=torch.Generator().manual_seed(seed))
    patches = random.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 1, 4, 5, 2, 3).flatten(1, 3)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(sigmas=sigmas)
    return scheduler.sigmas[0] * patches + (1 - scheduler.sigmas[0]) * clean


def test_runs_are_recorded_and_continued(make):
    pipe, stage = make(), replace(STAGE, shift=3.0)
    guided = replace(stage, stepwise_guidance=clear.StepwiseGuidance())
    lasts = []

    def stop(result):
        raise KeyboardInterrupt

    def keep(runner, step, timestep, tensors):
        lasts.append(tensors["latents"])
        return tensors

    with pytest.raises(clear.HighresInterrupted) as caught:
        draw(pipe, **SETTINGS | {"stages": guided}, callback_on_stage_end=stop, callback_on_step_end=keep)
    recording = caught.value.result.runs[0]
    last = unpack(lasts[-1], recording.size).float()
    torch.testing.assert_close(recording.prediction(0.0), last, atol=1e-4, rtol=0)
    images = [draw(pipe, **SETTINGS | {"stages": each}) for each in (stage, guided, replace(stage, continues=True))]
    assert all(image.finished for image in images)
    assert not any(same(first.image, second.image) for first, second in itertools.combinations(images, 2))


def test_a_flow_map_predicts_no_clean_image(make):
    for changes in ({"stepwise_guidance": clear.StepwiseGuidance()}, {"continues": True}):
        with pytest.raises(
            ValueError, match=r"stage 1 has .* this Flux3Transformer2DModel is a flow map, which predic"
        ):
            draw(make(FLOW_MAP), **SETTINGS | {"stages": replace(STAGE, shift=3.0, **changes)})


@each_kind
@pytest.mark.parametrize("shift", [None, 2.0])
def test_images_are_those_of_the_modular_pipeline(name, shift, make):
    pipe = make(name)
    options = {"negative_prompt": "blue"} if name == FLUX3 else {}
    before, components = snapshot(pipe.transformer), pipe.components
    result = draw(pipe, **SETTINGS | {"stages": replace(STAGE, shift=shift)}, **options)
    assert_same(pipe.transformer, before)
    assert pipe.components == components
    seed = torch.Generator().manual_seed(5)
    base = draw_modular(pipe, 3.0, 32, num_inference_steps=2, generator=seed, **options)
    assert same(result.images[0], base)
    clear.linearize(pipe, 4, weights=None)
    sigmas = np.linspace(1, 1 / 4, 4)[2:]
    if shift:
        pipe.update_components(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    latents = noised(pipe, base.resize((64, 64), Image.Resampling.LANCZOS), sigmas, 6)
    assert same(result.image, draw_modular(pipe, 2.0, 64, latents=latents, sigmas=sigmas, **options))
    pipe.update_components(scheduler=components["scheduler"])
    again = draw(pipe, window=None, weights="auto", **SETTINGS | {"stages": replace(STAGE, shift=shift)}, **options)
    assert (again.plan.window, again.plan.model["pipeline"]) == (4, name.replace("Modular", ""))
    assert same(again.image, result.image)
    assert clear.is_linearized(pipe)


@each_kind
@pytest.mark.parametrize(
    "change",
    [{"low_resolution_guidance": 1}, {"proportional": True}, {"ntk_factor": 10}, {"shift": 9.0}, {"guidance": 5}],
)
def test_settings_of_a_stage_take_effect(name, change, make):
    """A flow map has no guidance."""
    pipe, start = make(name), {"image": noise(32, 32), "height": 64, "width": 64}
    plain, changed = (draw(pipe, stages=stage, **start).image for stage in (STAGE, replace(STAGE, **change)))
    assert same(plain, changed) == (name == FLOW_MAP and "guidance" in change)


@pytest.mark.parametrize("guider", ["AdaptiveProjectedGuidance", "ClassifierFreeGuidance"])
def test_the_guider_of_the_pipeline_guides(guider, make):
    pipe, own = make(), getattr(diffusers, guider)(guidance_scale=9.0)
    pipe.update_components(guider=own)
    base = replace(BASE, guidance=3.0)
    drawn = draw(pipe, **SETTINGS | {"base": base}).images[0]
    assert pipe.guider is own
    pipe.update_components(guider=own.new(guidance_scale=3.0))
    seed = torch.Generator().manual_seed(5)
    assert same(
        drawn, pipe(prompt=PROMPT, height=32, width=32, num_inference_steps=2, generator=seed, output="images")[0]
    )


def test_the_prompt_is_upsampled_where_the_pipeline_does_it(make):
    pipe = make(text_blocks=("prompt_upsampler", "text_encoder"))
    drawn = draw(pipe, **SETTINGS).images[0]
    seed = torch.Generator().manual_seed(5)
    assert same(drawn, draw_modular(pipe, 3.0, 32, num_inference_steps=2, generator=seed))
    assert not same(drawn, draw(make(), **SETTINGS).images[0])
    pipe.unload_components("prompt_upsampler")
    with pytest.raises(RuntimeError, match=r"its prompt_upsampler yet; .* or give one whose blocks do not use them"):
        draw(pipe, **SETTINGS)


@each_kind
def test_callbacks_change_latents_and_stop(name, make):
    pipe, seen = make(name), []

    def zero(runner, step, timestep, tensors):
        seen.append((step, *tensors))
        return {"latents": tensors["latents"] * 0} if runner.interrupt is False else {}

    def stop(runner, step, timestep, tensors):
        runner._interrupt = tensors["latents"].shape[1] > 64
        return tensors

    expected = draw(pipe, **SETTINGS)
    assert not same(draw(pipe, callback_on_step_end=zero, **SETTINGS).image, expected.image)
    assert seen == [(0, "latents"), (1, "latents")] * 2
    stopped = draw(pipe, callback_on_step_end=stop, **SETTINGS)
    assert [same(*images) for images in zip(stopped.images, expected.images, strict=False)] == [True]


def test_its_own_pipelines_stop_between_steps(make):
    pipe, steps = find_cascade_target(make()).pipe, []

    def stop(runner, step, timestep, tensors):
        steps.append(step)
        runner._interrupt = True
        return tensors

    pipe("a red circle", height=32, width=32, num_inference_steps=3, callback_on_step_end=stop)
    assert steps == [0]


def test_latents_with_nan_are_found(make):
    def fail(runner, step, timestep, tensors):
        return {"latents": tensors["latents"] * float("nan")}

    with pytest.raises(clear.HighresError, match="base image, 32 x 32 px: the latents after step 1"):
        draw(make(), callback_on_step_end=fail, **SETTINGS)


def test_refusals(make):
    pipe = make()
    with pytest.raises(ValueError, match=r"inputs has prompt_embeds, but FLUX\.3 gives a callback latents alone"):
        draw(pipe, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], **SETTINGS)
    with pytest.raises(TypeError, match="unknown keyword 'negative_prompt'"):
        draw(make(FLOW_MAP), negative_prompt="blue", **SETTINGS)
    with pytest.raises(ValueError, match="has no effect without guidance"):
        draw(
            pipe,
            negative_prompt="blue",
            **SETTINGS | {"base": BASE, "stages": replace(STAGE, guidance=1)},
            image=noise(32, 32),
        )
    pipe.update_components(transformer=make(FLOW_MAP).transformer)
    with pytest.raises(TypeError, match="this one has flow_map=True; give a Flux3DistilledModularPipeline"):
        draw(pipe, **SETTINGS)
    pipe = make(FLOW_MAP)
    pipe.update_components(transformer=make().transformer)
    with pytest.raises(TypeError, match="this one has flow_map=False; give a Flux3ModularPipeline"):
        draw(pipe, **SETTINGS)
    pipe = make()
    pipe.guider = SimpleNamespace(config={"guidance_scales": [3.0, 5.0]})
    with pytest.raises(TypeError, match="a SimpleNamespace has none; give the pipeline a ClassifierFreeGuidance"):
        draw(pipe, **SETTINGS)


def test_several_prompts_are_refused(make):
    pipe = find_cascade_target(make()).pipe
    settings = {"height": 32, "width": 32, "num_inference_steps": 1}
    texts = [["a red circle"], "a red circle"]
    one, same_one = (pipe(text, generator=torch.Generator().manual_seed(0), **settings).images[0] for text in texts)
    assert same(one, same_one)
    with pytest.raises(ValueError, match=r"FLUX\.3 draws one prompt in a call, got 2; give them one by one"):
        pipe(["a red circle", "a cat"], **settings)


@each_kind
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_work_counts_each_forward_pass(name, guidance, make):
    pipe = make(name)
    assert_work_is_of_the_run(pipe, **SETTINGS | {"stages": replace(STAGE, guidance=guidance)})

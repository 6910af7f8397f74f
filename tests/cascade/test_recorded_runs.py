"""Stages that use the run before them: guidance by its steps, and continuing it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

import clear_attn as clear
from clear_attn.cascade import large_images, recorded_runs
from clear_attn.cascade.growth import grow, smaller_sigma
from clear_attn.cascade.latents import unpack
from clear_attn.cascade.pipelines import find_cascade_target
from clear_attn.cascade.recorded_runs import new_recording
from clear_attn.cascade.recording import Handover
from clear_attn.cascade.stage_runner import Cascade
from clear_attn.cascade.work import run_sigmas
from clear_attn.tools.reporting import spell_options
from tests.helpers import dummy_models
from tests.helpers.large_images import PROMPT, STAGE, assert_as_it_was, draw, everything, noise, same

BASE = clear.Base(height=64, width=64, steps=4)
GUIDED = replace(STAGE, stepwise_guidance=clear.StepwiseGuidance())
CONTINUED = replace(STAGE, continues=True)
BOTH = replace(GUIDED, continues=True)
EACH = pytest.mark.parametrize("stage", [GUIDED, CONTINUED, BOTH], ids=["guided", "continued", "both"])


def two(stage):
    return [replace(stage, height=96, width=96), stage]


def stopped(pipe, finished, **settings):
    """Return the result of a call that Ctrl-C stops after a number of images."""

    def press(result):
        if len(result.images) == finished:
            raise KeyboardInterrupt

    with pytest.raises(clear.HighresInterrupted) as caught:
        draw(pipe, callback_on_stage_end=press, **settings)
    return caught.value.result


@EACH
def test_resumed_is_as_if_never_interrupted(pipe, stage, tmp_path):
    settings = {"base": BASE, "stages": two(stage)}
    before, expected = everything(pipe), draw(pipe, **settings)
    assert [image.size for image in expected.images] == [(64, 64), (96, 96), (128, 128)]
    assert expected.runs == {}
    for finished in (1, 2):
        result = stopped(pipe, finished, **settings)
        held = [*result.runs[finished - 1].predictions.values(), *(result.runs[finished - 1].handover or ())]
        assert 0 < sum(each.nbytes for each in held) <= result.plan.recording_bytes
        result.save(tmp_path / "out.png")
        for kept in (result, clear.HighresResult.load(tmp_path / "out.png")):
            seen = []
            again = clear.highres(
                pipe,
                **kept.plan.arguments(),
                resume=kept,
                callback_on_stage_end=lambda result, seen=seen: seen.append(len(result.images) - 1),
            )
            assert seen == list(range(finished, 3))
            assert all(map(same, again.images, expected.images))
            assert again.finished
            assert len(kept.images) == finished
    again.save(tmp_path / "out.png")
    assert not (tmp_path / "out.png.run.safetensors").exists()
    assert_as_it_was(pipe, before)


def test_resumes_without_a_record_where_none_is_needed(pipe, tmp_path):
    result = stopped(pipe, 1)
    result.save(tmp_path / "out.png")
    assert not (tmp_path / "out.png.run.safetensors").exists()
    kept = clear.HighresResult.load(tmp_path / "out.png")
    assert same(clear.highres(pipe, **kept.plan.arguments(), resume=kept).image, draw(pipe).image)
    start = noise(64, 64)
    result, expected = stopped(pipe, 1, image=start), draw(pipe, image=start).image
    assert same(draw(pipe, image=start, resume=result).image, expected)
    assert same(clear.highres(pipe, **result.plan.arguments(), resume=result).image, expected)


def test_resumes_before_a_stage_whose_record_a_kill_prevented(pipe, tmp_path):
    result = stopped(pipe, 2, base=BASE, stages=[replace(STAGE, height=96, width=96), GUIDED])
    result.save(tmp_path / "out.png")
    assert len(clear.HighresResult.load(tmp_path / "out.png").images) == 2
    (tmp_path / "out.png.run.safetensors").unlink()
    assert len(clear.HighresResult.load(tmp_path / "out.png").images) == 1


def test_resumes_what_was_killed_before_its_first_image_or_its_record(pipe, tmp_path):
    settings, starts = {"base": BASE, "stages": GUIDED}, []

    def killed(result):
        starts.append(list(result.images))
        result.save(tmp_path / "out.png")
        raise KeyboardInterrupt

    expected = draw(pipe, **settings)
    with pytest.raises(clear.HighresInterrupted):
        draw(pipe, **settings, callback_on_start=killed)
    kept = clear.HighresResult.load(tmp_path / "out.png")
    assert (starts, kept.images, kept.runs) == ([[]], [], {})
    assert same(clear.highres(pipe, **kept.plan.arguments(), resume=kept).image, expected.image)
    stopped(pipe, 1, **settings).save(tmp_path / "out.png")
    (tmp_path / "out.png.run.safetensors").unlink()
    kept = clear.HighresResult.load(tmp_path / "out.png")
    assert kept.images == []
    assert same(clear.highres(pipe, **kept.plan.arguments(), resume=kept).image, expected.image)


def test_resumes_after_a_version_of_diffusers_with_other_entries_in_configs(pipe, tmp_path):
    result = stopped(pipe, 1)
    scheduler = result.plan.model["scheduler"]
    config = {**scheduler["config"], "of_before": 1}
    del config["invert_sigmas"]
    model = {**result.plan.model, "scheduler": {**scheduler, "config": config}}
    replace(result, plan=replace(result.plan, model=model)).save(tmp_path / "out.png")
    kept = clear.HighresResult.load(tmp_path / "out.png")
    again = clear.highres(pipe, **kept.plan.arguments(), resume=kept)
    assert again.finished
    assert again.plan.model == model  # else the images that are saved would be of another plan
    changed = replace(kept, plan=replace(kept.plan, model={**model, "dtype": "bfloat16"}))
    with pytest.raises(ValueError, match="resume has a plan with another model;"):
        clear.highres(pipe, **kept.plan.arguments(), resume=changed)


def test_resumes_what_runs_with_other_versions_and_folders_saved(pipe, tmp_path):
    """A run that is resumed, and killed again, replaces the plan, not all images."""
    result = stopped(pipe, 2, base=BASE, stages=two(GUIDED))
    plan = replace(result.plan, weights="/before/weights", made_with={"torch": "1.0"})
    replace(result, plan=plan).save(tmp_path / "out.png")
    (tmp_path / "out.png.json").write_text(replace(plan, weights="/now/weights", made_with={}).to_json())
    kept = clear.HighresResult.load(tmp_path / "out.png")
    assert (len(kept.images), list(kept.runs)) == (2, [1])


def test_resumes_with_weights_that_have_moved(pipe, tmp_path, monkeypatch, flux_weights):
    for folder in ("before", "now"):
        shutil.copytree(flux_weights, tmp_path / folder / "weights")
    monkeypatch.setattr(Cascade, "draw", lambda *args: None)
    settings = {"window": None, "base": BASE}
    result = draw(pipe, **settings, weights=tmp_path / "before" / "weights")
    moved = draw(pipe, **settings, weights=tmp_path / "now" / "weights", resume=result)
    assert moved.plan.weights == str(tmp_path / "now" / "weights")


@EACH
def test_every_option_takes_effect_and_the_base_image_ends_early_only_if_nothing_needs_the_rest(pipe, stage):
    plain, drawn = draw(pipe, base=BASE), draw(pipe, base=BASE, stages=stage)
    assert not same(drawn.image, plain.image)
    assert same(drawn.images[0], plain.images[0]) == bool(stage.stepwise_guidance)


@pytest.mark.parametrize(
    "changes", [{"structure": 0.1}, {"acceleration": 0.1}, {"cutoff": 0.7}, {"sharpening": 0.0}], ids=str
)
def test_every_setting_of_stepwise_guidance_takes_effect(pipe, changes):
    other = replace(GUIDED, stepwise_guidance=clear.StepwiseGuidance(**changes))
    assert not same(draw(pipe, base=BASE, stages=GUIDED).image, draw(pipe, base=BASE, stages=other).image)


def test_a_stage_starts_from_the_grown_latents_of_the_base_image(pipe, monkeypatch):
    """Written again with the pipelines of diffusers."""
    stage = replace(CONTINUED, ntk_factor=1, proportional=False, guidance=2.0)
    steps = []

    def record(runner, step, timestep, tensors):
        steps.append((type(runner), float(timestep) / 1000, tensors["latents"].clone()))
        return tensors

    result = draw(pipe, base=BASE, stages=stage, callback_on_step_end=record)
    shifted = [3 * share / (1 + 2 * share) for share in (0.5, 0.25)]  # 2 of 4 steps, with a shift of 3
    assert [sigma for cls, sigma, _ in steps if cls is FluxImg2ImgPipeline] == pytest.approx(shifted)
    ends_at = smaller_sigma(shifted[0], 2.0)
    sigmas = [4 * share / (1 + 3 * share) for share in (1, 0.75, 0.5, 0.25, 0)]  # the pipeline's shift is 4
    ran = [sigma for cls, sigma, _ in steps if cls is FluxPipeline]
    assert ran == pytest.approx([sigma for sigma in sigmas if sigma > ends_at])
    assert len(ran) < 4

    latents = [unpack(each, (16, 16)) for cls, _, each in steps if cls is FluxPipeline]
    now, following = sigmas[len(ran) - 1 : len(ran) + 1]
    velocity = (latents[-1] - latents[-2]) / (following - now)
    handover = Handover(latents[-2] - now * velocity, latents[-2] + (1 - now) * velocity)
    fresh = torch.randn(1, handover.clean.shape[1], 32, 32, generator=torch.Generator().manual_seed(6))
    start = grow(handover, fresh, shifted[0])
    clear.linearize(pipe, 4, weights=None)
    from_image = FluxImg2ImgPipeline(**pipe.components)
    from_image.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
    drawn = from_image(
        PROMPT,
        image=noise(128, 128),
        latents=FluxPipeline._pack_latents(start, 1, start.shape[1], 32, 32),
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=2.0,
        height=128,
        width=128,
        max_sequence_length=24,
    ).images[0]
    difference = np.abs(np.asarray(drawn).astype(int) - np.asarray(result.image).astype(int))
    assert difference.max() <= 2


@EACH
@pytest.mark.parametrize("make", [dummy_models.sd3_pipeline, dummy_models.flux_pipeline], ids=["sd3", "flux"])
def test_other_pipelines(make, stage):
    result = draw(make(), base=BASE, stages=stage)
    assert result.finished
    assert result.plan.stages[0].continues == stage.continues


@EACH
def test_plans_are_saved_and_read(pipe, stage, monkeypatch):
    monkeypatch.setattr(clear.cascade.stage_runner.Cascade, "draw", lambda *args: None)
    plan = draw(pipe, base=BASE, stages=two(stage)).plan
    assert plan.recording_bytes > 0
    assert clear.HighresPlan.from_json(plan.to_json()) == plan
    assert draw(pipe).plan.recording_bytes == 0


BAD = [
    ({"stages": GUIDED, "image": noise(64, 64)}, "stage 1 has stepwise_guidance=.*, and an image was given; leave out"),
    ({"stages": CONTINUED, "image": noise(64, 64)}, "stage 1 has continues=True, .* leave out image"),
    ({"stages": replace(CONTINUED, strength=1.0)}, "continues with strength=1.0, which leaves no step to the smaller"),
    (
        {"stages": [replace(CONTINUED, height=96, width=96, strength=0.25), replace(CONTINUED, strength=0.75)]},
        "stage 2 continues from a noise level at which stage 1 has not started; give stage 2 a strength below 0.75",
    ),
]


@pytest.mark.parametrize(("changes", "words"), BAD)
def test_refuses_before_it_draws(pipe, changes, words, monkeypatch):
    monkeypatch.setattr(FluxPipeline, "encode_prompt", None)
    with pytest.raises(ValueError, match=words):
        draw(pipe, **changes)


def test_refuses_a_dynamic_shift_and_too_little_memory(pipe, monkeypatch):
    monkeypatch.setattr(FluxPipeline, "encode_prompt", None)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="stage 1 continues, and shift=None leaves where it starts to the pipeline"):
        draw(pipe, stages=replace(CONTINUED, shift=None))
    monkeypatch.setattr(recorded_runs, "available_memory", lambda device: (1000, 1000))
    monkeypatch.setattr(recorded_runs, "pipeline_bytes", lambda pipe, device: 0)
    assert 4 * pipe.vae.config.latent_channels * 16 * 16 * (4 + 2) == 24 * 1024
    with pytest.raises(
        ValueError, match=r"recorded predictions .* take 24\.0 KiB of main memory, and 1,000 B are left"
    ):
        draw(pipe, base=BASE, stages=GUIDED)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: clear.StepwiseGuidance(structure=1.5), ValueError, "structure must be a number from 0 to 1, got 1.5"),
        (lambda: clear.StepwiseGuidance(acceleration=-1), ValueError, "acceleration must be a number from 0 to 1"),
        (lambda: clear.StepwiseGuidance(cutoff=0), ValueError, "cutoff must be a number from 1e-06 to 1, got 0; 0.2"),
        (lambda: clear.StepwiseGuidance(sharpening="1"), ValueError, "sharpening must be a number of at least 0"),
        (lambda: clear.Stage(stepwise_guidance=0.5), TypeError, "must be a clear_attn.StepwiseGuidance, got 0.5"),
        (lambda: clear.Stage(continues=1), TypeError, "continues must be True or False, got 1"),
        (
            lambda: clear.Stage(stepwise_guidance=clear.StepwiseGuidance(), low_resolution_guidance=1),
            ValueError,
            "low_resolution_guidance=1 and stepwise_guidance both guide .*; leave one out",
        ),
        (
            lambda: replace(clear.Stage.preset("refined"), continues=True),
            ValueError,
            "low_resolution_guidance=1 guides toward the finished image before, .* continues=True .*; leave one out",
        ),
    ],
)
def test_refuses_settings(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_refuses_to_resume_what_does_not_fit(pipe, tmp_path, monkeypatch):
    settings = {"base": BASE, "stages": GUIDED}
    result = stopped(pipe, 1, **settings)
    monkeypatch.setattr(FluxPipeline, "encode_prompt", None)
    with pytest.raises(TypeError, match="resume must be a HighresResult, got a str"):
        draw(pipe, **settings, resume="out.png")
    with pytest.raises(ValueError, match="resume has a plan with another seed; draw with the same pipeline") as refused:
        draw(pipe, **settings, seed=6, resume=result)
    assert spell_options(str(refused.value), {"resume": "--resume"}) == str(refused.value)
    with pytest.raises(ValueError, match="resume has no record of the run before stage 1"):
        draw(pipe, **settings, resume=replace(result, runs={}))
    with pytest.raises(FileNotFoundError, match=r"there is no .*out\.png\.json to resume from"):
        clear.HighresResult.load(tmp_path / "out.png")
    result.save(tmp_path / "out.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "out-0-64x64.png")
    with pytest.raises(
        ValueError, match=r"out-0-64x64\.png is not an image of highres, .* would overwrite it; move it"
    ):
        clear.HighresResult.load(tmp_path / "out.png")
    with pytest.raises(ValueError, match=r"out\.jpg cannot be resumed: only \.png files keep exact pixels"):
        clear.HighresResult.load(tmp_path / "out.jpg")


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"window": 5}, {"weights": "elsewhere"}, {"backend": "tiled"}, {}], ids=str
)
def test_refuses_to_resume_before_weights_are_loaded(pipe, monkeypatch, change):
    settings = {"base": BASE, "stages": GUIDED}
    result = stopped(pipe, 1, **settings)
    monkeypatch.setattr(large_images, "prepare", lambda *args, **settings: pytest.fail("it loads weights"))
    words = f"a plan with another {next(iter(change))};" if change else "no record of the run before stage 1"
    with pytest.raises(ValueError, match=f"resume has {words}"):
        draw(pipe, **{**settings, **change}, resume=result if change else replace(result, runs={}))


def test_refuses_to_resume_with_weights_that_say_another_window(pipe, flux_weights):
    settings = {"base": BASE, "window": None, "weights": flux_weights}
    result = stopped(pipe, 1, **settings)
    other = replace(result, plan=replace(result.plan, window=5))
    with pytest.raises(ValueError, match="resume has a plan with another window;"):
        draw(pipe, **settings, resume=other)


def test_work_counts_the_steps_that_run(pipe, monkeypatch):
    plans, steps = {}, []

    def count(runner, step, timestep, tensors):
        steps.append(type(runner))
        return tensors

    for name, stage in (("plain", STAGE), ("continued", CONTINUED), ("both", BOTH)):
        steps.clear()
        plan = plans[name] = draw(pipe, base=BASE, stages=stage, callback_on_step_end=count).plan
        work = plan.work(pipe)
        assert [run.steps for run in work.runs] == [steps.count(FluxPipeline), steps.count(FluxImg2ImgPipeline)]
        dense = clear.cost(pipe, 64, 64, text_tokens=24).dense_step_flops
        local = clear.cost(pipe, 128, 128, window=4, text_tokens=24).step_flops
        assert work.flops == work.runs[0].steps * dense + work.runs[1].steps * local
        assert "base image, 64 x 64 px" in str(work)
    assert plans["continued"].work(pipe).flops < plans["plain"].work(pipe).flops == plans["both"].work(pipe).flops
    monkeypatch.setattr(clear.cascade.stage_runner.Cascade, "draw", lambda *args: None)
    given = draw(pipe, image=noise(64, 64)).plan
    assert [run.name for run in given.work(pipe).runs] == ["stage 1"]
    dense_first = replace(given, schedule=clear.Schedule(dense_above_sigma=0.6))
    sigmas = run_sigmas(find_cascade_target(pipe), given, 1)
    assert sigmas == pytest.approx([0.75, 0.5])
    large = clear.cost(pipe, 128, 128, window=4, text_tokens=24)
    assert dense_first.work(pipe).flops == large.dense_step_flops + large.step_flops
    guided = clear.cost(pipe, 128, 128, window=4, text_tokens=24).step_flops
    with_negative = replace(given, options={**given.options, "true_cfg_scale": 2.0, "negative_prompt": "rain"})
    assert with_negative.work(pipe).flops == 2 * 2 * guided
    assert new_recording(find_cascade_target(pipe), given, 1) is None


def test_images_and_records_of_other_plans_are_not_resumed(pipe, tmp_path):
    """They were left under the same names."""
    settings = {"base": BASE, "stages": two(GUIDED)}
    stopped(pipe, 2, **settings, seed=6).save(tmp_path / "out.png")
    first, second = stopped(pipe, 1, **settings), stopped(pipe, 2, **settings)
    first.save(tmp_path / "out.png")
    assert len(clear.HighresResult.load(tmp_path / "out.png").images) == 1
    second.save(tmp_path / "out.png")
    first.save(tmp_path / "out.png")
    kept = clear.HighresResult.load(tmp_path / "out.png")
    assert (len(kept.images), list(kept.runs)) == (1, [0])
    record = (tmp_path / "out.png.run.safetensors").read_bytes()
    stopped(pipe, 1, **settings, seed=6).save(tmp_path / "out.png")
    (tmp_path / "out.png.run.safetensors").write_bytes(record)
    assert clear.HighresResult.load(tmp_path / "out.png").runs == {}

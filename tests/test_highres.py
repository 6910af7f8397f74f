"""The cascade: what it draws, what it leaves, what it refuses."""

import itertools
import warnings
from dataclasses import replace

import accelerate
import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, HeunDiscreteScheduler
from PIL import Image

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo.scenes import held_out_scenes, read
from clear_attn.highres import fits, sizes
from clear_attn.memory import GIB
from tests import tiny
from tests.test_linearize import assert_same, photograph

PROMPT = "a red circle on a blue ground, at the top left"
# Small and few, for it is not the pictures that are looked at.
BASE = clear.Base(height=64, width=64, steps=2)
STAGE = clear.Stage(steps=4, strength=0.5)
FAST = {"window": 4, "weights": None, "seed": 5, "base": BASE, "stages": STAGE, "max_sequence_length": 24}


@pytest.fixture
def pipe():
    pipe = tiny.flux_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, height=128, width=128, **changes):
    arguments = {**FAST, **changes}
    if "image" in arguments:
        del arguments["base"]
    return clear.highres(pipe, PROMPT, height=height, width=width, **arguments)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8))


def same(first, second):
    return np.array_equal(np.asarray(first), np.asarray(second))


def everything(pipe):
    return (
        photograph(pipe.transformer),
        pipe.transformer.pos_embed.theta,
        pipe.vae.use_tiling,
        dict(pipe.scheduler.config),
    )


def assert_as_it_was(pipe, before):
    assert_same(pipe.transformer, before[0])
    assert everything(pipe)[1:] == before[1:]


class TestPicture:
    def test_is_what_diffusers_own_pipelines_draw_one_after_the_other(self, pipe):
        plain = {"ntk_factor": 1, "proportional": False, "shift": None}
        result = draw(pipe, stages=replace(STAGE, **plain))
        call = {"max_sequence_length": 24, "guidance_scale": 7.5}
        base = pipe(
            PROMPT, height=64, width=64, num_inference_steps=2, generator=torch.Generator().manual_seed(5), **call
        ).images[0]
        assert same(result.images[0], base)
        clear.linearize(pipe, 4, weights=None)
        other = FluxImg2ImgPipeline(**pipe.components)
        drawn = other(
            PROMPT,
            image=base.resize((128, 128), Image.Resampling.LANCZOS),
            strength=0.5,
            num_inference_steps=4,
            height=128,
            width=128,
            generator=torch.Generator().manual_seed(6),
            **call,
        ).images[0]
        assert same(result.image, drawn)
        assert [image.size for image in result.images] == [(64, 64), (128, 128)]
        assert result.finished

    @pytest.mark.parametrize(
        "changes",
        [{"ntk_factor": 1}, {"proportional": False}, {"shift": 1.0}, {"strength": 1.0}, {"low_resolution_guidance": 1}],
    )
    def test_every_setting_of_a_stage_takes_effect(self, pipe, changes):
        start = noise(64, 64)
        assert not same(draw(pipe, image=start).image, draw(pipe, image=start, stages=replace(STAGE, **changes)).image)

    def test_base_is_dense_and_original_also_of_a_linearized_pipeline(self, pipe):
        expected = draw(pipe)
        clear.linearize(pipe, 4, weights=None)
        pipe.transformer.register_forward_pre_hook(lambda module, args: None)
        before = everything(pipe)
        result = draw(pipe, window=None, weights="auto")
        assert same(result.images[0], expected.images[0])
        assert same(result.image, expected.image)
        assert (result.plan.window, result.plan.weights) == (4, None)
        assert_as_it_was(pipe, before)

    def test_stages_follow_each_other_and_repeat_alone(self, pipe):
        stages = [replace(STAGE, height=96, width=96), STAGE]
        seen = []
        result = draw(pipe, stages=stages, callback_on_stage_end=lambda *stage: seen.append(stage))
        assert [image.height for image in result.images] == [64, 96, 128]
        assert [(number, image.height) for number, image, _ in seen] == [(0, 64), (1, 96), (2, 128)]
        assert all(plan == result.plan for *_, plan in seen)
        again = draw(pipe, stages=stages, image=result.images[0])
        assert same(again.image, result.image)

    def test_seeds(self, pipe):
        assert same(draw(pipe).image, draw(pipe).image)
        assert not same(draw(pipe).image, draw(pipe, seed=6).image)
        torch.manual_seed(3)
        first = draw(pipe, seed=None)
        torch.manual_seed(3)
        assert draw(pipe, seed=None).plan.seed == first.plan.seed

    def test_large_pictures_are_tiled_and_small_ones_not(self, pipe, monkeypatch):
        tiled = []
        for name in ("_tiled_encode", "tiled_decode"):
            plain = getattr(pipe.vae, name)
            monkeypatch.setattr(
                pipe.vae,
                name,
                lambda x, *args, plain=plain, name=name, **kw: (tiled.append(name), plain(x, *args, **kw))[1],
            )
        draw(pipe)
        assert tiled == []
        draw(pipe, 160, 160)
        assert tiled == ["_tiled_encode", "tiled_decode"]

    def test_any_aspect_ratio(self, pipe):
        result = draw(pipe, 96, 160, base=clear.Base(steps=1))
        assert (result.plan.base.height, result.plan.base.width) == (80, 128)
        assert result.image.size == (160, 96)

    def test_sd3(self):
        pipe = tiny.sd3_pipeline()
        before = photograph(pipe.transformer)
        result = draw(pipe, 256, 128, base=clear.Base(height=128, width=64, steps=2))
        assert result.plan.stages[0].ntk_factor == 1
        assert result.image.size == (128, 256)
        assert_same(pipe.transformer, before)

    def test_guidance_keeps_the_small_flux_on_its_caption(self, pipe):
        scene = held_out_scenes()[1]
        start = clear.Stage(strength=0.4, steps=10, ntk_factor=1, proportional=False)
        base = pipe(scene.caption, max_sequence_length=24, generator=torch.Generator().manual_seed(0)).images[0]
        seen = []
        for stage in (start, replace(start, low_resolution_guidance=1)):
            drawn = clear.highres(
                pipe,
                scene.caption,
                height=256,
                width=256,
                window=8,
                weights=None,
                seed=0,
                image=base,
                stages=stage,
                max_sequence_length=demo.TEXT_TOKENS,
            )
            seen.append(read(np.asarray(drawn.image)) == scene)
        assert seen == [False, True]


class TestAfterwards:
    def test_all_is_as_it_was(self, pipe):
        before = everything(pipe)
        draw(pipe, 160, 160)
        assert_as_it_was(pipe, before)
        pipe.vae.enable_tiling()
        draw(pipe)
        assert pipe.vae.use_tiling

    def test_after_an_error(self, pipe):
        before = everything(pipe)

        def fail(pipe, step, timestep, tensors):
            if pipe.transformer.pos_embed.theta != before[1]:
                raise ZeroDivisionError
            return tensors

        with pytest.raises(ZeroDivisionError):
            draw(pipe, callback_on_step_end=fail)
        assert_as_it_was(pipe, before)

    def test_ctrl_c_gives_what_was_finished(self, pipe):
        before, calls = everything(pipe), []

        def press(pipe, step, timestep, tensors):
            calls.append(step)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return tensors

        with pytest.raises(clear.HighresInterrupted, match="interrupted after 1 of 2 images") as caught:
            draw(pipe, callback_on_step_end=press)
        assert isinstance(caught.value, KeyboardInterrupt)
        assert [image.size for image in caught.value.result.images] == [(64, 64)]
        assert not caught.value.result.finished
        assert_as_it_was(pipe, before)

    def test_a_callback_that_interrupts_the_pipeline(self, pipe):
        def interrupt(pipe, step, timestep, tensors):
            assert set(tensors) == {"latents"}
            pipe._interrupt = isinstance(pipe, FluxImg2ImgPipeline)
            return tensors

        result = draw(pipe, callback_on_step_end=interrupt)
        assert len(result.images) == 1
        assert not result.finished

    def test_progress(self, pipe, capfd):
        pipe._progress_bar_config = {}
        draw(pipe)
        shown = capfd.readouterr().err
        assert "base image, 64 x 64 px" in shown
        assert "stage 1 of 1, 128 x 128 px" in shown
        assert pipe._progress_bar_config == {}


class TestPlan:
    def test_makes_the_picture_again(self, pipe, tmp_path):
        result = draw(pipe, stages=replace(STAGE, low_resolution_guidance=2))
        files = result.save(tmp_path / "out.png", stages=True)
        assert [file.name for file in files] == ["out-0-64x64.png", "out.png"]
        for file in (*files, tmp_path / "out.json"):
            assert clear.HighresPlan.load(file) == result.plan
        again = clear.highres(pipe, **clear.HighresPlan.load(tmp_path / "out.png").arguments())
        assert again.plan == result.plan
        assert same(again.image, Image.open(tmp_path / "out.png"))

    def test_names_all_that_was_left_open(self, pipe):
        plan = draw(pipe, 256, 128, base=clear.Base(steps=1), stages=clear.Stage()).plan
        stage = clear.Stage(height=256, width=128, ntk_factor=10.0)
        assert plan.stages == (stage,)
        assert plan.base == clear.Base(height=128, width=64, steps=1, guidance=3.5)
        assert plan.model == {"pipeline": "FluxPipeline", "name": "small_flux", "dtype": "float32"}
        assert set(plan.made_with) == {"clear_attn", "diffusers", "torch"}

    def test_other_kinds_of_picture_have_it_beside_them(self, pipe, tmp_path):
        result = draw(pipe)
        result.save(tmp_path / "out.jpg")
        assert clear.HighresPlan.load(tmp_path / "out.json") == result.plan

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{}", "no plan of a high-resolution picture: 'format'"),
            ("[", "no plan"),
            ('{"format": 2}', "its format was written by clear_attn another version"),
            ('{"format": 1, "base": null, "stages": [], "colour": "red"}', "unexpected keyword argument 'colour'"),
        ],
    )
    def test_refuses_other_files(self, text, words, tmp_path):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            clear.HighresPlan.load(tmp_path / "plan.json")
        noise(8, 8).save(tmp_path / "plain.png")
        with pytest.raises(ValueError, match="has no text entry 'clear_attn'"):
            clear.HighresPlan.load(tmp_path / "plain.png")


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "first", "stages"),
        [
            ((2048, 4096), (512, 1024), [(2048, 4096)]),  # as published
            ((4096, 4096), (1024, 1024), [(4096, 4096)]),
            ((8192, 8192), (1024, 1024), [(2896, 2896), (8192, 8192)]),
            ((1040, 1360), (784, 1024), [(1040, 1360)]),
        ],
    )
    def test_cascades(self, size, first, stages):
        assert sizes.base_size(size, 1024, 16) == first
        assert sizes.between(first, size, 16) == stages

    @pytest.mark.parametrize("size", [(4096, 2720), (8192, 1040), (1040, 8192), (4112, 16), (1456, 2064)])
    def test_every_cascade_follows_its_own_rule(self, size):
        seen = [sizes.base_size(size, 1024, 16)]
        seen += sizes.between(seen[0], size, 16)
        for before, after in itertools.pairwise(seen):
            sizes.check_follows(before, after, 16)

    def test_rounds_as_diffusers_does_and_says_so(self, pipe):
        with pytest.warns(UserWarning, match="130 x 135 px is no multiple of 8 px; drawing 128 x 128 px"):
            assert draw(pipe, 130, 135).image.size == (128, 128)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(pipe)


BAD = [
    ({"height": 7}, ValueError, "7 x 128 px is less than one token of 8 px"),
    ({"height": 128.0}, TypeError, "height must be a whole number, got 128.0"),
    ({"prompt": [PROMPT]}, TypeError, "prompt must be one text"),
    ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ({"base": clear.Base(128, 64)}, ValueError, "128 x 64 px has another aspect ratio than 128 x 128 px"),
    ({"base": clear.Base(256, 256)}, ValueError, "128 x 128 px is smaller than the 256 x 256 px before it"),
    (
        {"image": noise(128, 96)},
        ValueError,
        "128 x 96 px has another aspect ratio than 128 x 128 px; crop it to 96 x 96 px",
    ),
    ({"image": noise(256, 256)}, ValueError, "is smaller than the 256 x 256 px before it"),
    ({"image": "base.png"}, TypeError, "image must be a PIL image, got a str"),
    ({"stages": []}, ValueError, "stages is empty"),
    ({"stages": ["4x"]}, TypeError, "stages must be clear_attn.Stage each, got a str"),
    ({"stages": clear.Stage(128, 128)}, ValueError, "has a size; give it in a list"),
    ({"stages": [clear.Stage(96, 96)]}, ValueError, "the last stage draws 96 x 96 px, and the picture is to be 128"),
    ({"stages": [clear.Stage(120, 120), clear.Stage(96, 96)]}, ValueError, "96 x 96 px is smaller than the 120 x 120"),
    ({"strength": 0.3}, TypeError, "highres takes no strength; see strength of Stage"),
    ({"generator": None}, TypeError, "highres takes no generator; see seed"),
    ({"colour": "red"}, TypeError, "unknown keyword 'colour'"),
    ({"prompt_embeds": torch.ones(1)}, TypeError, "prompt_embeds must be plain data, .* got a Tensor"),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD)
def test_refuses_before_it_draws(pipe, changes, error, words, monkeypatch):
    monkeypatch.setattr(FluxPipeline, "encode_prompt", None)
    before = everything(pipe)
    arguments = {"prompt": PROMPT, "height": 128, "width": 128, **FAST, **changes}
    if "image" in changes:
        del arguments["base"]
    with pytest.raises(error, match=words):
        clear.highres(pipe, **arguments)
    assert_as_it_was(pipe, before)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"strength": 0}, ValueError, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.1}, ValueError, "strength must be above 0 and at most 1, got 1.1"),
        ({"strength": float("nan")}, ValueError, "strength must be"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number"),
        ({"height": 64}, ValueError, "give both in pixels, or neither"),
        ({"guidance": -1}, ValueError, "guidance must be a number of at least 0, got -1"),
        ({"ntk_factor": 0}, ValueError, "ntk_factor must be"),
        ({"shift": 0}, ValueError, "shift must be"),
        ({"proportional": 1}, TypeError, "proportional must be True or False"),
        ({"low_resolution_guidance": 0}, ValueError, "low_resolution_guidance must be at least 1"),
    ],
)
def test_refuses_settings(settings, error, words):
    with pytest.raises(error, match=words):
        clear.Stage(**settings)


def test_refuses_what_a_model_cannot_do(pipe):
    with pytest.raises(ValueError, match="base and image are both given"):
        clear.highres(pipe, PROMPT, height=128, width=128, base=BASE, image=noise(64, 64))
    sd3 = tiny.sd3_pipeline()
    with pytest.raises(ValueError, match="ntk_factor=10 needs a rotary embedding"):
        draw(sd3, stages=clear.Stage(ntk_factor=10))
    with pytest.raises(
        ValueError, match=r"has positions for 72 x 72 tokens, 576 x 576 px, and 640 x 640 px needs more"
    ):
        draw(sd3, 640, 640)
    with pytest.raises(TypeError, match="highres does not know a FluxTransformer2DModel"):
        draw(pipe.transformer)
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="a HeunDiscreteScheduler has no static shift"):
        draw(pipe)


class TestMemory:
    def test_refuses_what_cannot_fit_and_warns_of_what_may_not(self, pipe, monkeypatch):
        memory = clear.cost(pipe, 128, 128, text_tokens=0).memory
        weights = memory.all_weights
        least = weights + max(memory.activations.least, memory.decode.least)
        likely = max(memory.activations.likely, memory.decode.likely)
        before = everything(pipe)
        monkeypatch.setattr(fits, "room", lambda device: (least - 1, least - 1))
        with pytest.raises(
            ValueError, match=r"128 x 128 px needs at least 0\.0 GiB .* draw a smaller picture or stage"
        ):
            draw(pipe)
        assert_as_it_was(pipe, before)
        monkeypatch.setattr(fits, "room", lambda device: (least, likely - 1))
        with pytest.warns(UserWarning, match="128 x 128 px will likely need"):
            draw(pipe)
        monkeypatch.setattr(fits, "room", lambda device: (least, likely))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(pipe)

    def test_names_what_would_fit(self, pipe):
        device, all_weights = torch.device("cuda"), fits.weight_bytes(pipe.transformer)
        pipe.transformer.to("meta")
        assert "smaller picture" in fits._remedy(pipe, device, 100 * GIB, 80 * GIB)
        assert "enable_group_offload" in fits._remedy(pipe, device, all_weights, all_weights + 1)

    def test_counts_what_an_offloaded_transformer_brings_along(self, pipe):
        gpu = torch.device("cuda")
        assert fits.on_device(pipe, gpu) == 0
        accelerate.cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
        assert fits.on_device(pipe, gpu) == fits.weight_bytes(pipe.transformer)

    def test_room_of_this_machine(self):
        total, free = fits.room(torch.device("cpu"))
        assert GIB / 4 < free <= total

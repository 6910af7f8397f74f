"""Plans: what they record, how they are saved and read, and errors before anything is drawn."""

import contextlib
import itertools
import json
import random
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, HeunDiscreteScheduler
from peft import LoraConfig
from PIL import Image

import clear_attn as clear
from clear_attn.cascade import result as cascade_result
from clear_attn.cascade.pipelines import find_cascade_target
from clear_attn.cascade.plan import ATTENTION, describe
from clear_attn.cascade.planning import (
    base_size,
    make_plan,
    runs_as_it_is,
    stage_sizes,
    validate_aspect_ratio,
    validate_growth,
)
from clear_attn.cascade.recording import Recording
from clear_attn.cascade.result import HighresResult
from clear_attn.cascade.stage_runner import Cascade
from tests.helpers import dummy_models
from tests.helpers.large_images import BASE, FAST, PROMPT, STAGE, assert_as_it_was, draw, everything, noise, same

DRAWN = '{"prompt": "a", "height": 8, "width": 8, "seed": 1, "base": null, "stages": [], %s}'


class TestPlan:
    def test_draws_the_same_image_again(self, pipe, tmp_path):
        result = draw(pipe, stages=replace(STAGE, low_resolution_guidance=2))
        files = result.save(tmp_path / "out.png", stages=True)
        assert [file.name for file in files] == ["out-0-64x64.png", "out.png"]
        for file in (*files, tmp_path / "out.png.json"):
            assert clear.HighresPlan.load(file) == result.plan
        again = clear.highres(pipe, **clear.HighresPlan.load(tmp_path / "out.png").arguments())
        assert again.plan == result.plan
        assert same(again.image, Image.open(tmp_path / "out.png"))

    def test_has_the_defaults_of_what_was_not_given(self, pipe):
        plan = draw(pipe, 256, 128, base=clear.Base(steps=1), stages=clear.Stage()).plan
        stage = clear.Stage(height=256, width=128, ntk_factor=10.0)
        assert plan.stages == (stage,)
        assert plan.base == clear.Base(height=128, width=64, steps=1, guidance=3.5)
        assert plan.model["pipeline"] == "FluxPipeline"
        assert (plan.model["name"], plan.model["dtype"], plan.model["adapters"]) == ("random_flux", "float32", [])
        assert plan.model["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
        assert plan.model["scheduler"]["config"]["shift"] == pipe.scheduler.config.shift
        assert (plan.weights, plan.revision, plan.backend) == (None, None, "auto")
        assert set(plan.made_with) == {"clear_attn", "diffusers", "torch"}

    def test_leaves_the_pipeline_as_it_is(self, pipe):
        pipe.scheduler.config["_diffusers_version"] = "0.1.0"  # of the folder it was loaded from
        before = everything(pipe)
        describe(pipe)
        assert_as_it_was(pipe, before)

    def test_has_the_settings_of_a_linearized_pipeline(self, pipe, monkeypatch):
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="toy")
        assert describe(pipe)["adapters"] == ["toy"]
        clear.linearize(pipe, 4, weights=None, backend="reference")
        monkeypatch.setattr(Cascade, "draw", lambda *args: None)
        plan = draw(pipe, window=None, weights="auto").plan
        assert (plan.window, plan.weights, plan.revision, plan.backend) == (4, None, None, "reference")
        assert plan.arguments()["backend"] == "reference"
        with pytest.raises(ValueError, match="backend='tiled' is not that of this linearized pipeline, 'reference'"):
            draw(pipe, window=None, weights="auto", backend="tiled")

    def test_asks_a_linearized_pipeline_for_nothing_if_it_has_the_settings(self, pipe):
        clear.linearize(pipe, 4, weights=None, backend="reference")
        target, plan = find_cascade_target(pipe), draw(pipe).plan
        assert runs_as_it_is(target, replace(plan, schedule=clear.Schedule(), backend="auto"))
        assert runs_as_it_is(target, replace(plan, schedule=clear.Schedule(), backend="reference"))
        for other in ({"window": 5}, {"down_factor": 2}, {"weights": "auto"}, {"backend": "tiled"}):
            assert not runs_as_it_is(target, replace(plan, schedule=clear.Schedule(), **other))

    def test_has_sizes_that_can_be_given_again(self, pipe, monkeypatch):
        """Also if rounding to whole tokens changed their aspect ratio."""
        monkeypatch.setattr(Cascade, "draw", lambda *args: None)
        plan = draw(pipe, 144, 512, base=None).plan
        assert plan.base.size == (32, 128)
        assert clear.highres(pipe, **plan.arguments()).plan == plan
        with pytest.raises(ValueError, match="has another aspect ratio"):
            clear.highres(pipe, **{**plan.arguments(), "base": replace(plan.base, width=120)})

    def test_in_an_image_has_no_local_paths(self, tmp_path, flux_weights):
        plan = clear.HighresPlan(PROMPT, 64, 64, None, (clear.Stage(),), 3, 4, 1, str(flux_weights))
        HighresResult([noise(8, 8), noise(64, 64)], plan).save(tmp_path / "out.png")
        assert clear.HighresPlan.load(tmp_path / "out.png.json") == plan
        assert clear.HighresPlan.load(tmp_path / "out.png") == replace(plan, weights="flux_weights")
        on_hub = replace(plan, weights="owner/repo/file.safetensors")
        assert on_hub.without_paths() == on_hub

    def test_in_an_image_beyond_the_limit_of_pil(self, tmp_path, monkeypatch):
        plan = clear.HighresPlan(PROMPT, 64, 64, None, (clear.Stage(),), 3, 4, 1, None)
        HighresResult([noise(8, 8), noise(64, 64)], plan).save(tmp_path / "out.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert clear.HighresPlan.load(tmp_path / "out.png") == plan

    def test_for_a_pipeline_saved_while_linearized_gives_no_warning(self, pipe, tmp_path, monkeypatch):
        clear.linearize(pipe, 4, weights=None)
        pipe.save_pretrained(tmp_path)
        loaded = type(pipe).from_pretrained(tmp_path)
        monkeypatch.setattr(Cascade, "draw", lambda *args: None)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert draw(loaded, window=None, weights="auto").plan.window == 4

    def test_for_other_image_formats_is_in_a_file_next_to_the_image(self, pipe, tmp_path):
        result = draw(pipe)
        result.save(tmp_path / "out.jpg")
        assert clear.HighresPlan.load(tmp_path / "out.jpg.json") == result.plan

    @pytest.mark.parametrize(
        ("weights", "kept"),
        [
            (None, False),
            ("/home/me/small_flux_clear", False),
            ("small_flux_clear", False),
            ("owner/repo", True),
            ("owner/repo/file.safetensors", True),
        ],
    )
    def test_a_revision_of_weights_that_have_none_is_dropped(self, weights, kept):
        """Earlier versions ignored and recorded it, and today it is an error."""
        plan = clear.HighresPlan(PROMPT, 128, 128, BASE, (STAGE,), 3, 4, 1, weights, "main")
        assert clear.HighresPlan.from_json(plan.to_json()).revision == ("main" if kept else None)

    def test_format_1(self):
        plan = clear.HighresPlan.load(Path(__file__).parents[1] / "data" / "format_1" / "plan.json")
        assert plan.base == clear.Base(64, 64, steps=2, guidance=3.5)
        assert plan.stages == (clear.Stage(128, 128, strength=0.5, steps=4, ntk_factor=10.0),)
        assert (plan.window, plan.down_factor, plan.weights, plan.seed) == (4, 1, None, 5)
        assert plan.schedule == clear.Schedule(dense_above_sigma=0.95)
        assert plan.options == {"max_sequence_length": 24}
        assert plan.model["name"] == "small_flux"
        assert json.loads(plan.to_json())["format"] == 2
        assert clear.HighresPlan.from_json(plan.to_json()) == plan

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{}", "not a plan of a high-resolution image: it has no 'format'"),
            ("[", "not a plan"),
            ('{"format": 3}', "its format was written by clear_attn another version"),
            (DRAWN % '"format": 1, "color": "red"', "unexpected keyword argument 'color'"),
            (DRAWN % '"format": 2, "color": "red"', "unexpected keyword argument 'color'"),
            (DRAWN % '"format": 2, "options": []', r"it has options=\[\], which must be dict"),
            (DRAWN % '"format": 2, "options": {"seed": 3}', "options must not have 'seed'"),
            (DRAWN % '"format": 2, "options": {"token": "x"}', "options must not have 'token'"),
            ('{"format": 2, "stages": ' + "[" * 3000, "not a plan"),
        ],
    )
    def test_refuses_other_files(self, text, words, tmp_path):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            clear.HighresPlan.load(tmp_path / "plan.json")
        (tmp_path / "text.png").write_text(text)
        with pytest.raises(ValueError, match="is not a PNG image"):
            clear.HighresPlan.load(tmp_path / "text.png")
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
        assert base_size(size, 1024, 16) == first
        assert stage_sizes(first, size, 16) == stages

    def test_no_size_is_refused_because_of_rounding(self, pipe):
        pipe.vae_scale_factor = 8  # FLUX.1's
        pipe.vae.register_to_config(sample_size=1024)
        every = list(itertools.product(range(1024, 8193, 64), repeat=2))
        for size in every:
            seen = [base_size(size, 1024, 16)]
            seen += stage_sizes(seen[0], size, 16)
            for before, after in itertools.pairwise(seen):
                validate_growth(before, after)
        some = random.Random(0).sample(every, 100)
        attention = {**dict.fromkeys(ATTENTION), "backend": "auto"}
        for size in [(7872, 8192), (7104, 8192), (2208, 7232), (1040, 8192), (4112, 16), *some]:
            plan = make_plan(find_cascade_target(pipe), PROMPT, size, None, None, clear.Stage(), 0, attention, {})
            assert plan.stages[-1].size == size

    @pytest.mark.parametrize(
        ("before", "after", "same"),
        [
            ((784, 1024), (1040, 1360), True),
            ((667, 1000), (2720, 4096), True),
            ((768, 1024), (1040, 1360), True),
            ((752, 1024), (1040, 1360), False),
            ((65, 80), (1024, 1024), False),  # less than a token apart
        ],
    )
    def test_aspect_ratios(self, before, after, same):
        with contextlib.nullcontext() if same else pytest.raises(ValueError, match="has another aspect ratio"):
            validate_aspect_ratio(before, after, 16)

    def test_rounds_as_diffusers_does_and_warns(self, pipe):
        with pytest.warns(
            UserWarning, match="130 x 135 px is not a multiple of 8 px; it is rounded .* to 128 x 128 px"
        ):
            assert draw(pipe, 130, 135).image.size == (128, 128)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(pipe)

    def test_a_window_that_covers_the_image_saves_nothing(self, pipe):
        with pytest.warns(UserWarning, match="window=22, down_factor=1 covers 128 x 128 px: .* nothing is saved"):
            draw(pipe, window=22)  # the corners are 21.2 tokens apart


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
    ({"stages": None, "preset": "best"}, ValueError, "preset must be 'published' or 'refined', got 'best'"),
    ({"preset": "refined"}, ValueError, "preset='refined' and stages are both given; leave one out, or change"),
    ({"stages": 3}, TypeError, "stages must be a clear_attn.Stage or a list of them, got 3"),
    ({"stages": ["4x"]}, TypeError, "stages must be clear_attn.Stage each, got a str"),
    ({"stages": clear.Stage(128, 128)}, ValueError, "has a size; give it in a list"),
    ({"stages": [clear.Stage(96, 96)]}, ValueError, "the last stage draws 96 x 96 px, and the image is to be 128"),
    ({"stages": [clear.Stage(120, 120), clear.Stage(96, 96)]}, ValueError, "96 x 96 px is smaller than the 120 x 120"),
    ({"strength": 0.3}, TypeError, "highres takes no strength; see strength of Stage"),
    ({"generator": None}, TypeError, "highres takes no generator; see seed"),
    ({"color": "red"}, TypeError, "unknown keyword 'color'"),
    ({"prompt_embeds": torch.ones(1)}, TypeError, "unknown keyword 'prompt_embeds'"),
    (
        {"joint_attention_kwargs": {"x": torch.ones(1)}},
        TypeError,
        "joint_attention_kwargs must be plain data, .* got a dict",
    ),
    ({"self": 1}, TypeError, "pipelines are joint_attention_kwargs, max_sequence_length, negative_prompt, negative_p"),
    ({"negative_prompt": "rain"}, ValueError, "negative_prompt has no effect without true_cfg_scale above 1"),
    ({"true_cfg_scale": 4.0}, ValueError, "true_cfg_scale=4.0 has no effect without negative_prompt"),
    ({"true_cfg_scale": "4"}, ValueError, "true_cfg_scale must be a number of at least 0, got '4'"),
    ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
    (
        {"height": 96, "width": 120, "base": None},
        ValueError,
        r"96 x 120 px is smaller than the model's own 128 px; .* give base=Base\(height=\.\.\., width=\.\.\.\)",
    ),
    ({"window": 0}, ValueError, "window must be at least 1, got 0"),
    ({"seed": 2**64 - 1}, ValueError, "seed must be at most 18446744073709551614, got 18446744073709551615"),
    ({"max_sequence_length": 100_000}, ValueError, "max_sequence_length.* cannot be greater than 512 but is 100000"),
    ({"max_sequence_length": "24"}, TypeError, "max_sequence_length must be a whole number, got '24'"),
    (
        {"stages": clear.Stage(low_resolution_guidance=50)},
        ValueError,
        "low_resolution_guidance=50 is too much for 128 x 128 px: 5 levels are means over all its latents",
    ),
    (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        ValueError,
        r"callback_on_step_end_tensor_inputs.* found \['noise'\]",
    ),
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


def test_refuses_what_a_model_does_not_support(pipe):
    with pytest.raises(ValueError, match="base and image are both given"):
        clear.highres(pipe, PROMPT, height=128, width=128, base=BASE, image=noise(64, 64))
    sd3 = dummy_models.sd3_pipeline()
    with pytest.raises(ValueError, match="ntk_factor=10 needs a rotary embedding"):
        draw(sd3, stages=clear.Stage(ntk_factor=10))
    with pytest.raises(ValueError, match="negative_prompt has no effect without guidance"):
        draw(sd3, negative_prompt="rain", base=replace(BASE, guidance=1.0), stages=clear.Stage(guidance=1.0))
    with pytest.raises(
        ValueError, match=r"has positions for 72 x 72 tokens, 576 x 576 px, and 640 x 640 px needs more"
    ):
        draw(sd3, 640, 640)
    with pytest.raises(TypeError, match="highres does not support a FluxTransformer2DModel"):
        draw(pipe.transformer)
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="a HeunDiscreteScheduler has no static shift"):
        draw(pipe)


@pytest.mark.parametrize(
    "key", ["format", "prompt", "height", "stages", "base", "schedule", "options", "model", "made_with"]
)
def test_malformed_plans_name_the_file_and_the_key(tmp_path, key):
    plan = json.loads(TestResult.plan.to_json())
    for value in ([[]], 10**155 if key == "prompt" else 1.5, True, "text" if key != "prompt" else {}):
        (tmp_path / "out.png.json").write_text(json.dumps({**plan, key: value}))
        with pytest.raises(ValueError, match=r"out\.png\.json is not a plan"):
            clear.HighresPlan.load(tmp_path / "out.png.json")
    for broken in (b"\xff", b"[]", b"[" * 5000, b'{"format": 1' + b"0" * 5000 + b"}"):
        (tmp_path / "out.png.json").write_bytes(broken)
        with pytest.raises(ValueError, match=r"out\.png\.json"):
            clear.HighresPlan.load(tmp_path / "out.png.json")


class TestResult:
    plan = clear.HighresPlan(PROMPT, 64, 64, None, (clear.Stage(), clear.Stage()), 3, 4, 1, None)

    def test_a_folder_that_is_gone_loses_no_image(self, tmp_path, monkeypatch):
        """The image goes to a fallback file, and the plan's failure is a warning."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        result = HighresResult([noise(8, 8)] + [noise(32, 32)] * len(self.plan.stages), self.plan)
        with pytest.warns(UserWarning, match="could not be written") as warned:
            (written,) = result.save(tmp_path / "gone" / "out.png")
        assert len(warned) == 2
        assert not any(".unfinished-" in str(each.message) for each in warned)
        assert same(Image.open(written), result.image)

    def test_an_unfinished_result_is_saved_image_by_image(self, tmp_path):
        result = HighresResult([noise(8, 8), noise(32, 32)], self.plan)
        files = result.save(tmp_path / "out.png")
        assert [file.name for file in files] == ["out-0-8x8.png", "out-1-32x32.png"]
        assert {file.name for file in tmp_path.iterdir()} == {"out.png.json", *(file.name for file in files)}
        assert same(Image.open(files[1]), result.image)

    def test_the_plan_is_saved_before_the_record(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cascade_result, "save_recording", lambda *args: len(3))
        result = HighresResult([noise(8, 8)], self.plan, {0: Recording((1, 1))})
        with pytest.raises(TypeError):
            result.save(tmp_path / "out.png")
        assert clear.HighresPlan.load(tmp_path / "out.png.json") == self.plan

    def test_without_images(self, tmp_path):
        result = HighresResult([], replace(self.plan, stages=(clear.Stage(64, 64),)))
        with pytest.raises(ValueError, match="no image was finished"):
            result.image  # noqa: B018
        assert result.save(tmp_path / "out.png") == []
        assert [file.name for file in tmp_path.iterdir()] == ["out.png.json"]
        assert HighresResult.load(tmp_path / "out.png") == result

    def test_an_image_that_is_saved_is_not_written_again(self, tmp_path):
        first, other = HighresResult([noise(8, 8)], self.plan), HighresResult([noise(8, 8, seed=1)], self.plan)
        file = first.save(tmp_path / "out.png")[0]
        before = file.stat().st_ino
        first.save(tmp_path / "out.png")
        assert file.stat().st_ino == before
        other.save(tmp_path / "out.png")
        assert same(Image.open(file), other.image)

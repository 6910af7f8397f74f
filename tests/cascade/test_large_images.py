"""The cascade: its images, and the state of the pipeline afterwards."""

import gc
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, StableDiffusion3Img2ImgPipeline
from diffusers.callbacks import PipelineCallback
from PIL import Image

import clear_attn as clear
from clear_attn import demo
from clear_attn.cascade import tiling
from clear_attn.cascade.stage_runner import Cascade
from clear_attn.demo.scene_reader import read
from clear_attn.demo.scenes import held_out_scenes
from clear_attn.patching import linearization, state
from clear_attn.patching.context_managers import restored
from clear_attn.patching.target import find_transformer
from clear_attn.weights.parameters import replaced_parameters
from tests.helpers import dummy_models
from tests.helpers.large_images import BASE, PROMPT, STAGE, assert_as_it_was, draw, everything, noise, same
from tests.helpers.placement import by_group
from tests.helpers.snapshots import assert_same, snapshot
from tests.matrix import operations


class TestImages:
    @pytest.mark.parametrize(
        ("make", "from_image"),
        [
            (dummy_models.flux_pipeline, FluxImg2ImgPipeline),
            (dummy_models.sd3_pipeline, StableDiffusion3Img2ImgPipeline),
        ],
    )
    def test_equals_the_pipelines_of_diffusers_in_sequence(self, make, from_image):
        pipe = make()
        stage = replace(STAGE, ntk_factor=1, proportional=False, shift=None, guidance=2.0)
        result = draw(pipe, base=replace(BASE, guidance=3.0), stages=stage)
        call = {"max_sequence_length": 24}
        base = pipe(
            PROMPT,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5),
            **call,
        ).images[0]
        assert same(result.images[0], base)
        clear.linearize(pipe, 4, weights=None)
        drawn = from_image(**pipe.components)(
            PROMPT,
            image=base.resize((128, 128), Image.Resampling.LANCZOS),
            strength=0.5,
            num_inference_steps=4,
            guidance_scale=2.0,
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

    def test_the_base_image_of_a_linearized_pipeline_is_dense_too(self, pipe):
        expected = draw(pipe)
        clear.linearize(pipe, 4, weights=None)
        pipe.transformer.register_forward_pre_hook(lambda module, args: None)
        before = everything(pipe)
        result = draw(pipe, window=None, weights="auto")
        assert same(result.images[0], expected.images[0])
        assert same(result.image, expected.image)
        assert (result.plan.window, result.plan.weights) == (4, None)
        assert_as_it_was(pipe, before)

    def test_a_stage_alone_gives_the_same_image(self, pipe):
        stages = [replace(STAGE, height=96, width=96), STAGE]
        seen = []
        result = draw(pipe, stages=stages, callback_on_stage_end=lambda each: seen.append(list(each.images)))
        assert [image.height for image in result.images] == [64, 96, 128]
        assert [[image.height for image in each] for each in seen] == [[64], [64, 96], [64, 96, 128]]
        again = draw(pipe, stages=stages, image=result.images[0])
        assert same(again.image, result.image)

    def test_seeds(self, pipe):
        assert same(draw(pipe).image, draw(pipe).image)
        assert not same(draw(pipe).image, draw(pipe, seed=6).image)
        torch.manual_seed(3)
        first = draw(pipe, seed=None)
        torch.manual_seed(3)
        assert draw(pipe, seed=None).plan.seed == first.plan.seed

    def test_only_large_images_are_tiled(self, pipe, monkeypatch):
        run = mock.Mock(wraps=tiling.run_in_tiles)
        monkeypatch.setattr(tiling, "run_in_tiles", run)
        monkeypatch.setattr(tiling, "LEAST_SIDE", 1)
        side = tiling.tile_side(pipe.vae)
        base = clear.Base(height=128, width=128, steps=1)
        draw(pipe, side, side, base=base)
        assert not run.called
        draw(pipe, side + 16, side, base=clear.Base(height=136, width=128, steps=1))
        assert [call.args[0] for call in run.call_args_list] == [pipe.vae.encoder, pipe.vae.decoder]

    def test_any_aspect_ratio(self, pipe):
        result = draw(pipe, 96, 160, base=clear.Base(steps=1))
        assert (result.plan.base.height, result.plan.base.width) == (80, 128)
        assert result.image.size == (160, 96)

    def test_sd3(self):
        pipe = dummy_models.sd3_pipeline()
        before = snapshot(pipe.transformer)
        result = draw(pipe, 256, 128, base=clear.Base(height=128, width=64, steps=2))
        assert result.plan.stages[0].ntk_factor == 1
        assert result.image.size == (128, 256)
        assert_same(pipe.transformer, before)

    def test_guidance_of_each_image_takes_effect(self):
        pipe = dummy_models.sd3_pipeline()
        plain = draw(pipe)
        other_base = draw(pipe, base=replace(BASE, guidance=2.0))
        assert not same(other_base.images[0], plain.images[0])
        other_stage = draw(pipe, stages=replace(STAGE, guidance=2.0))
        assert same(other_stage.images[0], plain.images[0])
        assert not same(other_stage.image, plain.image)

    def test_offloaded(self, pipe, flux_weights):
        distilled = {"weights": flux_weights, "window": None}
        expected = draw(pipe, **distilled)
        by_group("leaf_level")(pipe.transformer)
        before = everything(pipe)
        assert same(draw(pipe, **distilled).image, expected.image)
        assert_as_it_was(pipe, before)

    @pytest.mark.slow
    def test_guidance_keeps_the_small_flux_on_its_caption(self):
        pipe, side = demo.pipeline(), 2 * demo.SIZE
        scene = held_out_scenes(7)[6]
        refined = clear.Stage.preset("refined")
        noisy = replace(refined, shift=3.0)  # at the preset's own noise it is right without guidance too
        free = replace(noisy, low_resolution_guidance=None)
        base = pipe(scene.captions[0], generator=torch.Generator().manual_seed(0), num_inference_steps=12).images[0]
        call = {"height": side, "width": side, "seed": 0, "image": base}
        drawn = [clear.highres(pipe, scene.captions[0], **call, stages=stage) for stage in (free, noisy, refined)]
        seen = [read(np.asarray(result.image)) for result in drawn]
        assert [reading is not None and reading.scene == scene for reading in seen] == [False, True, True]


def test_refuses_a_base_image_after_originals_were_discarded(pipe, flux_weights):
    clear.linearize(pipe, weights=flux_weights, keep_original=False)
    with pytest.raises(RuntimeError, match="the original weights of this pipeline were discarded"):
        draw(pipe, window=None, weights="auto")
    assert draw(pipe, window=None, weights="auto", image=noise(64, 64)).finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: operations.int8(pipe, None), r"to_q.weight has the type \w+Tensor and .* as in a quantized"),
        (lambda pipe: operations.offload_sequentially(pipe, None), "more parameters are on the meta device"),
    ],
    ids=["quantized", "sequential offload"],
)
def test_refuses_a_base_image_whose_weights_cannot_come_back(pipe, change, message, flux_weights):
    clear.linearize(pipe, weights=flux_weights)
    change(pipe)
    with pytest.raises(RuntimeError, match=f"the base image needs the original weights: .*{message}.* with image="):
        draw(pipe, window=None, weights="auto")
    assert draw(pipe, window=None, weights="auto", image=noise(64, 64)).finished


def test_refuses_a_base_image_of_a_pipeline_without_its_original_weights(pipe, tmp_path, flux_weights):
    clear.linearize(pipe, weights=flux_weights).save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="was loaded with distilled weights in it"):
        draw(loaded, window=None, weights="auto")


@pytest.mark.parametrize("linearized", [pytest.param(False, marks=pytest.mark.slow), True])
def test_copies_of_the_attention_weights(pipe, linearized, monkeypatch, flux_weights):
    """Two copies, originals and distilled; three for the base image of a linearized pipeline."""
    distilled = {"weights": flux_weights, "window": None}
    transformer, adapter = find_transformer(pipe)
    weights = [each for each in replaced_parameters(adapter.attention_layers(transformer)).values() if each.ndim == 2]
    shapes, once = {each.shape for each in weights}, sum(each.nbytes for each in weights)

    def held():
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return sum({each.data_ptr(): each.nbytes for each in tensors if each.shape in shapes}.values())

    others = held() - once
    if linearized:
        clear.linearize(pipe, weights=flux_weights)
        distilled["weights"] = "auto"
    copies = []

    def count(runner, step, timestep, tensors):
        copies.append(round((held() - others) / once, 1))
        return tensors

    loads = mock.Mock(wraps=linearization.load)
    monkeypatch.setattr(linearization, "load", loads)
    draw(pipe, callback_on_step_end=count, **distilled)
    assert copies == ([3.0] * 2 if linearized else [2.0] * 2) + [2.0] * 2
    assert loads.call_count == (not linearized)


class TestAfterwards:
    def test_everything_is_restored(self, pipe):
        before = everything(pipe)
        draw(pipe, 160, 160)
        assert_as_it_was(pipe, before)
        pipe.vae.enable_tiling()
        draw(pipe)
        assert pipe.vae.use_tiling

    def test_an_error_has_the_finished_images(self, pipe):
        before = everything(pipe)

        def fail(pipe, step, timestep, tensors):
            if pipe.transformer.pos_embed.theta != before[1]:
                raise ZeroDivisionError("of nothing")
            return tensors

        words = "^ZeroDivisionError: of nothing; 1 of 2 images are finished, in this error's result$"
        with pytest.raises(clear.HighresError, match=words) as caught:
            draw(pipe, callback_on_step_end=fail)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert [image.size for image in caught.value.result.images] == [(64, 64)]
        assert_as_it_was(pipe, before)

    @pytest.mark.parametrize("broken", ["base image", "stage", "decoder"])
    def test_nan_is_found_in_its_stage(self, pipe, broken, monkeypatch):
        before, steps, decode = everything(pipe), [], pipe.vae.decode

        def break_latents(runner, step, timestep, tensors):
            steps.append(step)
            if isinstance(runner, FluxImg2ImgPipeline) == (broken == "stage"):
                tensors["latents"][0, 0, 0] = float("nan")
            return tensors

        if broken == "decoder":
            monkeypatch.setattr(
                pipe.vae, "decode", lambda *args, **kwargs: (decode(*args, **kwargs)[0] * float("nan"),)
            )
        where = {
            "base image": "base image, 64 x 64 px: the latents after step 1",
            "stage": "stage 1 of 1, 128 x 128 px: the latents after step 1",
            "decoder": "base image, 64 x 64 px: the decoded pixels",
        }[broken]
        words = (
            f"FloatingPointError: {where}, in float32, contain NaN or infinity; .* bfloat16 or float32 usually helps"
        )
        with pytest.raises(clear.HighresError, match=words) as caught:
            draw(pipe, callback_on_step_end=None if broken == "decoder" else break_latents)
        assert len(caught.value.result.images) == (broken == "stage")
        assert steps == {"base image": [0], "stage": [0, 1, 0], "decoder": []}[broken]
        assert_as_it_was(pipe, before)

    def test_ctrl_c_has_the_finished_images(self, pipe):
        before, calls = everything(pipe), []

        def interrupt(pipe, step, timestep, tensors):
            calls.append(step)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return tensors

        with pytest.raises(clear.HighresInterrupted, match="interrupted after 1 of 2 images") as caught:
            draw(pipe, callback_on_step_end=interrupt)
        assert isinstance(caught.value, KeyboardInterrupt)
        assert [image.size for image in caught.value.result.images] == [(64, 64)]
        assert not caught.value.result.finished
        assert_as_it_was(pipe, before)

    @pytest.mark.parametrize("own", [False, True])
    def test_an_interrupted_pipeline_stops_and_decodes_nothing(self, pipe, own, monkeypatch):
        decode = mock.Mock(wraps=pipe.vae.decode)
        monkeypatch.setattr(pipe.vae, "decode", decode)

        def interrupt(runner, step, timestep, tensors):
            assert set(tensors) == {"latents"}
            (pipe if own else runner)._interrupt = isinstance(runner, FluxImg2ImgPipeline)
            return tensors

        result = draw(pipe, callback_on_step_end=interrupt)
        assert len(result.images) == decode.call_count == 1
        assert not result.finished
        assert draw(pipe).finished

    def test_callbacks_of_diffusers(self, pipe):
        class Look(PipelineCallback):
            tensor_inputs = ("latents", "prompt_embeds")

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                seen.append(set(callback_kwargs))
                return callback_kwargs

        seen = []
        draw(pipe, callback_on_step_end=Look())
        assert seen == [{"latents", "prompt_embeds"}] * 4

    # A dense pipeline is linearized after the base image, then restored. A linearized one is restored for the base
    # image, then linearized again. An interrupted restore is repeated.
    @pytest.mark.parametrize(
        ("linearized", "at", "finished"),
        [
            (False, [1], 1),
            (False, [1, 2], 1),
            (False, [2], 2),
            (True, [1], 0),
            (True, [2], 1),
        ],
    )
    def test_ctrl_c_while_weights_are_copied(self, pipe, monkeypatch, linearized, at, finished, flux_weights):
        distilled = {"weights": flux_weights, "window": None}
        if linearized:
            clear.linearize(pipe, weights=flux_weights)
            distilled["weights"] = "auto"
        pipe.transformer.register_forward_pre_hook(lambda module, args: None)
        before, calls, copy_values = everything(pipe), [], state.copy_values

        def interrupted(values, layers):
            calls.append(values)
            if len(calls) in at:
                copy_values(dict(list(values.items())[: len(values) // 2]), layers)
                raise KeyboardInterrupt
            copy_values(values, layers)

        monkeypatch.setattr(state, "copy_values", interrupted)
        monkeypatch.setattr(Cascade, "_run", lambda self, runner, number, drawn, *rest: noise(*drawn.size))
        with pytest.raises(KeyboardInterrupt) as caught:
            draw(pipe, **distilled)
        result = getattr(caught.value, "result", None)
        assert (None if result is None else len(result.images)) == finished
        assert_as_it_was(pipe, before)

    def test_hooks_are_added_and_removed_while_restored(self, pipe):
        clear.linearize(pipe, 4, weights=None)
        hooks = pipe.transformer._forward_pre_hooks
        kept, removed = (pipe.transformer.register_forward_pre_hook(lambda module, args: None) for _ in range(2))
        entry_hook = next(iter(hooks))
        with restored(pipe):
            assert list(hooks) == [kept.id, removed.id]
            removed.remove()
            new = pipe.transformer.register_forward_pre_hook(lambda module, args: None)
        assert list(hooks) == [entry_hook, kept.id, new.id]
        assert clear.is_linearized(pipe)

    def test_progress(self, pipe, capfd):
        pipe._progress_bar_config = {}
        draw(pipe)
        shown = capfd.readouterr().err
        assert "base image, 64 x 64 px" in shown
        assert "stage 1 of 1, 128 x 128 px" in shown
        assert pipe._progress_bar_config == {}

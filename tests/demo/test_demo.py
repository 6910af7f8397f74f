"""The small FLUX in the package, what it draws, and the command that shows it."""

import functools
import json
import re
import types

import diffusers
import numpy as np
import pytest
import torch
import typer
from diffusers import FluxPipeline
from PIL import Image
from typer.testing import CliRunner

import clear_attn as clear
from clear_attn import demo
from clear_attn.demo import comparison
from clear_attn.demo.scene_reader import read
from clear_attn.demo.scenes import draw, has_no_texture, held_out_scenes
from clear_attn.models._diffusers import diffusers_version
from clear_attn.tools.cli import app
from clear_attn.utils.image_sheets import CELL
from clear_attn.weights import packaged

needs_flux2_klein = pytest.mark.skipif(diffusers_version() < (0, 37), reason="diffusers has no FLUX.2 klein")


@pytest.fixture
def pipe():
    pipe = demo.pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestSmallFlux:
    def test_loads_in_plain_diffusers_and_is_small(self):
        pipe = FluxPipeline.from_pretrained(demo.path())
        assert isinstance(pipe, FluxPipeline)
        files = [file for file in demo.path().rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 8 * 2**20
        assert {file.suffix for file in files} <= {".json", ".safetensors", ".txt"}
        # diffusers writes the folder that a model was loaded from into its config.
        assert not any("_name_or_path" in file.read_text() for file in files if file.suffix == ".json")

    @pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
    def test_draws_captions_it_was_not_trained_on(self, pipe, example, count):
        evaluation = example("evaluate_small_flux")
        scenes = held_out_scenes(count)
        found = evaluation.score(scenes, evaluation.draw(pipe, scenes, demo.TEXT_TOKENS, batch=10, steps=12))
        assert found["right"] >= 0.9 * count, found
        assert found["median_overlap"] >= 0.93

    @pytest.mark.parametrize("call", [{}, {"max_sequence_length": 512}], ids=str)
    def test_draws_at_its_own_size_and_text_length_and_with_long_padding(self, pipe, call):
        scene, lengths = held_out_scenes(1)[0], []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, given: lengths.append(given["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        image = pipe(
            scene.captions[0], num_inference_steps=12, generator=torch.Generator().manual_seed(0), **call
        ).images[0]
        hook.remove()
        assert set(lengths) == {call.get("max_sequence_length", demo.TEXT_TOKENS)}
        assert image.size == (demo.SIZE, demo.SIZE)
        assert read(np.asarray(image)).scene == scene

    def test_encodes_prompts_at_its_own_text_length(self, pipe):
        assert pipe.encode_prompt("a red circle", device="cpu")[0].shape[1] == demo.TEXT_TOKENS
        assert pipe.encode_prompt("a red circle", device="cpu", max_sequence_length=96)[0].shape[1] == 96

    def test_a_window_that_covers_the_image_draws_the_same(self, pipe):
        def sample():
            generator, prompt = torch.Generator().manual_seed(0), "a red cross on a white ground, at the top left"
            return pipe(prompt, generator=generator, num_inference_steps=4, output_type="latent").images

        expected = sample()
        clear.linearize(pipe, 45, weights=None)
        torch.testing.assert_close(sample(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
        clear.restore(pipe)
        assert torch.equal(sample(), expected)


class TestDistilled:
    @pytest.mark.parametrize(
        ("window", "down_factor", "count"),
        [(8, 1, 2), *(pytest.param(*variant, 6, marks=pytest.mark.slow) for variant in packaged.FOLDERS)],
    )
    def test_draws_what_the_dense_model_draws(self, pipe, example, window, down_factor, count):
        """Distilled weights give nearly the dense images, and the model's own weights do not."""
        evaluation = example("evaluate_small_flux")
        scenes = held_out_scenes(count)

        def draw():
            return np.stack(evaluation.draw(pipe, scenes, demo.TEXT_TOKENS, batch=count, steps=12)) / 255.0

        dense = draw()
        with clear.linearized(pipe, window, down_factor, weights=None):
            free = draw()
        with clear.linearized(pipe, window, down_factor):
            distilled = draw()
        assert ((distilled - dense) ** 2).mean() < ((free - dense) ** 2).mean() / 4

    def test_names_what_there_is(self):
        assert demo.distilled() == demo.distilled(8, 1)
        assert {demo.distilled(*variant).name for variant in packaged.FOLDERS} == {*packaged.FOLDERS.values()}
        with pytest.raises(ValueError, match=r"for window=5, down_factor=1; there are some for window=8"):
            demo.distilled(5)

    def test_is_small(self):
        files = [file for file in packaged.WEIGHTS.rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 4 * 2**20

    @pytest.mark.slow
    def test_training_runs(self, tmp_path, example, monkeypatch):
        distilling = example("distill_small_flux")
        monkeypatch.setattr(distilling, "TRAINING_IMAGES", 4)
        monkeypatch.setattr(distilling, "VARIANTS", {(4, 1): tuple(distilling.LOSSES)})
        distilling.main(tmp_path, steps=1, captions=2, only=["4x1"])
        assert not (tmp_path / "table.json").exists()
        distilling.main(tmp_path, steps=1, captions=2)
        rows = json.loads((tmp_path / "table.json").read_text())["rows"]
        assert [row["weights"] for row in rows] == ["training-free", *distilling.LOSSES]
        assert len({row["error"] for row in rows}) == 4
        assert Image.open(tmp_path / "table.png").size[1] > 5 * CELL
        assert len(list((tmp_path / "images").glob("*.png"))) == 4


class TestLargeImages:
    @pytest.mark.parametrize("figures", [1, 3])
    def test_steepness_is_that_of_edges(self, example, figures):
        comparing = example("compare_highres")
        scene = next(each for each in held_out_scenes() if has_no_texture(each) and len(each.figures) == figures)
        exact = Image.fromarray(draw(scene))
        blurred = exact.resize((64, 64), Image.Resampling.BOX).resize(exact.size, Image.Resampling.LANCZOS)
        sharp, soft = (comparing.edge_steepness(np.asarray(each), read(np.asarray(each))) for each in (exact, blurred))
        assert 0.9 <= sharp <= 1.1
        assert 0.1 < soft < 0.5

    def test_crops_are_inside(self, example):
        comparing = example("compare_highres")
        image = Image.new("RGB", (512, 512), "white")
        for scene in held_out_scenes(20):
            cropped = comparing.crop(image, comparing.Task(0, scene, "", 0))
            assert cropped.size == (comparing.CELL, comparing.CELL)
            assert np.asarray(cropped).min() == 255

    @pytest.mark.slow
    def test_the_comparison_of_ways_goes_on_where_it_stopped(self, example, tmp_path, monkeypatch):
        comparing = example("compare_highres")
        monkeypatch.setattr(example("highres_ways"), "STEPS", 2)
        ways = ["enlarged", "close, stepwise"]
        run = functools.partial(comparing.main, tmp_path, side=[320], captions=2, seeds=1, shown=1)
        run(only=ways[:1])
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("0-*.png")}
        run(only=ways)
        assert {file: file.stat().st_mtime_ns for file in before} == before
        rows = json.loads((tmp_path / "highres.json").read_text())["rows"]
        assert [(row["side"], row["way"], row["images"]) for row in rows] == [
            (256, "base image", 2),
            *((320, way, 2) for way in ways),
        ]
        assert Image.open(tmp_path / "320-crops.png").height > 2 * comparing.CELL
        monkeypatch.setitem(comparing.WAYS, "enlarged", comparing.Direct(8))
        run(only=ways[:1])
        redrawn = {file for file in before if file.stat().st_mtime_ns != before[file]}
        assert redrawn == {file for file in before if file.parent.name == "enlarged"}
        with pytest.raises(typer.BadParameter, match="no such way: direct; there are enlarged, "):
            run(only=["direct"])


class TestComparison:
    @pytest.fixture
    def seconds(self):
        """By side, and whether the pipeline is linearized."""
        return {(256, False): 2.0, (256, True): 2.6, (512, False): 3.0, (512, True): 1.25}

    @pytest.fixture
    def calls(self, seconds, monkeypatch):
        """What was drawn, by a pipeline that draws nothing and takes these seconds."""
        calls, clock = [], [0.0]

        def call(pipe, prompt, height, width, num_inference_steps, **options):
            linearized = clear.is_linearized(pipe)
            calls.append((height, linearized, num_inference_steps))
            clock[0] += seconds[height, linearized]
            count = 1 if isinstance(prompt, str) else len(prompt)
            return types.SimpleNamespace(images=[Image.new("RGB", (width, height))] * count)

        monkeypatch.setattr(FluxPipeline, "__call__", call)
        monkeypatch.setattr(comparison.time, "perf_counter", lambda: clock[0])
        return calls

    def test_ends_with_twice_the_side_and_what_to_do_next(self, calls, tmp_path):
        report = comparison.compare(["a red circle", "a blue cross"], clear.methods.Clear(8), 0, tmp_path / "out.png")
        assert calls == [*[(256, each, 28) for each in (False, True, True)], (512, False, 2), (512, True, 2)]
        small, large, following = (part.splitlines() for part in report.split("\n\n")[-3:])
        assert small[0].startswith("2 images of 256 x 256 px (32 x 32 tokens), 28 steps")
        assert [line.split()[-4:] for line in small[2:4]] == [["2.6", "1.3", "times", "slower"]] * 2
        assert small[4] == "CLEAR is slower here, because so few tokens leave little to save."
        assert large[0].startswith("1 image of 512 x 512 px (64 x 64 tokens), 2 steps")
        assert [line.split()[-1] for line in large[1:2]] == ["3.0"]
        assert re.fullmatch(r"CLEAR, window 8 +1\.2  2\.4 times faster", large[2])
        assert len(large) == 3
        assert following[0].startswith("Next: call clear_attn.linearize(pipe)")
        assert len(following) == 1

    def test_is_honest_where_it_is_slower_at_the_larger_size(self, calls, seconds, tmp_path):
        seconds[512, True] = 6.0
        report = comparison.compare(["a red circle"], clear.methods.Clear(8), 0, tmp_path / "out.png")
        assert "2.0 times slower\nCLEAR is slower here" in report

    def test_a_difference_within_noise_is_none(self):
        described = comparison.describe_seconds({"dense": 2.0, "CLEAR": 2.05, "other": 1.95}, 1, 128, 16, 28)
        assert described.count("about as fast") == 2
        assert "slower" not in described


class TestCommand:
    run = staticmethod(lambda *arguments: CliRunner().invoke(app, list(map(str, arguments))))

    def test_demo(self, tmp_path, monkeypatch):
        monkeypatch.setattr(comparison, "SMALL_STEPS", 2)
        output = tmp_path / "out.png"
        prompt = "a green square on a yellow ground, at the top right"
        result = self.run(
            "demo", "--prompt", prompt, "--window", 5, "--down-factor", 2, "--seed", 3, "--output", output
        )
        assert result.exit_code == 0, result.output
        assert "32 x 32 image tokens, 32 text tokens, window=5, down_factor=2" in result.output
        assert f"Saved {output}" in result.output
        assert "window=8, down_factor=4, so they are not shown" in result.output
        assert "1 image of 512 x 512 px (64 x 64 tokens), 2 steps" in result.output
        assert "\nNext: " in result.output
        two = Image.open(output).size
        assert two[0] > CELL
        for name in ("out.ico", "no/out.png"):
            refused = self.run("demo", "--prompt", prompt, "--output", tmp_path / name)
            assert (refused.exit_code, (tmp_path / name).exists()) == (2, False)
        refused = self.run("demo", "--prompt", prompt, "--output", output)
        assert (refused.exit_code, Image.open(output).size) == (2, two)
        result = self.run("demo", "--prompt", prompt, "--output", output, "--overwrite")
        assert result.exit_code == 0, result.output
        assert "window 8 (distilled)" in result.output
        assert Image.open(output).size[1] > two[1]

    def test_demo_errors_come_before_drawing(self, tmp_path):
        result = self.run("demo", "--output", tmp_path / "no" / "where.png")
        assert result.exit_code == 2
        assert "no such directory" in result.output
        assert self.run("demo", "--window", 0).exit_code == 2
        result = self.run("demo", "--output", tmp_path / "image.xyz")
        assert result.exit_code == 2
        assert "image.xyz" in re.sub(r"[\s│]", "", result.output)  # a long path is wrapped

    def test_cost(self):
        result = self.run("cost", "--height", 1024, "--width", 1024, "--window", 16, "--json")
        assert round(json.loads(result.output)["layer_gflops"], 1) == 86.6
        assert "all 57 layers" in self.run("cost", "--height", 1024, "--width", 768).output

    def test_cost_lists_the_models_it_knows(self):
        result = self.run("cost", "--height", 1024, "--width", 1024, "--model", "sd9")
        assert result.exit_code == 2
        assert "'sd9' is not one of flux" in result.output

    @pytest.mark.parametrize(
        ("model", "layers", "text", "a_layer", "weights"),
        [
            ("sd3-medium", 24, 333, "33.4 ", "3.80 GiB"),
            ("sd3.5-medium", 37, 333, "33.4 ", "4.20 GiB"),
            ("sd3.5-large", 38, 333, "52.9 ", "15.0 GiB"),
            pytest.param("flux2-klein-4b", 25, 512, "86.6 ", "7.22 GiB", marks=needs_flux2_klein),
            pytest.param("flux2-klein-9b", 32, 512, "115.5 ", "16.9 GiB", marks=needs_flux2_klein),
        ],
    )
    def test_cost_of_other_models(self, model, layers, text, a_layer, weights):
        output = self.run("cost", "--height", 1024, "--width", 1024, "--model", model).output
        assert f"all {layers} layers" in output
        assert f"{text} text tokens" in output
        assert re.search(rf"a layer +[\d.]+ +{a_layer}", output), output  # in GFLOPs, proportional to its width
        assert f"transformer weights {weights}," in output  # the size of the published files in bfloat16

    def test_cost_refuses_a_model_that_needs_a_later_diffusers(self, monkeypatch):
        monkeypatch.setattr(diffusers, "__version__", "0.36.0")
        for model, first in (("flux2-klein-9b", "0.37"), ("krea2", "0.39")):
            result = self.run("cost", "--height", 1024, "--width", 1024, "--model", model)
            assert result.exit_code == 2
            assert f"is supported with diffusers {first} and later, not with 0.36" in result.output

    def test_cost_refuses(self):
        result = self.run("cost", "--height", 8, "--width", 1024)
        assert result.exit_code == 2
        assert "8 x 1024 px is less than one token of 16 px" in result.output

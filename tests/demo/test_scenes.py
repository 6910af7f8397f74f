"""Scenes of several figures, and the reader that recognizes them."""

import contextlib
import dataclasses

import numpy as np
import pytest
from diffusers import FluxPipeline

from clear_attn.demo.scene_reader import connected_regions, read, recognize_texture
from clear_attn.demo.scenes import (
    LAYOUTS,
    SIZE,
    Figure,
    Pose,
    Scene,
    Surface,
    draw,
    held_out_scenes,
    poses,
    random_scene,
    training_scenes,
)

CIRCLE, SQUARE, CROSS = (
    Figure("circle", Surface("red", "stripes", "black")),
    Figure("square", Surface("blue")),
    Figure("cross", Surface("green")),
)
SCENE = Scene((CIRCLE, SQUARE, CROSS), "two above one", Surface("yellow", "dots", "white"))


def scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


class TestScenes:
    def test_a_caption_names_the_first_pair_in_either_order(self):
        assert SCENE.captions == (
            "a red circle with black stripes left of a blue square, both above a green cross, "
            "on a yellow ground with white dots",
            "a blue square right of a red circle with black stripes, both above a green cross, "
            "on a yellow ground with white dots",
        )
        column = Scene((CIRCLE, SQUARE), "column", Surface("white"))
        assert column.captions[1] == "a blue square below a red circle with black stripes, on a white ground"

    def test_no_two_scenes_share_a_caption(self):
        named = {caption: scene for scene in scenes(2000) for caption in scene.captions}
        assert all(named[caption] == scene for scene in scenes(2000) for caption in scene.captions)

    def test_figures_differ_in_color_from_the_ground(self):
        for scene in scenes(500):
            assert all(not figure.surface.colors & scene.ground.colors for figure in scene.figures)

    def test_all_layouts_and_textures_occur(self):
        drawn = scenes(500)
        assert {scene.layout for scene in drawn} == set(LAYOUTS)
        for surfaces in ([scene.ground for scene in drawn], [f.surface for scene in drawn for f in scene.figures]):
            assert {surface.texture for surface in surfaces} == {None, "stripes", "dots", "gradient"}

    def test_held_out_scenes_are_not_trained_on(self):
        held_out = held_out_scenes()
        assert len(set(held_out)) == 200
        assert not set(held_out) & set(training_scenes(3000))
        assert held_out[:50] == held_out_scenes(50)


class TestReader:
    @pytest.mark.parametrize(
        ("size", "count"), [(128, 60), (256, 60), pytest.param(256, 500, marks=pytest.mark.slow), (512, 8)]
    )
    def test_drawn_scenes_are_read_back(self, size, count):
        rng = np.random.default_rng(1)
        for scene in scenes(count, seed=2):
            posed = poses(scene, rng)
            image = draw(scene, size, posed)
            noisy = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
            reading = read(noisy)
            assert reading is not None, scene
            assert reading.scene == scene
            assert min(reading.overlaps) > 0.96
            np.testing.assert_allclose(reading.poses, posed, atol=1 / size)

    def test_a_changed_part_is_read(self):
        changed = [
            dataclasses.replace(SCENE, ground=Surface("yellow", "gradient", "white")),
            dataclasses.replace(SCENE, ground=Surface("yellow", "stripes", "white")),
            dataclasses.replace(SCENE, ground=Surface("yellow")),
            dataclasses.replace(SCENE, layout="two below one"),
            dataclasses.replace(SCENE, figures=(SQUARE, CIRCLE, CROSS)),
            dataclasses.replace(SCENE, figures=(Figure("circle", Surface("red")), SQUARE, CROSS)),
            dataclasses.replace(SCENE, figures=(Figure("triangle", CIRCLE.surface), SQUARE, CROSS)),
            Scene((CIRCLE, SQUARE), "row", SCENE.ground),
        ]
        for scene in [SCENE, *changed]:
            assert read(draw(scene)).scene == scene

    def test_black_and_white_surfaces_are_told_apart(self):
        for texture in ("stripes", "dots", "gradient"):
            for surface in (Surface("black", texture, "white"), Surface("white", texture, "black")):
                on_ground = Scene((SQUARE,), "in the middle", surface)
                on_figure = Scene((Figure("circle", surface),), "in the middle", Surface("green"))
                assert read(draw(on_ground)).scene == on_ground
                assert read(draw(on_figure)).scene == on_figure

    def test_overlap_falls_with_the_shape(self):
        """The overlap is that of the areas: a bite of a tenth costs about as much."""
        scene = Scene((Figure("square", Surface("red")),), "in the middle", Surface("white"))
        image = draw(scene)
        assert read(image).overlaps[0] > 0.99
        side = 2 * 0.21 * 256
        left = round(128 - side / 2)
        image[left : left + round(side * 0.1 / 0.5), left : left + round(side / 2)] = 245
        assert 0.8 < read(image).overlaps[0] < 0.93

    @pytest.mark.parametrize("shift", [0.0, 0.08])
    def test_a_shifted_figure_is_read_where_it_is(self, shift):
        scene = Scene((SQUARE,), "in the middle", Surface("white"))
        reading = read(draw(scene, posed=[Pose(0.5 + shift, 0.5, 0.2)]))
        np.testing.assert_allclose(reading.poses[0], (0.5 + shift, 0.5, 0.2), atol=2e-3)

    def test_unclear_images_are_not_read(self):
        rng = np.random.default_rng(0)
        plain = Scene((CROSS, SQUARE), "row", Surface("yellow"))

        def painted(rows, columns, color):
            image = draw(plain)
            image[rows, columns] = color
            return image

        unclear = {
            "nothing": np.full((256, 256, 3), 245, dtype=np.uint8),
            "noise": rng.integers(0, 255, (256, 256, 3)).astype(np.uint8),
            "a color of no name": np.full((256, 256, 3), (150, 130, 190), dtype=np.uint8),
            "half a figure": painted(slice(None), slice(187, None), (250, 220, 60)),
            "a duplicate": painted(slice(20, 80), slice(100, 160), (40, 80, 220)),
            "a figure of two colors": painted(slice(100, 128), slice(140, 236), (245, 245, 245)),
            "a ground of two colors": painted(slice(200, None), slice(None), (220, 40, 40)),
            "a figure out of place": draw(plain, posed=[Pose(0.3, 0.2, 0.19), Pose(0.73, 0.5, 0.19)]),
            "a figure too small": draw(plain, posed=[Pose(0.27, 0.5, 0.12), Pose(0.73, 0.5, 0.19)]),
            "touching figures": draw(plain, posed=[Pose(0.4, 0.5, 0.19), Pose(0.6, 0.5, 0.19)]),
        }
        assert read(draw(plain)).scene == plain
        assert {name for name, image in unclear.items() if read(image) is not None} == set()

    def test_blurred_textures_are_still_read(self):
        def blur(image):
            padded = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)), mode="edge")
            rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
            return ((rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4).astype(np.uint8)

        right = [read(blur(draw(scene))).scene == scene for scene in scenes(30, seed=3)]
        assert all(right)

    def test_regions_without_a_texture(self):
        share = np.random.default_rng(0).random((64, 64))
        assert recognize_texture(share, np.eye(64, dtype=bool)) is None  # no line has three of its pixels
        assert recognize_texture(np.full((64, 64), 0.3), np.ones((64, 64), dtype=bool)) is None

    def test_connected_regions(self):
        mask = np.array([[1, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
        regions = connected_regions(mask)
        assert sorted(region.sum() for region in regions) == [1, 1, 5]
        assert np.array_equal(np.sum(regions, axis=0), mask)


@pytest.fixture
def training(example):
    return example("train_small_flux")


@pytest.fixture
def building(example):
    """The module that training builds the models with."""
    return example("build_small_flux")


class TestTraining:
    @pytest.fixture(autouse=True)
    def short(self, training, example, monkeypatch):
        monkeypatch.setattr(example("training_state"), "SAVE_EVERY", 0)
        autoencoder = example("train_small_autoencoder")
        monkeypatch.setattr(autoencoder, "IMAGES", 4)
        monkeypatch.setattr(autoencoder, "PHASES", (autoencoder.Phase(3, 64, 2),))
        monkeypatch.setattr(autoencoder, "DECODER_PHASES", (autoencoder.Phase(2, 64, 2),))
        monkeypatch.setattr(training, "IMAGES", 4)
        monkeypatch.setattr(training, "CROPS", 2)
        sizes = {32: 2, 96: 2, 512: 1}
        monkeypatch.setattr(
            training,
            "PHASES",
            (
                training.Phase(2, 16, sizes, (1e-3, 5e-4), (0.0, 0.5)),
                training.Phase(2, training.IMAGE_TOKENS, sizes, (5e-4, 0.0), (0.5, 0.5), enlarged=0.5),
            ),
        )

    def test_every_word_is_one_token_and_captions_fit(self, building):
        captions = [caption for scene in scenes(3000) for caption in scene.captions]
        clip, t5 = building.build_tokenizers(captions, building.CAPTION_LENGTH)
        for caption in captions:
            words = caption.replace(",", " ,").split()
            assert len(clip(caption).input_ids) == len(words) + 2 <= building.CAPTION_LENGTH
            assert len(t5(caption).input_ids) == len(words) + 1

    def test_tokenizers_are_the_same_in_every_run(self, building):
        captions = [caption for scene in scenes(100) for caption in scene.captions]
        first, second = (building.build_tokenizers(captions, building.CAPTION_LENGTH) for _ in range(2))
        for one, other in zip(first, second, strict=True):
            assert one.get_vocab() == other.get_vocab()

    def test_crops_show_the_textures_of_enlarged_scenes(self, example):
        images = example("small_flux_images")
        ground = Surface("blue", "stripes", "white")
        scene = Scene((Figure("circle", Surface("red", "stripes", "black")),), "in the middle", ground)

        def repeats_after(image, rows):
            return (image[:, rows:] == image[:, :-rows]).float().mean() > 0.6

        periods = [
            next(times for times in (1, 2, 4) if repeats_after(crop, times * images.TOKEN))
            for crop in images.draw_crops([scene] * 8, seed=0)
        ]
        assert set(periods) == set(images.ENLARGED)
        assert all(crop.shape == (3, SIZE, SIZE) for crop in images.draw_crops([scene] * 2, seed=1))

    def test_the_learning_rate_is_continuous(self, training, monkeypatch):
        monkeypatch.setattr(training, "WARMUP", 1)
        assert training.learning_rate(0) == 1e-3
        assert training.learning_rate(2) == 5e-4
        assert training.locate(3) == (1, 0.5)
        with pytest.raises(ValueError, match="past the last"):
            training.locate(4)

    @pytest.mark.slow
    def test_goes_on_where_it_was_interrupted(self, training, example, tmp_path, monkeypatch):
        training.main(tmp_path / "whole")
        randomness = training.generator_of
        for stop in ((1, 2), (1, 1), (2, 1), (2, 3), None):  # (1, 1): of the decoder, once the rest is trained

            def interrupt(seed, purpose, step, stop=stop):
                if (purpose, step) == stop:
                    raise KeyboardInterrupt
                return randomness(seed, purpose, step)

            for module in (example("train_small_autoencoder"), training):
                monkeypatch.setattr(module, "generator_of", interrupt)
            with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
                training.main(tmp_path / "parts")
        weights = [
            {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.safetensors")}
            for name in ("whole", "parts")
        ]
        assert len(weights[0]) == 8
        assert weights[0] == weights[1]
        assert FluxPipeline.from_pretrained(tmp_path / "parts" / "phase-1").scheduler.config.shift == training.SHIFT

"""clear-attn generate."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import clear_attn as clear
from clear_attn import demo
from clear_attn.cli import app
from clear_attn.highres import command

SMALL = (
    *("--prompt", "a red circle", "--width", 160, "--window", 4, "--weights", "none"),
    *("--seed", 3, "--max-sequence-length", 24, "--steps", 2, "--strength", 0.5),
)


def generate(output, *options, model="demo"):
    arguments = ["generate", "--model", model, "--output", output, *options]
    return CliRunner().invoke(app, list(map(str, arguments)))


def pixels(file):
    return np.asarray(Image.open(file))


def test_draws_from_an_image_and_draws_it_again(tmp_path):
    start, output = tmp_path / "start.png", tmp_path / "out.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3)).astype(np.uint8)).save(start)
    options = (*SMALL, "--height", 128, "--init-image", start, "--save-stages", "--low-resolution-guidance", 1)
    result = generate(output, *options)
    assert result.exit_code == 0, result.output
    assert f"Saved {output} and {tmp_path / 'out.json'}, seed 3" in result.output
    assert pixels(output).shape == (128, 160, 3)
    assert np.array_equal(pixels(tmp_path / "out-0-64x80.png"), pixels(start))
    stage = clear.HighresPlan.load(output).stages[0]
    assert (stage.steps, stage.strength, stage.low_resolution_guidance) == (2, 0.5, 1)

    again = tmp_path / "again.png"
    result = generate(again, "--plan", tmp_path / "out.json", "--init-image", start, model=demo.path())
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(again), pixels(output))
    result = generate(again, "--plan", output)
    assert result.exit_code == 2
    assert "and --init-image is not given" in " ".join(result.output.split())


def test_saves_what_was_finished_when_it_is_interrupted(tmp_path, monkeypatch):
    def interrupted(pipe, prompt, image, **asked):
        plan = clear.HighresPlan(prompt, 256, 256, clear.Base(), (clear.Stage(),), 3, 4, 1, None)
        raise clear.HighresInterrupted(clear.HighresResult([Image.new("RGB", (64, 32), "red")], plan))

    monkeypatch.setattr(command, "highres", interrupted)
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128)
    assert result.exit_code == 130
    assert clear.HighresPlan.load(tmp_path / "out-0-32x64.png").prompt == "a red circle"
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a red circle"), "--height, --width must be given, or a --plan"),
        ((*SMALL, "--height", 4), "4 x 160 px is less than one token of 8 px"),
        ((*SMALL, "--height", 128, "--strength", 0), "strength must be above 0 and at most 1, got 0"),
        ((*SMALL, "--height", 64), "64 x 160 px"),
        (("--plan", "none.json"), "none.json"),
        (("--plan", "none.json", "--steps", 20), "--plan and --steps both say what to draw"),
        ((*SMALL, "--height", 128, "--init-image", "none.png"), "none.png"),
        ((*SMALL, "--height", 128, "--device", "tpu"), "'tpu' is not here"),
        ((*SMALL, "--height", 128, "--device", "cpu", "--offload"), "--offload keeps a GPU's memory free"),
    ],
)
def test_refuses(tmp_path, options, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    if words == "64 x 160 px":
        words = "smaller"
        Image.new("RGB", (800, 320)).save("large.png")
        options = (*options, "--init-image", "large.png")
    result = generate(tmp_path / "out.png", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "out.png").exists()


def test_refuses_an_output_that_cannot_be_saved(tmp_path):
    for file, words in (("no/out.png", "no such directory"), ("out.xyz", "names no kind of picture")):
        result = generate(tmp_path / file, *SMALL, "--height", 128)
        assert result.exit_code == 2
        assert words in " ".join(result.output.replace("│", "").split())

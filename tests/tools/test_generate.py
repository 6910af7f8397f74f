"""The command `clear-attn generate`."""

import errno
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import typer
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import ExifTags, Image
from typer.testing import CliRunner

import clear_attn as clear
from clear_attn import demo
from clear_attn.cascade import result as cascade_result
from clear_attn.cascade import saved_files
from clear_attn.cascade.plan import describe
from clear_attn.tools import generation
from clear_attn.tools import options as tools_options
from clear_attn.tools.cli import app
from clear_attn.utils import atomic
from tests.helpers import dummy_models, dummy_pipelines
from tests.helpers.modular_pipelines import MODULAR, needs_modular_pipelines

FEW_STEPS = (
    *("--prompt", "a red circle", "--width", 160),
    *("--seed", 3, "--max-sequence-length", 24, "--steps", 2, "--strength", 0.5),
)
SMALL = (*FEW_STEPS, "--window", 4, "--weights", "none")


@pytest.fixture
def generate(flux_folder):
    """Return a function that runs the command, by default with the random FLUX."""

    def run(output, *options, model=flux_folder):
        arguments = ["generate", "--model", model, "--output", output, *options]
        return CliRunner().invoke(app, list(map(str, arguments)))

    return run


def shown(result):
    """Return the output without its frame."""
    return " ".join(result.output.replace("│", "").split())


def pixels(file):
    return np.asarray(Image.open(file))


@pytest.fixture
def start(tmp_path):
    file = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 80, 3)).astype(np.uint8)).save(file)
    return file


def test_draws_from_an_image_and_draws_it_again(flux_weights, generate, tmp_path, start):
    output = tmp_path / "out.png"
    options = (*FEW_STEPS, "--height", 128, "--init-image", start, "--save-stages", "--low-resolution-guidance", 1)
    result = generate(output, *options, "--weights", flux_weights)
    assert result.exit_code == 0, result.output
    assert f"Saved {output} and {tmp_path / 'out.png.json'}, seed 3" in result.output
    assert pixels(output).shape == (128, 160, 3)
    assert np.array_equal(pixels(tmp_path / "out-0-64x80.png"), pixels(start))
    stage = clear.HighresPlan.load(output).stages[0]
    assert (stage.steps, stage.strength, stage.low_resolution_guidance) == (2, 0.5, 1)

    # The image has no local paths, so the weights are not found.
    again = tmp_path / "again.png"
    result = generate(again, "--plan", output, "--init-image", start)
    assert result.exit_code == 2
    assert "--weights flux_weights does not exist" in shown(result)
    result = generate(again, "--plan", output, "--init-image", start, "--weights", flux_weights)
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    assert np.array_equal(pixels(again), pixels(output))
    assert "exists; give another file, or --overwrite" in shown(generate(again, "--plan", output))
    result = generate(again, "--plan", output, "--overwrite")
    assert result.exit_code == 2
    assert "and --init-image is not given" in shown(result)


def test_other_weights_than_the_plans_have_no_revision_of_it(generate, tmp_path, start, monkeypatch):
    plan = clear.HighresPlan("a red circle", 128, 160, None, (clear.Stage(),), 3, 4, 1, "owner/repo", "v2")
    (tmp_path / "plan.json").write_text(plan.to_json())
    asked = []
    monkeypatch.setattr(generation, "draw", lambda pipe, arguments, *rest, **settings: asked.append(arguments))
    for given in ((), ("--weights", "owner/repo"), ("--weights", "none")):
        result = generate(tmp_path / "out.png", "--plan", tmp_path / "plan.json", *given)
        assert result.exit_code == 0, result.output
    assert [(each["weights"], each["revision"]) for each in asked] == [("owner/repo", "v2")] * 2 + [(None, None)]


def test_options_change_the_preset(generate, tmp_path, monkeypatch):
    """The small FLUX has the refined one. Guidance of one kind turns the other off."""
    asked = []
    monkeypatch.setattr(generation, "draw", lambda pipe, arguments, *rest, **settings: asked.append(arguments))
    options = ("--prompt", "a red circle", "--height", 2 * demo.SIZE, "--width", 2 * demo.SIZE)
    refined = clear.Stage.preset("refined")
    by_run = replace(refined, low_resolution_guidance=None, stepwise_guidance=clear.StepwiseGuidance(structure=0.25))
    cases = {
        (): refined,
        ("--preset", "published"): clear.Stage(),
        ("--steps", 7): replace(refined, steps=7),
        ("--preset", "published", "--steps", 7, "--shift", 0): clear.Stage(steps=7, shift=None),
        ("--low-resolution-guidance", 0, "--no-continues"): replace(refined, low_resolution_guidance=None),
        ("--stepwise-guidance", 0.25): by_run,
        ("--continues",): replace(refined, low_resolution_guidance=None, continues=True),
        ("--continues", "--stepwise-guidance", 0.25): replace(by_run, continues=True),
    }
    for given, stage in cases.items():
        result = generate(tmp_path / "out.png", *options, *given, model="demo")
        assert result.exit_code == 0, result.output
        assert asked.pop()["stages"] == stage, given


@pytest.mark.parametrize("folder", [False, True])
def test_the_small_flux_brings_its_size_text_length_and_weights(generate, tmp_path, folder):
    side = demo.SIZE * 5 // 4
    options = (
        *("--prompt", "a red circle", "--height", side, "--width", side),
        *("--seed", 3, "--base-steps", 1, "--steps", 1, "--strength", 1),
    )
    if folder:
        demo.pipeline().save_pretrained(tmp_path / "small")
    model, same_model = (tmp_path / "small",) * 2 if folder else ("demo", demo.path())
    result = generate(tmp_path / "out.png", *options, model=model)
    assert result.exit_code == 0, result.output
    plan = clear.HighresPlan.load(tmp_path / "out.png")
    method = clear.info(clear.linearize(demo.pipeline())).method
    assert plan.base.size == (demo.SIZE, demo.SIZE)
    assert (plan.window, plan.down_factor) == (method.window, method.down_factor)
    assert plan.options == {"max_sequence_length": demo.TEXT_TOKENS}
    result = generate(tmp_path / "again.png", "--plan", tmp_path / "out.png", model=same_model)
    assert result.exit_code == 0, result.output
    assert "Warning" not in result.output
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "out.png"))
    refused = generate(tmp_path / "no.png", *options, "--width", 64, "--height", 64, model=model)
    assert f"64 x 64 px is smaller than the model's own {demo.SIZE} px" in shown(refused)


def test_warns_how_a_pipeline_differs_from_the_plan(generate, pipe, tmp_path, monkeypatch):
    planned = describe(pipe)
    planned["scheduler"]["config"]["shift"] = 9.0
    plan = clear.HighresPlan("a red circle", 256, 256, clear.Base(), (clear.Stage(),), 3, 4, 1, None, model=planned)
    (tmp_path / "plan.json").write_text(plan.to_json())
    monkeypatch.setattr(
        generation, "highres", lambda pipe, **asked: clear.HighresResult([Image.new("RGB", (8, 8))] * 2, plan)
    )
    result = generate(tmp_path / "out.png", "--plan", tmp_path / "plan.json", "--dtype", "bfloat16")
    assert result.exit_code == 0
    changes = "dtype was 'float32' and is 'bfloat16'; scheduler.config.shift was 9.0 and is 4.0\n"
    assert f"Warning: the image will differ, as the pipeline does: {changes}" in result.output


def test_refuses_to_resume_with_another_pipeline_but_not_for_other_entries_in_configs(pipe):
    model = describe(pipe)
    config = model["scheduler"]["config"]
    del config["invert_sigmas"]
    config["of_before"] = 1
    plan = clear.HighresPlan("a red circle", 256, 256, None, (clear.Stage(),), 3, 4, 1, None, model=model)
    generation.refuse_differences(plan, pipe)
    config["shift"] = 9.0
    with pytest.raises(typer.BadParameter, match=r"shift was 9.0 and is 4.0; give --model and --dtype as before$"):
        generation.refuse_differences(plan, pipe)
    other = replace(plan, made_with={**plan.made_with, "diffusers": "0.1"})
    with pytest.raises(typer.BadParameter, match=r"or install the versions of before: diffusers was '0.1' and is"):
        generation.refuse_differences(other, pipe)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "Interrupted; saved"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            1,
            "RuntimeError: DefaultCPUAllocator: can't allocate memory; saved",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_saves_finished_images(generate, tmp_path, start, monkeypatch, error, code, words, ending):
    def stop(*args, **kwargs):
        raise error

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", stop)
    result = generate(tmp_path / f"out.{ending}", *SMALL, "--height", 128, "--init-image", start)
    assert result.exit_code == code
    first = tmp_path / f"out-0-64x80.{ending}"
    plan = tmp_path / f"out.{ending}.json"
    assert f"{words} {first} and {plan}\n" in result.output
    way = "To go on, give --model, --output and --init-image again, --device and --dtype as before, and --resume\n"
    assert (way in result.output) == (ending == "png")
    assert ("Less memory is needed for a smaller image" in result.output) == (code == 1)
    again = shown(generate(tmp_path / f"out.{ending}", *SMALL, "--height", 128, "--init-image", start))
    assert f"{first.name} exists; give another file, or --overwrite" in again
    assert ("--resume to go on" in again) == (ending == "png")
    assert pixels(first).shape == (64, 80, 3)
    assert clear.HighresPlan.load(plan).seed == 3
    assert not (tmp_path / f"out.{ending}").exists()


@pytest.mark.parametrize("is_plan_saved", [False, True])
def test_a_full_disk_loses_no_image(generate, tmp_path, start, monkeypatch, is_plan_saved):
    """Neither while other images are drawn, nor at the end; the exit status says that a file is missing."""

    def full(file, *args):
        if file.parent == tmp_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return atomic.atomic_file(file)

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(saved_files, "atomic_file", full)
    if not is_plan_saved:
        monkeypatch.setattr(saved_files, "atomic_text", full)
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, "--init-image", start, "--save-stages")
    assert result.exit_code == 1, result.output
    reason = "could not be written (No space left on device)"
    assert f"out-0-64x80.png {reason}; the image is in " in result.stderr
    assert f"out.png {reason}; the image is in " in result.stderr
    assert (f"out.png.json {reason}\n" in result.stderr) == (not is_plan_saved)
    image, output = re.search(r"Saved (\S+?),? ", result.stdout)[1], tmp_path / "out.png"
    assert pixels(image).shape == (128, 160, 3)
    assert (f"{image} and {output}.json, seed" in result.stdout) == is_plan_saved
    missing = f"{output}" if is_plan_saved else f"{output} and {output}.json"
    assert result.stderr.endswith(f"\n{missing} could not be written\n")
    assert len(list((tmp_path / "temporary").rglob("*.png"))) == 2  # none of a stage while the next one is drawn


def test_says_how_to_go_on_only_if_the_images_are_there(generate, tmp_path, start, monkeypatch):
    def full(image, file, plan):
        if file.parent == tmp_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        save_with_plan(image, file, plan)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    save_with_plan = cascade_result.save_with_plan
    monkeypatch.setattr(cascade_result, "save_with_plan", full)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", stop)
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, "--init-image", start)
    assert result.exit_code == 130
    assert "the image is in" in result.stderr
    assert "To go on" not in result.stderr


def test_resumes_an_interrupted_run(flux_weights, generate, tmp_path, monkeypatch):
    options = (*SMALL, "--height", 160, "--base-steps", 3, "--stepwise-guidance", 0.5, "--continues")
    expected = generate(tmp_path / "expected.png", *options)
    assert expected.exit_code == 0, expected.output
    output, step = tmp_path / "out.png", FlowMatchEulerDiscreteScheduler.step

    def stop(self, velocity, timestep, sample, **settings):
        if sample.shape[1] > 16 * 16:
            raise KeyboardInterrupt
        return step(self, velocity, timestep, sample, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(FlowMatchEulerDiscreteScheduler, "step", stop)
        interrupted = generate(output, *options)
    assert interrupted.exit_code == 130
    way = "To go on, give --model and --output again, --device and --dtype as before, and --resume"
    assert f"{way}\n" in interrupted.output
    assert {file.name for file in tmp_path.iterdir() if file.name.startswith("out")} == {
        *("out-0-128x128.png", "out.png.json", "out.png.run.safetensors")
    }
    assert "exists; give another file, or --overwrite, or --resume to go on" in shown(generate(output, *options))
    refused = generate(output, *options, "--resume")
    assert "--resume and --prompt" in shown(refused)
    output.write_text("an earlier image")
    with monkeypatch.context() as patched:
        patched.setattr(FlowMatchEulerDiscreteScheduler, "step", stop)
        assert f"{way} and --overwrite\n" in generate(output, "--resume", "--overwrite").output
    output.unlink()
    other = generate(output, "--resume", "--dtype", "bfloat16")
    assert "'--resume': the pipeline is another, dtype was 'float32' and is 'bfloat16'; give" in shown(other)
    with monkeypatch.context() as patched:
        patched.setattr(tools_options, "load_pipeline", lambda *args, **settings: pytest.fail("it loads the pipeline"))
        other = generate(output, "--resume", "--weights", flux_weights)
    assert "'--resume': the unfinished run has a plan with another weights; give --model, " in shown(other)
    assert "arguments()" not in shown(other)
    result = generate(output, "--resume")
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(output), pixels(tmp_path / "expected.png"))
    stage = clear.HighresPlan.load(output).stages[0]
    assert (stage.stepwise_guidance, stage.continues) == (clear.StepwiseGuidance(structure=0.5), True)
    assert not (tmp_path / "out.png.run.safetensors").exists()
    missing = generate(tmp_path / "other.png", "--resume")
    assert missing.exit_code == 2
    assert "other.png.json" in shown(missing)


KILLED = """
import os, signal, sys
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler
from clear_attn.tools.cli import app
step = Scheduler.step

def killed(self, velocity, timestep, sample, **settings):
    if sample.shape[1] > 16 * 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, velocity, timestep, sample, **settings)

Scheduler.step = killed
app(sys.argv[1:])
"""


IN_TURN = """
import json, sys
from clear_attn.tools.cli import app

for command in json.loads(sys.argv[1]):
    app(command, standalone_mode=False)
"""


def in_new_process(code, *argument):
    return subprocess.run([sys.executable, "-c", code, *map(str, argument)], capture_output=True, timeout=600)


def test_a_killed_run_is_resumed(flux_folder, tmp_path):
    """In new processes: the last bits of an image may depend on what a process did before."""
    draw = ["generate", "--model", str(flux_folder), "--output"]
    options = (*SMALL, "--height", 160, "--base-steps", 2, "--stepwise-guidance", 0.5, "--continues")
    killed = in_new_process(KILLED, *draw, tmp_path / "out.png", *options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = ["out-0-128x128.png", "out.png.json", "out.png.run.safetensors"]
    assert sorted(file.name for file in tmp_path.glob("*")) == kept
    for name in kept:
        shutil.copy(tmp_path / name, tmp_path / name.replace("out", "copy", 1))
    runs = {"expected": options, "copy": ("--resume", "--save-stages"), "out": ("--resume",)}
    commands = [[*draw, f"{tmp_path / name}.png", *map(str, given)] for name, given in runs.items()]
    done = in_new_process(IN_TURN, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    for name in ("copy", "out"):
        assert np.array_equal(pixels(tmp_path / f"{name}.png"), pixels(tmp_path / "expected.png"))
    stages = {"copy": ["copy-0-128x128.png"]}
    for name in runs:
        files = [*stages.get(name, []), f"{name}.png", f"{name}.png.json"]
        assert sorted(file.name for file in tmp_path.glob(f"{name}*")) == files


@pytest.mark.parametrize("automatic", [True, False])
def test_a_run_that_saved_no_image_is_resumed(generate, flux_folder, flux_weights, tmp_path, monkeypatch, automatic):
    """Like one that is killed at once. The weights may be given as before."""
    weights, model, side = ("auto", "demo", demo.SIZE * 5 // 4) if automatic else (flux_weights, flux_folder, 160)
    generate = functools.partial(generate, model=model)
    options = (*FEW_STEPS, "--weights", weights, "--height", side, "--width", side, "--base-steps", 1)
    expected = generate(tmp_path / "expected.png", *options)
    assert expected.exit_code == 0, expected.output

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(FlowMatchEulerDiscreteScheduler, "step", stop)
        result = generate(tmp_path / "out.png", *options)
    assert f"Interrupted; saved {tmp_path / 'out.png.json'}\n" in result.output
    result = generate(tmp_path / "out.png", "--resume", "--weights", weights)
    assert result.exit_code == 0, result.output
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "expected.png"))


def test_a_finished_image_with_the_name_of_a_stage_stays(generate, tmp_path):
    options = (*SMALL, "--height", 128, "--base-steps", 1)
    finished = tmp_path / "out-1-2048x2048.png"
    assert generate(finished, *options).exit_code == 0
    before = finished.read_bytes()
    result = generate(tmp_path / "out.png", *options, "--overwrite")
    assert result.exit_code == 0, result.output
    assert finished.read_bytes() == before


def test_a_run_begins_without_the_stages_of_an_earlier_one(tmp_path):
    """The weights may have changed in between."""
    file, image = tmp_path / "out.png", Image.new("RGB", (64, 64))
    plan = clear.HighresPlan("a red circle", 128, 128, clear.Base(64, 64), (clear.Stage(128, 128),), 3, 4, 1, None)
    saved_files.save_with_plan(image, saved_files.stage_file(file, 0, image), plan)
    saved_files.save_with_plan(image, saved_files.stage_file(file, 1, image), replace(plan, seed=4))
    generation.Output.find(file, save_stages=False).keep(clear.HighresResult([], plan))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out-1-64x64.png", "out.png.json"]


def test_deletes_only_stages_of_its_own_and_of_unfinished_runs(generate, tmp_path, start, monkeypatch):
    output, options = tmp_path / "out.png", (*SMALL, "--height", 128, "--init-image", start)
    first = generate(output, *options, "--save-stages")
    assert first.exit_code == 0, first.output
    (tmp_path / "out-7-8x8.png").write_text("mine")
    Image.new("RGB", (8, 8)).save(tmp_path / "out-8-8x8.png")
    plan = clear.HighresPlan.load(output)
    plan = replace(plan, seed=9, image={**plan.image, "height": 32, "width": 40})
    left = cascade_result.HighresResult([Image.new("RGB", (40, 32))], plan).save(output)
    assert left == [tmp_path / "out-0-32x40.png"]
    result = generate(output, *options, "--overwrite")
    assert result.exit_code == 0, result.output
    stages = ["out-0-64x80.png", "out-7-8x8.png", "out-8-8x8.png"]
    assert sorted(file.name for file in tmp_path.glob("out-*")) == stages
    assert (tmp_path / "out-7-8x8.png").read_text() == "mine"


def test_an_init_image_with_the_name_of_a_stage_is_refused(generate, tmp_path, start):
    shutil.copy(start, tmp_path / "out-0-64x80.png")
    options = (*SMALL, "--height", 128, "--init-image", tmp_path / "out-0-64x80.png", "--overwrite")
    result = generate(tmp_path / "out.png", *options)
    assert result.exit_code == 2, result.output
    assert "'--init-image': " in shown(result)
    assert "give a copy of another name" in shown(result)
    assert (tmp_path / "out-0-64x80.png").read_bytes() == start.read_bytes()


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("save_stages", [False, True])
def test_only_what_can_be_resumed_or_is_wanted_is_kept_while_it_draws(
    generate, tmp_path, start, monkeypatch, ending, save_stages
):
    there, step = [], FlowMatchEulerDiscreteScheduler.step

    def look(self, *args, **settings):
        there.append(sorted(file.name for file in tmp_path.glob("out*")))
        return step(self, *args, **settings)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", look)
    options = ("--height", 128, "--init-image", start, *["--save-stages"] * save_stages)
    result = generate(tmp_path / f"out.{ending}", *SMALL, *options)
    assert result.exit_code == 0, result.output
    kept = [f"out-0-64x80.{ending}", f"out.{ending}.json"] if ending == "png" or save_stages else []
    assert there == [kept]


def test_ctrl_c_while_the_image_is_saved_loses_nothing(generate, tmp_path, start, monkeypatch):
    save, calls = generation.HighresResult.save, []

    def interrupted(self, *args, **settings):
        calls.append(self.finished)
        if calls.count(True) == 1:
            raise KeyboardInterrupt
        return save(self, *args, **settings)

    monkeypatch.setattr(generation.HighresResult, "save", interrupted)
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, "--init-image", start)
    assert result.exit_code == 130
    assert f"Interrupted; saved {tmp_path / 'out.png'} and {tmp_path / 'out.png.json'}\n" in result.output
    assert "To go on" not in result.output
    assert pixels(tmp_path / "out.png").shape == (128, 160, 3)
    assert not list(tmp_path.glob("out-*"))


@pytest.fixture
def under_torchrun(monkeypatch):
    """Set the environment of torchrun with one rank."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("under_torchrun")
def test_saves_finished_images_when_another_rank_failed(generate, tmp_path, start, monkeypatch):
    def step(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does
        time.sleep(10)

    save = generation.HighresResult.save

    def save_while_signals_come(*args, **settings):
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return save(*args, **settings)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", step)
    monkeypatch.setattr(generation.HighresResult, "save", save_while_signals_come)
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, "--init-image", start, "--device", "cpu")
    assert result.exit_code == 130, result.output
    saved = f"{tmp_path / 'out-0-64x80.png'} and {tmp_path / 'out.png.json'}"
    assert f"Interrupted; saved {saved}\n" in result.output
    assert pixels(tmp_path / "out-0-64x80.png").shape == (64, 80, 3)


def test_a_bug_keeps_its_traceback_and_the_images(generate, tmp_path, start, monkeypatch):
    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", lambda *args, **kwargs: len(3))
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, "--init-image", start)
    assert isinstance(result.exception, TypeError)
    assert f"TypeError: object of type 'int' has no len(); saved {tmp_path / 'out-0-64x80.png'} and " in result.output
    assert pixels(tmp_path / "out-0-64x80.png").shape == (64, 80, 3)


def test_intermediate_images_are_not_overwritten(generate, tmp_path, start):
    (tmp_path / "out-1-2x2.png").write_text("mine")
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, "--init-image", start)
    assert result.exit_code == 2
    assert "Invalid value for '--output': " in shown(result)
    assert "out-1-2x2.png exists; give another file, or --overwrite" in shown(result)


def test_the_plan_of_an_unfinished_image_is_replaced(generate, tmp_path, monkeypatch):
    plan = clear.HighresPlan("a red circle", 128, 160, clear.Base(), (clear.Stage(),), 3, 4, 1, None)
    (tmp_path / "out.png.json").write_text(replace(plan, seed=5).to_json())
    monkeypatch.setattr(
        generation, "highres", lambda pipe, **asked: clear.HighresResult([Image.new("RGB", (8, 8))] * 2, plan)
    )
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128)
    assert result.exit_code == 0, result.output
    assert clear.HighresPlan.load(tmp_path / "out.png.json").seed == 3


def test_stable_diffusion_3_from_a_folder(generate, tmp_path):
    dummy_models.sd3_pipeline().save_pretrained(tmp_path / "sd3")
    options = (*SMALL, "--height", 128, "--negative-prompt", "rain", "--base-steps", 1, "--base-guidance", 2)
    result = generate(tmp_path / "out.png", *options, "--guidance", 3, model=tmp_path / "sd3")
    assert result.exit_code == 0, result.output
    plan = clear.HighresPlan.load(tmp_path / "out.png")
    assert (plan.base.steps, plan.base.guidance, plan.stages[-1].guidance) == (1, 2, 3)
    assert plan.options == {"negative_prompt": "rain", "max_sequence_length": 24}
    assert plan.model["pipeline"] == "StableDiffusion3Pipeline"


@needs_modular_pipelines
@pytest.mark.parametrize("name", ["Flux3ModularPipeline", "Flux3DistilledModularPipeline"])
def test_a_modular_pipeline_from_a_folder(generate, tmp_path, start, monkeypatch, name):
    dummy_pipelines.fake_flux3_text(monkeypatch.setattr)
    model = tmp_path / "model"
    pipe = dummy_pipelines.flux3(name, ["prompt_upsampler", "text_encoder"])
    pipe.save_pretrained(str(model), overwrite_modular_index=True)
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, "--init-image", start, model=model)
    assert result.exit_code == 0, result.output
    assert clear.HighresPlan.load(tmp_path / "out.png").model["pipeline"] == name.replace("Modular", "")
    again = generate(tmp_path / "again.png", "--plan", tmp_path / "out.png.json", "--init-image", start, model=model)
    assert again.exit_code == 0, again.output
    assert "Warning: the image will differ" not in again.output
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "out.png"))
    shutil.rmtree(model / "prompt_upsampler")
    result = generate(tmp_path / "no.png", *SMALL, "--height", 128, "--init-image", start, model=model)
    assert result.exit_code == 2
    assert "has not loaded its prompt_upsampler yet" in shown(result)


@needs_modular_pipelines
def test_modular_pipelines_of_other_tasks_are_refused(generate, tmp_path):
    MODULAR["FLUX.1 Kontext"].pipeline().save_pretrained(str(tmp_path / "model"), overwrite_modular_index=True)
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, model=tmp_path / "model")
    assert result.exit_code == 2
    assert "highres does not support a FluxKontextModularPipeline; give one of: FluxPipeline," in shown(result)


def test_a_folder_without_a_pipeline(generate, tmp_path):
    result = generate(tmp_path / "out.png", *SMALL, "--height", 128, model=tmp_path)
    assert "no file named model_index.json" in shown(result)
    assert result.exit_code == 2


def test_the_orientation_of_the_first_image(tmp_path):
    image, exif = Image.new("RGB", (32, 16)), Image.Exif()
    image.putpixel((0, 0), (255, 0, 0))
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    shown = generation.open_image(tmp_path / "turned.png")
    assert shown.size == (16, 32)
    assert shown.getpixel((15, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "a red circle"), "--height, --width must be given, or a --plan"),
        ((*SMALL, "--height", 4), "4 x 160 px is less than one token of 8 px"),
        ((*SMALL, "--height", 128, "--negative-prompt", "rain"), "--negative-prompt has no effect without"),
        (
            (*SMALL, "--height", 128, "--true-cfg-scale", 4),
            "--true-cfg-scale 4.0 has no effect without --negative-prompt",
        ),
        ((*SMALL, "--height", 128, "--strength", 0), "--strength must be above 0 and at most 1, got 0"),
        ((*SMALL, "--height", 128, "--preset", "best"), "--preset must be 'published' or 'refined', got 'best'"),
        (
            (*SMALL, "--height", 128, "--low-resolution-guidance", 1, "--stepwise-guidance", 1),
            "both guide the low frequencies",
        ),
        (
            (*SMALL, "--height", 128, "--low-resolution-guidance", 1, "--continues"),
            "--low-resolution-guidance 1 guides toward the finished image before",
        ),
        ((*SMALL, "--height", 64), "64 x 160 px"),
        (("--plan", "none.json"), "none.json"),
        (("--plan", "plan.json", "--steps", 20), "--plan and --steps both say what to draw"),
        ((*SMALL, "--height", 128, "--init-image", "none.png"), "none.png"),
        ((*SMALL, "--height", 128, "--device", "tpu"), "'tpu' does not exist"),
        ((*SMALL, "--height", 128, "--device", "cpu", "--offload"), "it saves a GPU's memory"),
    ],
)
def test_refuses(generate, tmp_path, options, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    Path("plan.json").write_text("{}")
    if words == "64 x 160 px":
        words = "smaller"
        Image.new("RGB", (800, 320)).save("large.png")
        options = (*options, "--init-image", "large.png")
    result = generate(tmp_path / "out.png", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "out.png").exists()


def test_refuses_an_output_that_cannot_be_saved(generate, tmp_path):
    (tmp_path / "mine.png.json").write_text('{"mine": 1}')
    files = {
        "no/out.png": "no such directory",
        "out.xyz": "does not end in .png",
        "out.ico": "does not end in .png",
        f"{'x' * 240}.png": "cannot be written",
        f"{'x' * (236 - len(atomic.owned_prefix()))}.png": "cannot be written",  # its record has the longest name
        "mine.png": "is not a plan and would be overwritten",
    }
    for file, words in files.items():
        result = generate(tmp_path / file, *SMALL, "--height", 128, "--overwrite")
        assert result.exit_code == 2
        assert "Invalid value for '--output': " in shown(result)
        assert words in shown(result)

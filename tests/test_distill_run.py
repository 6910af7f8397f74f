"""Whole runs of distillation, on the small FLUX."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import clear_attn as clear
from clear_attn import demo
from clear_attn.distill import Settings, checkpoint, train
from clear_attn.distill import run as run_module
from clear_attn.distill.cache import Cache
from clear_attn.distill.losses import interpolate
from clear_attn.distill.recipes import FluxRecipe
from clear_attn.sources import WEIGHTS_FILE
from tests.plain import run
from tests.test_distill_data import fill

MODEL = str(Path(demo.__file__).parent / "small_flux")


@pytest.fixture
def settings(tmp_path):
    return Settings(
        pretrained_model_name_or_path=MODEL,
        train_data_dir=str(fill(tmp_path / "data", 6)),
        output_dir=str(tmp_path / "out"),
        cache_dir=str(tmp_path / "cache"),
        window=2,
        down_factor=2,
        resolution=64,
        max_sequence_length=24,
        train_batch_size=2,
        max_train_steps=4,
        optimizer="adamw",
        learning_rate=1e-3,
        checkpointing_steps=2,
        report_to="none",
    )


def weights_of(settings):
    return load_file(Path(settings.output_dir) / WEIGHTS_FILE)


def change(settings, **changes):
    return dataclasses.replace(settings, **changes)


@pytest.mark.parametrize("student", ["full", "lora"])
def test_a_run_and_its_result(settings, student):
    settings = change(settings, student=student, rank=4)
    folder = train(settings)
    pipe = demo.pipeline()
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    clear.linearize(pipe, weights=folder)
    assert pipe.transformer.transformer_blocks[0].attn.processor.down_factor == 2
    moved = {
        name for name, value in pipe.transformer.state_dict().items() if not torch.equal(value, before.get(name, value))
    }
    assert moved
    assert all(".attn.to_" in name for name in moved)
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "clear_config.json", WEIGHTS_FILE, "checkpoint-2", "checkpoint-4"
    }  # fmt: skip
    clear.restore(pipe)
    assert all(torch.equal(value, before[name]) for name, value in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("changes", [{}, {"use_ema": True, "lr_scheduler": "cosine", "gradient_accumulation_steps": 2}])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(settings, tmp_path, changes):
    settings = change(settings, max_train_steps=5, checkpointing_steps=3, **changes)
    train(settings)
    other = change(settings, output_dir=str(tmp_path / "other"))

    class Stopped(BaseException):
        pass

    def stop(run, *args, one_step=run_module.Run._one_step):
        if run.step == 4:
            raise Stopped
        return one_step(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.Run, "_one_step", stop)
        with pytest.raises(Stopped):
            train(other)
    assert [path.name for path in checkpoint.all_of(Path(other.output_dir))] == ["checkpoint-3"]
    train(change(other, resume_from_checkpoint="latest"))
    for name, value in weights_of(settings).items():
        assert torch.equal(value, weights_of(other)[name]), name


def test_training_brings_the_student_nearer(settings):
    """To the teacher's prediction of noise that it has not seen, than the training-free model is."""
    settings = change(settings, max_train_steps=80, checkpointing_steps=80, flow_matching_weight=1e-9)
    train(settings)
    rng = torch.Generator().manual_seed(11)
    batch = Cache(Path(settings.cache_dir)).read(range(6), rng)
    recipe, transformer = FluxRecipe(), demo.pipeline().transformer
    noise, sigma = torch.randn(batch.latents.shape, generator=rng), torch.linspace(0.1, 0.9, 6)
    call = recipe.call(interpolate(batch.latents, noise, sigma), sigma, batch.text, batch.pooled, None)
    teacher = run(transformer, call)
    errors = []
    for weights in (None, settings.output_dir):
        with clear.linearized(transformer, 2, 2, weights=weights):
            errors.append((run(transformer, call) - teacher).square().mean())
    assert errors[1] < 0.9 * errors[0]


def test_a_crash_while_saving_keeps_the_last_checkpoint(settings, monkeypatch):
    def save(*args, real=checkpoint.save_file):
        if (Path(settings.output_dir) / "checkpoint-2").exists():
            Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "save_file", save)
    with pytest.raises(OSError, match="No space left"):
        train(change(settings, checkpoints_total_limit=1))
    folder = Path(settings.output_dir)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    assert checkpoint.read(folder / "checkpoint-2", run_module.RUN)["step"] == 2


def test_old_checkpoints_go(settings):
    settings = change(settings, checkpointing_steps=1, checkpoints_total_limit=2)
    train(settings)
    names = [path.name for path in checkpoint.all_of(Path(settings.output_dir))]
    assert names == ["checkpoint-3", "checkpoint-4"]


def test_a_loss_that_is_not_finite_stops_the_run(settings, monkeypatch):
    def losses(*args, real=run_module.distillation_losses, **kwargs):
        calls.append(1)
        found = real(*args, **kwargs)
        return found._replace(total=found.total * float("nan")) if len(calls) == 4 else found

    calls = []
    monkeypatch.setattr(run_module, "distillation_losses", losses)
    with pytest.raises(FloatingPointError, match=r"loss of step 4 is not finite: \{'flow_matching': 0"):
        train(settings)
    assert [path.name for path in Path(settings.output_dir).iterdir()] == ["checkpoint-2"]


class TestRefusals:
    def test_another_run_in_the_folder(self, settings):
        train(settings)
        before = weights_of(settings)
        with pytest.raises(FileExistsError, match="holds a run with checkpoint-4; continue it with"):
            train(settings)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(settings).items())

    def test_other_settings_on_resuming(self, settings):
        train(settings)
        with pytest.raises(ValueError, match="was made with window=2, not window=3; continue it with the same"):
            train(change(settings, window=3, resume_from_checkpoint="latest"))

    def test_no_such_checkpoint(self, settings):
        with pytest.raises(FileNotFoundError, match="checkpoint-9 is no whole checkpoint"):
            train(change(settings, resume_from_checkpoint="checkpoint-9"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"optimizer": "sgd"}, "optimizer must be one of prodigy, adamw, adamw8bit, got 'sgd'"),
            ({"student": "half"}, "student must be one of full, lora, got 'half'"),
            ({"output_dir": ""}, "output_dir is missing"),
            ({"train_data_dir": None}, "give one of train_data_dir and dataset_name, or generate and"),
            ({"max_train_steps": 0}, "max_train_steps must be above 0, got 0"),
            ({"window": 0}, "window"),
            ({"attention_layers": ["blocks.7"]}, "attention_layers has 'blocks.7', which is no attention layer"),
            ({"resolution": 100}, "resolution must be a multiple of 16 pixels, got 100"),
        ],
    )
    def test_settings(self, settings, changes, message):
        with pytest.raises(ValueError, match=message):
            train(change(settings, **changes))
        assert not list(Path(settings.output_dir).glob("*"))

    def test_a_file_in_the_folders_place(self, settings):
        Path(settings.output_dir).write_text("mine")
        with pytest.raises(NotADirectoryError, match="is a file; give a directory"):
            train(settings)
        assert Path(settings.output_dir).read_text() == "mine"

    def test_a_window_beyond_the_grid(self, settings):
        with pytest.warns(UserWarning, match="a window of 40 tokens covers the largest picture, .* dense"):
            train(change(settings, window=40, down_factor=1, max_train_steps=1))


def test_the_command(settings, tmp_path):
    options = {**dataclasses.asdict(settings), "max_train_steps": 1}
    defaults = dataclasses.asdict(Settings())
    words = [word for name, value in options.items() if value != defaults[name] for word in (f"--{name}", str(value))]
    run = subprocess.run(
        [sys.executable, "-m", "clear_attn.distill", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    assert "use it with clear_attn.linearize(pipe, weights=" in run.stdout
    assert json.loads((Path(settings.output_dir) / "clear_config.json").read_text())["window"] == 2
    again = subprocess.run(
        [sys.executable, "-m", "clear_attn.distill", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith("error: ")


def test_a_checkpoint_holds_any_optimizers_state():
    state = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
        "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "amsgrad": False, "foreach": None, "params": [0, 1]}],
    }
    tensors = {}
    packed = json.loads(json.dumps(checkpoint.pack(state, tensors)))
    back = checkpoint.unpack(packed, tensors)
    assert torch.equal(back["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    assert back["state"].keys() == {0, 1}
    assert back["param_groups"][0]["lr"] == 0.1
    with pytest.raises(TypeError, match="is a set, which a checkpoint cannot hold"):
        checkpoint.pack({"a": {1}}, {})

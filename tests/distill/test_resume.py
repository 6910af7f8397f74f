"""Distillations that are stopped by errors, kills and interrupts, and those that continue."""

import dataclasses
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from clear_attn.distill import checkpoint, train
from clear_attn.distill import trainer as run_module
from clear_attn.weights.metadata import WEIGHTS_FILE
from tests.helpers.training_runs import change, fill, small_settings, weights_of


@pytest.fixture
def settings(tmp_path, flux_folder):
    return small_settings(tmp_path, fill(tmp_path / "data", 6), flux_folder)


def assert_same_weights(first, second):
    theirs = weights_of(second)
    for name, value in weights_of(first).items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "prodigy", "learning_rate": 1.0},
        {"use_ema": True, "lr_scheduler": "cosine", "gradient_accumulation_steps": 2, "student": "lora", "rank": 4},
    ],
)
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
    assert_same_weights(settings, other)


def test_a_crash_while_saving_keeps_the_last_checkpoint(settings, monkeypatch):
    def save(*args, real=checkpoint.write_tensors):
        if (Path(settings.output_dir) / "checkpoint-2").exists():
            Path(args[1]).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "write_tensors", save)
    with pytest.raises(OSError, match="No space left"):
        train(change(settings, checkpoints_total_limit=1))
    folder = Path(settings.output_dir)
    assert {path.name for path in folder.iterdir()} == {".lock", "checkpoint-2"}
    assert checkpoint.read(folder / "checkpoint-2", run_module.RUN)["step"] == 2


def test_a_checkpoint_of_format_1():
    """A LoRA student with pooled weights, after one step of AdamW."""
    folder = Path(__file__).parents[1] / "data" / "format_1" / "checkpoint-1"
    state = checkpoint.read(folder, run_module.RUN)
    assert list(state) == ["step", "student", "average", "schedule"]
    assert (state["step"], state["average"], state["schedule"]["last_epoch"]) == (1, {}, 1)
    optimizer = checkpoint.read(folder, "optimizer-0")["optimizer"]
    # An optimizer numbers its parameters.
    assert list(optimizer["state"]) == list(range(len(state["student"])))
    for moments, parameter in zip(optimizer["state"].values(), state["student"].values(), strict=True):
        assert moments["step"] == 1
        assert moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
    settings = json.loads((folder / checkpoint.SETTINGS).read_text())
    checkpoint.check_settings(folder, settings)
    with pytest.raises(ValueError, match="the checkpoint was made with"):
        checkpoint.check_settings(folder, {**settings, "student": "other"})


def test_old_checkpoints_are_deleted(settings):
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
    with pytest.raises(FloatingPointError, match=r"loss of step 4 \(\{'flow_matching': [0-9].* is not finite"):
        train(settings)
    assert {path.name for path in Path(settings.output_dir).iterdir()} == {".lock", "checkpoint-2"}


def test_a_gradient_that_is_not_finite_stops_the_run(settings, monkeypatch):
    """Also in the last step, after a finite loss."""

    def backward(accelerator, loss, real=run_module.Accelerator.backward):
        real(accelerator, loss)
        if len(checkpoint.all_of(Path(settings.output_dir))) == 1:
            next(iter(of_run[0].trained().values())).grad[0] = float("inf")

    def one_step(run, real=run_module.Run._one_step):
        of_run[:] = [run]
        return real(run)

    of_run = []
    monkeypatch.setattr(run_module.Accelerator, "backward", backward)
    monkeypatch.setattr(run_module.Run, "_one_step", one_step)
    with pytest.raises(FloatingPointError, match="the norm of the gradient of step 3 is not finite; the last"):
        train(change(settings, max_train_steps=3))
    assert {path.name for path in Path(settings.output_dir).iterdir()} == {".lock", "checkpoint-2"}


def test_weights_that_are_not_finite_are_not_saved(settings, monkeypatch):
    def spoil(run):
        if run.step == 3:
            with torch.no_grad():
                next(iter(run.trained().values()))[0] = float("nan")

    monkeypatch.setattr(run_module.Run, "_update_average", spoil)
    with pytest.raises(FloatingPointError, match=r"after step 4 .* is not finite"):
        train(settings)
    assert {path.name for path in Path(settings.output_dir).iterdir()} == {".lock", "checkpoint-2"}


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves(settings, tmp_path):
    """An incomplete folder is never used as a checkpoint."""
    script = """
        import json, os, signal, sys
        from pathlib import Path
        from clear_attn.distill import Settings, checkpoint, train
        settings = Settings(**json.loads(sys.argv[1]))

        def save(*args, real=checkpoint.write_tensors, **options):
            real(*args, **options)
            if checkpoint.all_of(Path(settings.output_dir)):
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.write_tensors = save
        train(settings)
    """
    train(settings)
    other = change(settings, output_dir=str(tmp_path / "other"), resume_from_checkpoint="latest")
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(dataclasses.asdict(other))]
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == -signal.SIGKILL
    assert {path.name for path in Path(other.output_dir).iterdir()} == {
        ".lock", "checkpoint-2", ".unfinished-checkpoint-4"
    }  # fmt: skip
    train(other)
    assert_same_weights(settings, other)


def test_a_run_that_is_stopped_while_it_deletes_an_old_checkpoint(settings, tmp_path, monkeypatch):
    def delete(folder):
        (folder / f"{run_module.RUN}.json").unlink()
        raise KeyboardInterrupt

    train(settings)
    other = change(settings, output_dir=str(tmp_path / "other"), checkpoints_total_limit=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", delete)
        with pytest.raises(KeyboardInterrupt):
            train(other)
    assert [path.name for path in checkpoint.all_of(Path(other.output_dir))] == ["checkpoint-4"]
    train(change(other, resume_from_checkpoint="latest"))
    assert_same_weights(settings, other)


class TestRefusals:
    def test_another_run_in_the_folder(self, settings):
        train(settings)
        before = weights_of(settings)
        with pytest.raises(FileExistsError, match="has a run already, with checkpoint-4; continue it with"):
            train(settings)
        assert all(torch.equal(value, before[name]) for name, value in weights_of(settings).items())

    def test_other_settings_on_resuming(self, settings):
        train(settings)
        words = "made with attention='window=2, down_factor=2', not attention='window=3, down_factor=2'"
        with pytest.raises(ValueError, match=words):
            train(change(settings, window=3, resume_from_checkpoint="latest"))

    def test_no_such_checkpoint(self, settings):
        with pytest.raises(FileNotFoundError, match="there is no checkpoint 'checkpoint-9', neither here nor in"):
            train(change(settings, resume_from_checkpoint="checkpoint-9"))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"mixed_precision": "bf16"}, "was made with mixed_precision='no', not mixed_precision='bf16'"),
            ({"max_train_steps": 8}, "was made with max_train_steps=4, not max_train_steps=8"),
        ],
    )
    def test_settings_that_a_resumed_run_cannot_change(self, settings, changes, message, fresh_accelerate):
        settings = change(settings, lr_scheduler="cosine")
        train(settings)
        fresh_accelerate()
        with pytest.raises(ValueError, match=message):
            train(change(settings, resume_from_checkpoint="latest", **changes))

    def test_an_earlier_checkpoint_than_the_last(self, settings, tmp_path):
        train(settings)
        for wanted in ("checkpoint-2", str(Path(settings.output_dir) / "checkpoint-2")):
            with pytest.raises(
                FileExistsError, match=r"has checkpoint-4 as well as the .*checkpoint-2 to continue from;"
            ):
                train(change(settings, resume_from_checkpoint=wanted))
        branch = change(settings, output_dir=str(tmp_path / "branch"))
        train(change(branch, resume_from_checkpoint=str(Path(settings.output_dir) / "checkpoint-2")))
        assert_same_weights(settings, branch)
        with pytest.raises(FileExistsError, match="branch has checkpoint-4 as well as the"):
            train(change(branch, resume_from_checkpoint=str(Path(settings.output_dir) / "checkpoint-4")))

    @pytest.mark.parametrize("resumed", [None, "latest"])
    def test_a_result_without_its_checkpoints(self, settings, resumed):
        folder = Path(settings.output_dir)
        folder.mkdir()
        (folder / WEIGHTS_FILE).write_bytes(b"mine")
        with pytest.raises(FileExistsError, match=f"has a run already, with {WEIGHTS_FILE}; give another output_dir"):
            train(change(settings, resume_from_checkpoint=resumed))
        assert (folder / WEIGHTS_FILE).read_bytes() == b"mine"

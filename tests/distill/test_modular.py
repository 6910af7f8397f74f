"""Distilling a model that exists only as a modular pipeline, from its folder: FLUX.3."""

import dataclasses

import pytest
import torch
from PIL import Image

import clear_attn as clear
from clear_attn.distill import Settings, checkpoint, train
from clear_attn.distill import trainer as run_module
from clear_attn.models import flux3
from tests.helpers import dummy_pipelines
from tests.helpers.modular_pipelines import MODULAR, needs_modular_pipelines
from tests.helpers.training_runs import change, fill, weights_of

pytestmark = needs_modular_pipelines
TEXT_TOKENS = 7


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Return a folder of a random FLUX.3 without text encoder; prompts are encoded as random numbers."""

    def encode(self, pipe, prompts, text_tokens):
        rows = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        return {"text": torch.stack([torch.randn(text_tokens, 12, generator=rng) for rng in rows])}

    monkeypatch.setattr(flux3.Flux3Training, "encode_prompts", encode)
    monkeypatch.setattr(flux3.Flux3Training, "text_tokens", TEXT_TOKENS)
    dummy_pipelines.flux3().save_pretrained(str(tmp_path / "model"), overwrite_modular_index=True)
    return tmp_path / "model"


@pytest.fixture
def settings(model, tmp_path):
    return Settings(
        pretrained_model_name_or_path=str(model),
        train_data_dir=str(fill(tmp_path / "data", 3)),
        output_dir=str(tmp_path / "out"),
        latents_dir=str(tmp_path / "cache"),
        window=2,
        resolution=64,
        max_train_steps=4,
        optimizer="adamw",
        learning_rate=1e-3,
        checkpointing_steps=2,
        report_to="none",
    )


def test_a_run_continues_bit_for_bit_and_its_weights_load(settings, tmp_path, monkeypatch):
    folder = train(settings)
    other = change(settings, output_dir=str(tmp_path / "other"))

    class Stopped(BaseException):
        pass

    def stop(run, real=run_module.Run._one_step):
        if run.step == 3:
            raise Stopped
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "_one_step", stop)
        with pytest.raises(Stopped):
            train(other)
    assert [path.name for path in checkpoint.all_of(tmp_path / "other")] == ["checkpoint-2"]
    train(change(other, resume_from_checkpoint="latest"))
    first, second = weights_of(settings), weights_of(other)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    pipe = dummy_pipelines.flux3()
    clear.linearize(pipe, weights=folder)
    assert clear.info(pipe).method == clear.methods.Clear(2)
    state = pipe.transformer.state_dict()
    assert all(torch.equal(state[name], value) for name, value in first.items())
    assert MODULAR["FLUX.3"].draw(pipe).isfinite().all()


def test_the_teacher_draws_training_images_and_both_draw_validations(settings, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    settings = change(
        settings,
        generate=2,
        prompts=str(tmp_path / "prompts.txt"),
        train_data_dir=str(tmp_path / "generated"),
        num_inference_steps=2,
        train_batch_size=2,
        max_train_steps=1,
        validation_prompts=["a circle"],
        validation_steps=1,
    )
    train(settings)
    pixels = [list(Image.open(tmp_path / "generated" / f"00000{n}.png").getdata()) for n in range(2)]
    assert pixels[0] != pixels[1]
    assert (tmp_path / "out" / "validation" / "step-1.png").exists()


def test_a_modular_folder_of_a_model_with_an_ordinary_pipeline(settings, tmp_path):
    """It is trained as the ordinary pipeline is."""
    MODULAR["FLUX.1"].pipeline().save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    MODULAR["FLUX.1"].ordinary().save_pretrained(str(tmp_path / "ordinary"))
    settings = change(settings, max_train_steps=1, max_sequence_length=20)
    runs = [
        change(
            settings,
            pretrained_model_name_or_path=str(tmp_path / name),
            output_dir=str(tmp_path / f"out-{name}"),
            latents_dir=str(tmp_path / f"cache-{name}"),
        )
        for name in ("modular", "ordinary")
    ]
    for each in runs:
        train(each)
    first, second = map(weights_of, runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


class TestRefusals:
    def refused(self, settings, folder, error, message):
        with pytest.raises(error, match=message):
            train(dataclasses.replace(settings, pretrained_model_name_or_path=str(folder)))

    def test_a_component_that_is_missing(self, settings, model):
        for file in (model / "vae").iterdir():
            file.unlink()
        message = "is a Flux3ModularPipeline, and diffusers could not load its vae .* save it complete"
        self.refused(settings, model, RuntimeError, message)

    def test_one_that_takes_an_image(self, settings, tmp_path):
        MODULAR["FLUX.1 Kontext"].pipeline().save_pretrained(str(tmp_path / "kontext"), overwrite_modular_index=True)
        message = "is a FluxKontextModularPipeline; give a text-to-image pipeline: FluxPipeline"
        self.refused(settings, tmp_path / "kontext", TypeError, message)

    def test_a_folder_without_a_pipeline(self, settings, tmp_path):
        self.refused(settings, tmp_path / "data", OSError, r"no file named model_index\.json")

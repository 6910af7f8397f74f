"""Distillation of every model: its training adapter, a student that learns, a run that continues, weights that load."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

import clear_attn as clear
from clear_attn.distill import Settings
from clear_attn.distill.student import STUDENT, keywords
from clear_attn.distill.trainer import Run
from clear_attn.models import adapter_for
from tests.helpers import families
from tests.helpers.reference_model import run
from tests.helpers.training_runs import change, training_batch

GRID, WINDOW = (8, 8), 2


def random_transformer(family):
    """Return a transformer of random weights; many models start with gates of zero, and could learn nothing."""
    transformer = family.transformer()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if parameter.ndim > 1:
                std = 1.5 if any(part in name for part in ("to_q", "to_k")) else 0.8
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * std * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return transformer


def test_flux2_embeds_guidance_where_its_config_does_not_say():
    training = adapter_for(families.FLUX2.transformer()).training
    for config, expected in (({}, True), ({"guidance_embeds": True}, True), ({"guidance_embeds": False}, False)):
        assert training.embeds_guidance(SimpleNamespace(config=config)) is expected


class Data:
    """A replacement of `Cache` with the same random latents and texts in each step; the noise differs."""

    def __init__(self, transformer):
        self.transformer, self.sizes = transformer, [(2 * GRID[0], 2 * GRID[1])] * 8

    def read(self, examples, rng):
        return training_batch(self.transformer, GRID, len(examples))


def settings_for(folder, **changes):
    settings = Settings(
        pretrained_model_name_or_path="random",
        output_dir=str(folder),
        window=WINDOW,
        train_batch_size=2,
        max_train_steps=50,
        optimizer="adamw",
        learning_rate=1e-3,
        lr_scheduler="cosine",
        flow_matching_weight=0.0,
        prediction_weight=1.0,
        attention_weight=0.0,
    )
    return change(settings, **changes)


def start(family, settings):
    transformer = random_transformer(family)
    scheduler = SimpleNamespace(config=SimpleNamespace(use_dynamic_shifting=False, shift=1.0))
    pipe = SimpleNamespace(transformer=transformer, scheduler=scheduler)
    return Run(settings, Accelerator(cpu=True), pipe, Data(transformer))


def prediction_error(training_run):
    """Return the student's mean error for noise that is not in its training."""
    training_run.bare.eval()
    batch, noises = training_batch(training_run.bare, GRID), [torch.Generator().manual_seed(seed) for seed in range(4)]
    with torch.no_grad():
        error = sum(training_run._losses(batch, noise).prediction.item() for noise in noises)
    training_run.bare.train()
    return error


@pytest.mark.parametrize("student", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@families.each_family(quick=("flux", "chroma"), training=True)
def test_a_student_learns_and_its_weights_load(family, student, tmp_path):
    # The projections of FLUX.2 single blocks hold their feed-forward network: a lower rate, and more steps.
    rate = (1e-3 if family is families.FLUX2 else 4e-3) * (1 if student == "full" else 3)
    steps = 150 if family is families.FLUX2 else 50
    changes = {"student": student, "rank": 8, "learning_rate": rate, "max_train_steps": steps}
    training_run = start(family, settings_for(tmp_path, **changes))
    before = prediction_error(training_run)
    for _ in training_run.steps():
        pass
    assert prediction_error(training_run) < before / 2
    training_run.bare.eval()
    call = family.call(training_run.bare, GRID)
    adapter = adapter_for(training_run.bare)
    expected = run(training_run.bare, {**call, adapter.keywords: keywords(STUDENT)})
    save_file(training_run.result(), tmp_path / "weights.safetensors")
    loaded = clear.linearize(random_transformer(family), weights=tmp_path / "weights.safetensors", window=WINDOW)
    torch.testing.assert_close(run(loaded, call), expected, atol=1e-4, rtol=1e-4)


@families.each_family(training=True)
def test_a_run_continues_bit_for_bit(family, tmp_path):
    settings = settings_for(tmp_path, max_train_steps=4, down_factor=2, optimizer="prodigy", learning_rate=1.0)
    training_run = start(family, settings)
    for _ in training_run.steps():
        if training_run.step == 2:
            training_run.save()
    continued = start(family, settings)
    continued.restore(tmp_path / "checkpoint-2")
    assert continued.step == 2
    for _ in continued.steps():
        pass
    expected = training_run.result()
    assert all(torch.equal(value, expected[name]) for name, value in continued.result().items())

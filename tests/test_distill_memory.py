"""What docs/distilling.md counts of training's memory."""

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import FluxTransformer2DModel

import clear_attn as clear
from clear_attn.distill.optimizers import make_optimizer
from clear_attn.distill.settings import Settings
from clear_attn.distill.student import add_student
from clear_attn.linearize import find_transformer
from clear_attn.weights import replaced_parameters
from tests import tiny

GB = 1e9


def test_flux_dev():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        trunk = sum(parameter.numel() for parameter in transformer.parameters())
        layers = find_transformer(transformer)[1].attention_layers(transformer)
        student = sum(parameter.numel() for parameter in replaced_parameters(layers).values())
    assert 2 * trunk / GB == pytest.approx(23.8, abs=0.05)
    assert student / GB == pytest.approx(1.79, abs=0.005)
    assert 2 * 4 * student / GB == pytest.approx(14.3, abs=0.05)
    assert (2 + 2 / 11) * 4 * student / GB == pytest.approx(15.65, abs=0.05)
    assert 2 * student / GB == pytest.approx(3.6, abs=0.05)


@pytest.mark.parametrize(("optimizer", "states"), [("prodigy", 2 + 2 / 11), ("adamw", 2)])
def test_an_optimizers_states(optimizer, states):
    transformer = clear.linearize(tiny.FLUX.transformer(), 3, weights=None)
    parameters = add_student(transformer)
    stepper = make_optimizer(Settings(optimizer=optimizer, learning_rate=1e-4), parameters, DistributedType.NO)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    stepper.step()
    held = sum(
        value.numel() * value.element_size()
        for state in stepper.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    student = sum(parameter.numel() for parameter in parameters)
    assert held / (4 * student) == pytest.approx(states, rel=0.02)

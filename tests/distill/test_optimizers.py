"""The memory of training, as docs/distilling.md counts it."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from diffusers import FluxTransformer2DModel

import clear_attn as clear
from clear_attn.distill.optimizers import STATES, counted, make_optimizer
from clear_attn.distill.settings import Settings
from clear_attn.distill.student import add_student
from clear_attn.patching.target import find_transformer
from clear_attn.weights.parameters import replaced_parameters
from tests.helpers import families

GB = 1e9
DOCS = Path(__file__).parents[2] / "docs" / "distilling.md"


def test_flux_dev():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        trunk = sum(parameter.numel() for parameter in transformer.parameters())
        layers = find_transformer(transformer)[1].attention_layers(transformer)
        student = sum(parameter.numel() for parameter in replaced_parameters(layers).values())
    parts = counted(trunk, student, "prodigy")
    held, whole, gradient, states, copies = parts.values()
    documented = re.findall(r"\| (\d+(?:\.\d+)?) \|$", DOCS.read_text(), re.MULTILINE)
    activations = 4  # the estimate
    expected = [held, whole + gradient, states, copies, activations * GB, sum(parts.values()) + activations * GB]
    assert [float(number) for number in documented] == pytest.approx([each / GB for each in expected], abs=0.5)
    assert [float(number) for number in documented][:4] == pytest.approx([each / GB for each in expected[:4]], abs=0.06)


@pytest.mark.parametrize("optimizer", ["prodigy", "adamw"])
def test_the_states_of_an_optimizer(optimizer):
    transformer = clear.linearize(families.FLUX.transformer(), 3, weights=None)
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
    assert held / (4 * student) == pytest.approx(STATES[optimizer], rel=0.02)

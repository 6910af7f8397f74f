"""Changed parameters are noticed; moving and rounding are not changes."""

import pytest
import torch

from clear_attn.weights.samples import changed, sample


@pytest.fixture
def parameters():
    return {"a.weight": torch.nn.Parameter(torch.randn(40, 30)), "a.bias": torch.nn.Parameter(torch.randn(3))}


def test_samples_are_few_and_copies(parameters):
    samples = sample(parameters)
    assert max(len(value) for value in samples.values()) < 130
    parameters["a.bias"].data.zero_()
    assert samples["a.bias"].all()


def test_a_change_is_noticed_without_autograds_counter(parameters):
    samples = sample(parameters)
    parameters["a.weight"].data += 1e-6 * torch.randn(40, 30)
    assert changed(parameters, samples) == ["a.weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_rounding_is_not_a_change(parameters, dtype):
    samples = sample(parameters)
    there = {name: value.detach().to(dtype) for name, value in parameters.items()}
    assert changed(there, samples) == []
    if dtype != torch.float8_e4m3fn:
        assert changed({name: value.float() for name, value in there.items()}, samples) == []


def test_tensors_without_values_are_left_out(parameters):
    samples = sample(parameters)
    assert changed({"a.weight": torch.nn.Parameter(torch.empty(40, 30, device="meta"))}, samples) == []
    assert sample({"whole": torch.ones(3, dtype=torch.int8)}) == {}

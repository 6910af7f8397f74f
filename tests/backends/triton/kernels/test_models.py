import pytest
import torch
from torch.utils._pytree import tree_map_only

import clear_attn as clear
from tests.backends.triton.kernels.cases import DEVICE, distance
from tests.helpers import dummy_models, families
from tests.helpers.families import FAMILIES

# From the reference in the same dtype, for the rest of a model rounds as well.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}


def linearized(family, backend, dtype, **arguments):
    # The kernels take a head_dim from 16 on.
    heads = {"attention_head_dim": 16, "axes_dims_rope": (4, 4, 8)} if family is families.KREA2 else {}
    transformer = family.transformer(**heads).to(DEVICE, dtype)
    return clear.linearize(transformer, window=3, weights=None, backend=backend, **arguments)


def placed(call, dtype):
    """Return the arguments of a call on the device; those with floating-point numbers in a dtype."""
    return tree_map_only(torch.Tensor, lambda x: x.to(DEVICE, dtype if x.is_floating_point() else x.dtype), call)


def call_of(family, transformer, dtype, grid=(9, 11), **arguments):
    return placed(family.call(transformer, grid, **arguments), dtype)


def output_of(family, backend, dtype, grid=(9, 11), **arguments):
    transformer = linearized(family, backend, dtype, **arguments)
    with torch.no_grad():
        output = transformer(**call_of(family, transformer, dtype, grid))[0]
    return torch.stack(output) if isinstance(output, list) else output  # Z-Image returns a list


QUICK = "flux", "chroma"  # one for each carrier of the context


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, marks=() if name in QUICK else pytest.mark.slow) for name, each in FAMILIES.items()],
    ids=FAMILIES,
)
def test_whole_models(family):
    grid = (6, 6) if family is families.DIT else (9, 11)
    expected = output_of(family, "reference", torch.float16, grid)
    assert distance(output_of(family, "triton", torch.float16, grid), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("family", [families.FLUX, families.SD3], ids=["flux", "sd3"])
def test_bfloat16(family):
    expected = output_of(family, "reference", torch.bfloat16)
    assert distance(output_of(family, "triton", torch.bfloat16), expected) < TOLERANCE[torch.bfloat16]


def test_pooled_keys():
    expected = output_of(families.FLUX, "reference", torch.float16, down_factor=2)
    output = output_of(families.FLUX, "triton", torch.float16, down_factor=2)
    assert distance(output, expected) < TOLERANCE[torch.float16]


def test_padded_text():
    family, results = families.QWEN, []
    for backend in ("reference", "triton"):
        transformer = linearized(family, backend, torch.float16)
        with torch.no_grad():
            results.append(transformer(**call_of(family, transformer, torch.float16, batch=2, padded=(2, 0)))[0])
    assert distance(results[1], results[0]) < TOLERANCE[torch.float16]


def test_two_segments():
    results = []
    for backend in ("reference", "triton"):
        transformer = linearized(families.FLUX, backend, torch.float16)
        call = dummy_models.flux_call(transformer, (9, 11), (5, 6))
        call = placed(call, torch.float16)
        with torch.no_grad():
            results.append(transformer(**call)[0])
    assert distance(results[1], results[0]) < TOLERANCE[torch.float16]


def test_training_with_checkpointing():
    gradients = []
    for checkpointing in (False, True):
        transformer = linearized(families.FLUX, "triton", torch.float16).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        call = call_of(families.FLUX, transformer, torch.float16, (5, 9))
        transformer(**call)[0].float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in transformer.parameters() if p.grad is not None]))
    assert torch.equal(*gradients)


def test_a_compiled_model():
    transformer = linearized(families.CHROMA, "triton", torch.float16)
    call = call_of(families.CHROMA, transformer, torch.float16, (5, 9))
    with torch.no_grad():
        expected = transformer(**call)[0]
        output = torch.compile(transformer, backend="aot_eager")(**call)[0]
    assert distance(output, expected) < 1e-3


@pytest.mark.slow
def test_a_model_compiled_by_inductor():
    transformer = linearized(families.FLUX, "triton", torch.float16)
    call = call_of(families.FLUX, transformer, torch.float16, (5, 9))
    with torch.no_grad():
        expected = transformer(**call)[0]
        output = torch.compile(transformer)(**call)[0]
    assert distance(output, expected) < 1e-2

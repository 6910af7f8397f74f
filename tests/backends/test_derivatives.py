"""Derivatives beyond a backward pass: the reference has them, the others raise an error."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

import clear_attn as clear
from clear_attn.backends.attention import pool
from tests.helpers import reference_attention
from tests.helpers.families import each_family
from tests.helpers.reference_model import in_raster_order, joined, run

GRID, TEXT = (9, 11), 5
PLAN = clear.methods.Clear(3).plan(clear.TokenLayout([GRID], TEXT))
REFUSAL = "supports a backward pass, but neither forward-mode derivatives nor transforms of torch.func"


@pytest.fixture(autouse=True)
def math_kernel():
    """Use the kernel of torch that has all derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def random_heads(dtype=torch.float64):
    return torch.randn(3, 1, 2, 99 + TEXT, 8, dtype=dtype).unbind()


def attend(*tensors, backend):
    return clear.clear_attention(*tensors, PLAN, backend=backend)


def forward_mode(function, inputs, tangents):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents))).tangent


def test_forward_mode_of_the_reference():
    inputs, tangents = random_heads(), random_heads()
    step = 1e-6
    ahead, behind = (
        attend(*(x + sign * step * dx for x, dx in zip(inputs, tangents, strict=True)), backend="reference")
        for sign in (1, -1)
    )
    for derivative in (forward_mode, lambda *args: torch.func.jvp(*args)[1]):
        found = derivative(lambda *tensors: attend(*tensors, backend="reference"), inputs, tangents)
        torch.testing.assert_close(found, (ahead - behind) / (2 * step), atol=1e-7, rtol=0)


def second_derivative(function, query, *others):
    query = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(query, *others).square().sum(), query, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), query)[0]


TRANSFORMS = {
    "forward_mode": lambda function, inputs: forward_mode(function, inputs, inputs),
    "jvp": lambda function, inputs: torch.func.jvp(function, inputs, inputs),
    "grad": lambda function, inputs: torch.func.grad(lambda *tensors: function(*tensors).sum())(*inputs),
    "vmap": lambda function, inputs: torch.func.vmap(function)(*(x[None] for x in inputs)),
    "jacrev": lambda function, inputs: torch.func.jacrev(lambda *tensors: function(*tensors).sum())(*inputs),
}


@pytest.mark.parametrize("backend", ["auto", "tiled", "flex"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_refused(name, backend):
    with pytest.raises(RuntimeError, match=f"{REFUSAL}|no gradients on a CPU"):
        TRANSFORMS[name](lambda *tensors: attend(*tensors, backend=backend), random_heads(torch.float32))


def test_a_tangent_of_one_input_is_enough():
    query, key, value = random_heads()
    for number in range(3):
        tensors = [query, key, value]
        with forward_ad.dual_level():
            tensors[number] = forward_ad.make_dual(tensors[number], tensors[number])
            with pytest.raises(RuntimeError, match=REFUSAL):
                attend(*tensors, backend="tiled")


def test_second_derivatives():
    inputs = random_heads()
    tensors = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, backend="reference"), tensors, fast_mode=True)
    for backend in ("auto", "tiled"):
        with pytest.raises(RuntimeError, match="backend='tiled' has no second derivatives"):
            second_derivative(lambda *tensors, name=backend: attend(*tensors, backend=name), *inputs)


@each_family()
def test_whole_models(family):
    transformer = family.transformer().double()
    grid = family.grid(7, 9)
    call = tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        family.call_without_mask(transformer, grid),
    )
    image = call.pop(family.image)
    tangent = tree_map(torch.randn_like, image)

    def derivative(model):
        return torch.func.jvp(lambda x: joined(model(**{family.image: x}, **call)), (image,), (tangent,))[1]

    expected = derivative(in_raster_order(transformer, [grid], clear.methods.Clear(3, 2)))
    clear.linearize(transformer, 3, 2, weights=None, backend="reference")
    torch.testing.assert_close(derivative(transformer), expected, atol=1e-6, rtol=0)
    clear.linearize(transformer, 3, 2, weights=None)
    with pytest.raises(RuntimeError, match=REFUSAL):
        derivative(transformer)
    assert run(transformer, {family.image: image, **call}).isfinite().all()


@pytest.mark.parametrize("factor", [2, 3, 5, 7])
def test_cut_cells_in_float64(factor):
    plan = clear.methods.Clear(3, factor).plan(layout := clear.TokenLayout([GRID], 0))
    image = torch.randn(1, 2, 99, 8, dtype=torch.float64)
    weight = torch.rand(factor, factor, dtype=torch.float64)
    found = pool(image[:, :, layout.permutation], plan, weight)
    expected = reference_attention.pool(image, [GRID], factor, weight)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)

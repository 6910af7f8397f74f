"""A transformer with `forward` set on the instance, as caches and hooks of other libraries do."""

import functools
import inspect
import types

import pytest
import torch

import clear_attn as clear
from tests.helpers.families import each_family
from tests.helpers.reference_model import joined, run


def wrapped_and_bound(transformer):
    @functools.wraps(type(transformer).forward)
    def forward(self, *args, **kwargs):
        return type(transformer).forward(self, *args, **kwargs)

    return forward.__get__(transformer)


def wrapped(transformer):
    original = transformer.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    return forward


def wrapped_class_function(transformer):
    @functools.wraps(type(transformer).forward)
    def forward(*args, **kwargs):
        return type(transformer).forward(transformer, *args, **kwargs)

    return forward


def plain(transformer):
    original = transformer.forward
    return lambda *args, **kwargs: original(*args, **kwargs)


def bound_method(transformer):
    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    return types.MethodType(forward, transformer)


def two_names(transformer):
    original = transformer.forward
    if "x" in inspect.signature(original).parameters:
        return lambda x, t, **kwargs: original(x=x, t=t, **kwargs)
    return lambda hidden_states, timestep, **kwargs: original(hidden_states=hidden_states, timestep=timestep, **kwargs)


FORWARDS = [wrapped_and_bound, wrapped, wrapped_class_function, plain, bound_method, two_names]


@each_family()
@pytest.mark.parametrize("make_forward", FORWARDS)
def test_any_forward(family, make_forward):
    transformer = family.transformer()
    call = family.call(transformer, family.grid(7, 9))
    expected = run(clear.linearize(transformer, 3, weights=None), call)
    transformer.forward = make_forward(transformer)
    assert torch.equal(run(transformer, call), expected)
    clear.restore(transformer)
    own = transformer.forward
    assert torch.equal(run(clear.linearize(transformer, 3, weights=None), call), expected)
    assert transformer.forward is own


@each_family()
def test_positional_arguments(family):
    transformer = family.transformer()
    call = family.call(transformer, family.grid(7, 9))
    expected = run(clear.linearize(transformer, 3, weights=None), call)
    transformer.forward = plain(transformer)
    image = call.pop(family.image)
    with torch.no_grad():
        assert torch.equal(joined(transformer(image, **call, return_dict=False)), expected)


@each_family()
def test_keywords_of_only_the_instances_forward(family):
    transformer = family.transformer()
    call = family.call(transformer, family.grid(7, 9))
    expected = run(clear.linearize(transformer, 3, weights=None), call)
    original, steps = transformer.forward, []

    def forward(*args, step, **kwargs):
        steps.append(step)
        return original(*args, **kwargs)

    transformer.forward = forward
    assert torch.equal(run(transformer, {**call, "step": 3}), expected)
    assert steps == [3]


@each_family()
def test_a_subclass_that_takes_anything(family):
    transformer = family.transformer()
    call = family.call(transformer, family.grid(7, 9))
    expected = run(clear.linearize(transformer, 3, weights=None), call)
    clear.restore(transformer)
    base = type(transformer)
    transformer.__class__ = type("Own", (base,), {"forward": lambda self, *a, **kw: base.forward(self, *a, **kw)})
    assert torch.equal(run(clear.linearize(transformer, 3, weights=None), call), expected)


@each_family()
def test_an_argument_that_is_missing(family):
    transformer = clear.linearize(family.transformer(), 3, weights=None)
    transformer.forward = plain(transformer)
    with pytest.raises(TypeError, match=f"missing a required argument: '{family.image}'"):
        transformer(return_dict=False)


@each_family()
def test_proportional_attention(family):
    transformer = family.transformer()
    call = family.call(transformer, family.grid(7, 9))
    clear.linearize(transformer, 3, weights=None)
    with clear.proportional_attention(transformer):
        expected = run(transformer, call)
    transformer.forward = wrapped_and_bound(transformer)
    with clear.proportional_attention(transformer):
        assert torch.equal(run(transformer, call), expected)

"""Finding the transformer of a pipeline."""

import pathlib
import types

import pytest
import torch

import clear_attn as clear
from clear_attn.models import adapter_for
from clear_attn.patching.target import entry_hook_of, find_target, find_transformer
from tests.helpers.families import each_family


@each_family()
def test_of_a_pipeline_a_compiled_transformer_and_a_transformer(family, transformer):
    for pipe in (transformer, torch.compile(transformer), types.SimpleNamespace(transformer=transformer)):
        target = find_target(pipe)
        assert target.pipe is pipe
        assert target.transformer is transformer
        assert target.adapter is adapter_for(transformer)
        assert len(target.layers) == len(target.processors) == family.layers
        assert target.model == type(transformer).__name__


def test_the_hook_is_there_while_it_is_linearized(transformer):
    target = find_target(transformer)
    assert target.hook is None
    clear.linearize(transformer, 3, weights=None)
    assert target.hook is entry_hook_of(transformer)
    assert target.hook.method == clear.methods.Clear(3)
    clear.restore(transformer)
    assert target.hook is None


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (torch.nn.Linear(2, 2), "a Linear is not supported; give a diffusers pipeline or transformer of: Flux"),
        (types.SimpleNamespace(transformer=3), "a SimpleNamespace with a int is not supported"),
        (
            "black-forest-labs/FLUX.1-dev",
            r"'black-forest-labs/FLUX.1-dev' is a name, not a pipeline; load it first: "
            r"pipe = diffusers.DiffusionPipeline.from_pretrained\('black-forest-labs/FLUX.1-dev'\)",
        ),
        (pathlib.Path("saved"), r"'saved' is a name, not a pipeline; load it first: .*from_pretrained\('saved'\)"),
        (types.SimpleNamespace(nets=[]), "give its ControlNets one by one"),
    ],
)
def test_unsupported_objects_are_named(thing, words):
    with pytest.raises(TypeError, match=words):
        find_transformer(thing)

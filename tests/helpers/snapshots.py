"""The state of a transformer, for comparison bit for bit, and random weights for it."""

import torch

from clear_attn.models import adapter_for
from clear_attn.weights.parameters import POOLED, own_parameters, replaced_parameters


def layers_of(transformer):
    return adapter_for(transformer).attention_layers(transformer)


def snapshot(transformer):
    """Return everything that linearizing could change."""
    return {
        "state": {name: value.clone() for name, value in transformer.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in transformer.named_parameters()},
        "processors": {name: id(attn.processor) for name, attn in layers_of(transformer).items()},
        "hooks": [list(hooks) for x in transformer.modules() for hooks in (x._forward_pre_hooks, x._forward_hooks)],
        "hooks_with_kwargs": [
            transformer._forward_pre_hooks_with_kwargs.copy(),
            transformer._forward_hooks_with_kwargs.copy(),
        ],
        "modules": [name for name, _ in transformer.named_modules()],
        "config": dict(transformer.config),
    }


def assert_same(transformer, before):
    after = snapshot(transformer)
    assert after["state"].keys() == before["state"].keys()
    assert all(torch.equal(value, before["state"][name]) for name, value in after["state"].items())
    assert {**after, "state": None} == {**before, "state": None}


def checkpoint_for(transformer, factor=1, seed=3):
    rng = torch.Generator().manual_seed(seed)
    layers = layers_of(transformer)
    values = {name: torch.randn(x.shape, generator=rng) * 0.1 for name, x in replaced_parameters(layers).items()}
    if factor > 1:
        shape = (1, 1, 1, factor, 1, factor, 1)
        values |= {layer + POOLED: torch.rand(shape, generator=rng) / factor**2 for layer in layers}
    return values


@torch.no_grad()
def train(transformer):
    """Change all attention parameters, as training would."""
    layers = layers_of(transformer)
    own = own_parameters({name: attn.processor for name, attn in layers.items()})
    for parameter in (*replaced_parameters(layers).values(), *own.values()):
        parameter.add_(torch.randn_like(parameter) * 0.01)

"""An error or Ctrl-C inside any block leaves nothing that a layer could read, with every carrier."""

import gc
import weakref

import pytest
import torch
from torch import nn

import clear_attn as clear
from clear_attn.models import adapter_for
from clear_attn.models.context import context_variable
from clear_attn.models.context.context import ClearContext
from clear_attn.models.processors.publishing import Publishing
from tests.helpers import dummy_models
from tests.helpers.families import each_family
from tests.helpers.reference_model import run


@pytest.fixture
def contexts(monkeypatch):
    """Collect weak references to all contexts."""
    made, create = [], ClearContext.__init__

    def record(self, *args, **kwargs):
        create(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(ClearContext, "__init__", record)
    return made


def blocks_of(transformer):
    return [block for blocks in transformer.children() if isinstance(blocks, nn.ModuleList) for block in blocks]


def interrupt(transformer, call, block, error):
    """Run a call that ends with the error inside a block."""

    def stop(*args):
        raise error

    handle = block.register_forward_hook(stop)
    try:
        with pytest.raises(error):
            run(transformer, call)
    finally:
        handle.remove()


@each_family(quick=("flux", "chroma", "qwen21"))
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_in_every_block(family, error, contexts):
    transformer = family.transformer()
    clear.linearize(transformer, 3, 2, weights=None)
    call, other = (family.call(transformer, family.grid(*size)) for size in ((9, 11), (5, 4)))
    expected = run(transformer, call), run(transformer, other)
    for block in blocks_of(transformer):
        interrupt(transformer, call, block, error)
        gc.collect()
        assert [context for context in contexts if context() is not None] == []
        assert context_variable.current() is None
        assert torch.equal(run(transformer, other), expected[1])
        assert torch.equal(run(transformer, call), expected[0])


@each_family()
def test_a_layer_called_afterwards_has_no_context(family):
    transformer = clear.linearize(family.transformer(), 3, weights=None)
    call, inputs = family.call(transformer, family.grid(9, 11)), []
    block, second = getattr(transformer, family.blocks)[:2]
    attention = next(module for name, module in block.named_modules() if hasattr(module, "processor"))
    attention.register_forward_pre_hook(lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True)
    interrupt(transformer, call, second, KeyboardInterrupt)
    args, kwargs = inputs.pop()
    kwargs = {name: value for name, value in kwargs.items() if name != "clear_context"}
    gc.collect()
    with pytest.raises(RuntimeError, match=r"was called without a context|outside a call of its linearized"):
        attention(*args, **kwargs)


@each_family()
def test_after_a_call_that_the_entry_hook_refused(family, contexts):
    transformer = clear.linearize(family.transformer(), 3, weights=None)
    call = family.call(transformer, family.grid(9, 11))
    expected = run(transformer, call)
    stale = context_variable.publish(ClearContext([]))
    with pytest.raises((ValueError, RuntimeError)):
        run(transformer, family.without_tokens(call))
    assert (context_variable.current() is None) == isinstance(adapter_for(transformer), Publishing)
    context_variable.clear()
    del stale
    assert torch.equal(run(transformer, call), expected)


def test_only_the_graph_keeps_a_context(contexts):
    transformer = clear.linearize(dummy_models.flux_transformer(), 3, weights=None)
    call = dummy_models.flux_call(transformer, (9, 11))

    def stop(*args):
        raise KeyboardInterrupt

    transformer.single_transformer_blocks[-1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        transformer(**call)
    gc.collect()
    assert [context for context in contexts if context() is not None] == []

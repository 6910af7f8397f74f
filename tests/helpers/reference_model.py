"""The original model in raster order, with the rule as a mask in the attention of each layer, for comparison."""

import copy
import functools
import inspect
import itertools
from collections import defaultdict
from unittest import mock

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.utils._pytree import tree_leaves

import clear_attn as clear
from clear_attn.models import adapter_for
from tests.helpers import dummy_models, reference_attention
from tests.helpers.method_rules import RULES, softmax

# The attention function of the original processors, and whether heads come before tokens in its inputs.
FLUX_ATTENTION = "diffusers.models.transformers.transformer_flux.dispatch_attention_fn", False
SD3_ATTENTION = "diffusers.models.attention_processor.F.scaled_dot_product_attention", True


def attention_of(processor):
    """Return the name of a processor's attention function, and whether heads come before tokens in its inputs."""
    module = inspect.getmodule(type(processor))
    if hasattr(module, "dispatch_attention_fn"):
        return f"{module.__name__}.dispatch_attention_fn", False
    return SD3_ATTENTION


def roll_mask(mask, shift):
    """Return a mask `[batch, 1, queries or 1, keys]` in the order of tokens that are rolled."""
    if mask is None:
        return None
    mask = mask.roll(shift, -1)
    return mask.roll(shift, -2) if mask.shape[-2] > 1 else mask


class RasterProcessor(torch.nn.Module):
    in_use = True  # false while a module that shares layers runs

    def __init__(self, original, grids, config, weight, text_first, unit=None):
        super().__init__()
        self.original, self.rule, self.text_first = original, (grids, config, weight), text_first
        self.unit = unit
        self.called, self.heads_first = attention_of(original)
        self.__call__ = original.__call__  # never called: layers read the accepted arguments from its signature

    def split(self, query, *others):
        """Return query, key and value with heads first, as many of each."""
        query, *others = (query, *others) if self.heads_first else [x.transpose(1, 2) for x in (query, *others)]
        return query, *(x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in others)

    def attend(self, query, key, value, attn_mask=None, **kwargs):
        grids, *rule = self.rule
        qkv = self.split(query, key, value)
        if qkv[0].shape != qkv[1].shape:  # the few tokens of an IP-Adapter
            return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **kwargs)
        text = qkv[0].shape[2] - sum(height * width for height, width in grids)
        # The reference has text first.
        shift = 0 if self.text_first else text
        qkv = (x.to(torch.promote_types(x.dtype, torch.float32)).roll(shift, 2) for x in qkv)
        bias = roll_mask(attn_mask, shift)
        output, _ = reference_attention.attention(*qkv, grids, text, *rule, bias=bias, unit=self.unit)
        output = output.roll(-shift, 2).to(query.dtype)
        return output if self.heads_first else output.transpose(1, 2)

    def attend_last(self, keys, query, key, value, attn_mask=None, **kwargs):
        """Attend from the last tokens alone, if they attend to this number of keys; others keep their attention."""
        before = key.shape[1] - query.shape[1]
        if key.shape[1] < keys:
            return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **kwargs)
        whole = torch.nn.functional.pad(query, (0, 0, 0, 0, before, 0))
        return self.attend(whole, key, value, attn_mask)[:, before:]

    def __call__(self, attn, hidden_states, *args, **kwargs):
        if not RasterProcessor.in_use:
            return self.original(attn, hidden_states, *args, **kwargs)
        attend = self.attend
        if "segments" in kwargs:
            cached = kwargs["layer_cache"].get()[0].shape[1] if kwargs["segments"] is None else 0
            attend = functools.partial(self.attend_last, cached + hidden_states.shape[1])
        with mock.patch(self.called, attend):
            return self.original(attn, hidden_states, *args, **kwargs)


def put_in_raster_order(transformer, grids, config, weight=None):
    """Make the layers of a model compute the rule densely in raster order, pooling with a weight, by default means."""
    if weight is None:
        weight = torch.full((config.down_factor,) * 2, 1 / config.down_factor**2)
    adapter = adapter_for(transformer)
    for name, layer in adapter.attention_layers(transformer).items():
        first, last = adapter.images_of(transformer, name)
        rule = grids[first:last], config, weight
        layer.set_processor(RasterProcessor(layer.processor, *rule, adapter.text_first, unit=grids[0]))


def keep_dense(module):
    """Make a module that shares layers with a transformer compute their original attention."""

    def use(in_use):
        RasterProcessor.in_use = in_use

    module.register_forward_pre_hook(lambda *_: use(False))
    module.register_forward_hook(lambda *_: use(True), always_call=True)


def in_raster_order(transformer, grids, config):
    """Return a copy with `put_in_raster_order`."""
    reference = copy.deepcopy(transformer)
    put_in_raster_order(reference, grids, config)
    return reference


def biases(mask, text):
    """Return the biases that a mask, text first, adds to scores: of text queries, and of image queries to text keys.

    The second is given as keywords of a rule, minus the bias of image keys: a constant does not change a softmax.
    """
    if mask is None:
        return None, {}
    bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    of_image = bias[:, :, -1:]
    return bias[:, :, :text], {"bias": of_image[..., :text] - of_image[..., -1:]}


class RuledProcessor(RasterProcessor):
    """An original processor with the rule of a method instead of softmax attention."""

    def attend(self, query, key, value, attn_mask=None, **kwargs):
        grid, rule, own = self.rule
        qkv = self.split(query, key, value)
        if qkv[0].shape != qkv[1].shape:  # the few tokens of an IP-Adapter
            return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **kwargs)
        text = qkv[0].shape[2] - grid[0] * grid[1]
        shift = 0 if self.text_first else text
        query, key, value = (x.roll(shift, 2) for x in qkv)
        of_text, of_image = biases(roll_mask(attn_mask, shift), text)
        output = torch.cat(
            [
                softmax(query[:, :, :text], key, value, bias=of_text).nan_to_num(),  # padding queries have no keys
                rule(query[:, :, text:], key, value, grid, own, **of_image),
            ],
            2,
        )
        output = output.roll(-shift, 2)
        return output if self.heads_first else output.transpose(1, 2)


def put_rule(transformer, grid, linearized, rule_of=None):
    """Make the layers of an original model compute the method of a linearized one densely, in raster order."""
    adapter, numbers = adapter_for(transformer), defaultdict(itertools.count)
    for name, layer in adapter.attention_layers(transformer).items():
        number = next(numbers[adapter.has_text(transformer, name), adapter.images_of(transformer, name)])
        own = linearized.get_submodule(name).processor
        rule = (rule_of or RULES[type(own.method)])(own.method, number)
        layer.set_processor(RuledProcessor(layer.processor, grid, rule, own, adapter.text_first))
    return transformer


def joined(output):
    """The only tensor of an output, or all in one."""
    parts = tree_leaves(output if isinstance(output, tuple | list) else output.sample)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def run(model, call):
    """Return the output of a transformer, or all outputs of a ControlNet in one tensor."""
    with torch.no_grad():
        return joined(model(**call, return_dict=False))


def check_pipeline(pipe, grids, draw):
    """Check that a window that covers the image gives the original pipeline's result, and a smaller one the rule's.

    Restoring gives the original pipeline's result again, bit for bit.
    """
    original, transformer = draw(), pipe.transformer
    scale = original.abs().max().item()
    pipe.transformer = in_raster_order(transformer, grids, clear.methods.Clear(3, 2))
    expected = draw()
    pipe.transformer = transformer
    clear.linearize(pipe, 40, weights=None)
    torch.testing.assert_close(draw(), original, atol=1e-5 * scale, rtol=0)
    clear.linearize(pipe, 3, 2, weights=None)
    local = draw()
    torch.testing.assert_close(local, expected, atol=1e-5 * scale, rtol=0)
    assert (local - original).abs().max() > 1e-3 * scale
    clear.restore(pipe)
    assert torch.equal(draw(), original)


def check_compiled_blocks(transformer, call):
    """Check that blocks compiled one by one, each in one graph, give the same output."""
    clear.linearize(transformer, 4, 2, weights=None)
    expected = run(transformer, call)
    torch.compiler.reset()  # compilations are counted per line of code, over all tests
    dummy_models.compile_blocks(transformer, backend="aot_eager")
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)

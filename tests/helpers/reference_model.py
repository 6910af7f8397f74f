"""CLEAR the plain way: the stock model, in raster order, with the rule as a mask in each layer's attention."""

import copy
from unittest import mock

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch.utils._pytree import tree_leaves

import clear_attn as clear
from clear_attn.models import adapter_for
from tests.helpers import reference_attention

# What each family's stock processor calls, and whether heads come before tokens there.
FLUX_ATTENTION = "diffusers.models.transformers.transformer_flux.dispatch_attention_fn", False
FLUX2_ATTENTION = "diffusers.models.transformers.transformer_flux2.dispatch_attention_fn", False
QWEN_ATTENTION = "diffusers.models.transformers.transformer_qwenimage.dispatch_attention_fn", False
SD3_ATTENTION = "diffusers.models.attention_processor.F.scaled_dot_product_attention", True
ATTENTION = {
    "Flux2Transformer2DModel": FLUX2_ATTENTION,
    "QwenImageTransformer2DModel": QWEN_ATTENTION,
    "QwenImageControlNetModel": QWEN_ATTENTION,
}


class RasterProcessor(torch.nn.Module):
    def __init__(self, stock, grids, config, weight, text_first, called, heads_first):
        super().__init__()
        self.stock, self.rule, self.text_first = stock, (grids, config, weight), text_first
        self.called, self.heads_first = called, heads_first
        self.__call__ = stock.__call__  # never called: layers read from its signature what they may pass on

    def attend(self, query, key, value, attn_mask=None, **kwargs):
        if key.shape != query.shape:  # an IP-Adapter's few tokens
            return dispatch_attention_fn(query, key, value, attn_mask=attn_mask, **kwargs)
        grids, *rule = self.rule
        qkv = query, key, value
        if not self.heads_first:
            qkv = [x.transpose(1, 2) for x in qkv]
        text = qkv[0].shape[2] - sum(height * width for height, width in grids)
        # The reference has text first.
        shift = 0 if self.text_first else text
        qkv = (x.to(torch.promote_types(x.dtype, torch.float32)).roll(shift, 2) for x in qkv)
        output, _ = reference_attention.attention(*qkv, grids, text, *rule, bias=attn_mask)
        output = output.roll(-shift, 2).to(query.dtype)
        return output if self.heads_first else output.transpose(1, 2)

    def __call__(self, *args, **kwargs):
        with mock.patch(self.called, self.attend):
            return self.stock(*args, **kwargs)


def put_in_raster_order(transformer, grids, config, weight=None):
    """Makes a stock model's layers compute the rule densely in raster order, pooling with plain means or a weight."""
    if weight is None:
        weight = torch.full((config.down_factor,) * 2, 1 / config.down_factor**2)
    text_first = adapter_for(transformer).text_first
    attention = ATTENTION.get(type(transformer).__name__, FLUX_ATTENTION if text_first else SD3_ATTENTION)
    for layer in adapter_for(transformer).attention_layers(transformer).values():
        layer.set_processor(RasterProcessor(layer.processor, grids, config, weight, text_first, *attention))


def in_raster_order(transformer, grids, config):
    """A copy that does."""
    plain = copy.deepcopy(transformer)
    put_in_raster_order(plain, grids, config)
    return plain


def run(model, call):
    """A transformer's output, or all of a ControlNet's in one tensor."""
    with torch.no_grad():
        parts = tree_leaves(model(**call, return_dict=False))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def check_pipeline(pipe, grids, draw):
    """With a window that covers the picture the stock pipeline's result, with another one the plain rule's.

    Afterwards the stock pipeline's again, bit for bit.
    """
    stock, transformer = draw(), pipe.transformer
    scale = stock.abs().max().item()
    pipe.transformer = in_raster_order(transformer, grids, clear.methods.Clear(3, 2))
    expected = draw()
    pipe.transformer = transformer
    clear.linearize(pipe, 40, weights=None)
    torch.testing.assert_close(draw(), stock, atol=1e-5 * scale, rtol=0)
    clear.linearize(pipe, 3, 2, weights=None)
    local = draw()
    torch.testing.assert_close(local, expected, atol=1e-5 * scale, rtol=0)
    assert (local - stock).abs().max() > 1e-3 * scale
    clear.restore(pipe)
    assert torch.equal(draw(), stock)


def check_compiled_blocks(transformer, call):
    """Blocks that are compiled one by one, each in one graph, give what they gave."""
    clear.linearize(transformer, 4, 2, weights=None)
    expected = run(transformer, call)
    torch.compiler.reset()  # compilations are counted for each line of code, over all tests
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(transformer, call), expected, atol=1e-5, rtol=0)

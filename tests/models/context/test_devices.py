"""A transformer on several devices: plans are on the device of each layer. The second device is meta."""

import contextlib

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

import clear_attn as clear
from clear_attn.backends import attention
from clear_attn.models import adapter_for
from clear_attn.models.context.context import ClearContext
from clear_attn.models.processors.publishing import Publishing
from tests.helpers.families import each_family
from tests.helpers.reference_model import run

META = torch.device("meta")


def move(tree):
    return tree_map_only(torch.Tensor, lambda x: x.to(META), tree)


def put_second_half_elsewhere(transformer, blocks):
    """As accelerate does for a `device_map`: modules and their inputs move, plain objects do not."""
    blocks = [*getattr(transformer, blocks), *getattr(transformer, "single_transformer_blocks", [])]
    output = ("norm_out", "proj_out", "final_layer", "all_final_layer.")
    last = [module for name, module in transformer.named_modules() if name.startswith(output) and name.count(".") < 2]
    for module in [*blocks[len(blocks) // 2 :], *last]:
        module.to(META)
        module.register_forward_pre_hook(lambda _, args, kwargs: (move(args), move(kwargs)), with_kwargs=True)


@each_family()
@pytest.mark.parametrize("factor", [1, 2])
def test_a_model_on_two_devices(family, factor, monkeypatch):
    transformer = family.transformer()
    grid = family.grid(7, 9)
    call = family.call(transformer, grid, batch=2)
    clear.linearize(transformer, 3, factor, weights=None)
    run(transformer, call)
    put_second_half_elsewhere(transformer, family.blocks)
    used, made, attend, on = [], [], attention.BACKENDS["tiled"].attend, ClearContext.on

    def record(query, key, value, plan, key_bias, scale, return_lse):
        assert plan.device == query.device == plan.tiles.mask.device
        assert key_bias is None or key_bias.device == query.device
        used.append((query.device.type, plan))
        return attend(query, key, value, plan, key_bias, scale, return_lse)

    def record_groups(self, device):
        groups = on(self, device)
        made.append((device.type, id(groups)))
        return groups

    # The meta device has no autocast in torch.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    monkeypatch.setitem(attention.BACKENDS, "tiled", attention.BACKENDS["tiled"]._replace(attend=record))
    monkeypatch.setattr(ClearContext, "on", record_groups)
    with torch.no_grad():
        for _ in range(2):
            output = transformer(**call, return_dict=False)[0]
    assert {x.device for x in tree_leaves(output)} == {META}
    # Models that do not pass keywords to their layers use an operator, which has its own kernel for the meta device.
    published = isinstance(adapter_for(transformer), Publishing)
    assert {device for device, _ in used} == ({"cpu"} if published else {"cpu", "meta"})
    assert len(set(made)) <= 4  # two calls, two devices
    plans = {(device, id(plan)) for device, plan in used}
    assert len(plans) == len({(device, plan.text_tokens) for device, plan in used})  # shared by layers and calls


def test_a_layout_has_one_copy_for_each_device():
    layout = clear.TokenLayout([(7, 9)], 5)
    elsewhere = layout.on(META)
    assert layout.on(torch.device("cpu")) is layout
    assert layout.on(META) is elsewhere
    assert elsewhere.permutation.device == META
    assert (elsewhere.grids, elsewhere.tokens) == (layout.grids, layout.tokens)

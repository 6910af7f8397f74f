import torch

from clear_attn import TokenLayout, clear_attention
from clear_attn.backends import flex
from clear_attn.backends.selection import BACKENDS
from clear_attn.methods import Clear


def test_the_block_mask_is_made_once_per_plan(monkeypatch):
    made = []
    original = flex._new_block_mask
    monkeypatch.setattr(flex, "_new_block_mask", lambda *args, **kwargs: made.append(1) or original(*args, **kwargs))
    monkeypatch.setattr(flex, "_run_compiled", lambda query, *args, **kwargs: torch.zeros_like(query))
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["flex"]._replace(attend=flex.attend_directly))
    plan = Clear(6).plan(TokenLayout([(24, 24)], 16))
    query, key, value = torch.randn(3, 1, 2, 16 + 576, 16).unbind()
    with torch.no_grad():
        for _ in range(3):
            clear_attention(query, key, value, plan, backend="flex")
    assert len(made) == 1


def test_one_outer_graph_takes_the_masks_of_several_plans(monkeypatch):
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["flex"]._replace(attend=flex.attend_directly))
    compiled = torch.compile(clear_attention, fullgraph=True, backend="eager")
    for grid in [(24, 24), (17, 40), (33, 20)]:
        plan = Clear(6).plan(TokenLayout([grid], 16))
        query, key, value = torch.randn(3, 1, 2, plan.tokens, 16).unbind()
        with torch.no_grad():
            flex.block_mask(plan, False)
            output = compiled(query, key, value, plan, backend="flex")
        expected = clear_attention(query, key, value, plan, backend="reference")
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)

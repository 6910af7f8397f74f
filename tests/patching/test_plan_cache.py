"""The cache of layouts and plans."""

import copy
import gc
import pickle
import weakref

import torch

from clear_attn.methods import Clear
from clear_attn.patching.plan_cache import LAYOUTS, PlanCache

CPU = torch.device("cpu")


def layout_of(cache, width):
    return cache.layout(((4, width),), 3, True, CPU)


def test_a_layout_is_made_once():
    cache = PlanCache()
    assert layout_of(cache, 5) is layout_of(cache, 5)
    assert layout_of(cache, 5).grids == ((4, 5),)
    others = [((4, 5),), 4, True], [((4, 5),), 3, False]
    assert all(cache.layout(*arguments, CPU) is not layout_of(cache, 5) for arguments in others)


def test_a_plan_is_made_once_per_method_and_layout():
    cache, made = PlanCache(), []

    def make(method, layout):
        made.append((method, layout))
        return object()

    layouts = [layout_of(cache, width) for width in (5, 6)]
    plans = [cache.plan(Clear(window), layout, make) for _ in range(2) for layout in layouts for window in (3, 4)]
    assert plans[:4] == plans[4:]
    assert made == [(Clear(window), layout) for layout in layouts for window in (3, 4)]


def test_the_least_recently_used_layout_is_dropped_with_its_plans():
    cache = PlanCache()
    plan = weakref.ref(cache.plan(Clear(3), layout_of(cache, 1), Clear.plan))
    kept = layout_of(cache, 2)
    for width in range(3, 3 + 2 * LAYOUTS):
        layout_of(cache, width)
        assert layout_of(cache, 2) is kept
    gc.collect()
    assert plan() is None
    assert len(cache._layouts) == LAYOUTS


def test_copies_start_empty():
    cache = PlanCache()
    layout = layout_of(cache, 5)
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert layout_of(twin, 5) is not layout
    assert layout_of(cache, 5) is layout

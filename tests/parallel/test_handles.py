"""Objects that a compiled graph refers to by number."""

import gc

import pytest

from clear_attn.parallel.handles import recall, remember


class Thing:
    pass


def test_an_object_is_found_by_its_handle_while_it_lives():
    first, second = Thing(), Thing()
    handles = remember(first), remember(second)
    assert recall(handles[0]) is first
    assert recall(handles[1]) is second
    del first
    gc.collect()
    with pytest.raises(KeyError):
        recall(handles[0])
    assert recall(handles[1]) is second

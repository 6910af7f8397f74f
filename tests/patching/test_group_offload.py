"""Group offload with a stream keeps values in RAM, and drops what is on the GPU. The GPU is a copy on the CPU here."""

import pytest
import torch

import clear_attn as clear
from clear_attn.models._diffusers import hooks_in
from tests.helpers.placement import by_group_in_a_stream
from tests.helpers.reference_model import run
from tests.helpers.snapshots import layers_of, train

GRID = (11, 20)


@pytest.fixture
def models(family, tmp_path, monkeypatch):
    """A transformer, the same one with group offload, and a folder of distilled weights with pooled keys."""
    plain, offloaded, student = (family.transformer() for _ in range(3))
    clear.linearize(student, window=5, down_factor=2, weights=None)
    train(student)
    clear.save_pretrained(student, tmp_path / "distilled")
    return plain, by_group_in_a_stream(offloaded, monkeypatch), tmp_path / "distilled"


def held_in_ram(transformer):
    """Return how many tensors the groups of a transformer keep."""
    return sum(len(hook.group.cpu_param_dict) for hook in hooks_in(transformer) if hasattr(hook, "group"))


def same_images(family, ours, theirs):
    call = family.call(theirs, GRID)
    return torch.equal(run(ours, call), run(theirs, call))


def test_a_forward_has_the_new_weights_and_the_processors_parameters(family, models):
    plain, offloaded, folder = models
    before = held_in_ram(offloaded)
    for change in (lambda each: clear.linearize(each, weights=folder), clear.restore) * 2:
        change(plain)
        change(offloaded)
        assert same_images(family, offloaded, plain)
    assert held_in_ram(offloaded) == before


def test_restored_after_an_interrupt_that_left_weights_on_the_gpu(family, models):
    plain, offloaded, folder = models
    clear.linearize(offloaded, weights=folder)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = [*layers_of(offloaded).values()][-1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(offloaded, family.call(offloaded, GRID))
    handle.remove()
    clear.restore(offloaded)
    assert same_images(family, offloaded, plain)
